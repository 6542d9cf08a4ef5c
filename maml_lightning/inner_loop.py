"""MAML's inner loop and its exact meta-gradient, on :mod:`torch.func` alone.

For a task with support loss ``L_s`` and query loss ``L_q`` (Finn, Abbeel and Levine 2017, algorithm 1)::

    theta_{k+1} = theta_k - alpha * grad L_s(theta_k)         k = 0 .. S-1
    outer loss  = L_q(theta_S)

The meta-gradient is the adjoint sweep, one vector ``lam`` the size of the model::

    lam_S = grad L_q(theta_S)
    lam_k = lam_{k+1} - H_k (alpha * lam_{k+1})               H_k = Hessian of L_s at theta_k, never formed
    meta-gradient = mean over tasks of lam_0

``first_order`` drops ``H_k``. Everything is taken inside ``vmap``: taking the outer gradient outside of it gives
normalisation layers a silently wrong second derivative (functorch #534).
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value

from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.kernels import TaskKernels, kernel_layout, sum_over_tasks
from maml_lightning.memory import free_bytes, keep_freed_memory
from maml_lightning.tracing import Tracer

Parameters = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class MetaGradient(NamedTuple):
    """What one meta-batch yields.

    Args:
        loss: the query loss after adaptation, mean over tasks, a scalar.
        gradient: of ``loss`` with respect to each parameter, shaped like it.
        predictions: the adapted networks' outputs on the query inputs, ``[T, N*Q, ...]``.
    """

    loss: Tensor
    gradient: Parameters
    predictions: Tensor


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

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> loop = InnerLoop(net, nn.functional.mse_loss)
        >>> x, y = torch.ones(1, 3, 2), torch.zeros(1, 3, 1)
        >>> loop.meta_gradient(dict(net.named_parameters()), Episode(x, y, x, y), lr=0.1, steps=1).gradient.keys()
        dict_keys(['weight'])
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        tasks_per_chunk: int | Literal["auto"] | None = "auto",
        flat_memory: bool | Literal["auto"] = "auto",
        compile: bool = False,
    ) -> None:
        if isinstance(tasks_per_chunk, int) and tasks_per_chunk < 1:
            raise SettingError(f"model.tasks_per_chunk must be at least 1, null or auto (got {tasks_per_chunk}).")
        self.tasks_per_chunk = tasks_per_chunk
        self.chosen: int | None = None
        self.flat_memory = flat_memory
        self.flat = flat_memory is True
        self._trace = Tracer(compile)
        keep_freed_memory()

        def call(params: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
            with TaskKernels():
                return functional_call(net, {**params, **buffers}, (x,))

        def step(params: Parameters, buffers: Parameters, lr: Tensor, x: Tensor, y: Tensor) -> Parameters:
            gradient = grad(lambda params: loss(call(params, buffers, x), y))(params)
            return {name: torch.addcmul(value, gradient[name], lr, value=-1) for name, value in params.items()}

        def judge(params: Parameters, buffers: Parameters, x: Tensor, y: Tensor) -> tuple:
            def objective(params: Parameters) -> tuple[Tensor, Tensor]:
                outputs = call(params, buffers, x)
                return loss(outputs, y), outputs

            gradient, (value, outputs) = grad_and_value(objective, has_aux=True)(params)
            return gradient, value, outputs

        self._call, self._step, self._judge = call, step, judge
        self._buffers = lambda: {name: buffer.detach() for name, buffer in net.named_buffers()}

    def _chunks(self, episode: Episode, size: int | None = None) -> Iterator[Episode]:
        size = size or (self.chosen if self.tasks_per_chunk == "auto" else self.tasks_per_chunk) or episode.tasks
        return (Episode(*part) for part in zip(*(tensor.split(size) for tensor in episode), strict=True))

    @torch.no_grad()
    def meta_gradient(
        self, params: Parameters, episode: Episode, lr: float, steps: int, first_order: bool = False
    ) -> MetaGradient:
        """The exact gradient of the mean query loss after ``steps`` steps of gradient descent on the support set.

        Args:
            params: the shared initialisation, by name.
            episode: ``T`` tasks.
            lr: the inner learning rate alpha.
            steps: inner steps ``S``, at least 0.
            first_order: drop the Hessian term (FOMAML).
        """
        params = {name: kernel_layout(value.detach()) for name, value in params.items()}
        if self.tasks_per_chunk == "auto" and self.chosen is None:
            # Dropout draws in the trials; the run's own draws stay what they are without them.
            with torch.random.fork_rng([device] if (device := episode.support_inputs.device).type == "cuda" else []):
                self.chosen = self._fastest(
                    lambda size: self._sweep(params, episode, lr, steps, first_order, size), episode, steps
                )
        return self._sweep(params, episode, lr, steps, first_order)

    def _sweep(
        self,
        params: Parameters,
        episode: Episode,
        lr: float,
        steps: int,
        first_order: bool,
        only: int | None = None,
    ) -> MetaGradient:
        """The meta-gradient over the whole episode, or over its first chunk of ``only`` tasks."""
        buffers, rate = self._buffers(), _scalar(lr, params)
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        losses, predictions = [], []
        for chunk in [next(self._chunks(episode, only))] if only else self._chunks(episode):
            support = (chunk.support_inputs, chunk.support_targets)
            fast, pullbacks = params, []
            for k in range(steps):
                arguments = (self._step, (None if k == 0 else 0, None, None, 0, 0), fast, buffers, rate, *support)
                if first_order:
                    fast = self._trace(*arguments)
                else:
                    fast, pullback = self._trace.vjp(*arguments, recompute=self.flat and k < steps - 1)
                    pullbacks.append(pullback)
                    if k == 0 and self.flat_memory == "auto" and not self.flat:
                        self.flat = steps > 1 and self._trace.kept_bytes * steps > free_bytes(rate.device) / 4
            shared = 0 if steps else None
            lam, loss, outputs = self._trace(
                self._judge, (shared, None, 0, 0), fast, buffers, chunk.query_inputs, chunk.query_targets
            )
            while pullbacks:
                lam = pullbacks.pop()(lam)
            for name, value in lam.items():
                total[name] += sum_over_tasks(value)
            losses.append(loss)
            predictions.append(outputs)
        gradient = {name: value.div_(episode.tasks) for name, value in total.items()}
        return MetaGradient(torch.cat(losses).mean(), gradient, torch.cat(predictions))

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
            except torch.OutOfMemoryError:
                return False
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

    def trajectory(self, params: Parameters, episode: Episode, lr: float, steps: int) -> list[Tensor]:
        """The outputs on the query inputs before adaptation and after each of ``steps`` inner steps.

        Adapts whatever the grad and inference mode of the caller, and keeps no graph.

        Returns:
            ``steps + 1`` tensors ``[T, N*Q, ...]``.
        """
        # grad under inference mode silently returns zeros (pytorch #177318); clones are no inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            params = {name: kernel_layout(_usable(value)) for name, value in params.items()}
            buffers, rate = self._buffers(), _scalar(lr, params)
            chunks = []
            for chunk in self._chunks(Episode(*map(_usable, episode))):
                fast = params
                outputs = [self._trace(self._call, (None, None, 0), fast, buffers, chunk.query_inputs)]
                for k in range(steps):
                    in_dims = (None if k == 0 else 0, None, None, 0, 0)
                    support = (chunk.support_inputs, chunk.support_targets)
                    fast = self._trace(self._step, in_dims, fast, buffers, rate, *support)
                    outputs.append(self._trace(self._call, (0, None, 0), fast, buffers, chunk.query_inputs))
                chunks.append(outputs)
            return [torch.cat(outputs) for outputs in zip(*chunks, strict=True)]

    def adapt(self, params: Parameters, inputs: Tensor, targets: Tensor, lr: float, steps: int) -> Parameters:
        """The parameters of one task after ``steps`` inner steps.

        Args:
            inputs: ``[N*K, ...]``.
            targets: ``[N*K]``.
        """
        with torch.inference_mode(False), torch.no_grad():
            params = {name: _usable(value) for name, value in params.items()}
            rate, inputs, targets = _scalar(lr, params), _usable(inputs), _usable(targets)
            for _ in range(steps):
                params = self._step(params, self._buffers(), rate, inputs, targets)
            return params


def _scalar(lr: float, params: Parameters) -> Tensor:
    like = next(iter(params.values()))
    return torch.as_tensor(lr, dtype=like.dtype, device=like.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _usable(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()
