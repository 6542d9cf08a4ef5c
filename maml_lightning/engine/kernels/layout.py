"""What all kernels share: where the task dimension lies, the order of dimensions in memory, and what fits a cache."""

from collections.abc import Sequence
from typing import Any, List  # noqa: UP035

from torch import Tensor

Ints = List[int]  # noqa: UP006  # torch 2.6 reads no list[int] in an operator's signature

# Above this many bytes one task's patches or activations leave a core's cache: torch's own kernels, task by task, are
# then faster than batched products of patches and than passes over all tasks (benchmarks).
CACHE_BYTES = 2**20

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)  # [B, C, H, W] to channels-last, and back
HWIO, OIHW = (2, 3, 1, 0), (3, 2, 0, 1)  # weights [O, C, kh, kw] to [kh, kw, C, O], and back


def spans(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> Ints:
    """How many windows there are along each dimension."""
    each = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each]


def leaves_cache(tensor: Tensor, elements: int) -> bool:
    """Whether ``elements`` numbers like those of ``tensor`` leave a core's cache; a GPU has no such limit."""
    return tensor.device.type == "cpu" and elements * tensor.element_size() > CACHE_BYTES


def tasks_first(tensor: Tensor, in_dim: int | None, tasks: int, order: tuple[int, ...] = ()) -> Tensor:
    """With a leading task dimension, and the others permuted to ``order``."""
    if in_dim != 0:
        tensor = tensor.expand(tasks, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)
    return permute_each(tensor, order) if order else tensor


def permute_each(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """``[T, ...]`` with the dimensions of each task permuted to ``order``."""
    return tensor.permute(0, *(dim + 1 for dim in order))


def all_tasks_first(info: Any, in_dims: tuple, *tensors: Tensor) -> list[Tensor]:
    """The arguments of a ``vmap`` rule, each contiguous with a leading task dimension."""
    return [tasks_first(t, dim, info.batch_size).contiguous() for t, dim in zip(tensors, in_dims, strict=False)]


def sum_over_tasks(value: Tensor) -> Tensor:
    """``value.sum(0)``, read in the order of its memory: torch's own is 20 times slower on a permuted weight."""
    if len(value) == 1:
        return value[0]
    order = sorted(range(1, value.dim()), key=value.stride, reverse=True)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(0, *order).sum(0).permute(inverse)


def kernel_layout(weight: Tensor) -> Tensor:
    """A convolution's weight ``[O, C, kh, kw]`` with the memory of the matrix ``[kh*kw*C, O]``.

    Values and shape stay; all that is computed from it elementwise keeps the layout. Others pass unchanged.
    """
    return weight.permute(HWIO).contiguous().permute(OIHW) if weight.dim() == 4 else weight


def repeated(value: Tensor, tasks: int) -> Tensor:
    """``[tasks, ...]``, a copy for each task, with the memory layout of ``value``."""
    shape = (tasks, *value.shape)
    return value.new_empty_strided(shape, (max(value.numel(), 1), *value.stride())).copy_(value.expand(shape))
