"""Episodes: the tensors of a batch of tasks, and the check of their shapes."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from maml_lightning.errors import SettingError


class Episode(NamedTuple):
    """A batch of ``T`` few-shot tasks: what to adapt on (support) and what to be judged on (query).

    Classification targets are ``int64`` in ``[0, N)``; regression targets are floats shaped like the network's
    output. All four tensors carry the task dimension first.

    Args:
        support_inputs: ``[T, N*K, ...]``, images ``[T, N*K, C, H, W]``.
        support_targets: ``[T, N*K]`` for classification, ``[T, K, D]`` for regression.
        query_inputs: ``[T, N*Q, ...]``.
        query_targets: ``[T, N*Q]`` or ``[T, Q, D]``.
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor

    def check(self) -> "Episode":
        """Return the episode itself if its shapes agree.

        Raises:
            SettingError: the task counts differ, or inputs and targets of a set differ in number.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._asdict().items()}
        if len({shape[:1] for shape in shapes.values()}) != 1 or not self.support_inputs.shape[:1]:
            raise SettingError(
                f"An Episode's tensors must share the task dimension T; got {shapes}. Add it with [None]."
            )
        for part in ("support", "query"):
            inputs, targets = shapes[f"{part}_inputs"], shapes[f"{part}_targets"]
            if inputs[:2] != targets[:2] or len(inputs) < 2:
                raise SettingError(
                    f"An Episode needs one target per {part} input: got {part}_inputs {inputs} and "
                    f"{part}_targets {targets}; both must begin with [T, examples]."
                )
        return self

    @property
    def tasks(self) -> int:
        """``T``, the number of tasks in the batch."""
        return self.support_inputs.shape[0]


class Inputs(NamedTuple):
    """What pictures a network was trained on; kept in its checkpoints.

    Args:
        ways: classes that it tells apart.
        channels: 1 or 3.
        side: edge in pixels.
        background: what most of the border is, in [0, 1], of drawings on a plain ground; None of photos.
    """

    ways: int
    channels: Literal[1, 3]
    side: int
    background: float | None

    @classmethod
    def of(cls, images: Tensor, ways: int) -> "Inputs | None":
        """Those of images ``[..., C, H, W]`` in [0, 1]; None where they are no square pictures."""
        if images.dim() < 4 or images.shape[-3] not in (1, 3) or images.shape[-1] != images.shape[-2]:
            return None
        border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1).float()
        ground = border.median().item()
        plain = ((border - ground).abs() < 0.1).float().mean().item() > 0.8
        channels = cast(Literal[1, 3], images.shape[-3])
        return cls(ways, channels, images.shape[-1], ground if plain else None)
