"""What stays the same from one inner step to the next is computed once: the features of a body that does not adapt."""

from typing import Any

import torch
from torch import Tensor, fx

from maml_lightning.engine.graphs import depending_on, is_mutable, output_of, subgraph
from maml_lightning.engine.kernels.convolution import CONVOLUTIONS

_aten = torch.ops.aten
_COSTLY = {
    op.default for op in (_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.convolution, _aten.embedding)
} | CONVOLUTIONS


class Hoisted:
    """A graph that computes the part of it which depends on unchanged inputs only where they change.

    Which inputs change is seen at its second call, by identity. Copies nothing; :meth:`release` drops what is kept.

    Args:
        graph: of tensors, without random numbers in the part that is kept.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self._first: tuple[Tensor, ...] | None = None
        self._parts: tuple[fx.GraphModule, fx.GraphModule, list[int]] | None = None
        self._decided = False
        self.release()

    def release(self) -> None:
        """Forget the results that are kept."""
        self._inputs: list[Tensor] = []
        self._results: list[Tensor] = []
        self._first = None if self._decided else self._first

    def __call__(self, *inputs: Tensor) -> Any:
        """The graph's results."""
        if not self._decided:
            if self._first is None:
                self._first = inputs
            else:
                changed = {i for i, pair in enumerate(zip(self._first, inputs, strict=True)) if pair[0] is not pair[1]}
                self._parts, self._decided, self._first = _parted(self.graph, changed), True, None
        if self._parts is None:
            return self.graph(*inputs)
        fixed, rest, kept = self._parts
        own = [inputs[i] for i in kept]
        if not self._inputs or any(a is not b for a, b in zip(own, self._inputs, strict=True)):
            self._inputs, self._results = own, fixed(*own)
        return rest(*self._results, *inputs)


def _parted(graph: fx.GraphModule, changed: set[int]) -> tuple[fx.GraphModule, fx.GraphModule, list[int]] | None:
    """``fixed(*unchanged inputs) -> results``, ``rest(*results, *inputs)``, and which inputs are unchanged.

    None where that saves no costly operator, or where the graph writes in place.
    """
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    if any(is_mutable(node) for node in nodes):
        return None
    drawn = [n for n in nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    dependent = depending_on([*(inputs[i] for i in changed), *drawn], nodes)
    fixed = [node for node in nodes if node.op != "placeholder" and node not in dependent]
    if not any(node.target in _COSTLY for node in fixed):
        return None
    results: Any = output_of(graph.graph)
    needed = [n for n in fixed if any(user in dependent or user is results for user in n.users)]
    kept = [i for i in range(len(inputs)) if i not in changed]
    rest = [node for node in nodes if node in dependent and node.op != "placeholder"]
    return (
        subgraph(fixed, [inputs[i] for i in kept], needed, graph),
        subgraph(rest, [*needed, *inputs], results.args[0], graph),
        kept,
    )
