"""Bags of embeddings as embeddings and their sum: torch's own operator has no second derivative.

A bag's sum is a matrix product: row ``b`` of the matrix has the weights of the examples in bag ``b``, 0 for others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maml_lightning.devices import has_values

_OF_TORCH = torch.embedding_bag
_MODES = ("sum", "mean", "max")


def embedding_bag_of_offsets(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Any, ...]:
    """``torch.embedding_bag``, which ``torch.nn.functional.embedding_bag`` calls with one row of indices.

    Bags of one size are what that one was called with: the largest of each is taken of those alone.
    """
    size, rest = divmod(len(indices), max(len(offsets), 1))
    even = size and not rest and not include_last_offset and has_values(offsets)
    even = even and torch.equal(offsets, size * torch.arange(len(offsets)).to(offsets))
    if scale_grad_by_freq or (mode == 2 and not even):
        others = (sparse, per_sample_weights, include_last_offset, padding_idx)
        return _OF_TORCH(weight, indices, offsets, scale_grad_by_freq, mode, *others)
    kinds: dict[str, Any] = {"mode": _MODES[mode], "padding_idx": padding_idx}
    if not even:
        kinds |= {"offsets": offsets, "include_last_offset": include_last_offset}
        return embedding_bag(indices, weight, per_sample_weights=per_sample_weights, **kinds), None, None, None
    rows = None if per_sample_weights is None else per_sample_weights.view(-1, size)
    return embedding_bag(indices.view(-1, size), weight, per_sample_weights=rows, **kinds), None, None, None


def embedding_bag(  # Long: torch's arguments
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding_bag``, for bags of one size ``[B, L]`` and for sums and means of others.

    The largest of each of bags with offsets, embeddings renormalized in place and gradients scaled by frequency are
    left to torch.
    """
    others = max_norm is not None or scale_grad_by_freq or (offsets is not None and mode == "max")
    if others or (offsets is None) != (input.dim() == 2):
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    values = F.embedding(input, weight)
    counted = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % len(weight)
    if mode == "max":
        largest = values.masked_fill(~counted[..., None], -torch.inf).amax(-2)
        return torch.where(counted.any(-1, keepdim=True), largest, 0)
    shares = counted.to(values.dtype) if per_sample_weights is None else counted * per_sample_weights
    if offsets is not None:
        starts = offsets[:-1] if include_last_offset else offsets
        at = torch.arange(len(input), device=input.device)
        ends = torch.cat([offsets[1:], offsets.new_full((0 if include_last_offset else 1,), len(input))])
        inside = (at >= starts[:, None]) & (at < ends[:, None])
        counted, shares = inside & counted, inside * shares
        sums = shares @ values
    else:
        sums = (shares[:, None] @ values)[:, 0]
    return sums if mode == "sum" else sums / counted.sum(-1, keepdim=True).clamp(min=1)
