"""Command lines of tiny runs, and the real process."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
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


def process(*arguments, program=(sys.executable, str(ROOT / "cli.py")), **environment):
    """The command line as a process of its own, under way, its output piped."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def end(child, timeout=300):
    """A process at its end; where it does not come to one, it and its children are killed and the test fails."""
    try:
        stdout, stderr = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {timeout} s: {child.args}\n{child.communicate()}") from None
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def run(*arguments, **environment):
    """The command line as a process of its own, at its end."""
    return end(process(*arguments, **environment))


def in_terminal(command, timeout=300, **environment):
    """A command in a terminal of its own, where the progress bar moves: its status and all that it printed."""
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", **environment}
    child = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True, close_fds=True
    )
    os.close(slave)
    printed, deadline = b"", time.monotonic() + timeout
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                printed += os.read(master, 65536)
            except OSError:  # what Linux says when the last process has closed the terminal
                break
        elif child.poll() is not None:
            break
    else:
        os.killpg(child.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {timeout} s: {command}\n{printed.decode(errors='replace')}")
    os.close(master)
    return child.wait(10), printed.decode(errors="replace")


def omniglot(root, **extra):
    flags = {
        key: value
        for key, value in TINY.items()
        if key not in ("data.train_classes", "data.val_classes", "data.test_classes")
    }
    return words("fit", **{**flags, "data": "OmniglotDataModule", "data.root": root, **extra})
