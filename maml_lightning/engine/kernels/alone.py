"""A task by itself: PyTorch's own operators, but for those without a second derivative.

Those are replaced where PyTorch looks them up each time that it calls them, so that they are replaced for any network,
however it comes to call them. A ``TorchFunctionMode`` does the same, and takes time at each call of any operator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from maml_lightning.engine.kernels.activations import hardsigmoid
from maml_lightning.engine.kernels.embedding import embedding_bag_of_offsets
from maml_lightning.engine.kernels.normalization import instance_norm
from maml_lightning.engine.kernels.recurrence import recurrences

_instance_norm_of_torch = torch.instance_norm


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Torch's own; but with running statistics older versions round them, in place, where they do not update them."""
    if use_input_stats or running_mean is None:
        statistics = (running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled)
        return _instance_norm_of_torch(input, weight, bias, *statistics)
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _off_the_cpu(own: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own on a CPU; elsewhere the kernel: cuDNN's recurrent layers have no second derivative."""

    def run(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (own if input.device.type == "cpu" else kernel)(input, *args, **kwargs)

    return run


_IN_TORCH: dict[str, Callable[..., Any]] = {
    "embedding_bag": embedding_bag_of_offsets,
    "instance_norm": _instance_norm,
    **{own.__name__: _off_the_cpu(own, kernel) for own, kernel in recurrences().items()},
}
# Where PyTorch looks them up: `nn.functional` in `torch` and `torch._C._nn`, recurrent layers in `torch._VF`.
_PLACES: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch._C._nn, "hardsigmoid", hardsigmoid),
    (torch._C._nn, "hardsigmoid_", lambda input: hardsigmoid(input, inplace=True)),
    *((owner, name, kernel) for owner in (torch, torch._VF) for name, kernel in _IN_TORCH.items()),
]
_OWN = [getattr(owner, name) for owner, name, _ in _PLACES]
_lock, _active = Lock(), 0


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """While active, every operator that PyTorch's functions and layers call has a second derivative, if any has one.

    In all threads: those of backward passes run checkpointed layers anew.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(change: int) -> None:
    global _active
    with _lock:
        before, _active = _active, _active + change
        if not (before and _active):
            for (owner, name, kernel), own in zip(_PLACES, _OWN, strict=True):
                setattr(owner, name, kernel if _active else own)
