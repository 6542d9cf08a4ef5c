"""MAML's inner loop and its exact meta-gradient, on :mod:`torch.func` alone.

For a task with support loss ``L_s`` and query loss ``L_q`` (Finn, Abbeel and Levine 2017, algorithm 1)::

    theta_{k+1} = theta_k - alpha_k * grad L_s(theta_k)       k = 0 .. S-1
    outer loss  = sum_k w_k L_q(theta_k)                      MAML: w_S = 1, all others 0

The meta-gradient is the adjoint sweep, one vector ``lam`` the size of the adapted parameters::

    lam_S = w_S grad L_q(theta_S)
    d / d alpha_k = -lam_{k+1} * grad L_s(theta_k)
    lam_k = lam_{k+1} - H_k (alpha_k * lam_{k+1}) + w_k grad L_q(theta_k)     H_k = Hessian of L_s, never formed
    meta-gradient = mean over tasks of lam_0

Each ``H_k`` product is the pullback of the step, so the same sweep holds for momentum and Adam, whose state is carried
beside the parameters. The family is what the arguments say: which parameters have a rate (ANIL, BOIL), whether rates
require a gradient (Meta-SGD, LSLR), the weights ``w`` (multi-step loss), ``first_order`` (FOMAML). Parameters without a
rate, and those given per step (MAML++), are held: the same for all tasks, with a gradient but no adjoint.

Everything is taken inside ``vmap``: taking the outer gradient outside of it gives normalisation layers a silently
wrong second derivative (functorch #534).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.optimizers import InnerOptimizer, Parameters, sgd
from maml_lightning.engine.kernels import TaskKernels, kernel_layout, sum_over_tasks
from maml_lightning.engine.memory import free_bytes, keep_freed_memory, out_of_memory
from maml_lightning.engine.tracing import State, Tracer
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError

Loss = Callable[[Tensor, Tensor], Tensor]


class MetaGradient(NamedTuple):
    """What one meta-batch yields.

    Args:
        loss: the outer loss, mean over tasks, a scalar.
        gradient: of ``loss`` with respect to each parameter, shaped like it.
        rates: of ``loss`` with respect to each rate that requires a gradient, shaped like it.
        predictions: the adapted networks' outputs on the query inputs, ``[T, N*Q, ...]``.
    """

    loss: Tensor
    gradient: Parameters
    rates: Parameters
    predictions: Tensor


class _Model(NamedTuple):
    """What a task's functions depend on beside tensors; their first argument."""

    net: nn.Module
    loss: Loss
    optimizer: InnerOptimizer
    proximal: float


def _outputs(model: _Model, fast: Parameters, held: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
    with TaskKernels():
        return functional_call(model.net, {**fast, **held, **buffers}, (x,))


def _support_gradient(
    model: _Model, params: tuple[Parameters, Parameters], buffers: Parameters, x: Tensor, y: Tensor
) -> Parameters:
    fast, held = params
    return grad(lambda fast: model.loss(_outputs(model, fast, held, buffers, x), y))(fast)


def _step(
    model: _Model, differentiable: tuple, fixed: Parameters, buffers: Parameters, x: Tensor, y: Tensor
) -> tuple[Parameters, Any]:
    """``theta_{k+1}`` and the optimiser's state, of those at ``k``."""
    return _update(model, differentiable, fixed, buffers, x, y, lambda params: params)


def _first_order_step(
    model: _Model, differentiable: tuple, fixed: Parameters, buffers: Parameters, x: Tensor, y: Tensor
) -> tuple[Parameters, Any]:
    """The same step, whose derivative lacks the Hessian."""
    return _update(model, differentiable, fixed, buffers, x, y, lambda params: pytree.tree_map(torch.detach, params))


def _update(
    model: _Model,
    differentiable: tuple,
    fixed: Parameters,
    buffers: Parameters,
    x: Tensor,
    y: Tensor,
    at: Callable[[Any], Any],
) -> tuple[Parameters, Any]:
    (fast, state), more = differentiable
    arguments: Any = {**fixed, **more}
    gradient = _support_gradient(model, at((fast, arguments["held"])), buffers, x, y)
    if model.proximal:
        anchor = arguments["anchor"]
        gradient = {name: g + model.proximal * (fast[name] - anchor[name]) for name, g in gradient.items()}
    return model.optimizer.update(gradient, state, fast, arguments["rates"])


def _evaluate(
    model: _Model, fast: Parameters, held: Parameters, buffers: Parameters, x: Tensor, y: Tensor
) -> tuple[tuple[Parameters, Parameters], Tensor, Tensor]:
    """The gradients of the query loss with respect to adapted and shared parameters, the loss and the outputs."""

    def objective(params: tuple[Parameters, Parameters]) -> tuple[Tensor, Tensor]:
        outputs = _outputs(model, *params, buffers, x)
        return model.loss(outputs, y), outputs

    gradient, (value, outputs) = grad_and_value(objective, has_aux=True)((fast, held))
    return gradient, value, outputs


class InnerLoop:
    """The inner loop of one network, vectorised over tasks.

    Args:
        net: any ``nn.Module``; run through ``functional_call``, its own parameters are never written.
        loss: ``loss(outputs, targets)``, a scalar mean over the examples.
        tasks_per_chunk: how many tasks are vectorised together, at least 1; None takes all; "auto" measures what is
            fastest on the first meta-batch, the same on every rank, and keeps it in ``chosen``.
        flat_memory: keep only the fast weights of each step and compute the rest again on the way back; peak memory
            then does not grow with the steps, for about a quarter more arithmetic. "auto" does so where the steps
            would otherwise keep more than a quarter of the free memory.
        compile: run the traced graphs through ``torch.compile``.
        optimizer: the rule of the inner updates; None is gradient descent.
        proximal: strength ``mu`` of a pull to the initialisation, ``mu / 2 |theta - theta_0|^2`` added to ``L_s``
            (iMAML, equation 3); 0 is none.

    Parameters are given by name, shaped like the network's or with a leading dimension ``[S+1, ...]``, one value for
    each ``theta_k``: those are not adapted. Rates are a number, or a dictionary ``[1 or S, ...]`` by name, each rate
    broadcastable to its parameter; a parameter without a rate is not adapted. Steps beyond the last take the last.

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
    ) -> None:
        if isinstance(tasks_per_chunk, int) and tasks_per_chunk < 1:
            raise SettingError(f"model.tasks_per_chunk must be at least 1, null or auto (got {tasks_per_chunk}).")
        self.net, self.loss = net, loss
        self.tasks_per_chunk = tasks_per_chunk
        self.chosen: dict[str, int] = {}
        self.flat_memory = flat_memory
        self.flat = flat_memory is True
        self.optimizer = optimizer or sgd()
        self.proximal = proximal
        self._trace = Tracer(compile)

    @torch.no_grad()
    def meta_gradient(
        self,
        params: Parameters,
        episode: Episode,
        rates: float | Parameters,
        steps: int,
        first_order: bool = False,
        weights: Sequence[float] | None = None,
    ) -> MetaGradient:
        """The exact gradient of the mean outer loss after ``steps`` steps of adaptation to the support set.

        Args:
            params: the shared initialisation, by name.
            episode: ``T`` tasks.
            rates: the inner learning rates alpha.
            steps: inner steps ``S``, at least 0.
            first_order: drop the Hessian term (FOMAML).
            weights: ``w_0 … w_S``, of the query losses along the way; None judges ``theta_S`` alone.
        """
        start = self._start(params, rates, steps)
        weights = weights or [0.0] * steps + [1.0]

        def sweep(chunk: Episode, total: MetaGradient) -> tuple[Tensor, Tensor]:
            return self._sweep(start, chunk, total, first_order, weights)

        return self._collect(params, rates, episode, sweep, "first order" if first_order else "exact", steps)

    @torch.no_grad()
    def implicit_gradient(
        self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int, iterations: int = 5
    ) -> MetaGradient:
        """iMAML: the gradient of the mean query loss as if the steps had found the minimum of the proximal objective.

        ``(I + H / mu)^-1 grad L_q(theta_S)`` by conjugate gradients (Rajeswaran et al. 2019, equation 7 and algorithm
        2), for ``mu = proximal``, larger than minus the smallest eigenvalue of ``H``. Memory does not depend on the
        steps.

        Args:
            iterations: of conjugate gradients, at least 1; the others as in ``meta_gradient``, ``steps`` at least 1.
        """
        start, mu = self._start(params, rates, steps), self.proximal

        def solve(chunk: Episode, total: MetaGradient) -> tuple[Tensor, Tensor]:
            support, held = (chunk.support_inputs, chunk.support_targets), start.held[-1]
            fast = deque(self._descend(start, support), maxlen=1).pop()
            query = (chunk.query_inputs, chunk.query_targets)
            evaluate, support_gradient = (start.model.bind(f) for f in (_evaluate, _support_gradient))
            (slope, direct), loss, outputs = self._trace(
                evaluate, (0, None, None, 0, 0), fast, held, start.buffers, *query
            )
            in_dims = ((0, None), None, 0, 0)
            _, product = self._trace.vjp(support_gradient, in_dims, (fast, held), start.buffers, *support)

            def regularised(v: Parameters) -> Parameters:
                return {name: torch.add(v[name], hv, alpha=1 / mu) for name, hv in product(v)[0].items()}

            solution = _conjugate_gradients(regularised, slope, iterations)
            through = product(solution)[1]  # how the minimum moves with the held parameters
            held_gradient = {name: torch.add(g, through[name], alpha=-1 / mu) for name, g in direct.items()}
            _add(total.gradient, {**solution, **held_gradient}, steps)
            return loss, outputs

        return self._collect(params, rates, episode, solve, "implicit", 1)

    @torch.no_grad()
    def reptile_gradient(
        self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int
    ) -> MetaGradient:
        """Reptile: ``theta_0 - theta_S``, mean over tasks (Nichol, Achiam and Schulman 2018, algorithm 2).

        There is no query set in it: the steps descend on support and query examples together. The loss is that of the
        query set afterwards.
        """
        start = self._start(params, rates, steps)

        def move(chunk: Episode, total: MetaGradient) -> tuple[Tensor, Tensor]:
            x, y = (torch.cat(parts, 1) for parts in (chunk[::2], chunk[1::2]))
            fast = deque(self._descend(start, (x, y)), maxlen=1).pop()
            _add(total.gradient, {name: value - fast[name] for name, value in start.fast.items()}, steps)
            parameters, (inputs, targets) = (fast, start.held[-1], start.buffers), chunk[2:]
            outputs = self._trace(start.model.bind(_outputs), (0, None, None, 0), *parameters, inputs)
            return torch.stack([self.loss(o, t) for o, t in zip(outputs, targets, strict=True)]), outputs

        return self._collect(params, rates, episode, move, "reptile", 1)

    def trajectory(self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int) -> list[Tensor]:
        """The outputs on the query inputs before adaptation and after each of ``steps`` inner steps.

        Adapts whatever the grad and inference mode of the caller, and keeps no graph.

        Returns:
            ``steps + 1`` tensors ``[T, N*Q, ...]``.
        """
        # grad under inference mode silently returns zeros (pytorch #177318); clones are no inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            start = self._start(params, rates, steps)
            call, chunks = start.model.bind(_outputs), []
            for chunk in self._evaluated(episode):
                path = self._descend(start, (chunk.support_inputs, chunk.support_targets))
                chunks.append(
                    [
                        self._trace(call, (_over(k), None, None, 0), fast, held, start.buffers, chunk[2])
                        for k, (fast, held) in enumerate(zip(path, start.held, strict=True))
                    ]
                )
            return [torch.cat(outputs) for outputs in zip(*chunks, strict=True)]

    def moved(self, params: Parameters, episode: Episode, rates: float | Parameters, steps: int) -> Tensor:
        """How far ``steps`` inner steps move each task's parameters, in the Euclidean norm: ``[T]``."""
        with torch.inference_mode(False), torch.no_grad():
            start = self._start(params, rates, steps)
            norms = []
            for chunk in self._evaluated(episode):
                *_, ended = self._descend(start, (chunk.support_inputs, chunk.support_targets))
                moved = [(ended[name] - value).expand(chunk.tasks, *value.shape) for name, value in start.fast.items()]
                norms.append(torch.stack([part.flatten(1).square().sum(1) for part in moved]).sum(0).sqrt())
            return torch.cat(norms)

    def adapt(
        self, params: Parameters, inputs: Tensor, targets: Tensor, rates: float | Parameters, steps: int
    ) -> Parameters:
        """The parameters of one task after ``steps`` inner steps.

        Args:
            inputs: ``[N*K, ...]``.
            targets: ``[N*K]``.
        """
        with torch.inference_mode(False), torch.no_grad():
            start = self._start(params, rates, steps)
            inputs, targets = _usable(inputs), _usable(targets)
            state, step = (start.fast, self.optimizer.init(start.fast)), start.model.bind(_step)
            for fixed in start.fixed(self.proximal):
                state = step((state, {}), fixed, start.buffers, inputs, targets)
            return {**state[0], **start.held[-1]}

    def _start(self, params: Parameters, rates: float | Parameters, steps: int) -> "_Start":
        keep_freed_memory()
        values = {name: _usable(value) for name, value in params.items()}
        dims = {name: value.dim() for name, value in self.net.named_parameters()}
        by_step = {name: value for name, value in values.items() if value.dim() > dims[name]}
        if not isinstance(rates, dict):
            rate = next(iter(values.values())).new_tensor([rates])
            rates = {name: rate for name in values if name not in by_step}
        held = {name: kernel_layout(v) for name, v in values.items() if name not in rates and name not in by_step}
        return _Start(
            self._trace.state(_Model(self.net, self.loss, self.optimizer, self.proximal)),
            {name: buffer.detach() for name, buffer in self.net.named_buffers()},
            {name: kernel_layout(value) for name, value in values.items() if name in rates},
            [{**held, **_at(by_step, k)} for k in range(steps + 1)],
            [_at({name: _usable(rate) for name, rate in rates.items()}, k) for k in range(steps)],
            any(rate.requires_grad for rate in rates.values()),
        )

    def _descend(self, start: "_Start", support: tuple[Tensor, Tensor]) -> Iterator[Parameters]:
        """``theta_0 … theta_S`` one by one, without what a gradient needs."""
        state, step = (start.fast, self.optimizer.init(start.fast)), start.model.bind(_step)
        yield start.fast
        for k, fixed in enumerate(start.fixed(self.proximal)):
            in_dims = ((_over(k), None), None, None, 0, 0)
            state = self._trace(step, in_dims, (state, {}), fixed, start.buffers, *support)
            yield state[0]

    def _sweep(
        self, start: "_Start", chunk: Episode, total: MetaGradient, first_order: bool, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Add one chunk's gradients to ``total``; its losses ``[T]`` and predictions."""
        support, buffers = (chunk.support_inputs, chunk.support_targets), start.buffers
        step, evaluate = (start.model.bind(f) for f in (_first_order_step if first_order else _step, _evaluate))
        steps = len(start.rates)
        choice = {
            "held": not first_order and bool(start.held[0]),
            "rates": start.learnt,
            "anchor": bool(self.proximal),
        }
        state: Any = (start.fast, self.optimizer.init(start.fast))
        trail, pullbacks = [state[0]], []
        for k, given in enumerate(start.fixed(self.proximal)):
            wanted = {name: given.pop(name) for name, wants in choice.items() if wants}
            in_dims = ((_over(k), None), None, None, 0, 0)
            again = self.flat and not first_order and k < steps - 1
            state, pullback = self._trace.vjp(step, in_dims, (state, wanted), given, buffers, *support, recompute=again)
            trail.append(state[0])
            pullbacks.append(pullback)
            del pullback  # the last step's would live as long as the sweep
            if k == 0 and self.flat_memory == "auto" and not self.flat:
                device = chunk.support_inputs.device
                self.flat = steps > 1 and self._trace.kept_bytes * steps > free_bytes(device) / 4
        adjoint: Any = None
        loss: Any = 0.0
        for k in reversed(range(steps + 1)):
            if adjoint is not None:
                adjoint, gradients = pullbacks.pop()(adjoint)
                _add(total.rates, gradients.get("rates", {}), k)
                for name in ("held", "anchor"):
                    _add(total.gradient, gradients.get(name, {}), k)
            fast = trail.pop()
            if weights[k] or k == steps:
                (slope, held), value, outputs = self._trace(
                    evaluate, (_over(k), None, None, 0, 0), fast, start.held[k], buffers, *chunk[2:]
                )
                if weights[k] != 1:
                    slope, held = pytree.tree_map(lambda g, w=weights[k]: g * w, (slope, held))
                loss = loss + weights[k] * value
                _add(total.gradient, held, k)
                if adjoint is None:
                    predictions, adjoint = outputs, (slope, pytree.tree_map(torch.zeros_like, state[1]))
                else:
                    adjoint = ({name: lam + slope[name] for name, lam in adjoint[0].items()}, adjoint[1])
        _add(total.gradient, adjoint[0], 0)
        return loss, predictions

    def _collect(
        self,
        params: Parameters,
        rates: float | Parameters,
        episode: Episode,
        run: Callable[[Episode, MetaGradient], tuple[Tensor, Tensor]],
        what: str,
        steps: int,
    ) -> MetaGradient:
        """The mean over all tasks of what ``run`` adds up chunk by chunk, the chunk's size measured first."""
        learnt = {n: r for n, r in rates.items() if r.requires_grad} if isinstance(rates, dict) else {}

        def over(size: int | None, only_one: bool = False) -> MetaGradient:
            total = MetaGradient(torch.zeros(()), _zeros(params), _zeros(learnt), torch.zeros(()))
            chunks = self._chunks(episode, size)
            results = [run(chunk, total) for chunk in ([next(chunks)] if only_one else chunks)]
            losses, predictions = (torch.cat(parts) for parts in zip(*results, strict=True))
            for value in (*total.gradient.values(), *total.rates.values()):
                value.div_(episode.tasks)
            return MetaGradient(losses.mean(), total.gradient, total.rates, predictions)

        if self.tasks_per_chunk == "auto" and what not in self.chosen:
            # Dropout draws in the trials; the run's own draws stay what they are without them.
            with torch.random.fork_rng([device] if (device := episode.support_inputs.device).type == "cuda" else []):
                self.chosen[what] = self._fastest(lambda size: over(size, only_one=True), episode, steps)
        return over(self.chosen[what] if self.tasks_per_chunk == "auto" else self.tasks_per_chunk)

    def _evaluated(self, episode: Episode) -> Iterator[Episode]:
        size = min(self.chosen.values(), default=None) if self.tasks_per_chunk == "auto" else self.tasks_per_chunk
        return self._chunks(Episode(*map(_usable, episode)), size)

    def _chunks(self, episode: Episode, size: int | None) -> Iterator[Episode]:
        size = size or episode.tasks
        return (Episode(*part) for part in zip(*(tensor.split(size) for tensor in episode), strict=True))

    def _fastest(self, sweep: Callable[[int], object], episode: Episode, steps: int) -> int:
        """The number of tasks that costs least per task when vectorised together; memory is asked for step by step."""
        device, tasks = episode.support_inputs.device, episode.tasks

        def faster(size: int, than: int) -> bool:
            # In turns, for a machine is not equally fast at all times; a gain within the noise is none.
            seconds: dict[int, list[float]] = {size: [], than: []}
            try:
                for _ in range(2):
                    sweep(size)  # traces, compiles, warms up
                for _ in range(3):
                    for each, taken in seconds.items():
                        taken.append(_seconds(partial(sweep, each), device) / each)
            except RuntimeError as error:
                if out_of_memory(error):
                    return False
                raise
            return min(seconds[size]) < 0.97 * min(seconds[than])

        size = max(tasks // 4, 1)
        sweep(size)
        needed = self._trace.kept_bytes * tasks / size * (1 if self.flat else max(steps, 1))
        if needed < free_bytes(device) / 2 and tasks > size and faster(tasks, than=size):
            size = tasks
        else:
            while size > 1 and faster(max(size // 4, 1), than=size):
                size = max(size // 4, 1)
        best = [size]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(best)
        return best[0]


class _Start(NamedTuple):
    """Where the inner loop begins: the model, adapted parameters, and the shared ones and rates of each step."""

    model: State
    buffers: Parameters
    fast: Parameters
    held: list[Parameters]  # at theta_0 … theta_S
    rates: list[Parameters]
    learnt: bool

    def fixed(self, proximal: float) -> list[dict[str, Parameters]]:
        """What each step takes beside its state."""
        anchor = {"anchor": self.fast} if proximal else {}
        return [{"held": held, "rates": rates, **anchor} for held, rates in zip(self.held, self.rates, strict=False)]


def multi_step_weights(steps: int, epoch: int, epochs: int) -> list[float]:
    """Weights ``w_0 … w_S`` of MAML++'s multi-step loss, annealed to the last step (Antoniou et al. 2019, section 4).

    Each of ``theta_1 … theta_S`` begins at ``1 / S``; those before the last fall linearly to 0.03 / S within
    ``epochs`` epochs, and the last takes what they lose.

    Example:
        >>> multi_step_weights(steps=2, epoch=0, epochs=10)
        [0.0, 0.5, 0.5]
    """
    if steps == 0:
        return [1.0]
    early = max(1 - epoch / epochs, 0.03) / steps
    return [0.0, *[early] * (steps - 1), 1 - early * (steps - 1)]


def _zeros(values: Parameters) -> Parameters:
    return {name: kernel_layout(torch.zeros_like(value)) for name, value in values.items()}


def _over(step: int) -> int | None:
    """The task dimension of what step 0 shares over all tasks."""
    return 0 if step else None


def _at(values: Parameters, step: int) -> Parameters:
    return {name: kernel_layout(value[min(step, len(value) - 1)]) for name, value in values.items()}


def _add(total: Parameters, gradient: Parameters, step: int) -> None:
    """Add the sum over tasks to the whole of ``total``, or to the step's part where it has one for each."""
    for name, value in gradient.items():
        into = total[name]
        if into.dim() == value.dim():
            into = into[min(step, len(into) - 1)]
        into += sum_over_tasks(value)


def _conjugate_gradients(product: Callable[[Parameters], Parameters], b: Parameters, iterations: int) -> Parameters:
    """Solve ``product(x) = b`` for each task, ``product`` linear, symmetric and positive definite."""

    def dot(a: Parameters, b: Parameters) -> Tensor:
        return torch.stack([(value * b[name]).reshape(len(value), -1).sum(1) for name, value in a.items()]).sum(0)

    def move(a: Parameters, scale: Tensor, b: Parameters) -> Parameters:
        return {n: torch.addcmul(v, b[n], scale.view(-1, *[1] * (v.dim() - 1))) for n, v in a.items()}

    x = {name: torch.zeros_like(value) for name, value in b.items()}
    residual = direction = b
    square = dot(b, b)
    enough = square * torch.finfo(square.dtype).eps ** 2
    for _ in range(iterations):
        along, active = product(direction), square > enough
        step = torch.where(active, square / dot(direction, along), 0)
        x, residual = move(x, step, direction), move(residual, -step, along)
        before, square = square, dot(residual, residual)
        direction = move(residual, torch.where(active, square / before, 0), direction)
    return x


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _usable(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()
