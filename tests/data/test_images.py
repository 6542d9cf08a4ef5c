import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli import main
from maml_lightning import ImagesDataModule, SettingError
from maml_lightning.data import images
from maml_lightning.data.images import split_classes
from tests.command_line import TINY, words

SMALL = {"size": 12, "ways": 2, "query_shots": 1, "meta_batch_size": 2, "train_episodes": 4, "val_episodes": 2}


def make(folder: Path, classes: int, start: int = 0) -> None:
    """Classes of 2, 3, 4, 2 … grey pictures of different sizes; the grey tells class and picture."""
    for index in range(start, start + classes):
        (folder / f"class {index:02d}").mkdir(parents=True)
        for picture in range(2 + index % 3):
            shade = 10 * index + picture
            Image.new("RGB", (20 + index, 15 + picture), (shade, shade, shade)).save(
                folder / f"class {index:02d}" / f"{picture}.png"
            )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for start, split in enumerate(("train", "val", "test")):
        make(tmp_path / split, 4, 4 * start)
    return tmp_path


def shades(batch: torch.Tensor) -> torch.Tensor:
    return (batch[..., 0, 5, 5] * 255).round().long()


def test_episodes_are_of_the_splits_folders(tree: Path):
    data = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
    data.setup()
    for number, split in enumerate(("train", "val", "test")):
        batch = data.datasets[split].__getitems__(range(50))  # type: ignore[index]
        assert batch.support_inputs.shape == (50, 2, 3, 12, 12)
        found = torch.cat([shades(batch.support_inputs), shades(batch.query_inputs)], 1)
        assert set((found // 10).flatten().tolist()) == set(range(4 * number, 4 * number + 4))
        assert torch.equal(found[:, :2] // 10, found[:, 2:] // 10)  # query classes are the support's
        assert (found[:, :2] != found[:, 2:]).all()  # in other pictures
        assert set((found % 10).flatten().tolist()) == {0, 1, 2, 3}  # all pictures of the classes that have more


def test_packed_once_and_again_when_a_file_changes(tree: Path, monkeypatch: pytest.MonkeyPatch):
    first = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
    first.setup("fit")
    packed = {file: file.stat().st_mtime_ns for file in (tree / ".packed").iterdir()}
    assert len(packed) == 2
    with monkeypatch.context() as patch:
        patch.setattr(images, "read_picture", None)
        again = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
        again.setup("fit")
    assert torch.equal(again.datasets["train"][0].query_inputs, first.datasets["train"][0].query_inputs)
    Image.new("L", (9, 9), 250).save(tree / "train" / "class 00" / "new.png")
    later = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
    later.setup("fit")
    assert later.datasets["train"].counts.tolist() == [3, 3, 4, 2]  # type: ignore[attr-defined]
    assert {file: file.stat().st_mtime_ns for file in packed} == packed


def test_pictures_are_mapped_not_read(tree: Path):
    data = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
    data.setup("test")
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("the system does not tell what is mapped")
    assert str(tree / ".packed") in mapped.read_text()


def test_a_root_that_cannot_be_written(tree: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(images, "write_whole", full)
    data = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="could not be written .*Read-only"):
        data.setup("test")
    assert shades(data.datasets["test"][0].support_inputs).min() >= 80


def test_classes_alone_are_split_by_a_seed(tmp_path: Path):
    make(tmp_path, 25)
    names = [f"class {index:02d}" for index in range(25)]
    splits = split_classes(names, 0)
    assert {split: len(found) for split, found in splits.items()} == {"train": 16, "val": 4, "test": 5}
    assert sorted(name for found in splits.values() for name in found) == names
    assert split_classes(names, 0) == splits
    assert split_classes(names, 1) != splits
    data = ImagesDataModule(str(tmp_path), **SMALL)  # type: ignore[arg-type]
    assert sorted(data.classes_of("test")) == splits["test"]


def test_bad_trees_are_named(tmp_path: Path):
    make(tmp_path / "train", 3)
    with pytest.raises(SettingError, match=rf"data.root {tmp_path} has train but no folder val"):
        ImagesDataModule(str(tmp_path)).setup("fit")
    with pytest.raises(SettingError, match=rf"{tmp_path / 'nothing'} is not a folder"):
        ImagesDataModule(str(tmp_path / "nothing")).setup("fit")
    (tmp_path / "none").mkdir()
    with pytest.raises(SettingError, match=rf"data.root {tmp_path / 'none'} has no folders of pictures for train"):
        ImagesDataModule(str(tmp_path / "none")).setup("fit")
    with pytest.raises(SettingError, match=r"data.size must be at least 1 \(got 0\)"):
        ImagesDataModule(str(tmp_path), size=0)


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="nothing is unreadable to root")
def test_an_unreadable_folder_is_named(tmp_path: Path):
    make(tmp_path, 3)
    (tmp_path / "class 01").chmod(stat.S_IWUSR)
    with pytest.raises(SettingError, match=r"class 01.* cannot be read"):
        ImagesDataModule(str(tmp_path)).setup("fit")


def test_the_network_takes_the_datas_channels(tree: Path, folder: Path):
    flags = {key: value for key, value in TINY.items() if not key.startswith("data.") or "episodes" in key}
    for channels in (1, 3):
        cli = main(
            words(
                "fit",
                **{**flags, "data": "ImagesDataModule", "data.root": tree, "data.channels": channels},
                **{"data.size": 16, "data.ways": 2, "data.query_shots": 1, "data.meta_batch_size": 4},
            )
        )
        assert cli.model.net.body[0].in_channels == channels
        assert cli.trainer.logged_metrics["val/accuracy"].isfinite()
