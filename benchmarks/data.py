"""How much of a meta-step is drawing its episodes."""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import seconds
from maml_lightning import MAML, ConvNet, ImagesDataModule

CLASSES, PICTURES = 32, 24  # 20 classes are for training


def _folders(root: Path, size: int) -> None:
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / f"{label:02d}").mkdir()
        for number in range(PICTURES):
            pixels = random.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{label:02d}" / f"{number}.bmp")


def data(rounds: int = 5, size: int = 84, device: str = "cpu") -> None:
    """Milliseconds of drawing a meta-batch of 4 tasks from a mapped pack, and of the meta-step with it, medians.

    5-way 5-shot, 15 queries per class, color; four max-pooled blocks of 32 filters, 5 inner steps, as in the paper.

    Args:
        rounds: meta-steps that are timed, after one that is not.
        size: edge length of the pictures in pixels.
        device: cpu or cuda.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        _folders(Path(folder), size)
        module = ImagesDataModule(folder, size=size, shots=5, query_shots=15)
        dataset = module.make_dataset("train")
        net = ConvNet(in_channels=3, out_features=5, hidden_channels=32, pooling=True)
        maml, tasks = MAML(net, inner_lr=0.01, inner_steps=5).to(device), module.meta_batch_size
        drawn, stepped = [], []
        for number in range(rounds + 1):
            found = []

            def draw(first: int = number * tasks, found: list = found) -> None:
                found.append(dataset.__getitems__(range(first, first + tasks)))

            drawn.append(seconds(draw, torch.device(device)))
            batch = type(found[0])(*(part.to(device) for part in found[0]))
            stepped.append(seconds(lambda batch=batch: maml.training_step(batch, 0).backward(), torch.device(device)))
    ours, whole = (statistics.median(times[1:]) * 1e3 for times in (drawn, stepped))
    print(f"| {size}x{size} color, 5-way 5-shot, 15 queries, {tasks} tasks | drawing | meta-step | share of drawing |")
    print("|---|---|---|---|")
    print(f"| ms | {ours:.1f} | {whole:.0f} | {ours / (ours + whole):.1%} |", flush=True)
