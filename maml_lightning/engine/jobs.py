"""One call of a function of one task over all tasks of a chunk: vectorized, or in a loop."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.library import custom_op
from torch.utils import _pytree as pytree

from maml_lightning.engine import loop
from maml_lightning.engine.failures import raising_what_is_caught
from maml_lightning.engine.kernels.layout import tasks_first
from maml_lightning.engine.state import Bound, RandomState, State
from maml_lightning.engine.trials import same


@custom_op("maml_lightning::cotangent", mutates_args=())
def _cotangent(output: Tensor, anchor: Tensor) -> Tensor:
    """In a recording: a tensor like an output, dense and with a dimension over tasks as the ``anchor`` has it."""
    return torch.empty_like(output)


@_cotangent.register_fake
def _(output: Tensor, anchor: Tensor) -> Tensor:
    return torch.empty_like(output)


@_cotangent.register_vmap
def _(info: Any, in_dims: tuple, output: Tensor, anchor: Tensor) -> tuple[Tensor, int]:
    return COTANGENT(tasks_first(output, in_dims[0], info.batch_size), anchor), 0


COTANGENT = torch.ops.maml_lightning.cotangent.default


class Job(NamedTuple):
    """One call of a function of one task: over all tasks, with its pullback or without.

    Args:
        function: of one task, and the objects that it depends on.
        in_dims: of ``args``, as for ``vmap``.
        args: its arguments; with a pullback the first is what it is differentiated with respect to.
        pullback: whether the pullback is wanted, too.
        recompute: keep only the arguments for it, unless it runs in a loop.
    """

    function: Bound
    in_dims: tuple
    args: tuple
    pullback: bool
    recompute: bool

    @property
    def family(self) -> tuple[Hashable, ...]:
        """The same for calls that differ in the signature of the arguments alone."""
        return self.function.function, self.function.state.number, self.pullback, self.in_dims

    def on(self, objects: Any) -> "Job":
        """The same with other objects."""
        state = State(objects, self.function.state.key, self.function.state.number)
        return self._replace(function=state.bind(self.function.function))

    def vectorized(self) -> Callable:
        """The function, vectorized over tasks."""
        return _vmap(self.function, self.in_dims)

    def joint(self) -> Callable:
        """``joint(cotangents, primal, *args) -> (outputs, gradients)``, vectorized over tasks."""

        # Differentiated inside of vmap: outside, normalization layers have a silently wrong second derivative
        # (functorch #534).
        def joint(cotangents: Any, primal: Any, *args: Any) -> tuple:
            outputs, pullback, *_ = vjp(lambda primal: self.function(primal, *args), primal)
            return outputs, pullback(cotangents)[0]

        return _vmap(joint, (0, *self.in_dims))

    def joint_of_any(self) -> Callable:
        """``joint`` of the arguments alone, for a recording: the cotangents are results of :data:`COTANGENT`."""
        return lambda *args: self._joint_of(COTANGENT)(self._batched(args), *args)

    def untraced_joint(self) -> tuple[Any, Any]:
        """Outputs, and gradients with the outputs for cotangents, by ``vmap``."""
        return self._joint_of(lambda output, _: output)(self._batched(self.args), *self.args)

    def _joint_of(self, cotangent: Callable[[Tensor, Tensor], Tensor]) -> Callable:
        """``joint`` of an anchor and the arguments, with what ``cotangent`` makes of each output and the anchor."""

        def joint(anchor: Tensor, primal: Any, *args: Any) -> tuple:
            outputs, pullback, *_ = vjp(lambda primal: self.function(primal, *args), primal)
            return outputs, pullback(pytree.tree_map(lambda output: cotangent(output, anchor), outputs))[0]

        return _vmap(joint, (0, *self.in_dims))

    def _batched(self, args: tuple) -> Tensor:
        """One of the arguments that has a dimension over tasks."""
        leaves, spec = pytree.tree_flatten(args)
        dims: Any = pytree._broadcast_to_and_flatten(self.in_dims, spec)
        return next(leaf for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)

    def tasks(self) -> int:
        """How many there are, ``T``."""
        return len(self._batched(self.args))

    def last_task(self) -> "Job":
        """The same of the last task alone."""

        def last(leaf: Tensor, dim: int | None) -> Tensor:
            return leaf if dim is None else leaf[-1:]

        leaves, spec = pytree.tree_flatten(self.args)
        dims: Any = pytree._broadcast_to_and_flatten(self.in_dims, spec)
        return self._replace(args=pytree.tree_unflatten(list(map(last, leaves, dims)), spec), recompute=False)

    def copied(self) -> "Job":
        """The same with copies of its arguments, which it may write to."""
        return self._replace(args=pytree.tree_map(torch.clone, self.args))

    def changes(self, original: "Job") -> str:
        """What this, made by :meth:`copied`, changed since then, in words that follow "it"; empty for nothing.

        Of the first argument and of what all tasks share, which are parameters, values alone count: ``max_norm`` of an
        embedding writes to them where none is too large.
        """
        own, others = _of_each_task(self), _of_each_task(original)
        written = any(tensor._version for tensor in own)  # a copy's version is 0; `.data` and NumPy leave it so
        if written or not all(map(same, own, others)):
            return "writes to its inputs or targets as it runs"
        kept = all(map(same, pytree.tree_leaves(self.args), pytree.tree_leaves(original.args)))
        return "" if kept else "writes to its parameters as it runs"

    def in_loop(self) -> tuple[Any, Callable | None]:
        """Outputs and pullback, by a loop over tasks; nothing is recomputed, which would repeat effects."""
        if not self.pullback:
            return loop.call(self.function, self.in_dims, self.args), None
        return loop.vjp(self.function, self.in_dims, self.args[0], self.args[1:])

    def untraced(self) -> tuple[Any, Callable | None]:
        """Outputs and pullback, by ``vmap``."""
        pullback = recomputed_pullback(self, lambda cotangents: self.joint()(cotangents, *self.args)[1])
        return self.vectorized()(*self.args), pullback if self.pullback else None

    def device(self) -> torch.device:
        """Where it runs."""
        return pytree.tree_leaves(self.args)[0].device


def _of_each_task(job: Job) -> list[Tensor]:
    leaves, spec = pytree.tree_flatten(job.args[1:])
    dims: Any = pytree._broadcast_to_and_flatten(job.in_dims[1:], spec)
    return [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]


def recomputed_pullback(job: Job, pullback: Callable) -> Callable:
    """A pullback that computes the function once more, with the random numbers that are drawn after this call."""
    random_state = RandomState(job.device())

    @torch.no_grad()
    def recomputed(cotangents: Any) -> Any:
        with random_state.restored():
            return pullback(cotangents)

    return recomputed


def _vmap(function: Callable, in_dims: tuple) -> Callable:
    vectorized = vmap(function, in_dims, randomness="different")

    def quiet(*args: Any) -> Any:
        # An operator that vmap does not know runs task by task: slower, and the user can do nothing about it.
        with warnings.catch_warnings(), raising_what_is_caught():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return vectorized(*args)

    return quiet
