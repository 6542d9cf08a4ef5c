"""The parts of ``python -m benchmarks gpu`` that train, and those that communicate."""

import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.gpu_bench import Bench
from benchmarks.measure import LR, seconds
from maml_lightning import MAML, ConvNet, CostMonitor, GlyphsDataModule, OmniglotDataModule


def _data(bench: Bench, folder: str, **settings: Any) -> Any:
    """Episodes of the packed Omniglot file, or of glyphs."""
    small = {"train_episodes": 8 * settings["meta_batch_size"], "val_episodes": 4, "ways": 2} if bench.quick else {}
    settings |= small
    if bench.pack is None:
        return GlyphsDataModule(**settings, **({"train_classes": 8, "val_classes": 8} if bench.quick else {}))
    target = Path(folder) / "omniglot-py" / "packed_28.npz"
    target.parent.mkdir()
    shutil.copy(bench.pack, target)
    return OmniglotDataModule(root=folder, **settings)


def _trainer(bench: Bench, folder: str, callbacks: list[Callback], **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(
        accelerator="gpu" if bench.device.type == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **quiet,
        **settings,
    )


class _Utilisation:
    """Samples how busy a card is, as nvidia-smi says."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._ended.wait(0.5):
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            self.samples += [float(found.stdout)] if found.returncode == 0 else []

    def __enter__(self) -> "_Utilisation":
        if shutil.which("nvidia-smi"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()


def throughput(bench: Bench) -> None:
    """Meta-steps per second of ``Trainer.fit`` with the paper's 5-way 1-shot settings, and how busy the card is."""
    for workers in (0, 4):
        if bench.quick and workers:
            break
        with tempfile.TemporaryDirectory() as folder, _Utilisation() as busy:
            data = _data(bench, folder, ways=5, meta_batch_size=32, train_episodes=32 * 1500, num_workers=workers)
            maml, cost = MAML(ConvNet(out_features=data.ways), inner_lr=LR), CostMonitor()
            most = {} if bench.quick else {"max_time": {"seconds": 18}}
            trainer = _trainer(bench, folder, [cost], **most, max_epochs=1, limit_val_batches=0)
            trainer.fit(maml, datamodule=data)
        taken = trainer.callback_metrics["train/seconds_per_step"].item()
        bench.add(f"meta-steps per second, {workers} workers", 1 / taken)
        bench.add(f"minutes for 60,000 meta-steps, {workers} workers", 1000 * taken, "min")
        bench.add(f"utilisation, {workers} workers", statistics.mean(busy.samples) if busy.samples else "unknown", "%")


class _Clock(Callback):
    """Notes when validation accuracy first reaches each target, and ends the run at the last."""

    def __init__(self, bench: Bench, targets: list[float]) -> None:
        self.bench, self.targets, self.best, self.start = bench, targets, 0.0, time.monotonic()

    def on_train_start(self, *_: Any) -> None:
        self.start = time.monotonic()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        accuracy = trainer.callback_metrics["val/accuracy"].item()
        minutes = (time.monotonic() - self.start) / 60
        while self.targets and accuracy >= self.targets[0]:
            what = f"minutes to {self.targets.pop(0):.0%} of validation accuracy"
            self.bench.add(what, minutes, f"min, {trainer.global_step} meta-steps")
        if accuracy > self.best:
            self.best = accuracy
        trainer.should_stop = trainer.should_stop or not self.targets


def _accuracy(bench: Bench, config: str, ways: int, targets: list[float], limit: int) -> None:
    settings = yaml.safe_load(Path(f"configs/{config}.yaml").read_text())
    model = {name: value for name, value in settings["model"].items() if name != "net"}
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"ways": ways, "query_shots": 5, "meta_batch_size": 4, "train_episodes": 2000, "val_episodes": 200}
        data, clock = _data(bench, folder, **shape), _Clock(bench, list(targets))
        net = ConvNet(out_features=data.ways, pooling=True, hidden_channels=4 if bench.quick else 64)
        most = {"max_epochs": 2} if bench.quick else {"max_time": {"seconds": limit}, "max_epochs": 60}
        trainer = _trainer(bench, folder, [clock], **most, precision="bf16-mixed")
        trainer.fit(MAML(net, **model), datamodule=data)
    bench.add(f"best validation accuracy, {trainer.global_step} meta-steps", clock.best)
    for target in clock.targets:
        bench.add(f"minutes to {target:.0%} of validation accuracy", "not reached")


def accuracy_5way(bench: Bench) -> None:
    """Minutes to 95, 98 and 99 % at 5-way 1-shot."""
    _accuracy(bench, "omniglot_5way_1shot_best", 5, [0.95, 0.98, 0.99], 45)


def accuracy_20way(bench: Bench) -> None:
    """Minutes to 97 % at 20-way 1-shot."""
    _accuracy(bench, "omniglot_5way_1shot_best", 20, [0.9, 0.95, 0.97], 45)


def _communicate(rank: int, world: int, port: int, cuda: bool, file: str) -> None:
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for name, numbers in (("the gradient (448 kB)", 112_005), ("one number", 1)):
        tensor, times = torch.rand(numbers, device=device), []
        for _ in range(60):
            times.append(seconds(partial(dist.all_reduce, tensor), device))
        if rank == 0:
            unit = f"ms, {world} {'NCCL' if cuda else 'gloo'} processes"
            bench = Bench(Path(file), device, None, False)
            bench.add(f"all-reduce of {name}", statistics.median(times[10:]) * 1e3, unit)
    dist.destroy_process_group()


def collectives(bench: Bench) -> None:
    """Milliseconds of the all-reduce of a gradient and of one number, over as many cards as there are."""
    cuda = bench.device.type == "cuda"
    world = torch.cuda.device_count() if cuda else 2
    arguments = (world, find_free_network_port(), cuda, str(bench.file))
    torch.multiprocessing.spawn(_communicate, arguments, nprocs=world)
