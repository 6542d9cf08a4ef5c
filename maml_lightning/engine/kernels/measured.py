"""Which of several ways of computing the same is fastest on a GPU, measured once for each shape.

All ways are exact, so that processes and runs may choose different ones: gradients are averaged over processes, and
differ by rounding alone. Where torch is asked to be deterministic nothing is timed.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml_lightning.devices import synchronize
from maml_lightning.engine.memory import shared_bytes

MEASURED = {"cuda"}  # kinds of devices; on a CPU what fits its caches is known
REPEATS = 5
_TIE = 1.1  # times as slow as the fastest: the one that needs least memory is taken
_chosen: dict[Hashable, str] = {}


class Way(NamedTuple):
    """A way to compute: of two tensors, and the bytes that it takes beside its arguments and results."""

    run: Callable[[Tensor, Tensor], Tensor]
    workspace: int


def fastest(what: Hashable, ways: Mapping[str, Way], a: Tensor, b: Tensor) -> str:
    """The name of the way that is fastest for tensors like ``a`` and ``b``, which may be without values.

    Those that need more memory than a meta-batch may take, and those that raise, are out; where all are, it is the one
    that needs least.

    Args:
        what: the operator and its settings.
        ways: by name.
        a: an operand.
        b: the other one.
    """
    like = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in (a, b))
    timed = not torch.are_deterministic_algorithms_enabled()
    key = (what, like, tuple(ways), timed)
    if key not in _chosen:
        # In a thread of its own: what records, vectorizes or differentiates here is not active there.
        with ThreadPoolExecutor(1) as thread:
            _chosen[key] = thread.submit(_choose, ways, like, timed).result()
    return _chosen[key]


def _choose(ways: Mapping[str, Way], like: Any, timed: bool) -> str:
    device, smallest = like[0][2], min(ways, key=lambda name: ways[name].workspace)
    budget = shared_bytes(device)
    fitting = [name for name, way in ways.items() if way.workspace <= budget]
    if not timed or len(fitting) < 2:
        return fitting[0] if fitting else smallest
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    try:
        operands = [torch.rand(shape, dtype=dtype, device=device, generator=generator) for shape, dtype, _ in like]
    except torch.OutOfMemoryError:
        return smallest
    with torch.no_grad():
        taken = {name: _seconds(ways[name].run, operands, device) for name in fitting}
    least = min(taken.values())
    near = [name for name in fitting if taken[name] <= _TIE * least]
    return min(near, key=lambda name: ways[name].workspace)


def _seconds(run: Callable[..., Tensor], operands: list[Tensor], device: torch.device) -> float:
    """The median of some calls' wall time; infinite where one raises."""
    try:
        run(*operands)  # chooses and loads its own kernels
        times = []
        for _ in range(REPEATS):
            synchronize(device)
            start = time.perf_counter()
            run(*operands)
            synchronize(device)
            times.append(time.perf_counter() - start)
    except RuntimeError:  # of memory, or of a kernel that there is not
        return float("inf")
    return statistics.median(times)
