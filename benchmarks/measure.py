"""Time and memory of the meta-gradient, compared with other packages."""

import copy
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import CASES, POOLED, Case, episodes, network
from benchmarks.peers import PEERS, Run, peers_of
from maml_lightning import MAML, ConvNet, CostMonitor, Episode, GlyphsDataModule
from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.analysis.runs import read_scalars
from maml_lightning.training.cost import WARM_UP

LR = 0.4
OURS = "maml_lightning"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``run``, until the device is done."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ours(net: nn.Module, episode: Episode, lr: float, steps: int, **settings: Any) -> Run:
    loop, parameters = InnerLoop(net, F.cross_entropy, **settings), dict(net.named_parameters())
    return lambda: loop.meta_gradient(parameters, episode, lr, steps).gradient


# A fixed chunk size of 4, so that the growth with inner steps does not depend on the measured choice of the chunk size.
FOUR = partial(ours, tasks_per_chunk=4)
CONTENDERS = {OURS: ours, "chunks of 4": FOUR, "chunks of 4, flat": partial(FOUR, flat_memory=True), **PEERS}


def disagreement(case: Case, device: str, contenders: dict) -> float:
    """Return the largest error against the plain loop on two tasks in float64, relative to the gradient's norm."""
    net = network(case).double().to(device)
    few = [tensor[:2].double() if tensor.is_floating_point() else tensor[:2] for tensor in episodes(case, device)]
    gradients = {name: make(copy.deepcopy(net), Episode(*few), LR, case.steps)() for name, make in contenders.items()}
    exact = gradients["plain loop"]
    norm = torch.cat([value.flatten() for value in exact.values()]).norm()
    return max(((g[n] - e).norm() / norm).item() for g in gradients.values() for n, e in exact.items())


@sdpa_kernel(SDPBackend.MATH)  # the other kernels of attention have no second derivative, for any contender
def speed(
    cases: tuple[str, ...] = tuple(CASES),
    compile: bool = False,
    rounds: int = 9,
    budget: float = 90,
    device: str = "cpu",
) -> None:
    """Milliseconds of one meta-batch, medians over interleaved rounds, and the ratio to the fastest peer.

    Args:
        cases: the cases to run, from 1, 2, 3, 4, LSTM, transformer, ResNet-12 and LoRA.
        compile: also time the compiled meta-gradient; compilation takes minutes.
        rounds: the maximum number of rounds; at least 3 always run.
        budget: seconds after which no further round starts.
        device: cpu or cuda.
    """
    columns = [*PEERS, OURS, *(["compiled"] if compile else [])]
    print(f"| case | {' | '.join(columns)} | ratio | error |")
    print("|---" * (len(columns) + 3) + "|")
    for key in cases:
        case = CASES[key]
        compared = {**peers_of(network(case)), OURS: ours}
        contenders = {**compared, "compiled": partial(ours, compile=True)} if compile else compared
        error = disagreement(case, device, compared)
        runs = {
            n: make(network(case).to(device), episodes(case, device), LR, case.steps) for n, make in contenders.items()
        }
        for run in runs.values():
            run()  # traces, compiles, chooses the chunk size
            run()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        start = time.perf_counter()
        for number in range(rounds):
            if number >= 3 and time.perf_counter() - start > budget:
                break
            for name, run in runs.items():
                taken[name].append(seconds(run, torch.device(device)))
        peer = min(set(PEERS) & set(taken), key=lambda name: statistics.median(taken[name]))
        ratios = [
            f"{statistics.median(p / o for p, o in zip(taken[peer], taken[name], strict=True)):.2f}"
            for name in contenders
            if name not in PEERS
        ]
        cells = [f"{statistics.median(taken[name]) * 1e3:.0f}" if name in taken else "" for name in columns]
        print(f"| {case.name} | {' | '.join(cells)} | {' and '.join(ratios)} | {error:.0e} |", flush=True)


def _peak_bytes(name: str, case: Case) -> int:
    make = CONTENDERS[name]
    run = make(network(case), episodes(case), LR, case.steps)

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    run()
    run()
    return status("VmHWM") - before


def memory(steps: tuple[int, ...] = (1, 2, 5, 10), names: tuple[str, ...] = tuple(CONTENDERS)) -> None:
    """Peak memory of one meta-batch against inner steps: 16 tasks, max-pooled network, a separate process for each.

    Args:
        steps: the numbers of inner steps.
        names: the implementations to measure.
    """
    print(f"| MB at inner steps | {' | '.join(map(str, steps))} | growth |")
    print("|---" * (len(steps) + 2) + "|")
    for name in names:
        peaks = []
        for count in steps:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peaks.append(process.submit(_peak_bytes, name, POOLED._replace(steps=count)).result())
        print(f"| {name} | {' | '.join(f'{p / 2**20:.0f}' for p in peaks)} | {peaks[-1] / peaks[0]:.2f} |", flush=True)


def batch(sizes: tuple[int, ...] = (8, 32, 128), device: str = "cpu") -> None:
    """Milliseconds per task against the meta-batch: 5-way 1-shot, 1 step.

    Args:
        sizes: the numbers of tasks in a meta-batch.
        device: cpu or cuda.
    """
    runs = {}
    for size in sizes:
        case = CASES["1"]._replace(tasks=size)
        runs[size] = ours(network(case).to(device), episodes(case, device), LR, case.steps)
        runs[size]()
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(9):
        for size, run in runs.items():
            taken[size].append(seconds(run, torch.device(device)) / size)
    print(f"| meta-batch | {' | '.join(map(str, sizes))} |")
    print("|---" * (len(sizes) + 1) + "|")
    print(
        f"| ms per task | {' | '.join(f'{statistics.median(taken[size]) * 1e3:.2f}' for size in sizes)} |", flush=True
    )


def family(names: tuple[str, ...] = (), device: str = "cpu") -> None:
    """Milliseconds of one training step of each variant and of MAML: 5-way 1-shot, 16 filters, medians over rounds.

    Args:
        names: names of files in configs/variants; without any, all are measured.
        device: cpu or cuda.
    """
    files = {file.stem: file for file in sorted(Path("configs/variants").glob("*.yaml"))}
    base = yaml.safe_load(Path("configs/omniglot_5way_1shot_16filters.yaml").read_text())["model"]
    case, steps = CASES["1"], {}
    for name in ("maml", *(names or files)):
        settings = base if name == "maml" else {**base, **yaml.safe_load(files[name].read_text())["model"]}
        given = {key: value for key, value in settings.items() if key != "net"}
        pretraining = 4400 if name == "pretrained" else 0
        net = ConvNet(hidden_channels=16, pretraining_classes=pretraining)
        maml, episode = MAML(net, **given).to(device), episodes(case, device)
        if pretraining:
            x, y = episode.query_inputs.flatten(0, 1)[None], episode.query_targets.flatten()[None]
            x, y = (torch.cat([part, part], 1) for part in (x, y))  # as many examples as in support and query sets
            y[0, 0] = pretraining - 1  # the number of classes is checked against the labels
            episode = Episode(x[:, :0], y[:, :0], x, y)
        steps[name] = lambda maml=maml, episode=episode: maml.training_step(episode, 0).backward()
        steps[name]()
        steps[name]()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(9):
        for name, step in steps.items():
            taken[name].append(seconds(step, torch.device(device)))
    print("| variant | ms | times MAML |")
    print("|---|---|---|")
    for name, times in taken.items():
        ratio = statistics.median(t / m for t, m in zip(times, taken["maml"], strict=True))
        print(f"| {name} | {statistics.median(times) * 1e3:.0f} | {ratio:.2f} |", flush=True)


def _timed(function: Callable, spent: list[float]) -> Callable:
    """The function, which also appends the seconds of each call."""

    def call(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    return call


def fit(steps: int = 200) -> None:
    """Where the wall time of ``Trainer.fit`` goes, without validation and checkpoints: 5-way 1-shot on glyphs.

    Args:
        steps: the number of meta-steps, after the first ones, which `CostMonitor` does not count.
    """
    gradient: list[float] = []
    sampling: list[float] = []
    maml = MAML(ConvNet(out_features=5), inner_lr=LR)
    maml._gradient = _timed(maml._gradient, gradient)
    data = GlyphsDataModule(ways=5, train_episodes=32 * (steps + WARM_UP), val_episodes=32)
    data.prepare_data()
    data.setup("fit")
    dataset = data.datasets["train"]
    draw = type(dataset).__getitems__
    type(dataset).__getitems__ = _timed(draw, sampling)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(max_epochs=1, limit_val_batches=0, default_root_dir=folder, callbacks=[CostMonitor()])
            trainer.fit(maml, datamodule=data)
    finally:
        type(dataset).__getitems__ = draw
    wall = trainer.callback_metrics["train/seconds_per_step"].item()
    parts = [sum(spent[-steps:]) / steps / wall for spent in (gradient, sampling)]
    print("| ms per meta-step | meta-gradient | sampling | everything else |")
    print("|---|---|---|---|")
    print(f"| {wall * 1e3:.1f} | {' | '.join(f'{part:.1%}' for part in (*parts, 1 - sum(parts)))} |", flush=True)


def _all_reduce(rank: int, world: int, port: int, count: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for name, numbers in (("the gradient", count), ("one number", 1)):
        tensor, times = torch.rand(numbers), []
        for _ in range(200):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - start)
        if rank == 0:
            results.put((name, statistics.median(times)))
    dist.destroy_process_group()


def _seconds_per_step(processes: int, tasks: int, steps: int) -> float:
    """Return the seconds per meta-step that a run logs: 5-way 1-shot glyphs, 64 filters, one thread per process."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "config": "configs/glyphs_5way_1shot.yaml",
            "data.meta_batch_size": tasks,
            "data.train_episodes": tasks * steps,
            "data.val_episodes": 32,
            "model.tasks_per_chunk": 16,
            "trainer.max_epochs": 1,
            "trainer.strategy": "ddp" if processes > 1 else "auto",
            "trainer.devices": processes,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
            "trainer.default_root_dir": folder,
        }
        command = [sys.executable, "cli.py", "fit", *(f"--{key}={value}" for key, value in flags.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        scalars = read_scalars(Path(folder) / "lightning_logs" / "version_0")
        return scalars["train/seconds_per_step"][-1][1]


def scale(processes: tuple[int, ...] = (1, 2, 4), steps: int = 60) -> None:
    """Milliseconds of one outer update and of its communication, with one thread per process, strong and weak scaling.

    Args:
        processes: the numbers of processes.
        steps: the number of meta-steps of each run.
    """
    count = sum(value.numel() for value in network(CASES["1"]).parameters())
    spawn = multiprocessing.get_context("spawn")
    print(f"Size of the gradient: {4 * count:,} bytes.")
    print("| processes | 32 tasks in total | 16 tasks per process | all-reduce of the gradient | of one number |")
    print("|---|---|---|---|---|")
    for world in processes:
        strong, weak = (_seconds_per_step(world, tasks, steps) * 1e3 for tasks in (32, 16 * world))
        reduced = {"the gradient": 0.0, "one number": 0.0}
        if world > 1:
            results, port = spawn.Queue(), find_free_network_port()
            ranks = [
                spawn.Process(target=_all_reduce, args=(rank, world, port, count, results)) for rank in range(world)
            ]
            for rank in ranks:
                rank.start()
            reduced = dict(results.get() for _ in reduced)
            for rank in ranks:
                rank.join()
        print(
            f"| {world} | {strong:.0f} | {weak:.0f} | {reduced['the gradient'] * 1e3:.2f} | "
            f"{reduced['one number'] * 1e3:.2f} |",
            flush=True,
        )
