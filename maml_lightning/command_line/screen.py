"""What the screen says before training: the algorithm, the tasks, the network, the device and the log folder."""

import os
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from maml_lightning.analysis.runs import algorithm_text, task_text


def header(config: dict[str, Any], net: nn.Module, trainer: Trainer) -> str:
    """Such as ``MAML, 1 inner step; 5-way 1-shot of GlyphsDataModule; ConvNet, 112,005 parameters in 14 tensors; …``.

    Args:
        config: the settings, as a run's ``config.yaml`` has them.
        net: the network.
        trainer: with devices and loggers.
    """
    sizes = [value.numel() for value in net.parameters()]
    # The first logger's folder alone: the next one takes the next number, once this one is there.
    folder = getattr(trainer.logger, "log_dir", None)
    processes = trainer.num_devices * trainer.num_nodes
    return "; ".join(
        [
            algorithm_text(config),
            task_text(config),
            f"{type(net).__name__}, {sum(sizes):,} parameters in {len(sizes)} tensors",
            f"on {trainer.strategy.root_device.type}" + (f", {processes} processes" if processes > 1 else ""),
            f"logs in {os.path.relpath(folder)}" if folder else "no logs",
        ]
    )
