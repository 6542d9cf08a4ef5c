"""CUDA graphs: the operators that a function launches on a GPU, launched together from then on.

A graph remembers addresses, not Python: it reads the tensors that were read when it was captured, and writes its
results over those of its last replay. What it cannot hold is found in a run before the capture (:class:`Watch`): random
numbers, values that Python reads, and tensors of another device, whose memory nobody keeps.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Captured(NamedTuple):
    """A captured function of no arguments.

    Args:
        outputs: its tensors, which each replay overwrites.
        replay: runs it once more, on what the memory of its inputs holds now.
        release: frees its memory; no replay afterwards.
    """

    outputs: list[Tensor]
    replay: Callable[[], None]
    release: Callable[[], None]


class Capturer(Protocol):
    """Captures functions on one device."""

    def __init__(self, device: torch.device) -> None: ...

    def capture(self, function: Callable[[], list[Tensor]]) -> Captured:
        """Run a function of no arguments, which gives tensors, and keep its operators.

        Raises:
            Exception: it cannot be captured; streams and random numbers are as before.
        """


class CudaGraphs:
    """Captures functions as CUDA graphs, whose memory is shared: results are copied before another one is replayed.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], list[Tensor]]) -> Captured:
        """See :class:`Capturer`."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a capture is under way already")
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[self.device.index or 0]
        random_numbers = generator.clone_state()
        try:
            # thread_local: what loaders pin and NCCL asks in other threads meanwhile is no error.
            own = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
            with torch.cuda.device(self.device), own:
                outputs = function()
        except BaseException:
            torch.cuda.set_stream(stream)  # some versions of torch leave the capture's
            generator.graphsafe_set_state(random_numbers)  # the other state may wait for the capture's end
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                torch._C._cuda_endAllocateToPool(stream.device_index, self.pool)
            torch.cuda.synchronize(self.device)
            raise

        def release() -> None:
            torch.cuda.synchronize(self.device)  # a replay may run
            outputs.clear()
            graph.reset()

        return Captured(outputs, graph.replay, release)


# What captures on each kind of device; elsewhere nothing is captured.
CAPTURERS: dict[str, type[Capturer]] = {"cuda": CudaGraphs}

_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MASKS = (torch.bool, torch.uint8)


class Watch(TorchDispatchMode):
    """While active, notes why the operators that run cannot be captured.

    Args:
        device: of all tensors.

    Attributes:
        why: the first reason, in words that follow "it"; empty for none.
        operators: how many ran.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.why, self.operators = device, "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        self.why = self.why or self._reason(func, args, (args, kwargs, result))
        return result

    def _reason(self, func: Any, args: tuple, values: Any) -> str:
        tags, copies = set(getattr(func, "tags", ())), "copy" in func._schema.name
        if torch.Tag.nondeterministic_seeded in tags:
            return f"draws random numbers ({func})"
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        others = [tensor for tensor in tensors if tensor.device != self.device]
        # A scalar on the CPU is a constant of the launch, unless it is copied: nobody keeps its memory.
        if any(t.dim() or t.device.type != "cpu" for t in others) or (len({t.device for t in tensors}) > 1 and copies):
            return f"has a tensor on {others[0].device} ({func})"
        if func._schema.name.startswith(("aten::index", "aten::_index_put", "aten::_unsafe_index")):
            masks = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor) and leaf.dtype in _MASKS]
            return f"reads a mask ({func})" if masks else ""
        return f"reads values ({func})" if tags & _NEEDS_VALUES else ""
