"""The inner loop of one network over a meta-batch: chunks of tasks, run by an algorithm or evaluated."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maml_lightning.algorithms import steps as inner
from maml_lightning.algorithms.algorithm import DEFAULTS, Settings
from maml_lightning.algorithms.calling import calling
from maml_lightning.algorithms.losses import Found
from maml_lightning.algorithms.model import Loss, Model
from maml_lightning.algorithms.optimizers import InnerOptimizer, Parameters, sgd
from maml_lightning.algorithms.prototypes import labels_of, of_task, of_tasks, tried_of_tasks
from maml_lightning.algorithms.registry import find_algorithm
from maml_lightning.algorithms.statistics import adapted_copy, deciding, uses_running_statistics
from maml_lightning.engine.captures import Captures
from maml_lightning.engine.chunks import MetaGradient, chunk_size, detached, mean_over_tasks, split
from maml_lightning.engine.differentiation import by_autograd
from maml_lightning.engine.execution import Execution, Executor
from maml_lightning.engine.failures import naming_what_has_no_derivative
from maml_lightning.engine.memory import FlatMemory
from maml_lightning.engine.state import State
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.structures import first_task, joined, leaves

Evaluated = tuple[list[Tensor], list[Tensor]]  # outputs and losses before adaptation and after each inner step


class InnerLoop:
    """The inner loop of one network, vectorized over tasks.

    Args:
        net: any ``nn.Module``; its own parameters are never written.
        loss: ``loss(outputs, targets)``, a scalar mean over the examples. Of a network that returns several tensors it
            gets all of them, as in a plain loop, if it takes them, else ``logits`` or the first; see
            :mod:`~maml_lightning.algorithms.losses`.
        tasks_per_chunk: how many tasks are vectorized together, at least 1; None takes all; "auto" goes by the memory
            that a task of the first meta-batch needs, and keeps it in ``chosen``.
        flat_memory: keep only the fast weights of each step and recompute the rest in the backward pass, for about a
            quarter more arithmetic. "auto" does so where the steps would otherwise keep more than a quarter of the
            free memory.
        compile: run the traced graphs through ``torch.compile``.
        optimizer: of the inner loop; None is gradient descent.
        proximal: strength ``mu`` of the proximal term, ``mu / 2 |theta - theta_0|^2`` added to ``L_s``
            (iMAML, equation 3); 0 is none.
        execution: see :mod:`~maml_lightning.engine.execution`.

    ``running`` names the normalization layers that use their running statistics; None goes by what the network is when
    it is called, see :mod:`~maml_lightning.algorithms.statistics`. ``collected`` names those that do so in evaluation
    alone. With ``query_statistics`` support, batch normalization of the queries takes the statistics of the task's
    support set under the same fast weights. With ``head`` prototypes, see :mod:`~maml_lightning.algorithms.prototypes`.

    Parameters are given by name, shaped like the network's or with a leading dimension ``[S+1, ...]``, one value for
    each ``theta_k``: those are not adapted. Inner learning rates are a number, or a dictionary ``[1 or S, ...]`` by
    name, each rate broadcastable to its parameter; a parameter without a rate is not adapted. The dictionary may also
    have the curvature matrices of parameters, see :mod:`~maml_lightning.algorithms.curvature`. Steps beyond the last
    take the last.

    Raises:
        SettingError: ``tasks_per_chunk`` is below 1.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> loop = InnerLoop(net, nn.functional.mse_loss)
        >>> x, y = torch.ones(1, 3, 2), torch.zeros(1, 3, 1)
        >>> loop.meta_gradient(dict(net.named_parameters()), Episode(x, y, x, y), 0.1, steps=1).gradient.keys()
        dict_keys(['weight'])
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        tasks_per_chunk: int | Literal["auto"] | None = "auto",
        flat_memory: bool | Literal["auto"] = "auto",
        compile: bool = False,
        optimizer: InnerOptimizer | None = None,
        proximal: float = 0.0,
        execution: Execution = "auto",
    ) -> None:
        if isinstance(tasks_per_chunk, int) and tasks_per_chunk < 1:
            raise SettingError(f"model.tasks_per_chunk must be at least 1, null or auto (got {tasks_per_chunk}).")
        self.net, self.loss = net, loss
        self.running: Collection[str] | None = None
        self.collected: Collection[str] = ()
        self.query_statistics: Literal["batch", "support"] = "batch"
        self.head: Literal["learned", "prototypes"] = "learned"
        self.tasks_per_chunk = tasks_per_chunk
        self.chosen: dict[str, int] = {}
        self._found = Found()
        self.optimizer = optimizer or sgd()
        self.proximal = proximal
        self._flat_memory = FlatMemory(flat_memory)
        self._executor = Executor(execution, compile)
        self._captures = Captures(self._executor)

    @property
    def flat(self) -> bool:
        """Whether the backward pass recomputes the inner steps."""
        return self._flat_memory.active

    def runs_task_by_task(self, tasks: int) -> bool:
        """Whether a chunk of so many tasks runs in a loop over tasks now."""
        return self._executor.way(self._state(tasks), tasks) == "loop"

    @torch.no_grad()
    def gradient(
        self,
        algorithm: str,
        params: Parameters,
        episode: Episode,
        rates: float | Parameters,
        steps: int,
        settings: Settings = DEFAULTS,
    ) -> MetaGradient:
        """The mean meta-gradient of a meta-batch, by the algorithm of that name.

        Args:
            algorithm: a name in :data:`~maml_lightning.algorithms.registry.ALGORITHMS`.
            params: the shared initialization, by name.
            episode: ``T`` tasks.
            rates: the inner learning rates ``alpha``.
            steps: inner steps ``S``, at least 0.
            settings: of the outer loop.

        Raises:
            SettingError: there is no algorithm of that name, or it needs more steps.
        """
        with deciding(self.net, self.running), calling(self.net), self._releasing():
            return self._gradient(algorithm, params, episode, rates, steps, settings)

    def adapted(
        self, params: Parameters, inputs: Tensor, targets: Tensor, rates: float | Parameters, steps: int
    ) -> nn.Module:
        """A copy of the network with the parameters of :meth:`adapt`, a plain module that is run by itself."""
        parameters = self.adapt(params, inputs, targets, rates, steps)
        support = inputs if self.query_statistics == "support" else None
        return adapted_copy(self.net, parameters, self._running_in_evaluation(), support)

    def _gradient(
        self,
        algorithm: str,
        params: Parameters,
        episode: Episode,
        rates: float | Parameters,
        steps: int,
        settings: Settings,
    ) -> MetaGradient:
        method = find_algorithm(algorithm)
        if steps < (least := method.min_inner_steps):
            raise SettingError(
                f"model.inner_steps must be at least {least} with model.algorithm {algorithm} (got {steps})."
            )
        name = "first order" if settings.first_order else method.measured_as or algorithm
        state, labels = self._state_of(episode), self._labels(episode.support_targets, episode.query_targets)

        def run(params: Parameters, buffers: Parameters, rates: Any, episode: Episode, labels: Any) -> MetaGradient:
            setup = self._setup(state, params, buffers, rates, steps, labels)
            learned = {n: r for n, r in rates.items() if r.requires_grad} if isinstance(rates, dict) else {}

            def of_chunk(chunk: Episode, total: MetaGradient) -> tuple[Tensor, Tensor]:
                return method.meta_gradient(setup, chunk, total, settings)

            return mean_over_tasks(of_chunk, episode, params, learned, self._size(setup, episode, name, method.loops))

        arguments = (params, dict(self.net.named_buffers()), rates, episode, labels)
        if not method.capturable:
            return run(*arguments)
        key = self._key(method.meta_gradient, steps, settings._replace(weights=tuple(settings.weights)))
        return self._captures(run, key, state, *arguments)

    def meta_gradient(
        self,
        params: Parameters,
        episode: Episode,
        rates: float | Parameters,
        steps: int,
        first_order: bool = False,
        weights: Sequence[float] | None = None,
    ) -> MetaGradient:
        """MAML: the exact gradient of the mean outer loss after ``steps`` steps of adaptation to the support set.

        Args:
            params: as for ``gradient``, like ``episode``, ``rates`` and ``steps``.
            episode: ``T`` tasks.
            rates: the inner learning rates.
            steps: inner steps ``S``, at least 0.
            first_order: drop the Hessian term (FOMAML).
            weights: ``w_0 … w_S``, of the query losses after each step; None evaluates at ``theta_S`` alone.
        """
        return self.gradient("maml", params, episode, rates, steps, Settings(first_order, weights or ()))

    def implicit_gradient(
        self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int, iterations: int = 5
    ) -> MetaGradient:
        """iMAML: the gradient at the minimum of the proximal objective, with ``iterations`` of conjugate gradients."""
        return self.gradient("imaml", params, episode, rates, steps, Settings(implicit_iterations=iterations))

    def reptile_gradient(
        self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int
    ) -> MetaGradient:
        """Reptile: ``theta_0 - theta_S`` after steps on support and query examples together."""
        return self.gradient("reptile", params, episode, rates, steps)

    def trajectory(self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int) -> list[Tensor]:
        """The outputs on the query inputs before adaptation and after each of ``steps`` inner steps.

        Adapts whatever the grad and inference mode of the caller, and keeps no graph.

        Returns:
            ``steps + 1`` tensors ``[T, N*Q, ...]``.
        """
        return self.evaluated(params, episode, rates, steps, with_losses=False)[0]

    def evaluated(
        self,
        params: Parameters,
        episode: Episode,
        rates: float | Parameters,
        steps: int,
        with_losses: bool = True,
    ) -> Evaluated:
        """The trajectory, and ``with_losses`` the query losses ``[T]`` along it if they are not of these outputs alone.

        Returns:
            ``steps + 1`` outputs and as many losses; no losses where they can be computed from the outputs.
        """
        with self._evaluating():
            state, labels = self._state_of(episode), self._labels(episode.support_targets)
            read = inner.evaluate if with_losses and state.objects.takes_all else inner.predict

            def run(params: Parameters, buffers: Parameters, rates: Any, episode: Episode, labels: Any) -> list[Any]:
                every, chunks = self._setup(state, params, buffers, rates, steps, labels), []
                for chunk in self._evaluation_chunks(episode):
                    setup = of_tasks(every, chunk)
                    path = inner.descend(setup, chunk.support_inputs, chunk.support_targets)
                    chunks.append([read(setup, fast, k, chunk) for k, fast in enumerate(path)])
                return [joined(parts, 0) for parts in zip(*chunks, strict=True)]

            arguments = (params, dict(self.net.named_buffers()), rates, episode, labels)
            found = self._captures(run, self._key(read, steps), state, *arguments)
        if read is inner.predict:
            return found, []
        losses, outputs = zip(*found, strict=True)
        return list(outputs), list(losses)

    def moved(self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int) -> Tensor:
        """How far ``steps`` inner steps move each task's parameters, in the Euclidean norm: ``[T]``."""
        with self._evaluating():
            labels, buffers = self._labels(episode.support_targets), dict(self.net.named_buffers())
            every, norms = self._setup(self._state_of(episode), params, buffers, rates, steps, labels), []
            for chunk in self._evaluation_chunks(episode):
                setup = of_tasks(every, chunk)
                fast = inner.adapt(setup, chunk.support_inputs, chunk.support_targets)
                each = setup.state is not None  # whether a task has an initialization of its own
                moves = [(fast[n] - v).expand(chunk.tasks, *v.shape[each:]) for n, v in setup.initial.items()]
                norms.append(
                    torch.stack([move.reshape(chunk.tasks, -1).abs().square().sum(1) for move in moves]).sum(0).sqrt()
                )
            return torch.cat(norms)

    def adapt(self, params: Parameters, inputs: Any, targets: Any, rates: float | Parameters, steps: int) -> Parameters:
        """The parameters of one task after ``steps`` inner steps.

        Args:
            params: the shared initialization, by name.
            inputs: ``[N*K, ...]``.
            targets: ``[N*K]``.
            rates: the inner learning rates.
            steps: inner steps ``S``, at least 0.
        """
        with self._evaluating():
            buffers = dict(self.net.named_buffers())
            if not self._found.knows(self.net, self.loss):
                self._found.find(self.net, self.loss, detached(inputs), detached(targets))
            setup = self._setup(self._state(1), params, buffers, rates, steps, self._labels(targets))
            setup = of_task(setup, detached(inputs), detached(targets))
            state, step = setup.initial_state(), setup.model.bind(inner.step)
            with naming_what_has_no_derivative(), by_autograd():  # one task by itself, which runs as any network does
                for arguments in setup.arguments():
                    state = step((state, {}), arguments, setup.constants, detached(inputs), detached(targets))
            return {**state[0], **setup.shared[-1]}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        # grad under inference mode silently returns zeros (pytorch #177318); clones are no inference tensors.
        decided = deciding(self.net, self._running_in_evaluation())
        with torch.inference_mode(False), torch.no_grad(), decided, calling(self.net), self._releasing():
            yield

    def _running_in_evaluation(self) -> frozenset[str]:
        running = uses_running_statistics(self.net) if self.running is None else self.running
        return frozenset(running) | frozenset(self.collected)

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._executor.release()

    def _state(self, tasks: int) -> State:
        """The network, loss and optimizer as they are now, for so many tasks."""
        of_support, takes_all = self.query_statistics == "support", self._found.takes_all(self.net, self.loss)
        model = Model(self.net, self.loss, self.optimizer, self.proximal, of_support, takes_all)
        return self._executor.state(model, tasks)

    def _state_of(self, episode: Episode) -> State:
        """The same, for an episode."""
        if not self._found.knows(self.net, self.loss):
            part = episode[:2] if any(leaf.numel() for leaf in leaves(episode.support_targets)) else episode[2:]
            self._found.find(self.net, self.loss, *map(first_task, detached(part)))
        return self._state(episode.tasks)

    def _labels(self, *targets: Any) -> Tensor | None:
        return labels_of(*targets) if self.head == "prototypes" else None

    def _setup(
        self, state: State, params: Parameters, buffers: Parameters, rates: Any, steps: int, labels: Tensor | None
    ) -> inner.Setup:
        setup = inner.prepare(state, self._executor, self._flat_memory, params, buffers, rates, steps)
        return setup._replace(labels=labels)

    def _key(self, *settings: Any) -> tuple:
        """Of all that a function of a meta-batch depends on beside tensors and the :meth:`_state`."""
        return *settings, self.tasks_per_chunk, tuple(self.chosen.items()), self._flat_memory.active

    def _size(self, setup: inner.Setup, episode: Episode, name: str, loops: bool) -> int | None:
        """Tasks in a chunk; one by one in a loop, which takes no more memory, but for an algorithm that ``loops``."""
        known = name in self.chosen or self.tasks_per_chunk != "auto"
        examined = self._executor.knows(setup.model)
        if not examined or not (known or self._executor.way(setup.model) == "loop"):
            first = next(split(episode, 1))
            kept = inner.bytes_per_task(tried_of_tasks(setup, first), first)
        if self._executor.way(setup.model) == "loop":
            return None if loops and not self.flat else 1
        if self.tasks_per_chunk != "auto":
            return self.tasks_per_chunk
        if not known:
            self.chosen[name] = chunk_size(kept, episode.tasks, episode.device)
        return self.chosen[name]

    def _evaluation_chunks(self, episode: Episode) -> Iterator[Episode]:
        size = min(self.chosen.values(), default=None) if self.tasks_per_chunk == "auto" else self.tasks_per_chunk
        return split(detached(episode), size)
