"""Episodes: the tensors of a batch of tasks, and what images a network was trained on."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from maml_lightning.deprecation import old_names
from maml_lightning.devices import has_values
from maml_lightning.errors import SettingError
from maml_lightning.structures import describe, leaves, plain

ROUNDING = 1e-3  # of images in [0, 1]


class Episode(NamedTuple):
    """A batch of ``T`` few-shot tasks: a support set to adapt on and a query set to evaluate on.

    Classification targets are ``int64`` in ``[0, N)``; regression targets are floats shaped like the network's
    output. Each part is a tensor, or a tuple, list or dict of tensors; all tensors carry the task dimension first.
    The network is called as ``net(x)``, ``net(*x)`` of a tuple or list, ``net(**x)`` of a dict.

    Args:
        support_inputs: ``[T, N*K, ...]``, images ``[T, N*K, C, H, W]``.
        support_targets: ``[T, N*K]`` for classification, ``[T, K, D]`` for regression, ``[T, K, H, W]`` for pixels.
        query_inputs: ``[T, N*Q, ...]``.
        query_targets: ``[T, N*Q]``, ``[T, Q, D]`` or ``[T, Q, H, W]``.
    """

    support_inputs: Any
    support_targets: Any
    query_inputs: Any
    query_targets: Any

    @classmethod
    def of(cls, batch: Any) -> "Episode":
        """The episode that a batch of a data loader is.

        Raises:
            SettingError: it has not four parts, in a tuple or list.
        """
        if not isinstance(batch, tuple | list) or len(batch) != len(cls._fields):
            size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            # Lightning takes a list as loaders, and draws a batch of each.
            of_list = isinstance(batch, list) and len(batch) == 1
            advice = " Where fit got a list, give it DataLoader(list, batch_size=None)." if of_list else ""
            raise SettingError(
                f"A batch of the data loader is a {type(batch).__name__}{size}; give an Episode, or a tuple of its "
                f"parts: {', '.join(cls._fields)}.{advice}"
            )
        return cls(*batch)

    def check(self) -> "Episode":
        """Return the episode if its shapes agree.

        Raises:
            SettingError: a part holds anything but dense tensors, there is no task or no query example, or the numbers
                of tasks differ, or those of inputs and targets in a set that are one tensor each.
        """
        episode = Episode(*map(plain, self))
        tensors = {name: leaves(part) for name, part in episode._asdict().items()}
        for name, found in tensors.items():
            if not found or not all(isinstance(leaf, Tensor) for leaf in found):
                others = {type(leaf).__name__ for leaf in found if not isinstance(leaf, Tensor)} or {"nothing"}
                raise SettingError(
                    f"An Episode's {name} must be a tensor, or a tuple or dict of tensors; it holds "
                    f"{', '.join(sorted(others))}. Make tensors of it, or leave it out."
                )
            if any(leaf.is_nested or leaf.is_quantized or leaf.layout is not torch.strided for leaf in found):
                raise SettingError(
                    f"An Episode's {name} must be dense tensors; it holds a sparse, nested or quantized one. Pad it or "
                    "use .to_dense(), and let the network do the rest, such as x.to_sparse()."
                )
        sizes = {leaf.shape[:1] for found in tensors.values() for leaf in found}
        if len(sizes) != 1 or not all(sizes):
            shapes = ", ".join(f"{name} {describe(part)}" for name, part in episode._asdict().items())
            raise SettingError(
                f"An Episode's tensors must share the task dimension T; got {shapes}. Add it with [None]."
            )
        if not all(leaf.numel() for leaf in tensors["query_targets"]):
            raise SettingError(
                f"An Episode needs at least one task, and a query example in each: got query_targets "
                f"{describe(episode.query_targets)}. Leave empty batches out."
            )
        for part in ("support", "query"):
            inputs, targets = (getattr(episode, f"{part}_{kind}") for kind in ("inputs", "targets"))
            if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
                continue  # whose tensors may be of the task as a whole
            if inputs.shape[:2] != targets.shape[:2] or inputs.dim() < 2:
                raise SettingError(
                    f"An Episode needs one target per {part} input: got {part}_inputs {list(inputs.shape)} and "
                    f"{part}_targets {list(targets.shape)}; both must begin with [T, examples]."
                )
        return episode

    @property
    def tasks(self) -> int:
        """``T``, the number of tasks in the batch."""
        return len(leaves(self.support_inputs)[0])

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return leaves(self.support_inputs)[0].device


class InputSpec(NamedTuple):
    """What images a network was trained on; saved in its checkpoints under ``inputs``.

    Args:
        ways: classes that it classifies among.
        channels: 1 or 3.
        side: edge length in pixels.
        background: for drawings, the value of their plain background in [0, 1]; None for photos.
        mean: subtracted from each channel of images in [0, 1], one value or one for each; None for none.
        std: by which each channel is divided then.
    """

    ways: int
    channels: Literal[1, 3]
    side: int
    background: float | None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def normalized(self, images: Tensor) -> Tensor:
        """Images ``[..., C, H, W]`` in [0, 1] as the network takes them."""
        if self.mean is not None:
            images = images - images.new_tensor(self.mean).view(-1, 1, 1)
        return images if self.std is None else images / images.new_tensor(self.std).view(-1, 1, 1)

    @classmethod
    def of_episode(
        cls,
        episode: Episode,
        ways: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> "InputSpec | None":
        """The specification of an episode's pictures, of one class each; None of anything else.

        Args:
            episode: whose pictures are normalized with ``mean`` and ``std``.
            ways: classes that the network classifies among; None counts those of the episode.
            mean, std: see `InputSpec`.
        """
        targets = episode.query_targets
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() != 2:
            return None
        if not has_values(targets):
            return None
        images = episode.query_inputs
        if isinstance(images, Tensor) and std is not None:
            images = images * images.new_tensor(std).view(-1, 1, 1)
        if isinstance(images, Tensor) and mean is not None:
            images = images + images.new_tensor(mean).view(-1, 1, 1)
        found = cls.of(images, int(targets.max()) + 1 if ways is None else ways)
        return None if found is None else found._replace(mean=mean, std=std)

    @classmethod
    def of(cls, images: Any, ways: int) -> "InputSpec | None":
        """The specification of images ``[..., C, H, W]`` in [0, 1]; None if the inputs are not square images."""
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 4:
            return None
        if images.shape[-3] not in (1, 3) or images.shape[-1] != images.shape[-2]:
            return None
        border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1).float()
        background = border.median().item()
        plain = ((border - background).abs() < 0.1).float().mean().item() > 0.8
        channels = cast(Literal[1, 3], images.shape[-3])
        if images.min() < -ROUNDING or images.max() > 1 + ROUNDING:  # normalized, and nothing says how
            return None
        return cls(ways, channels, images.shape[-1], min(max(background, 0.0), 1.0) if plain else None)


__getattr__ = old_names(__name__, {"Inputs": f"{__name__}.InputSpec"})
