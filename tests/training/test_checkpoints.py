import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from cli import main
from maml_lightning import LastCheckpoint, SettingError
from maml_lightning.training.checkpoints import last_checkpoint, read_checkpoint
from tests.runs import DATA, ROOT, TINY, process, run, words

pytestmark = pytest.mark.usefixtures("folder")

# 3 epochs of 5 meta-steps.
SMALL = {
    **TINY,
    "data.train_episodes": 20,
    "trainer.max_epochs": 3,
}
EVERY_STEP = {"last_checkpoint.every_n_train_steps": 1}
# Everything that has a state of its own.
STATEFUL = {
    "model.learn_inner_lr": "step",
    "model.meta_curvature": "true",
    "model.inner_steps": 2,
    "model.multi_step_epochs": 2,
    "model.first_order_epochs": 1,
    "lr_scheduler": "CosineAnnealingLR",
    "lr_scheduler.T_max": 3,
    "model.net": "tests.training.test_checkpoints.WithDropout",
    "model.net.hidden_channels": None,
    "model.net.blocks": None,
}
AVERAGED = {"trainer.callbacks+": "EMAWeightAveraging", "trainer.callbacks.decay": 0.5}  # Lightning's


class WithDropout(nn.Sequential):
    def __init__(self, out_features: int = 3):
        super().__init__(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(0.5), nn.Linear(8, out_features))


def state(folder, version=0):
    return torch.load(
        Path(folder) / "lightning_logs" / f"version_{version}" / "checkpoints" / "last.ckpt", weights_only=True
    )


def same(a, b):
    return a["global_step"] == b["global_step"] and all(
        torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items()
    )


def fit(folder, **flags):
    return main(words("fit", **{**SMALL, "trainer.default_root_dir": folder, **flags}))


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, [3, 5, 12]),
        (STATEFUL, [7]),
        ({"data.num_workers": 2}, [8]),
        ({"trainer.accumulate_grad_batches": 2}, [4]),
        (AVERAGED, [7]),
    ],
    ids=["plain", "stateful", "workers", "accumulated", "averaged"],
)
def test_a_run_that_goes_on_ends_in_the_same_weights(settings, stops):
    fit("whole", **settings)
    for stop in stops:
        fit("halted", **settings, **{"trainer.max_steps": stop})
        fit("halted", **settings, ckpt_path="last")
    assert same(state("whole"), state("halted", len(stops) - 1))


def test_a_run_that_goes_on_stays_in_its_folder():
    fit("run", **{"trainer.max_steps": 7})
    before = state("run")["callbacks"]
    cli = fit("run", ckpt_path="last")
    assert Path(cli.trainer.log_dir).name == "version_0"
    best = [value for key, value in state("run")["callbacks"].items() if key.startswith("ModelCheckpoint")]
    assert best[0]["best_model_score"] >= max(
        value["best_model_score"] for key, value in before.items() if key.startswith("ModelCheckpoint")
    )


def test_everything_at_its_default_a_run_stays_in_its_folder(folder):
    main(words("fit", **SMALL))
    cli = main(words("fit", **{**SMALL, "trainer.max_epochs": 4}, ckpt_path="last"))
    assert [path.name for path in (folder / "lightning_logs").iterdir()] == ["version_0"]
    assert cli.trainer.global_step == 20


def test_a_run_of_limited_epochs_goes_on():
    limited = {"trainer.limit_train_batches": 3, "trainer.max_epochs": 3}
    fit("whole", **limited)
    fit("halted", **{**limited, "trainer.max_epochs": 1})
    fit("halted", **limited, ckpt_path="last")
    assert same(state("whole"), state("halted"))


def test_training_begins_with_the_weights_and_settings_of_another_run(checkpoint):
    initial = {"initial_checkpoint": checkpoint, "trainer.default_root_dir": "run", "ckpt_path": "last"}
    cli = main(words("fit", **{**DATA, **initial, "trainer.max_epochs": 0}))
    theirs = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, theirs[name]) for name, value in cli.model.state_dict().items())
    assert cli.model.inner_lr == 0.3
    assert main(words("fit", **DATA, **initial)).trainer.global_step == 2  # anew: the other run's are not counted
    assert not torch.equal(state("run", 1)["state_dict"]["net.head.weight"], theirs["net.head.weight"])


def test_a_run_that_began_with_anothers_weights_goes_on_from_its_own():
    fit("other")
    initial = {"initial_checkpoint": next(Path("other").rglob("last.ckpt"))}
    fit("whole", **initial)
    fit("halted", **initial, **{"trainer.max_steps": 5})
    fit("halted", **initial, ckpt_path="last")
    assert same(state("whole"), state("halted"))


def test_matrices_begin_as_the_identity_where_a_checkpoint_has_none(checkpoint):
    curved = {**DATA, "model.meta_curvature": "true", "trainer.default_root_dir": "run", "trainer.max_epochs": 0}
    begun = main(words("fit", **curved, initial_checkpoint=checkpoint)).model.state_dict()
    theirs = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(begun[name], value) for name, value in theirs.items())
    matrices = {name: value[0] for name, value in begun.items() if name.startswith("adaptation.curvature.")}
    assert len(matrices) == 13
    assert set(begun) - set(theirs) == set(matrices)
    for value in matrices.values():
        assert torch.equal(value, torch.ones(len(value)) if value.dim() < 2 else torch.eye(len(value)))


def test_learned_matrices_begin_another_run_and_are_tested():
    fit("first", **{"model.meta_curvature": "true"})
    best = next(Path("first").rglob("best.ckpt"))
    theirs = torch.load(best, weights_only=True)["state_dict"]
    assert not torch.equal(theirs["adaptation.curvature.body/0/weight/filter"][0], torch.eye(9))
    begun = main(words("fit", **{**DATA, "trainer.max_epochs": 0}, initial_checkpoint=best)).model
    assert all(torch.equal(value, theirs[name]) for name, value in begun.state_dict().items())
    tested = main(words("test", **DATA, ckpt_path=best)).model
    assert torch.equal(
        tested.adaptation.curvature["head/weight/input"], theirs["adaptation.curvature.head/weight/input"]
    )
    with pytest.raises(
        SettingError, match=r"curvature matrices: adaptation\.curvature\..* is \(.*\) in it and missing"
    ):
        main(words("fit", **DATA, **{"model.meta_curvature": "false"}, initial_checkpoint=best))


def test_training_cannot_begin_with_another_network_or_without_a_file(checkpoint):
    with pytest.raises(SettingError, match=r"initial_checkpoint no\.ckpt is not a file; give a checkpoint"):
        fit("run", initial_checkpoint="no.ckpt")
    with pytest.raises(SettingError, match=r"another network.* \(4, .* in it and \(6, .* here"):
        main(words("fit", **DATA, initial_checkpoint=checkpoint, **{"model.net.hidden_channels": 6}))


def test_last_of_nothing_starts_from_the_beginning_and_cannot_be_tested():
    assert fit("new", ckpt_path="last", **{"trainer.max_steps": 1}).trainer.global_step == 1
    with pytest.raises(SettingError, match=r"ckpt_path last: there is no checkpoint in .*lightning_logs; run fit"):
        main(words("test", **DATA, ckpt_path="last"))


def test_period_is_of_the_last_checkpoint(folder):
    for flag in ("last_checkpoint", "checkpoint"):
        cli = fit(flag, **{f"{flag}.every_n_train_steps": 2, "trainer.max_steps": 2})
        (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, LastCheckpoint)]
        assert callback.every_n_train_steps == 2
    with pytest.raises(SettingError, match=r"last_checkpoint.every_n_train_steps must be at least 1.*got 0"):
        fit("zero", **{"last_checkpoint.every_n_train_steps": 0})
    assert not (folder / "zero").exists()


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(folder, damage):
    fit("run", **{"trainer.max_epochs": 2})
    checkpoints = folder / "run" / "lightning_logs" / "version_0" / "checkpoints"
    last, best = checkpoints / "last.ckpt", checkpoints / "best.ckpt"
    whole = state("run")
    damage(last)
    with pytest.raises(SettingError, match=rf"{last} was not loaded: it is damaged.*; give {best}, which is whole"):
        read_checkpoint(last)
    with pytest.warns(UserWarning, match=rf"Damaged, and not used: {last}; resuming from {best}"):
        assert last_checkpoint(folder / "run" / "lightning_logs") == best
    with pytest.warns(UserWarning, match="Damaged, and not used"):
        fit("run", **{"trainer.max_epochs": 2}, ckpt_path="last")
    assert same(whole, state("run"))
    damage(last)
    damage(best)
    with pytest.raises(SettingError, match=r"every checkpoint in .* is damaged"):
        last_checkpoint(folder / "run" / "lightning_logs")


def started(folder, *before, **flags):
    """A fit in a process of its own, when its first checkpoint is there."""
    child = process(*words("fit", **{**SMALL, **EVERY_STEP, "trainer.default_root_dir": folder, **flags}))
    pattern = "lightning_logs/version_0/checkpoints/last.ckpt"
    while child.poll() is None and not list(Path(folder).glob(pattern)):
        time.sleep(0.01)
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(folder, number):
    long = {"trainer.max_epochs": 2000, "trainer.check_val_every_n_epoch": 3000}
    child = started(folder, **long)
    child.send_signal(number)
    printed = child.communicate(timeout=100)[1]
    assert child.returncode == 128 + number
    step = int(re.search(rf"{number.name}: saved .*last.ckpt after meta-step (\d+); resume with", printed)[1])
    assert "Traceback" not in printed
    left = state(folder)
    assert left["global_step"] == step
    fit(folder / "whole", **{**long, "trainer.max_steps": step})
    assert same(left, state(folder / "whole"))


def test_slurm_requeues_and_the_job_goes_on(folder):
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $@ > {folder}/requeued\n")
    (folder / "bin" / "scontrol").chmod(0o755)
    job = {f"SLURM_{key}": value for key, value in {"JOB_ID": "7", "JOB_NAME": "maml", "NTASKS": "1"}.items()}
    zero = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    environment = {**job, **zero, "SLURM_NODELIST": "localhost", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    flags = {**SMALL, "trainer.default_root_dir": folder / "job", "trainer.max_epochs": 20}
    child = process(*words("fit", **flags, **EVERY_STEP), **environment)
    while child.poll() is None and not list(folder.glob("job/lightning_logs/*/checkpoints/last.ckpt")):
        time.sleep(0.01)
    child.send_signal(signal.SIGUSR1)
    while child.poll() is None and not (folder / "requeued").exists():
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert (folder / "requeued").read_text().split() == ["requeue", "7"]
    assert (folder / "job" / "hpc_ckpt_1.ckpt").exists()
    again = run(*words("fit", **flags, **EVERY_STEP), **environment)
    assert "hpc_ckpt_1.ckpt" in again.stderr
    fit(folder / "whole", **{"trainer.max_epochs": 20})
    (ended,) = [file for file in folder.glob("job/lightning_logs/*/checkpoints/last.ckpt") if "version_7" in str(file)]
    assert same(torch.load(ended, weights_only=True), state(folder / "whole"))


# Runs the command line with a process that dies by kill -9 when half of its fourth last.ckpt is written.
DIES_WRITING = """
import io, os, signal, sys
import maml_lightning.training.checkpoints as checkpoints
from cli import main
writes = 0
def half(path, write, temporary):
    global writes
    writes += path.name == "last.ckpt"
    dies = path.name == "last.ckpt" and writes == 4
    content = io.BytesIO()
    write(content)
    with path.with_name(temporary).open("wb") as file:
        file.write(content.getbuffer()[: len(content.getbuffer()) // 2 if dies else None])
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(path.with_name(temporary), path)
checkpoints.write_whole = half
main(sys.argv[1:])
"""


@pytest.mark.long
def test_ten_kills_end_in_the_same_weights(folder):
    epochs = {"trainer.max_epochs": 60}
    fit("whole", **epochs)
    flags = words("fit", **{**SMALL, **EVERY_STEP, **epochs, "trainer.default_root_dir": "killed", "ckpt_path": "last"})
    delays = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    steps = []
    for kill, delay in enumerate([*delays, None]):
        if delay is None:
            command = [sys.executable, "-c", DIES_WRITING, *flags]
            child = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False
            )
            assert list(folder.glob("killed/lightning_logs/version_0/checkpoints/.last.ckpt.part"))
        else:
            last = folder / "killed/lightning_logs/version_0/checkpoints/last.ckpt"
            before = last.stat().st_mtime_ns if last.exists() else 0
            child = process(*flags)
            while child.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
                time.sleep(0.01)
            time.sleep(delay / 2)
            child.kill()
            child.communicate()
        assert child.returncode == -signal.SIGKILL, f"kill {kill} came too late"
        steps.append(state("killed")["global_step"])
    assert sorted(set(steps)) == steps  # each went on from where the one before it was killed
    assert run(*flags).returncode == 0
    assert same(state("whole"), state("killed"))
    assert not list(folder.glob("killed/lightning_logs/version_0/checkpoints/.*"))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (0, r"error: The checkpoint .* was not written \(No space left on device\), the one before it is whole"),
        (2, r"error: .*No space left on device.*; make room, "),  # TensorBoard's, or the checkpoint's
    ],
)
def test_a_full_disk_is_named_and_leaves_no_part(small_disk, pictures, message):
    fit(small_disk, **{"trainer.max_epochs": 1, "inspection.episodes": 0})
    whole = state(small_disk)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    flags = {**SMALL, "trainer.default_root_dir": small_disk, "inspection.episodes": pictures}
    ended = run(*words("fit", **flags, ckpt_path="last"))
    assert ended.returncode == 1
    assert re.match(message, ended.stderr.strip().splitlines()[-1])
    assert pictures or "Traceback" not in ended.stderr  # TensorBoard's thread prints one of its own
    assert same(whole, state(small_disk))
    assert not list(small_disk.rglob(".*.part"))
