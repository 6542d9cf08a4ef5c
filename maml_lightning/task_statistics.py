"""Normalization statistics of a task's support set: which examples of a batch they are of, and TaskNorm.

To evaluate queries with the statistics of the support set, the network runs once over support and query examples
together, and batch normalization takes its statistics from the support part alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PARTS: list[tuple[int, int]] = []  # support examples and all examples of the batch that runs, innermost last


@contextmanager
def statistics_of_first(support: int, examples: int) -> Iterator[None]:
    """While active, normalization statistics are those of the first ``support`` of a batch of ``examples``."""
    _PARTS.append((support, examples))
    try:
        yield
    finally:
        _PARTS.pop()


def statistics_part(batch: Tensor) -> Tensor:
    """The examples of ``[B, ...]`` whose statistics count: all of them outside of :func:`statistics_of_first`.

    A network may split each example into several, one after the other.

    Raises:
        ValueError: the batch is not of so many parts of each example.
    """
    if not _PARTS:
        return batch
    support, examples = _PARTS[-1]
    if len(batch) % examples:
        raise ValueError(
            f"model.query_statistics support needs normalization layers that keep examples apart, but one got a batch "
            f"of {len(batch)} for {examples} examples; use model.query_statistics batch."
        )
    return batch[: support * (len(batch) // examples)]


class TaskNorm(nn.Module):
    """TaskNorm-I: a learned blend of the support set's statistics and each example's own (Bronskill et al. 2020).

    With the moments ``m, v`` of a channel over the support set and ``m', v'`` over one example, it normalizes with::

        alpha = sigmoid(scale * |support| + offset)                             (equation 8)
        mean = alpha m + (1 - alpha) m'                                         (equation 6)
        var = alpha (v + (m - mean)^2) + (1 - alpha) (v' + (m' - mean)^2)       (equation 7)

    Queries take the support set's moments with ``query_statistics`` support, else those of their own batch.

    Args:
        channels: ``C``.
        eps: added to the variance.

    Example:
        >>> TaskNorm(3)(torch.rand(5, 3, 4, 4)).shape
        torch.Size([5, 3, 4, 4])
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    examples: Tensor | None

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.scale, self.offset = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.eps = eps
        for name in ("running_mean", "running_var", "examples"):  # of a support set that is kept
            self.register_buffer(name, None)

    def keep_statistics(self, support: Tensor) -> None:
        """Use the moments of these examples ``[N*K, C, ...]`` in evaluation mode from now on."""
        self.running_var, self.running_mean = _moments(support, (0, *range(2, support.dim())))
        self.examples = self.running_mean.new_tensor(len(support))

    def forward(self, x: Tensor) -> Tensor:
        """Normalized ``[B, C, ...]`` of ``[B, C, ...]``."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.running_mean is None or self.running_var is None or self.examples is None or self.training:
            part = statistics_part(wide)
            var, mean = _moments(part, (0, *range(2, x.dim())))
            examples: Tensor | int = len(part)
        else:
            var, mean, examples = self.running_var, self.running_mean, self.examples
        alpha = torch.sigmoid(self.scale * examples + self.offset)
        own_var, own_mean = _moments(wide, tuple(range(2, x.dim()))) if x.dim() > 2 else (torch.zeros_like(wide), wide)
        blend = alpha * mean + (1 - alpha) * own_mean
        spread = alpha * (var + (mean - blend).square()) + (1 - alpha) * (own_var + (own_mean - blend).square())
        scale = self.weight * (spread + self.eps).rsqrt()
        shape = (*scale.shape, *[1] * (x.dim() - 2))
        return (wide * scale.view(shape) + (self.bias - blend * scale).view(shape)).to(x.dtype)


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Variance and mean over ``dims``, of elementary operations: others are differentiated wrongly under vmap."""
    mean = x.mean(dims, keepdim=True)
    return (x - mean).square().mean(dims), mean.squeeze(dims)
