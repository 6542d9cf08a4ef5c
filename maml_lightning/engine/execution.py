"""How functions of one task run over all tasks of a chunk: the fastest way that gives what a loop over tasks gives.

There are three ways, tried in this order. ``traced``: a graph that is vectorized over tasks, recorded once and
replayed. ``vectorized``: the function itself under ``vmap``. ``loop``: each task by itself, differentiated by autograd
like any training loop; it runs whatever PyTorch runs. What cannot run in one way runs in the next. The first time,
the last task also runs in the loop, and a way whose results differ is not taken.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_lightning.engine import loop
from maml_lightning.engine.agreement import disagreement, pullback_disagreement, untraced_disagreement
from maml_lightning.engine.differentiation import by_autograd
from maml_lightning.engine.failures import attempt, naming_what_has_no_derivative, reason_of
from maml_lightning.engine.fingerprints import fingerprint, needs_loop
from maml_lightning.engine.graphs import structure
from maml_lightning.engine.hoisting import Hoisted
from maml_lightning.engine.jobs import Job, recomputed_pullback
from maml_lightning.engine.memory import memory_of
from maml_lightning.engine.state import RandomState, State, bound
from maml_lightning.engine.states import MAX_STATES, WINDOW, Signatures, States
from maml_lightning.engine.tracing import TracedPair, quiet, signature, traced_call, traced_pair
from maml_lightning.engine.trials import Trial
from maml_lightning.errors import SettingError

log = logging.getLogger(__name__)
MAX_GRAPHS = 64  # so many graphs are kept; inputs of ever new shapes run untraced
# Without a graph, fewer tasks are faster in a loop than under vmap, which takes its time at each operator (issue 23).
FEW = 12

Execution = Literal["auto", "traced", "vectorized", "loop"]
WAYS: tuple[Literal["traced", "vectorized", "loop"], ...] = ("traced", "vectorized", "loop")
TRACED, VECTORIZED, LOOP = range(3)


class Executor:
    """Runs functions of pytrees of tensors over tasks; see the head of this file. Copies and pickles begin anew.

    Args:
        execution: auto takes the first way that works and says once in one line which; the others are one way, and
            raise where it does not work.
        compile: hand the graphs to ``torch.compile`` (inductor).
    """

    def __init__(self, execution: Execution = "auto", compile: bool = False) -> None:
        self.execution, self.compile = execution, compile
        # Since they were last set: bytes that pullbacks keep; whether all runs replayed graphs checked before.
        self.kept_bytes, self.settled = 0, True
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[tuple, Any] = {}
        self._signatures: defaultdict[tuple, Signatures] = defaultdict(Signatures)  # of each family of calls
        self._states = States(self._forget_state)
        self._checked: set[tuple] = set()  # graphs and families of calls that agree with the loop
        self._examined: set[Hashable] = set()  # networks whose effects are known
        self._random: set[Hashable] = set()  # networks that draw random numbers
        self._lowest: dict[Hashable, int] = {}  # the way that a network was found to need
        self._reasons: dict[Hashable, str] = {}  # why
        self._said: set[str] = set()

    def _forget_state(self, number: int) -> None:
        """Drop the graphs of a state; the second part of a :attr:`Job.family` is its number."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[1] != number}
        for family in [family for family in self._signatures if family[1] == number]:
            del self._signatures[family]
        self._checked = {key for key in self._checked if key[1] != number}

    def __getstate__(self) -> dict[str, Any]:
        return {"execution": self.execution, "compile": self.compile, "kept_bytes": 0, "settled": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def state(self, objects: tuple, tasks: int = FEW) -> State:
        """The state that ``objects`` are in now, to run for at most so many tasks: while it lasts, graphs are valid."""
        state = State(objects, None, 0)
        if self._way(state, tasks) == LOOP and (self.execution == "loop" or self.knows(state)):
            return State(objects, None, None)  # nothing is replayed
        key = fingerprint(objects)
        if (number := self._states.number(key)) is None:
            why = f"its attributes changed in more than {MAX_STATES} of {WINDOW} steps"
            self._say(f"The network runs without a recorded graph, which is slower: {why}")
        return State(objects, key, number)

    def release(self) -> None:
        """Forget what inner steps share: the tensors that they took may change from here on."""
        for graph in self._graphs.values():
            if isinstance(graph.forward, Hoisted):
                graph.forward.release()

    def knows(self, state: State) -> bool:
        """Whether it is known what running the network has for effects."""
        return state.network in self._examined

    def way(self, state: State, tasks: int = FEW) -> str:
        """How functions of these objects run now over so many tasks: traced, vectorized or loop."""
        return WAYS[self._way(state, tasks)]

    def saved_bytes(self, function: Callable, in_dims: tuple, *args: Any) -> int:
        """Bytes that the backward pass through ``function`` of the first task needs, beside its arguments."""
        job = Job(bound(function), in_dims, args, pullback=True, recompute=False)
        return self._try(job, lambda job: loop.saved_bytes(job.function, job.in_dims, job.args))[0] or 0

    def tried(self, function: Callable, in_dims: tuple, *args: Any) -> Any:
        """``vmap(function, in_dims)(*args)`` of copies, so that nothing has happened; None where it cannot run so."""
        job = Job(bound(function), in_dims, args, pullback=False, recompute=False)
        return self._try(job, lambda job: job.in_loop()[0])[0]

    def __call__(self, function: Callable, in_dims: tuple, *args: Any) -> Any:
        """``vmap(function, in_dims)(*args)``, without a graph for autograd."""
        return self._run(Job(bound(function), in_dims, args, pullback=False, recompute=False))[0]

    def vjp(
        self, function: Callable, in_dims: tuple, primal: Any, *args: Any, recompute: bool = False
    ) -> tuple[Any, Callable]:
        """``vmap`` of ``function(primal, *args)``, with its pullback to ``primal``, task by task.

        Args:
            function: of one task; returns a pytree of tensors.
            in_dims: of ``(primal, *args)``, 0 or None for each or for parts of it.
            primal: what it is differentiated with respect to.
            args: its other arguments.
            recompute: keep only the arguments, and recompute the rest in the pullback.

        Returns:
            the outputs, and ``pullback(cotangents) -> gradients``, all with a leading task dimension.
        """
        outputs, pullback = self._run(Job(bound(function), in_dims, (primal, *args), True, recompute))
        assert pullback is not None
        return outputs, pullback

    @torch.no_grad()
    def _run(self, job: Job) -> tuple[Any, Callable | None]:
        state = job.function.state
        if self._way(state) == LOOP:
            return self._looped(job)
        leaves, spec = pytree.tree_flatten(job.args)
        family = (*job.family, structure(spec))
        key = (*family, *signature(leaves))
        pays = self._signatures[family].pays(key, state.time, job.device())
        before, compared, reference = RandomState(job.device()), False, None
        while (way := self._way(state)) != LOOP:
            traced = way == TRACED and (self._is_traced(key, pays) or self.execution == "traced")
            if not traced and not job.recompute and self._is_faster_in_loop(state, job.tasks()):
                break
            checked = key if traced else family
            if checked not in self._checked and not compared:
                compared, reference = True, self._last_task(job)
                continue
            try:
                outputs, pullback, effect = self._replay(job, key, leaves) if traced else self._untraced(job, key)
                why = effect or (reference and disagreement(outputs, reference[0]))
            except Exception as error:  # whatever a user's network raises where it cannot run this way
                effect, why = "", reason_of(error)
            if not why and traced and compared and fingerprint(state.objects) != state.key:
                effect = why = "it changes its own attributes or variables as it runs"
            if not why:
                self.settled &= traced and not compared
                self._checked.add(checked)
                self._announce(state, way)
                if pullback is None or (of_pullback := (*checked, "pullback")) in self._checked:
                    return outputs, pullback
                if compared and reference is None:  # nothing to compare with
                    self._checked.add(of_pullback)
                    return outputs, pullback
                return outputs, self._checking(job, pullback, of_pullback)
            before.restore()
            self._lower(state, LOOP if effect else way + 1, why)
        return self._looped(job)

    def _way(self, state: State, tasks: int = FEW) -> int:
        if self.execution != "auto":
            return WAYS.index(self.execution)
        lowest = self._lowest.get(state.network, TRACED)
        if state.number is None:
            lowest = max(lowest, VECTORIZED)
        return LOOP if lowest == VECTORIZED and tasks < FEW else lowest

    def _is_faster_in_loop(self, state: State, tasks: int) -> bool:
        """Whether to loop over tasks, which have no graph, or none yet.

        Random layers would draw other numbers than with a graph, and recurrent ones have kernels that vectorize.
        """
        if self._way(state) != TRACED:
            return self._way(state, tasks) == LOOP
        few = self.execution == "auto" and tasks < FEW
        return few and state.network not in self._random and not state.is_recurrent()

    def _lower(self, state: State, way: int, why: str) -> None:
        """Take a slower way from now on."""
        if self.execution == "loop":
            return
        if self.execution != "auto":
            raise SettingError(
                f"model.execution {self.execution} does not work for this network: {why}; leave it out, or set it to "
                f"{'loop' if way == LOOP else 'vectorized or loop'}."
            )
        self._lowest[state.network] = max(way, self._lowest.get(state.network, TRACED))
        self._reasons.setdefault(state.network, why)

    def _announce(self, state: State, way: int) -> None:
        """Say once in which slower way a network runs, and why."""
        if (why := self._reasons.get(state.network)) is not None:
            how = "task by task" if way == LOOP else "without a recorded graph"
            self._say(f"The network runs {how}, which is slower: {why}")

    def _say(self, line: str) -> None:
        if line not in self._said:
            log.warning("%s", line)
            self._said.add(line)

    def _is_traced(self, key: Hashable, pays: bool) -> bool:
        if key in self._graphs or not pays:
            return key in self._graphs
        if len(self._graphs) == MAX_GRAPHS:
            self._say(
                f"The network runs without a recorded graph, which is slower, for shapes beyond the first {MAX_GRAPHS}."
            )
            return False
        return True

    def _last_task(self, job: Job) -> tuple[Any, Callable | None] | None:
        """Outputs and pullback of the last task by the loop, to compare with; None where they cannot be compared.

        Random numbers differ from task to task. With the same ones, the last task alone has to be the same vectorized.
        """
        last, before = job.last_task(), RandomState(job.device())
        result, deterministic = self._try(last, lambda job: job.in_loop())
        if deterministic or result is None or self._way(job.function.state) == LOOP:
            return result if deterministic else None
        with before.restored():
            if why := untraced_disagreement(last):
                self._lower(job.function.state, LOOP, why)
        return None

    def _try(self, job: Job, run: Callable[[Job], Any]) -> tuple[Any, bool]:
        """What ``run`` gives of copies of the objects, None where it cannot run; and whether it is the same each time.

        Takes the loop from now on where running has effects, which have to happen as in a loop.
        """
        state, before, result = job.function.state, RandomState(job.device()), None
        self._examined.add(state.network)
        if why := needs_loop(state.objects):
            self._lower(state, LOOP, why)
            return None, False
        try:
            trial = Trial(state.objects)
        except Exception as error:  # whatever a part of a user's network raises
            self._lower(state, LOOP, f"it cannot be copied ({reason_of(error)})")
            return None, False
        copied = job.copied()
        with before.restored():
            result, changes = trial.watch(lambda objects: attempt(run, copied.on(objects)))
            deterministic = before.is_current()
        self._random |= set() if deterministic else {state.network}
        if changes := changes or copied.changes(job):
            self._lower(state, LOOP, f"it {changes}")
        return result, deterministic and not changes

    def _checking(self, job: Job, pullback: Callable, checked: tuple) -> Callable:
        """The pullback; the first of its kind that is called is compared with that of the last task by the loop.

        That of the last inner step is called first. If it differs, the others run anew in another way, too.
        """
        state, random_state = job.function.state, RandomState(job.device())
        way = self._way(state)

        @torch.no_grad()
        def checking(cotangents: Any) -> Any:
            nonlocal pullback, way
            if checked not in self._checked:
                self._checked.add(checked)
                expected = self._last_task(job)
                try:
                    gradients = pullback(cotangents)
                    why = expected and expected[1] and pullback_disagreement(gradients, expected[1], cotangents)
                except Exception as error:
                    why = reason_of(error)
                if not why:
                    return gradients
                self._lower(state, way + 1, why)
            if self._way(state) > way:
                with random_state.restored():
                    pullback, way = self._run(job)[1] or pullback, self._way(state)
            return pullback(cotangents)

        return checking

    @contextmanager
    def looping(self, state: State) -> Iterator[None]:
        """While active, functions of these objects run for one task after another, and are differentiated by autograd.

        Raises:
            SettingError: PyTorch has no derivative of an operator.
        """
        self.settled = False
        with naming_what_has_no_derivative(), by_autograd():
            yield
        self._announce(state, LOOP)

    def _looped(self, job: Job) -> tuple[Any, Callable | None]:
        self.settled = False
        with naming_what_has_no_derivative():
            outputs, pullback = job.in_loop()
        self._announce(job.function.state, LOOP)
        return outputs, None if pullback is None else naming_what_has_no_derivative()(pullback)

    def _untraced(self, job: Job, key: tuple) -> tuple[Any, Callable | None, str]:
        """Outputs and pullback by ``vmap``, on copies while effects, which have to happen in a loop, may begin."""
        if job.function.state.number is not None and (*key, "no effects") in self._checked:
            return *job.untraced(), ""
        if why := needs_loop(job.function.state.objects):
            return None, None, why
        (outputs, pullback), changes = job.function.state.trial().run(lambda objects: job.on(objects).untraced())
        self._checked |= set() if changes else {(*key, "no effects")}
        return outputs, pullback, changes and f"it {changes}"

    def _replay(self, job: Job, key: tuple, leaves: list[Tensor]) -> tuple[Any, Callable | None, str]:
        """Outputs and pullback by a graph, which is recorded the first time; a replay changes nothing."""
        if key not in self._graphs:
            with quiet():
                self._graphs[key] = (
                    traced_pair(job.joint_of_any(), job.args, self.compile)
                    if job.pullback
                    else traced_call(job.vectorized(), job.args, self.compile)
                )
        graph: Any = self._graphs[key]
        if not job.pullback:
            return graph(leaves), None, ""
        pair: TracedPair = graph
        if job.recompute:
            pullback = recomputed_pullback(job, lambda cotangents: pair.pullback(pair.outputs(leaves)[1], cotangents))
            return self._run(job._replace(pullback=False))[0], pullback, ""
        outputs, residuals = pair.outputs(leaves)
        self.kept_bytes += sum({memory_of(tensor): tensor.untyped_storage().nbytes() for tensor in residuals}.values())
        return outputs, lambda cotangents: pair.pullback(residuals, cotangents), ""
