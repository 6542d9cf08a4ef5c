"""Command lines of tiny runs, and the real process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = {
    "data": "GlyphsDataModule",
    "data.ways": 3,
    "data.meta_batch_size": 4,
    "data.train_episodes": 8,
    "data.val_episodes": 4,
    "data.test_episodes": 12,
    "data.train_classes": 8,
    "data.val_classes": 8,
    "data.test_classes": 8,
    "model.net": "maml_lightning.ConvNet",
    "model.net.hidden_channels": 4,
    "model.net.blocks": 2,
    "model.inner_lr": 0.3,
    "model.eval_inner_steps": 2,
    "model.tasks_per_chunk": "null",
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
}
SINUSOIDS = {
    **{key: value for key, value in TINY.items() if not key.endswith("classes") and not key.startswith("model.net")},
    "data": "SinusoidsDataModule",
    "data.ways": None,
    "model.net": "maml_lightning.MLP",
    "model.loss": "torch.nn.functional.mse_loss",
    "model.inner_lr": 0.01,
}
# The least that every data module of episodes takes.
LEAST = {
    "shots": 1,
    "query_shots": 1,
    "meta_batch_size": 1,
    "train_episodes": 1,
    "val_episodes": 1,
    "test_episodes": 1,
    "num_workers": 0,
}
DATA = {key: value for key, value in TINY.items() if not key.startswith("model.")}


def words(*command, **flags):
    return [*map(str, command), *(f"--{key}={value}" for key, value in flags.items() if value is not None)]


def process(*arguments, **environment):
    """The command line as a process of its own, under way."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def run(*arguments, **environment):
    """The command line as a process of its own, at its end."""
    child = process(*arguments, **environment)
    stdout, stderr = child.communicate(timeout=300)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def omniglot(root, **extra):
    flags = {
        key: value
        for key, value in TINY.items()
        if key not in ("data.train_classes", "data.val_classes", "data.test_classes")
    }
    return words("fit", **{**flags, "data": "OmniglotDataModule", "data.root": root, **extra})
