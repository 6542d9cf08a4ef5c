"""mini-ImageNet and tieredImageNet as they are downloaded, on generated files of the same format."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_lightning import ImagesDataModule, SettingError
from maml_lightning.data.layout import lay_out, read_pickle
from tests.runs import ROOT

SPLITS = ("train", "val", "test")


def pictures(split):
    """Two classes of three pictures, each of one color of its own."""
    colors = np.random.default_rng(SPLITS.index(split)).integers(0, 256, (6, 1, 1, 3), np.uint8)
    return np.broadcast_to(colors, (6, 8, 8, 3)).copy()


def write_mini(folder, split, **protocol):
    names = [f"n{SPLITS.index(split)}{index}" for index in range(2)]
    content = {"image_data": pictures(split), "class_dict": {names[0]: [0, 2, 4], names[1]: [1, 3, 5]}}
    (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, **protocol))


def write_tiered(folder, split):
    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return np.frombuffer(file.getvalue(), np.uint8)

    (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps([png(each) for each in pictures(split)]))
    labels = {"label_specific": np.array([0, 1] * 3), "label_general": np.zeros(6, int)}
    (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(labels))


@pytest.mark.parametrize("write", [write_mini, write_tiered])
def test_pictures_come_out_as_they_went_in(write, tmp_path: Path):
    for split in SPLITS:
        write(tmp_path, split)
    assert lay_out(tmp_path, tmp_path / "root") == dict.fromkeys(SPLITS, 6)
    data = ImagesDataModule(str(tmp_path / "root"), size=8, ways=2, query_shots=1)
    for split in SPLITS:
        loaded = data.load_split(split)  # type: ignore[arg-type]
        assert loaded.counts == [3, 3]
        expected = torch.from_numpy(pictures(split)).permute(0, 3, 1, 2)
        assert torch.equal(loaded.inputs, expected[[0, 2, 4, 1, 3, 5]])


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_protocol_is_read(protocol, tmp_path: Path):
    write_mini(tmp_path, "train", protocol=protocol)
    assert np.array_equal(read_pickle(tmp_path / "mini-imagenet-cache-train.pkl")["image_data"], pictures("train"))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_pickle_that_could_run_code_does_not(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in SPLITS:
        write_mini(tmp_path, split)
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps({"image_data": Harmful(), "class_dict": {}}))
    with pytest.raises(SettingError, match=r"cannot be read \(it names (posix|nt).mkdir, which could run code\)"):
        lay_out(tmp_path, tmp_path / "root")
    assert not (tmp_path / "harmed").exists()


def test_what_cannot_be_laid_out_is_named(tmp_path: Path):
    with pytest.raises(SettingError, match=r"has no mini-imagenet-cache-train.pkl or train_images_png.pkl; give"):
        lay_out(tmp_path, tmp_path / "root")
    write_mini(tmp_path, "train")
    with pytest.raises(SettingError, match=r"mini-imagenet-cache-val.pkl is missing; download all three"):
        lay_out(tmp_path, tmp_path / "root")
    with pytest.raises(SettingError, match=r"is there already; give a new folder"):
        lay_out(tmp_path, tmp_path)
    for split in ("val", "test"):
        write_mini(tmp_path, split)
    for content, message in (
        (pickle.dumps({"image_data": np.zeros(3)}), "has not image_data and class_dict"),
        (pickle.dumps({"image_data": pictures("train"), "class_dict": {"../up": [0]}}), "../up is no name of a class"),
        (pickle.dumps({"image_data": pictures("train"), "class_dict": {"a": [9]}}), "has not row 9 of class a"),
        (b"\x80\x04damaged", "cannot be read"),
    ):
        (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(content)
        with pytest.raises(SettingError, match=message):
            lay_out(tmp_path, tmp_path / "root")
    assert not (tmp_path / "up").exists()


def test_the_command(tmp_path: Path):
    for split in SPLITS:
        write_mini(tmp_path, split)
    command = [sys.executable, "-m", "maml_lightning.data.layout", str(tmp_path), "root"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first, again = (
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        for _ in range(2)
    )
    assert (first.returncode, first.stdout) == (0, "6 train, 6 val, 6 test pictures written to root.\n")
    assert (again.returncode, again.stderr) == (1, "error: root is there already; give a new folder.\n")
