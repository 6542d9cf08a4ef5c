import subprocess
import sys

import pytest
import torch

from maml_lightning import SettingError, load
from maml_lightning.trained import FOLDER, packaged, strip
from maml_lightning.training.checkpoints import read_checkpoint
from maml_lightning.training.confidence import calibration_of
from tests.runs import ROOT


def test_names_are_those_in_the_package():
    assert packaged("omniglot_5way_1shot") == FOLDER / "omniglot_5way_1shot.ckpt"
    assert packaged("omniglot_20way_1shot") == FOLDER / "omniglot_20way_1shot.ckpt"
    assert packaged("../trained/omniglot_5way_1shot") is None
    assert packaged("nothing") is None


def test_a_network_of_the_package_is_small_and_complete():
    for file in FOLDER.glob("*.ckpt"):
        assert file.stat().st_size < 1_000_000
        maml = load(file.stem)
        assert maml.inputs is not None
        assert calibration_of(maml) is not None
        assert maml(torch.rand(4, 1, 28, 28)).shape == (4, maml.inputs.ways)


def test_a_checkpoint_of_ones_own_loads(checkpoint, trained_weights):
    maml = load(checkpoint)
    assert (maml.inner_lr, maml.eval_inner_steps, maml.net.head.out_features) == (0.3, 2, 3)
    assert torch.equal(maml.net.head.weight, trained_weights["net.head.weight"])
    assert maml.inputs.ways == 3
    assert maml.hparams.tasks_per_chunk is None  # null, not left out


@pytest.fixture
def trained_weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_a_checkpoint_without_a_network_is_refused(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"inner_lr": 0.1}}, tmp_path / "bare.ckpt")
    with pytest.raises(SettingError, match=r"bare.ckpt does not name its network; use MAML.load_from_checkpoint"):
        load(tmp_path / "bare.ckpt")


def test_stripped_of_what_training_needs(checkpoint, tmp_path):
    strip(checkpoint, tmp_path / "small.ckpt")
    content = read_checkpoint(tmp_path / "small.ckpt")
    assert "optimizer_states" not in content
    assert torch.equal(load(tmp_path / "small.ckpt").net.head.weight, load(checkpoint).net.head.weight)
    command = [sys.executable, "-m", "maml_lightning.trained", str(tmp_path / "no.ckpt"), str(tmp_path / "out.ckpt")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ckpt_path ")
    assert "no.ckpt is not a file" in ended.stderr
