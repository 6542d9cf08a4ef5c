"""A run that goes wrong says so."""

import os
import re
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli import main
from maml_lightning import MAML, NonFiniteError, SettingError
from maml_lightning.data import EpisodeDataset
from tests.reference import images
from tests.runs import DATA, ROOT, TINY, words

pytestmark = pytest.mark.usefixtures("folder")

# 2 epochs of 3 meta-steps; episodes 12 to 23 are those of the second epoch.
SMALL = {**TINY, "data.train_episodes": 12, "trainer.max_epochs": 2}


@pytest.fixture
def broken(monkeypatch):
    """Makes one episode of a split not a number."""

    def put(split, episode, part):
        def broken(dataset, indices):
            batch = whole(dataset, indices)
            if dataset.split == split and episode in indices:
                batch[part][list(indices).index(episode), 0] = torch.nan
            return batch

        monkeypatch.setattr(EpisodeDataset, "__getitems__", broken)

    whole = EpisodeDataset.__getitems__
    return put


@pytest.mark.parametrize("part", [0, 2], ids=["support", "query"])
def test_a_step_that_is_not_finite_names_itself_and_the_episode(broken, part):
    broken("train", 18, part)
    with pytest.raises(
        NonFiniteError, match=r"meta-gradient of meta-step 4 is not finite \(train split, episodes 18\)"
    ):
        main(words("fit", **SMALL))


def test_gradients_that_are_accumulated_name_the_episode(broken):
    broken("train", 6, 0)
    with pytest.raises(NonFiniteError, match=r"meta-step 0 is not finite \(train split, episodes 6\)"):
        main(words("fit", **{**SMALL, "trainer.accumulate_grad_batches": 3}))


def test_a_gradient_alone_names_the_episodes_of_the_step():
    without = {"model.loss": "tests.training.test_safety.without_gradient", "model.inner_steps": 0}
    with pytest.raises(NonFiniteError, match=r"\(train split, episodes 0 to 3, whose outputs are finite"):
        main(words("fit", **SMALL, **without, **{"trainer.num_sanity_val_steps": 0}))


def without_gradient(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    picked = outputs.gather(-1, targets[:, None])
    return torch.where(picked == picked, (picked - picked).abs().sqrt(), picked).mean()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_evaluation_that_is_not_finite_names_the_episode(broken, checkpoint, command):
    split = {"validate": "val", "test": "test"}[command]
    broken(split, 3, 0)
    with pytest.raises(NonFiniteError, match=rf"output is not finite \({split} split, episodes 3\)"):
        main(words(command, **DATA, ckpt_path=checkpoint))
    skipped = main(words(command, **DATA, ckpt_path=checkpoint, **{"model.non_finite": "skip"}))
    assert 0 <= skipped.trainer.logged_metrics[f"{split}/accuracy"] <= 1


def test_a_step_that_is_skipped_changes_nothing_and_is_counted(broken, folder):
    weights, moments = [], []
    skipping = {"model.non_finite": "skip", "trainer.default_root_dir": folder}
    broken("train", 18, 0)
    for steps in (4, 5, 6):
        cli = main(words("fit", **SMALL, **skipping, **{"trainer.max_steps": steps}))
        weights.append(torch.cat([value.detach().flatten() for value in cli.model.parameters()]))
        (state, *_) = cli.trainer.optimizers[0].state.values()
        moments.append((state["step"].item(), state["exp_avg"].clone()))
    assert torch.equal(weights[0], weights[1])
    assert moments[0][0] == moments[1][0] == 4
    assert torch.equal(moments[0][1], moments[1][1])
    assert not torch.equal(weights[1], weights[2])
    assert weights[2].isfinite().all()
    events = EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/skipped_steps")] == [(4, 1.0), (5, 1.0)]


# Trains in a process that may have 300 MB more than it has when training begins.
SHORT_OF_MEMORY = """
import re, resource, sys
from pathlib import Path
from cli import main
from maml_lightning import MAML, SettingError
def limit(maml):
    now = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + 300_000_000,) * 2)
MAML.on_train_start = limit
try:
    main(sys.argv[1:])
except SettingError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_memory_that_runs_out_names_the_chunk_size():
    large = {**TINY, "data.meta_batch_size": 1024, "data.train_episodes": 1024, "model.net.hidden_channels": 64}
    command = [sys.executable, "-c", SHORT_OF_MEMORY, *words("fit", **large, **{"trainer.num_sanity_val_steps": 0})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert re.match(r"error: Memory ran out with model.tasks_per_chunk None: give a smaller number", last), ended.stderr


def test_a_device_that_is_full_names_the_chunk_size(monkeypatch):
    maml = MAML(net=torch.nn.Linear(100, 3).double(), tasks_per_chunk=2)
    monkeypatch.setattr(maml, "_check", lambda batch: batch)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(maml._inner_loop, "gradient", full)
    with pytest.raises(SettingError, match=r"Memory ran out with model.tasks_per_chunk 2: give a smaller number"):
        maml.training_step(images(), 0)
