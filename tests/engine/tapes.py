"""CUDA graphs in the place of which operators are taped: they run again on the very tensors that they ran on.

As on a GPU, no Python runs in a replay, results are written over the last ones, what lies between is anything before,
and reading a value or asking for random states during the capture raises.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maml_lightning.engine import cuda_graphs
from maml_lightning.engine.cuda_graphs import Captured


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Notes operators, and which of their results are in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor], list[bool]]] = []
        self.made: dict[int, Tensor] = {}
        self.read: dict[int, Tensor] = {}  # that were not made meanwhile

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {memory(tensor): tensor for tensor in tensors_of((args, kwargs))}
        self.read |= {place: tensor for place, tensor in given.items() if place not in self.made}
        results = tensors_of(result)
        fresh = [memory(tensor) not in given for tensor in results]
        self.made |= {memory(tensor): tensor for tensor, new in zip(results, fresh, strict=True) if new}
        self.calls.append((func, args, kwargs, results, fresh))
        return result

    def replay(self) -> None:
        for tensor in self.made.values():
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            whole.fill_(float("nan") if tensor.is_floating_point() else 1)
        for func, args, kwargs, results, fresh in self.calls:
            for new, old, own in zip(tensors_of(func(*args, **kwargs)), results, fresh, strict=True):
                if own:
                    old.copy_(new)


class Tapes:
    """Captures by tape; ``all`` are those of this test."""

    all: ClassVar[list["Tapes"]] = []
    fails = ""

    def __init__(self, device: torch.device) -> None:
        self.tapes: list[Tape] = []
        self.replays = self.released = 0
        Tapes.all.append(self)

    def capture(self, function: Callable[[], list[Tensor]]) -> Captured:
        tape = Tape()
        with pytest.MonkeyPatch.context() as patch, tape:
            patch.setattr(torch, "get_rng_state", _forbidden)
            patch.setattr(torch, "set_rng_state", _forbidden)
            if Tapes.fails:
                raise RuntimeError(Tapes.fails)
            outputs = function()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        def release() -> None:
            self.released += 1
            outputs.clear()
            vars(tape).clear()

        return Captured(outputs, replay, release)


def _forbidden(*_: Any) -> None:
    raise RuntimeError("cannot be asked during a capture")


def replays() -> int:
    """How often a tape was replayed in this test."""
    return sum(tapes.replays for tapes in Tapes.all)


def captured() -> int:
    """How many captures were made in this test."""
    return sum(len(tapes.tapes) for tapes in Tapes.all)


@pytest.fixture
def tapes(monkeypatch):
    """Captures on the CPU and on torch's meta device."""
    monkeypatch.setattr(Tapes, "all", [])
    monkeypatch.setattr(Tapes, "fails", "")
    monkeypatch.setattr(cuda_graphs, "CAPTURERS", cuda_graphs.CAPTURERS)
    for device in ("cpu", "meta"):
        monkeypatch.setitem(cuda_graphs.CAPTURERS, device, Tapes)
    return Tapes
