"""The operators of ``normalization.py`` in Triton, two kernels each, in float32.

Per task there are ``M`` rows of ``C`` channels, ``[T, ..., C]``. The first kernel leaves sums of parts of the rows
(splits), the second adds them up and does the rest. Importing needs Triton.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # that a program reads at a time
_CHANNELS = 64  # of a program, at most
_SPLITS = 32  # at most, of at least twice as many rows as are read at a time
_PROGRAMS = 264  # about two for each processor of a large GPU


@triton.jit
def _tile(first, end, channels, part, block_m: tl.constexpr, block_c: tl.constexpr):
    """Offsets of a tile of one task, and which of its elements there are."""
    m = first + tl.arange(0, block_m)
    c = part * block_c + tl.arange(0, block_c)
    return m[:, None] * channels + c[None, :], (m[:, None] < end) & (c[None, :] < channels)


@triton.jit
def _channels(channels, part, block_c: tl.constexpr):
    c = part * block_c + tl.arange(0, block_c)
    return c, c < channels


@triton.jit
def _of_splits(sums, task, which, kinds, splits, channels, part, block_s: tl.constexpr, block_c: tl.constexpr):
    """What each split left of one kind in ``sums [T, kinds, splits, C]``, zero where there is no split."""
    s = tl.arange(0, block_s)
    c, inside = _channels(channels, part, block_c)
    offsets = ((task * kinds + which) * splits + s[:, None]) * channels + c[None, :]
    return tl.load(sums + offsets, (s[:, None] < splits) & inside[None, :], 0.0)


@triton.jit
def _keep(sums, value, task, which, kinds, split, splits, channels, part, block_c: tl.constexpr):
    c, inside = _channels(channels, part, block_c)
    tl.store(sums + ((task * kinds + which) * splits + split) * channels + c, value, inside)


@triton.jit(do_not_specialize=["rows", "each", "splits"])
def _moments(x, sums, rows, channels, each, splits, block_m: tl.constexpr, block_c: tl.constexpr):
    """Of each split the mean of its rows, and the sum of squares around it."""
    task, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x += task.to(tl.int64) * rows * channels
    start, end = split * each, tl.minimum(split * each + each, rows)
    total = tl.zeros([block_c], tl.float32)
    for first in range(start, end, block_m):
        offsets, inside = _tile(first, end, channels, part, block_m, block_c)
        total += tl.sum(tl.load(x + offsets, inside, 0.0), 0)
    mean = total / (end - start)
    squares = tl.zeros([block_c], tl.float32)
    for first in range(start, end, block_m):
        offsets, inside = _tile(first, end, channels, part, block_m, block_c)
        centered = tl.where(inside, tl.load(x + offsets, inside, 0.0) - mean[None, :], 0.0)
        squares += tl.sum(centered * centered, 0)
    _keep(sums, mean, task, 0, 2, split, splits, channels, part, block_c)
    _keep(sums, squares, task, 1, 2, split, splits, channels, part, block_c)


@triton.jit(do_not_specialize=["rows", "each", "splits"])
def _standardize(
    x,
    sums,
    n,
    r,
    eps,
    rows,
    channels,
    each,
    splits,
    block_m: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """``n = (x - mean) r`` and ``r``, from the moments of all splits (Chan, Golub and LeVeque 1983)."""
    task, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x += task.to(tl.int64) * rows * channels
    n += task.to(tl.int64) * rows * channels
    means = _of_splits(sums, task, 0, 2, splits, channels, part, block_s, block_c)
    squares = _of_splits(sums, task, 1, 2, splits, channels, part, block_s, block_c)
    s = tl.arange(0, block_s)
    counts = tl.maximum(tl.minimum(each, rows - s * each), 0).to(tl.float32)[:, None]
    mean = tl.sum(counts * means, 0) / rows
    off = means - mean[None, :]
    scale = 1.0 / tl.sqrt((tl.sum(squares, 0) + tl.sum(counts * off * off, 0)) / rows + eps)
    start, end = split * each, tl.minimum(split * each + each, rows)
    for first in range(start, end, block_m):
        offsets, inside = _tile(first, end, channels, part, block_m, block_c)
        tl.store(n + offsets, (tl.load(x + offsets, inside, 0.0) - mean[None, :]) * scale[None, :], inside)
    if split == 0:
        c, there = _channels(channels, part, block_c)
        tl.store(r + task * channels + c, scale, there)


@triton.jit(do_not_specialize=["rows", "each", "splits"])
def _products(
    a,
    b,
    d,
    sums,
    rows,
    channels,
    each,
    splits,
    kinds: tl.constexpr,
    block_m: tl.constexpr,
    block_c: tl.constexpr,
):
    """Of each split the sums of ``a``, of ``a b`` and, of three kinds, of ``a d``."""
    task, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_task = task.to(tl.int64) * rows * channels
    start, end = split * each, tl.minimum(split * each + each, rows)
    sum_a = tl.zeros([block_c], tl.float32)
    sum_ab = tl.zeros([block_c], tl.float32)
    sum_ad = tl.zeros([block_c], tl.float32)
    for first in range(start, end, block_m):
        offsets, inside = _tile(first, end, channels, part, block_m, block_c)
        value = tl.load(a + of_task + offsets, inside, 0.0)
        sum_a += tl.sum(value, 0)
        sum_ab += tl.sum(value * tl.load(b + of_task + offsets, inside, 0.0), 0)
        if kinds == 3:
            sum_ad += tl.sum(value * tl.load(d + of_task + offsets, inside, 0.0), 0)
    _keep(sums, sum_a, task, 0, kinds, split, splits, channels, part, block_c)
    _keep(sums, sum_ab, task, 1, kinds, split, splits, channels, part, block_c)
    if kinds == 3:
        _keep(sums, sum_ad, task, 2, kinds, split, splits, channels, part, block_c)


@triton.jit(do_not_specialize=["rows", "each", "splits"])
def _project(
    g,
    n,
    scale,
    sums,
    out,
    sum_gn,
    sum_g,
    rows,
    channels,
    each,
    splits,
    block_m: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """``scale * (g - mean(g) - n mean(g n))``, and both sums."""
    task, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_task = task.to(tl.int64) * rows * channels
    total = tl.sum(_of_splits(sums, task, 0, 2, splits, channels, part, block_s, block_c), 0)
    total_n = tl.sum(_of_splits(sums, task, 1, 2, splits, channels, part, block_s, block_c), 0)
    c, there = _channels(channels, part, block_c)
    factor = tl.load(scale + task * channels + c, there, 0.0)
    mean, along_n = total / rows, total_n / rows
    start, end = split * each, tl.minimum(split * each + each, rows)
    for first in range(start, end, block_m):
        offsets, inside = _tile(first, end, channels, part, block_m, block_c)
        value = tl.load(g + of_task + offsets, inside, 0.0) - mean[None, :]
        value -= tl.load(n + of_task + offsets, inside, 0.0) * along_n[None, :]
        tl.store(out + of_task + offsets, value * factor[None, :], inside)
    if split == 0:
        tl.store(sum_gn + task * channels + c, total_n, there)
        tl.store(sum_g + task * channels + c, total, there)


@triton.jit(do_not_specialize=["rows", "each", "splits"])
def _second_derivative(  # Long: an argument for each tensor
    u,
    v,
    w,
    g,
    weight,
    n,
    r,
    sum_gn,
    sum_g,
    sums,
    g_bar,
    x_bar,
    weight_bar,
    rows,
    channels,
    each,
    splits,
    block_m: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
):
    """See ``second_derivative`` in ``normalization.py``, whose names these are."""
    task, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_task = task.to(tl.int64) * rows * channels
    mean_u = tl.sum(_of_splits(sums, task, 0, 3, splits, channels, part, block_s, block_c), 0) / rows
    mean_un = tl.sum(_of_splits(sums, task, 1, 3, splits, channels, part, block_s, block_c), 0) / rows
    mean_ug = tl.sum(_of_splits(sums, task, 2, 3, splits, channels, part, block_s, block_c), 0) / rows
    c, there = _channels(channels, part, block_c)
    each_channel = task * channels + c
    v_c = tl.load(v + each_channel, there, 0.0)
    w_c = tl.load(w + each_channel, there, 0.0)
    r_c = tl.load(r + each_channel, there, 0.0)
    mean_gn = tl.load(sum_gn + each_channel, there, 0.0) / rows
    mean_g = tl.load(sum_g + each_channel, there, 0.0) / rows
    scale = tl.load(weight + each_channel, there, 0.0) * r_c
    mean_ujg = r_c * (mean_ug - mean_u * mean_g - mean_un * mean_gn)
    along_g, along_u = r_c * (v_c - scale * mean_un), -r_c * scale * mean_gn
    along_n = -scale * mean_ujg - along_g * mean_gn - along_u * mean_un
    of_g, along_gn = w_c - scale * mean_u, v_c - scale * mean_un
    of_x = -along_g * mean_g - along_u * mean_u
    start, end = split * each, tl.minimum(split * each + each, rows)
    for first in range(start, end, block_m):
        offsets, inside = _tile(first, end, channels, part, block_m, block_c)
        offsets += of_task
        n_t, u_t = tl.load(n + offsets, inside, 0.0), tl.load(u + offsets, inside, 0.0)
        g_t = tl.load(g + offsets, inside, 0.0)
        to_g = of_g[None, :] + n_t * along_gn[None, :] + u_t * scale[None, :]
        to_x = of_x[None, :] + n_t * along_n[None, :] + g_t * along_g[None, :] + u_t * along_u[None, :]
        tl.store(g_bar + offsets, to_g, inside)
        tl.store(x_bar + offsets, to_x, inside)
    if split == 0:
        tl.store(weight_bar + each_channel, rows * mean_ujg, there)


class _Grid(NamedTuple):
    """How the rows and channels of all tasks are given to programs."""

    programs: tuple[int, int, int]
    shape: tuple[int, int, int, int]
    blocks: dict[str, int]


def _grid(x: Tensor) -> _Grid:
    tasks, channels, rows = x.shape[0], x.shape[-1], math.prod(x.shape[1:-1])
    block_c = min(_CHANNELS, triton.next_power_of_2(channels))
    parts = triton.cdiv(channels, block_c)
    splits = max(min(_SPLITS, triton.cdiv(_PROGRAMS, tasks * parts), rows // (2 * _ROWS)), 1)
    each = triton.cdiv(triton.cdiv(rows, splits), _ROWS) * _ROWS
    splits = triton.cdiv(rows, each)
    return _Grid((tasks, parts, splits), (rows, channels, each, splits), {"block_m": _ROWS, "block_c": block_c})


def _sums(grid: _Grid, kinds: int, like: Tensor) -> Tensor:
    return like.new_empty(like.shape[0], kinds, grid.programs[2], like.shape[-1])


def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``standardize`` of ``normalization.py``."""
    x, grid = x.contiguous(), _grid(x)
    sums, n, r = _sums(grid, 2, x), torch.empty_like(x), x.new_empty(x.shape[0], x.shape[-1])
    _moments[grid.programs](x, sums, *grid.shape, **grid.blocks)
    _standardize[grid.programs](x, sums, n, r, eps, *grid.shape, **grid.blocks, block_s=_SPLITS)
    return n, r


def project(g: Tensor, n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``project`` of ``normalization.py``."""
    (g, n, scale), grid = (tensor.contiguous() for tensor in (g, n, scale)), _grid(g)
    sums, results = _sums(grid, 2, g), (torch.empty_like(g), torch.empty_like(scale), torch.empty_like(scale))
    _products[grid.programs](g, n, n, sums, *grid.shape, kinds=2, **grid.blocks)
    _project[grid.programs](g, n, scale, sums, *results, *grid.shape, **grid.blocks, block_s=_SPLITS)
    return results


def second_derivative(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``second_derivative`` of ``normalization.py``."""
    u, v, w, g, weight, n, r, sum_gn, sum_g = (tensor.contiguous() for tensor in tensors)
    grid = _grid(u)
    sums, results = _sums(grid, 3, u), (torch.empty_like(u), torch.empty_like(u), torch.empty_like(v))
    _products[grid.programs](u, n, g, sums, *grid.shape, kinds=3, **grid.blocks)
    given = (u, v, w, g, weight, n, r, sum_gn, sum_g)
    _second_derivative[grid.programs](*given, sums, *results, *grid.shape, **grid.blocks, block_s=_SPLITS)
    return results
