"""Whether what a fast way of running computes is what a loop over tasks computes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from maml_lightning.devices import autocast_dtype, has_values, widest
from maml_lightning.engine.failures import reason_of
from maml_lightning.engine.jobs import Job
from maml_lightning.engine.state import RandomState

# Relative differences that rounding explains, of all tensors together; of one tensor it is ten times as much.
_ROUNDING = {torch.float64: 2e-7, torch.complex128: 2e-7, torch.float32: 1e-2, torch.complex64: 1e-2}
_HALF = 0.2
# Rounding grows in second derivatives: those of the last inner step of a ResNet12 in float32 differ by 2 %.
_OF_PULLBACK = 4.0
_SIGNS = 3  # draws of other signs, for the case that some cancel, too


def disagreement(results: Any, expected: Any, share: float = 1.0, scales: Sequence[Any] = ()) -> str:
    """In which way the results of the last task are not the expected ones, in a few words; empty where they are.

    Tensors with values that are not finite are left out. Each is measured by those beside it (in the same dict): the
    gradients to an optimizer's state may be millions of times larger than those to parameters.

    Args:
        results: a pytree of tensors ``[T, ...]``.
        expected: the same ``[1, ...]``.
        share: of the differences that rounding explains, how much is accepted.
        scales: pytrees like ``expected``; differences are relative to the largest of these and of ``expected``.
    """
    groups: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
    leaves, _ = pytree.tree_flatten_with_path(expected)
    others = map(pytree.tree_leaves, scales)
    for result, (path, value), *scale in zip(pytree.tree_leaves(results), leaves, *others, strict=True):
        if result.shape[1:] != value.shape[1:] or not _same_type(result, value):
            return f"gives {list(result.shape[1:])} {result.dtype}, not {list(value.shape[1:])} {value.dtype}"
        if (value.is_floating_point() or value.is_complex()) and has_values(value) and value.isfinite().all():
            size = torch.stack([_norm(tensor) for tensor in (value, *scale)]).max()
            groups.setdefault(path[:-1], []).append((result[-1:], value, size))
    pairs = [pair for group in groups.values() for pair in group]
    if not pairs:
        return ""
    tolerance = share * max(_tolerance(value) for _, value, _ in pairs)
    whole = torch.stack([size for _, _, size in pairs]).norm()
    # What rounding leaves of a tensor that is zero, and no division by zero.
    rounded = 10 * max(torch.finfo(value.dtype).eps for _, value, _ in pairs) / tolerance * whole
    rounded = rounded.clamp_min(torch.finfo(rounded.dtype).tiny)
    differences = [_difference(group, rounded) for group in groups.values()]
    relative, each = (max(values) for values in zip(*differences, strict=True))
    if relative <= tolerance and each <= 10 * tolerance:
        return ""
    return f"it differs from a loop over tasks by {max(relative, each):.1g} of the gradient or output"


def _difference(pairs: list[tuple[Tensor, Tensor, Tensor]], rounded: Tensor) -> tuple[float, float]:
    """The relative difference of all tensors together, and the largest of one."""
    errors = torch.stack([_norm(result - value) for result, value, _ in pairs])
    sizes = torch.stack([size for _, _, size in pairs])
    size = sizes.norm()
    return (errors.norm() / (size + rounded)).item(), (errors / (sizes + size / 100 + rounded)).max().item()


def _same_type(result: Tensor, value: Tensor) -> bool:
    """Under autocast a layer may be several operators for a chunk of tasks, of which some run in float32."""
    if autocast_dtype(value.device.type) is not None and result.is_floating_point():
        return value.is_floating_point()
    return result.dtype == value.dtype


def _norm(value: Tensor) -> Tensor:
    return value.abs().to(widest(value.device)).norm()


def _tolerance(value: Tensor) -> float:
    rounded = autocast_dtype(value.device.type) is not None or (value.dtype == torch.float32 and _is_tf32(value.device))
    return _HALF if rounded else _ROUNDING.get(value.dtype, _HALF)


def _is_tf32(device: torch.device) -> bool:
    """Whether products of float32 may be rounded as those of half precision: convolutions are so by torch's default."""
    return device.type == "cuda" and (
        torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    )


def pullback_disagreement(gradients: Any, reference: Callable[[Any], Any], cotangents: Any) -> str:
    """In which way gradients are not those of the last task by the loop, in a few words; empty where they are.

    A gradient may be what large terms leave that cancel, such as that to a learned inner learning rate: rounding of the
    terms explains any relative difference then. Cotangents of other signs show how large the terms are.

    Args:
        gradients: a pytree of tensors ``[T, ...]``.
        reference: the pullback of the last task.
        cotangents: of the outputs ``[T, ...]``.
    """
    last = pytree.tree_map(lambda cotangent: cotangent[-1:], cotangents)
    expected = reference(last)
    if not disagreement(gradients, expected, _OF_PULLBACK):
        return ""
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are

    def other_signs(cotangent: Tensor) -> Tensor:
        signs = torch.randint(2, cotangent.shape, generator=generator) * 2 - 1
        return cotangent * signs.to(cotangent)

    scales = [reference(pytree.tree_map(other_signs, last)) for _ in range(_SIGNS)]
    return disagreement(gradients, expected, _OF_PULLBACK, scales)


def untraced_disagreement(job: Job) -> str:
    """In which way a job of one task that draws random numbers, vectorized, is not what a loop computes with the same.

    Empty where it is the same.
    """
    before = RandomState(job.device())
    try:
        with _DrawnInOrder():
            expected, reference = job.in_loop()
            before.restore()
            if reference is None:
                return disagreement(job.untraced()[0], expected)
            outputs, gradients = job.untraced_joint()
            return disagreement(outputs, expected) or disagreement(gradients, reference(outputs))
    except Exception as error:
        return reason_of(error)


class _DrawnInOrder(TorchDispatchMode):
    """Random numbers are drawn in the order of dimensions.

    A loop otherwise fills a permuted tensor in the order of its memory, ``vmap`` in that of dimensions.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        ordered = pytree.tree_map_only(Tensor, Tensor.contiguous, args)
        result = func(*ordered, **(kwargs or {}))
        for argument, value, written in zip(func._schema.arguments, args, ordered, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and value is not written:
                value.copy_(written)
                result = value if result is written else result
        return result
