"""A task by itself: PyTorch's own operators, but for those without a second derivative.

Those are replaced where PyTorch looks them up each time that it calls them, so that they are replaced for any network,
however it comes to call them. A ``TorchFunctionMode`` does the same, and takes time at each call of any operator.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maml_lightning.engine.kernels.activations import hardsigmoid
from maml_lightning.engine.kernels.embedding import embedding_bag_of_offsets
from maml_lightning.engine.kernels.normalization import instance_norm
from maml_lightning.engine.kernels.recurrence import recurrences
from maml_lightning.engine.kernels.swapping import swapping
from maml_lightning.engine.kernels.weight_normalization import weight_norm

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
    "_weight_norm": weight_norm,
    **{own.__name__: _off_the_cpu(own, kernel) for own, kernel in recurrences().items()},
}
# Where PyTorch looks them up: `nn.functional` in `torch` and `torch._C._nn`, recurrent layers in `torch._VF`.
_PLACES: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch._C._nn, "hardsigmoid", hardsigmoid),
    (torch._C._nn, "hardsigmoid_", lambda input: hardsigmoid(input, inplace=True)),
    # By its path: in `torch.nn.utils` a function has the module's name.
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", weight_norm),
    *((owner, name, kernel) for owner in (torch, torch._VF) for name, kernel in _IN_TORCH.items()),
]
# While active, every operator that PyTorch's functions and layers call has a second derivative, if any has one. In all
# threads: those of backward passes run checkpointed layers anew.
twice_differentiable = swapping(_PLACES)
