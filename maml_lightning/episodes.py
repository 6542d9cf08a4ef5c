"""Episodes: the tensors of a batch of tasks, and what images a network was trained on."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from maml_lightning.deprecation import old_names
from maml_lightning.errors import SettingError


class Episode(NamedTuple):
    """A batch of ``T`` few-shot tasks: a support set to adapt on and a query set to evaluate on.

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
        """Return the episode if its shapes agree.

        Raises:
            SettingError: the numbers of tasks differ, or those of inputs and targets in a set.
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


class InputSpec(NamedTuple):
    """What images a network was trained on; saved in its checkpoints under ``inputs``.

    Args:
        ways: classes that it classifies among.
        channels: 1 or 3.
        side: edge length in pixels.
        background: for drawings, the value of their plain background in [0, 1]; None for photos.
    """

    ways: int
    channels: Literal[1, 3]
    side: int
    background: float | None

    @classmethod
    def of(cls, images: Tensor, ways: int) -> "InputSpec | None":
        """The specification of images ``[..., C, H, W]`` in [0, 1]; None if the inputs are not square images."""
        if images.dim() < 4 or images.shape[-3] not in (1, 3) or images.shape[-1] != images.shape[-2]:
            return None
        border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1).float()
        background = border.median().item()
        plain = ((border - background).abs() < 0.1).float().mean().item() > 0.8
        channels = cast(Literal[1, 3], images.shape[-3])
        if images.min() < 0 or images.max() > 1:  # normalized, as pictures to predict would not be
            return None
        return cls(ways, channels, images.shape[-1], background if plain else None)


__getattr__ = old_names(__name__, {"Inputs": f"{__name__}.InputSpec"})
