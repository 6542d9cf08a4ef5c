"""The parts of ``python -m benchmarks gpu`` that measure the meta-gradient by itself."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import CASES, LSTM, POOLED, Case, episodes, network
from benchmarks.gpu_bench import Bench
from benchmarks.measure import LR, ours, seconds
from benchmarks.peers import Run, peers_of, plain_loop
from maml_lightning import ConvNet, Episode, ResNet12
from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.engine.kernels import convolution, measured


def _resnet(ways: int) -> nn.Module:
    return ResNet12(out_features=ways)


IMAGES_84 = Case("ResNet-12, 84x84", tasks=4, query_shots=3, make=_resnet, shape=(3, 84, 84))


def _small(case: Case) -> Case:
    """A case in small: one filter of four, two tasks, a quarter of each side."""
    if case is IMAGES_84:
        return case._replace(
            tasks=2, ways=2, query_shots=1, make=lambda ways: ResNet12(3, ways, (4, 4)), shape=(3, 8, 8)
        )
    pooling, few = case.make is POOLED.make, {"tasks": 2, "ways": 2, "query_shots": 1, "shots": 1}
    return case._replace(**few, make=lambda ways: ConvNet(1, ways, 4, 2, pooling), shape=(1, 8, 8))


def _cases(bench: Bench, *cases: Case) -> list[Case]:
    return [_small(case) if bench.quick else case for case in cases]


def torch_func(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """``vmap`` of ``grad`` of ``grad``, like functorch's MAML in torch's own benchmark suite, but inside vmap."""
    start = {name: value.detach() for name, value in net.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    def outer(params: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        for _ in range(steps):
            gradient = grad(loss)(params, x, y)
            params = {name: value - lr * gradient[name] for name, value in params.items()}
        return loss(params, query_x, query_y)

    each = vmap(grad(outer), (None, 0, 0, 0, 0))
    return lambda: {name: value.mean(0) for name, value in each(start, *episode).items()}


def _error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    norm = torch.cat([value.flatten() for value in exact.values()]).norm()
    return max(((found[name].double() - value).norm() / norm).item() for name, value in exact.items())


def _error_of(run: Run, exact: dict[str, Tensor]) -> float:
    return _error(run(), exact)


def _typed(episode: Episode, dtype: torch.dtype) -> Episode:
    return Episode(*(part.to(dtype) if part.is_floating_point() else part for part in episode))


def _cudnn(enabled: bool, tf32: bool = True) -> Any:
    """A context with cuDNN, whose recurrent layers have no second derivative; its convolutions are TF32 by default."""
    return torch.backends.cudnn.flags(enabled=enabled, allow_tf32=tf32)


def correctness(bench: Bench) -> None:
    """The relative error of the meta-gradient against a plain loop in float64, on the same device."""
    lstm = Case("LSTM", tasks=2, make=LSTM, shape=(5, 16))
    cases = [*_cases(bench, CASES["1"], CASES["4"], IMAGES_84), lstm]
    for case in (case._replace(tasks=2, steps=2) for case in cases):
        net, batch = network(case).to(bench.device), _typed(episodes(case), torch.float32)
        batch = Episode(*(part.to(bench.device) for part in batch))
        double = network(case).to(bench.device).double()
        with _cudnn(case.make is not LSTM):
            exact = plain_loop(double, _typed(batch, torch.float64), LR, case.steps)()
        wide = ours(double, _typed(batch, torch.float64), LR, case.steps)
        bench.attempt(f"{case.name}, float64", "relative error", partial(_error_of, wide, exact))
        for tf32, (name, make) in product((False, True), {"maml_lightning": ours, "plain loop": plain_loop}.items()):
            single = make(net, batch, LR, case.steps)
            with _cudnn(case.make is not LSTM or make is ours, tf32):
                what = f"{case.name}, {'tf32' if tf32 else 'float32'}: {name}"
                bench.attempt(what, "relative error", partial(_error_of, single, exact))
        half = ours(net, batch, LR, case.steps)
        with torch.autocast(bench.device.type, torch.bfloat16):
            bench.attempt(f"{case.name}, bfloat16 autocast", "relative error", partial(_error_of, half, exact))


def _first(runs: dict[str, Run], name: str, make: Any, net: nn.Module, batch: Episode, case: Case) -> float:
    """Seconds of a contender's first call, which is kept if it works; making it may import what is not there."""
    run = make(net, batch, LR, case.steps)
    taken = seconds(run, batch.support_inputs.device)
    runs[name] = run
    return taken


@sdpa_kernel(SDPBackend.MATH)
def speed(bench: Bench) -> None:
    """Milliseconds of one meta-batch, medians over interleaved rounds, and the ratio to the fastest contender."""
    cases = _cases(bench, *(CASES[key] for key in "1234"), IMAGES_84)
    for case in cases:
        net, batch = network(case).to(bench.device), episodes(case, str(bench.device))
        runs: dict[str, Run] = {}
        peers = {name: make for name, make in peers_of(net).items() if name != "JAX"}  # which compiles for 20 s a case
        for name, make in {"maml_lightning": ours, "torch.func": torch_func, **peers}.items():
            first = partial(_first, runs, name, make, net, batch, case)
            bench.attempt(f"{case.name}: {name}, first", "s", first)
        for _ in range(0 if bench.quick else 6):  # after which it is captured as a CUDA graph
            runs["maml_lightning"]()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        start = time.perf_counter()
        while len(taken["maml_lightning"]) < 3 or (time.perf_counter() - start < 5 and not bench.quick):
            for name, run in runs.items():
                taken[name].append(seconds(run, bench.device))
        medians = {name: statistics.median(times) for name, times in taken.items()}
        for name, value in medians.items():
            bench.add(f"{case.name}: {name}", value * 1e3, "ms")
        own = medians.pop("maml_lightning")
        bench.add(f"{case.name}: times as fast as the fastest other", min(medians.values()) / own)


def _peak(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes held during a call, beyond those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from tests.zoo.memory import peak_bytes

    return peak_bytes(run)


def memory(bench: Bench) -> None:
    """Peak memory of a meta-batch against inner steps, with and without flat memory: 16 tasks, max-pooled network."""
    for flat in (False, True):
        peaks = {}
        for steps in (1, 5, 10):
            (case,) = _cases(bench, POOLED._replace(steps=steps))
            net, batch = network(case).to(bench.device), episodes(case, str(bench.device))
            # A CUDA graph's memory is held by no tensor: graphs are replayed operator by operator here.
            own: Any = {"flat_memory": flat, "tasks_per_chunk": None, "execution": "traced"}
            run = ours(net, batch, LR, case.steps, **own)
            run()
            peaks[steps] = _peak(run, bench.device)
            bench.add(f"{'flat memory' if flat else 'plain'}, {steps} steps", peaks[steps] / 2**20, "MiB")
        bench.add(f"{'flat memory' if flat else 'plain'}, 10 steps against 1", peaks[10] / peaks[1])


def kernels(bench: Bench) -> None:
    """A convolution of per-task weights and its gradients: as patches, task by task, as a grouped convolution."""
    stride, padding, dilation = [1, 1], [1, 1], [1, 1]
    for tasks, side, channels in ((32, 28, 64), (4, 84, 64)):
        if bench.quick:
            tasks, side, channels = 2, 6, 3
        x = torch.rand(tasks, 5, side, side, channels, device=bench.device)
        w = torch.rand(tasks, 3, 3, channels, channels, device=bench.device)

        def patches(x: Tensor = x, w: Tensor = w) -> Any:
            y = convolution._product(x, w, stride, padding)
            size, kernel = list(x.shape[2:4]), [3, 3]
            gradients = convolution._product_input(y, w, size, stride, padding)
            return gradients, convolution._product_weight(x, y, kernel, stride, padding)

        def direct(x: Tensor = x, w: Tensor = w) -> Any:
            y = torch.ops.maml_lightning.convolution(x, w, stride, padding, dilation, 1)
            size, kernel = list(x.shape[2:4]), [3, 3]
            gradients = torch.ops.maml_lightning.convolution_input(y, w, size, stride, padding, dilation, 1)
            return gradients, torch.ops.maml_lightning.convolution_weight(x, y, kernel, stride, padding, dilation, 1)

        def grouped(x: Tensor = x, w: Tensor = w) -> Any:
            y = torch.ops.maml_lightning.grouped_convolution(x, w, stride, padding, dilation, 1)
            size, window = list(x.shape[2:4]), (stride, padding, dilation, 1)
            gradients = torch.ops.maml_lightning.grouped_convolution_input(y, w, size, *window)
            return gradients, torch.ops.maml_lightning.grouped_convolution_weight(x, y, [3, 3], *window)

        for name, run in {"patches": patches, "task by task": direct, "grouped": grouped}.items():
            run()
            times = [seconds(run, bench.device) for _ in range(3 if bench.quick else 15)]
            what = f"{tasks} tasks, {side}x{side}, {channels} channels: {name}"
            bench.add(what, statistics.median(times) * 1e3, "ms")
            bench.add(f"{what}, peak", _peak(run, bench.device) / 2**20, "MiB")
    for case in _cases(bench, CASES["1"], IMAGES_84):
        net, batch = network(case).to(bench.device), episodes(case, str(bench.device))
        before = dict(measured._chosen)
        first = seconds(ours(net, batch, LR, case.steps), bench.device)
        chosen = Counter(way for key, way in measured._chosen.items() if key not in before)
        ways = ", ".join(f"{count} {way}" for way, count in chosen.most_common()) or "none measured"
        bench.add(f"{case.name}: convolutions chosen", ways)
        bench.add(f"{case.name}: first meta-batch, with its measurements", first, "s")


def _memory_reserved(device: torch.device) -> float:
    return torch.cuda.memory_reserved(device) / 2**20 if device.type == "cuda" else 0.0


def captured(bench: Bench) -> None:
    """The meta-gradient replayed as one CUDA graph against the same graphs operator by operator; and whether it is."""
    for case in _cases(bench, *(CASES[key] for key in "1234")):
        net, batches = network(case).to(bench.device), [episodes(case, str(bench.device), seed) for seed in range(3)]
        parameters = dict(net.named_parameters())
        loops = {name: InnerLoop(net, F.cross_entropy, execution=name) for name in ("auto", "traced")}

        def run(name: str, batch: Episode, loops: Any = loops, parameters: Any = parameters, case: Case = case) -> Any:
            return loops[name].meta_gradient(parameters, batch, LR, case.steps).gradient

        for name in ("traced", "auto"):  # until it is captured, and compared
            before = _memory_reserved(bench.device)
            for i in range(8):
                run(name, batches[i % 2])
            bench.add(f"{case.name}: {name}, memory reserved", _memory_reserved(bench.device) - before, "MiB")
        entries = loops["auto"]._captures._entries.values()
        graphs = sum(entry.agrees for entry in entries)
        why = "; ".join(dict.fromkeys(entry.why for entry in entries if entry.why))
        bench.add(f"{case.name}: CUDA graphs in use", f"{graphs} {why}".strip())
        kept = [run("auto", batch) for batch in batches]  # a result must outlive the next replay
        exact = [{name: value.double() for name, value in run("traced", batch).items()} for batch in batches]
        worst = max(map(_error, kept, exact))
        bench.add(f"{case.name}: auto against traced, of three meta-batches the most", worst, "relative error")
        taken: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(3 if bench.quick else 30):
            for name, times in taken.items():
                times.append(seconds(partial(run, name, batches[0]), bench.device))
        for name, times in taken.items():
            bench.add(f"{case.name}: {name}", statistics.median(times) * 1e3, "ms")


def compiled(bench: Bench) -> None:
    """The graphs handed to ``torch.compile``: its time at the start, and milliseconds of a meta-batch then."""
    for case in _cases(bench, CASES["1"], CASES["4"]):
        net, batch = network(case).to(bench.device), episodes(case, str(bench.device))
        run = ours(net, batch, LR, case.steps, compile=not bench.quick)
        bench.add(f"{case.name}: first meta-batch", seconds(run, bench.device), "s")
        taken = [seconds(run, bench.device) for _ in range(9)]
        bench.add(f"{case.name}: meta-batch", statistics.median(taken) * 1e3, "ms")
