"""Several processes give what one gives."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from cli import main
from maml_lightning import SettingError
from maml_lightning.analysis.runs import read_scalars
from maml_lightning.data.omniglot import read_cache
from tests.runs import TINY, omniglot, process, run, words

pytestmark = [pytest.mark.usefixtures("folder"), pytest.mark.long]

# 20 meta-steps of a whole meta-batch of 8, 1,000 test episodes.
WHOLE = {
    **TINY,
    "data.meta_batch_size": 8,
    "data.train_episodes": 80,
    "data.val_episodes": 13,
    "data.test_episodes": 1000,
    "data.seed": 3,
    "trainer.max_epochs": 2,
    "trainer.precision": "64-true",
}
TESTED = {key: value for key, value in WHOLE.items() if not key.startswith("model.")}


def ddp(devices, **more):
    return {"trainer.strategy": "ddp", "trainer.devices": devices, **more}


def checkpoint(folder):
    return Path(folder) / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"


def weights(folder):
    content = torch.load(checkpoint(folder), weights_only=True)
    assert content["global_step"] == 20
    return torch.cat([value.flatten() for value in content["state_dict"].values()])


def scalars(folder):
    return read_scalars(Path(folder) / "lightning_logs" / "version_0")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, trained and tested."""
    folder = tmp_path_factory.mktemp("alone")
    main(words("fit", **WHOLE, **{"trainer.default_root_dir": folder}))
    cli = main(words("test", **TESTED, **{"trainer.default_root_dir": folder}, ckpt_path=checkpoint(folder)))
    return folder, json.loads((Path(cli.trainer.log_dir) / "test_results.json").read_text())


@pytest.mark.parametrize("devices", [2, 4])
def test_processes_give_what_one_gives(folder, alone, devices):
    spread = ddp(devices, **{"trainer.default_root_dir": folder})
    ended = run(*words("fit", **WHOLE, **spread))
    assert ended.returncode == 0, ended.stderr
    assert "sync_dist" not in ended.stderr
    expected = weights(alone[0])
    assert (weights(folder) - expected).norm() / expected.norm() < 1e-6
    ours, theirs = scalars(folder), scalars(alone[0])
    for tag in ("val/accuracy", "val/accuracy_step_0"):
        assert [value for _, value in ours[tag]] == [value for _, value in theirs[tag]]
    for tag in ("train/loss", "val/loss"):
        assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in theirs[tag]], rel=1e-5)
    # the same checkpoint: its test is the same to the last episode
    ended = run(*words("test", **TESTED, **spread, ckpt_path=checkpoint(alone[0])))
    assert ended.returncode == 0, ended.stderr
    (results,) = folder.glob("lightning_logs/*/test_results.json")
    assert json.loads(results.read_text()) == alone[1]


def test_two_processes_learn_the_curvature_matrices_that_one_learns(folder):
    settings = {**WHOLE, "model.meta_curvature": True, "trainer.max_epochs": 1}
    main(words("fit", **settings, **{"trainer.default_root_dir": "alone"}))
    ended = run(*words("fit", **settings, **ddp(2), **{"trainer.default_root_dir": "two"}))
    assert ended.returncode == 0, ended.stderr
    one, two = (curvature(name) for name in ("alone", "two"))
    assert one.unique().numel() > 20  # learned: no identities
    assert (two - one).norm() / one.norm() < 1e-6


def curvature(name):
    state = torch.load(checkpoint(name), weights_only=True)["state_dict"]
    return torch.cat([value.flatten() for key, value in state.items() if "curvature" in key])


def test_two_nodes_give_what_one_process_gives(folder, alone):
    port = str(find_free_network_port())
    flags = words("fit", **WHOLE, **ddp(1, **{"trainer.num_nodes": 2, "trainer.default_root_dir": folder}))
    nodes = [
        process(*flags, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK=str(node), LOCAL_RANK="0")
        for node in range(2)
    ]
    ends = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    expected = weights(alone[0])
    assert (weights(folder) - expected).norm() / expected.norm() < 1e-6


def training(folder, **flags):
    """Two processes that train for long, once their first checkpoint is there; and the second's process."""
    endless = {"trainer.max_epochs": 100000, "last_checkpoint.every_n_train_steps": 5}
    parent = process(*words("fit", **{**WHOLE, **endless, **flags}, **ddp(2, **{"trainer.default_root_dir": folder})))
    while parent.poll() is None and not checkpoint(folder).exists():
        time.sleep(0.05)
    assert parent.poll() is None, parent.communicate()[1]
    (child,) = [each for each in psutil.Process(parent.pid).children(recursive=True) if "cli.py" in each.cmdline()[1]]
    return parent, child


@pytest.mark.parametrize("victim", ["first", "second"])
def test_the_others_end_where_one_is_killed(folder, victim):
    parent, child = training(folder)
    begun = time.monotonic()
    os.kill(parent.pid if victim == "first" else child.pid, signal.SIGKILL)
    parent.communicate(timeout=60)
    gone, alive = psutil.wait_procs([child], timeout=max(60 - (time.monotonic() - begun), 0))
    assert (len(gone), alive) == (1, [])
    assert parent.returncode != 0
    step = torch.load(checkpoint(folder), weights_only=True)["global_step"]
    assert step >= 5
    assert step % 5 == 0


def test_processes_agree_to_leave_where_one_is_told(folder):
    parent, child = training(folder)
    child.terminate()
    printed = parent.communicate(timeout=60)[1]
    psutil.wait_procs([child], timeout=30)
    assert parent.returncode == 128 + signal.SIGTERM, printed
    assert not child.is_running()
    step = torch.load(checkpoint(folder), weights_only=True)["global_step"]
    assert f"after meta-step {step}; resume with --ckpt_path last" in printed
    assert "Traceback" not in printed


def test_spawned_processes_give_what_launched_ones_give(folder):
    found = []
    for strategy in ("ddp", "ddp_spawn"):
        settings = {**TINY, **ddp(2), "trainer.strategy": strategy, "seed_everything": 0}
        ended = run(*words("fit", **settings, **{"trainer.default_root_dir": strategy}))
        assert ended.returncode == 0, ended.stderr
        found.append(torch.load(checkpoint(strategy), weights_only=True))
    assert found[0]["global_step"] == found[1]["global_step"] == 2
    assert all(torch.equal(found[1]["state_dict"][name], value) for name, value in found[0]["state_dict"].items())


@pytest.mark.parametrize(
    ("strategy", "why"),
    [("fsdp", "spreads parameters"), ("deepspeed_stage_2", "spreads parameters")],
)
def test_strategies_that_cannot_work_are_refused(folder, strategy, why):
    with pytest.raises(SettingError, match=rf"trainer.strategy {strategy} {why} .*; use ddp"):
        main(words("fit", **WHOLE, **{"trainer.strategy": strategy}))
    assert list(folder.iterdir()) == []


def test_two_runs_at_once_pack_one_tree(folder, omniglot_root):
    tree = folder / "data" / "omniglot-py"
    tree.mkdir(parents=True)
    for part in ("images_background", "images_evaluation"):
        (tree / part).symlink_to(omniglot_root / "omniglot-py" / part)
    runs = [process(*omniglot(folder / "data", **{"trainer.default_root_dir": name})) for name in ("a", "b")]
    ends = [each.communicate(timeout=300)[1] for each in runs]
    assert [each.returncode for each in runs] == [0, 0], ends
    assert all("Packing" in end for end in ends)
    assert sorted(path.name for path in tree.iterdir()) == ["images_background", "images_evaluation", "packed_28.npz"]
    assert read_cache(tree / "packed_28.npz") is not None
