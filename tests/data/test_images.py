import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import main
from maml_lightning import ImagesDataModule, SettingError
from maml_lightning.data import images
from maml_lightning.data import packs as data_packs
from maml_lightning.data.images import split_classes
from tests.runs import TINY, words

SMALL = {"size": 12, "ways": 2, "query_shots": 1, "meta_batch_size": 2, "train_episodes": 4, "val_episodes": 2}


def make(folder: Path, classes: int, start: int = 0) -> None:
    """Classes of 2, 3, 4, 2 … gray images of different sizes; the gray value gives class and image."""
    for index in range(start, start + classes):
        (folder / f"class {index:02d}").mkdir(parents=True)
        for number in range(2 + index % 3):
            shade = 10 * index + number
            Image.new("RGB", (20 + index, 15 + number), (shade, shade, shade)).save(
                folder / f"class {index:02d}" / f"{number}.png"
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
        assert (found[:, :2] != found[:, 2:]).all()  # in other images
        assert set((found % 10).flatten().tolist()) == {0, 1, 2, 3}  # all images of the classes that have more


def loaded(root: Path, split: str = "train", **settings: object) -> torch.Tensor:
    """The images of a split as a start finds them."""
    return ImagesDataModule(str(root), **{**SMALL, **settings}).load_split(split)[0].clone()  # type: ignore[arg-type]


def packs(root: Path) -> dict[str, int]:
    """The files of the packs, and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in (root / ".packed").iterdir()}


def only_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no image may be read."""
    monkeypatch.setattr(images, "read_image", None)


def test_packed_once_and_again_when_a_file_changes(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    first = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
    first.setup("fit")
    before = packs(tree)
    assert sorted(before) == ["train_3x12.npy", "train_3x12.npz", "val_3x12.npy", "val_3x12.npz"]
    assert len(set(caplog.messages)) == 2
    with monkeypatch.context() as patch:
        only_known(patch)
        again = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
        again.setup("fit")
    assert torch.equal(again.datasets["train"][0].query_inputs, first.datasets["train"][0].query_inputs)
    Image.new("L", (9, 9), 250).save(tree / "train" / "class 00" / "new.png")
    caplog.clear()
    later = ImagesDataModule(str(tree), **SMALL)  # type: ignore[arg-type]
    later.setup("fit")
    assert later.datasets["train"].counts.tolist() == [3, 3, 4, 2]  # type: ignore[attr-defined]
    (message,) = set(caplog.messages)
    assert message.startswith("Packing 12 images into")
    assert message.endswith("(again: class 00/new.png is new)")
    after = packs(tree)
    assert sorted(after) == sorted(before)  # the superseded one is gone
    assert after["val_3x12.npy"] == before["val_3x12.npy"]
    assert (tree / "train/class 00/new.png").unlink() is None
    loaded(tree)
    assert "class 00/new.png is gone" in caplog.text


def test_other_pixels_of_the_same_size_and_time_are_packed_again(tree: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    file = tree / "train" / "class 01" / "2.bmp"
    Image.new("RGB", (12, 12), (7, 7, 7)).save(file)
    assert (loaded(tree)[4] == 7).all()
    for shade, way in ((8, "written"), (9, "moved")):
        before = file.stat()
        other = tree / "other.bmp"
        Image.new("RGB", (12, 12), (shade,) * 3).save(other)
        if way == "written":
            file.write_bytes(other.read_bytes())
        else:
            other.replace(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert (loaded(tree)[4] == shade).all()
    assert "Packing 12 images" in caplog.text
    assert "(again: class 01/2.bmp has changed)" in caplog.text


def test_the_same_bytes_at_another_time_are_not_packed_again(tree: Path, monkeypatch: pytest.MonkeyPatch):
    first = loaded(tree)
    for file in tree.glob("train/*/*"):
        os.utime(file, (1, 1))
    shutil.copytree(tree, tree / "copy", ignore=shutil.ignore_patterns("copy"))
    only_known(monkeypatch)
    for root in (tree, tree / "copy"):
        assert torch.equal(loaded(root), first)


def test_a_file_that_did_not_change_is_not_read(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_packs, "GRAIN", -(10**18))  # as if the tree had been written long ago
    first = loaded(tree)
    read: list[str] = []
    reader = data_packs._read
    monkeypatch.setattr(data_packs, "_read", lambda file: read.append(file) or reader(file))
    monkeypatch.setattr(images.hashlib, "file_digest", None)
    assert torch.equal(loaded(tree), first)
    assert read == []
    (tree / "train/class 00/0.png").touch()
    assert torch.equal(loaded(tree), first)
    assert read == [str(tree / "train/class 00/0.png")]
    assert torch.equal(loaded(tree), first)
    assert len(read) == 1  # noted


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "dtype", "shape", "count", "text", "pixel", "about", "no about", "another about"]
)
def test_a_pack_that_is_not_what_was_written_is_made_anew(tree: Path, damage: str):
    first = loaded(tree)
    pack, about = tree / ".packed" / "train_3x12.npy", tree / ".packed" / "train_3x12.npz"
    before, whole, pixels = pack.stat(), pack.read_bytes(), np.load(pack)
    if damage in ("dtype", "shape", "count"):
        other = {"dtype": pixels.astype(np.float32), "shape": pixels[..., :6], "count": pixels[:5]}[damage]
        np.save(pack, other)
    elif damage == "about":
        about.write_bytes(about.read_bytes()[:100])
    elif damage == "no about":
        about.unlink()
    elif damage == "another about":
        loaded(tree, "val")
        about.write_bytes((tree / ".packed" / "val_3x12.npz").read_bytes())
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        pack.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"hello", "pixel": flipped}[damage])
    os.utime(pack, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert torch.equal(loaded(tree), first)
    assert pack.read_bytes() == whole


def test_settings_and_seeds_have_packs_of_their_own(tmp_path: Path):
    make(tmp_path, 12)
    found = [loaded(tmp_path, "test", **settings) for settings in ({}, {"size": 8}, {"channels": 1}, {"split_seed": 1})]
    assert [tuple(pictures.shape[1:]) for pictures in found] == [(3, 12, 12), (3, 8, 8), (1, 12, 12), (3, 12, 12)]
    assert found[0].shape != found[3].shape or not torch.equal(found[0], found[3])
    before = packs(tmp_path)
    assert len(before) == 8
    for settings in ({}, {"size": 8}, {"channels": 1}, {"split_seed": 1}):
        loaded(tmp_path, "test", **settings)
    assert {name: time for name, time in packs(tmp_path).items() if name.endswith(".npy")} == {
        name: time for name, time in before.items() if name.endswith(".npy")
    }


PACKING = """
import os, signal, sys
from maml_lightning.data import images
from maml_lightning.data import packs as data_packs
read, count = images.read_image, 0
def last(*given):
    global count
    count += 1
    if count == 5:
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        print("packing", flush=True)
        sys.stdin.readline()
    return read(*given)
images.read_image = last
images.ImagesDataModule(sys.argv[1], size=12).load_split("train")
"""


def test_what_killed_runs_left_is_removed_and_what_others_write_is_not(tree: Path):
    command = [sys.executable, "-c", PACKING, str(tree)]
    subprocess.run([*command, "kill"], check=False, stderr=subprocess.DEVNULL)
    (killed,) = packs(tree)
    with subprocess.Popen([*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stdin
        assert running.stdout.readline() == "packing\n"  # and the killed one's is gone
        (written,) = packs(tree)
        assert written != killed
        abroad = tree / ".packed" / f".train_3x12.npy.elsewhere.{os.getpid()}.aa"  # by a process of another machine
        abroad.touch()
        old = tree / ".packed" / ".train_3x12.npz.elsewhere.1.aa"
        old.touch()
        os.utime(old, (1, 1))
        (tree / ".packed" / "train_3x12_0a1b2c3d.npy").touch()  # as packs were once named
        loaded(tree)
        assert sorted(packs(tree)) == sorted([written, abroad.name, "train_3x12.npy", "train_3x12.npz"])
        mapped = loaded(tree)
        running.communicate("go on\n")
    assert running.returncode == 0
    assert sorted(packs(tree)) == [abroad.name, "train_3x12.npy", "train_3x12.npz"]
    assert torch.equal(mapped, loaded(tree))  # the file that it maps is another's now


def test_a_pack_without_room_for_its_description_is_not_kept(tree: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match=r"train_3x12.npy could not be written \(No space left on device\)"):
        pictures = loaded(tree)
    assert packs(tree) == {}
    monkeypatch.undo()
    assert torch.equal(loaded(tree), pictures)


def test_images_are_mapped_not_read(tree: Path):
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


def lists(root: Path, **rows: list[tuple[str, str]]) -> None:
    for split, named in rows.items():
        lines = ["filename,label", *(f"{name},{label}" for name, label in named)]
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")


def listed(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Four images of each of four classes a split, in ROOT/images, and their lists."""
    (root / "images").mkdir()
    found: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for index in range(12):
        for number in range(4):
            Image.new("RGB", (12, 12), (10 * index + number,) * 3).save(root / "images" / f"n{number}_{index}.png")
            found[("train", "val", "test")[index // 4]].append((f"n{number}_{index}.png", f"class {index}"))
    return found


def test_lists_name_images_and_their_classes(tmp_path: Path):
    lists(tmp_path, **listed(tmp_path))
    data = ImagesDataModule(str(tmp_path), **SMALL)  # type: ignore[arg-type]
    data.setup()
    assert list(data.classes_of("val")) == ["class 4", "class 5", "class 6", "class 7"]
    found = shades(data.datasets["val"].__getitems__(range(50)).support_inputs)
    assert set((found // 10).flatten().tolist()) == {4, 5, 6, 7}
    assert sorted(packs(tmp_path)) == [f"{split}_3x12.np{end}" for split in ("test", "train", "val") for end in "yz"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("n0_0.png", "class 9"), r"train.csv names n0_0.png 2 times; leave one line"),
        (("gone.png", "class 9"), r"train.csv, line 18: gone.png is not in .*images; mend it"),
        (("n0_11.png", ""), r"train.csv, line 18: n0_11.png has no label; mend it"),
        (
            ("n0_11.png", "class 11"),
            r"data.root: train and data.root: test share class class 11; a class must be in one",
        ),
        (
            ("n0_4.png", "class 3"),
            r"images/n0_4.png of (train|val) and images/n0_4.png of (train|val) are the same picture",
        ),
    ],
)
def test_what_a_list_must_not_name(tmp_path: Path, line: tuple[str, str], message: str):
    rows = listed(tmp_path)
    lists(tmp_path, **{**rows, "train": [*rows["train"], line]})
    with pytest.raises(SettingError, match=message):
        ImagesDataModule(str(tmp_path), **SMALL).setup()  # type: ignore[arg-type]


def test_lists_that_are_missing_or_have_other_columns_are_named(tmp_path: Path):
    rows = listed(tmp_path)
    lists(tmp_path, train=rows["train"], val=rows["val"])
    with pytest.raises(SettingError, match=r"has train.csv, val.csv but no list test.csv; give all"):
        ImagesDataModule(str(tmp_path)).setup("fit")
    (tmp_path / "test.csv").write_text("file;class\n")
    with pytest.raises(
        SettingError, match=r"test.csv has the columns file;class; its first line must name filename and"
    ):
        ImagesDataModule(str(tmp_path)).setup("fit")


def test_an_image_in_two_splits_is_named(tree: Path):
    shutil.copy(tree / "val/class 05/0.png", tree / "train/class 01/9.png")
    with pytest.raises(
        SettingError, match=r"val/class 05/0.png of val and train/class 01/9.png of train are the same pic"
    ):
        ImagesDataModule(str(tree), **SMALL).setup("fit")  # type: ignore[arg-type]
    shutil.move(tree / "train/class 01/9.png", tree / "test/class 08/9.png")
    ImagesDataModule(str(tree), **SMALL).setup("fit")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"test/class 08/9.png of test and val/class 05/0.png of val are the same"):
        ImagesDataModule(str(tree), **SMALL).setup("test")  # type: ignore[arg-type]


def test_a_class_in_two_splits_is_named(tree: Path, tmp_path: Path):
    (tree / "test/class 08").rename(tree / "test/class 01")
    with pytest.raises(
        SettingError, match=r"data.root: train and data.root: test share class class 01; a class must be"
    ):
        ImagesDataModule(str(tree), **SMALL).setup("fit")  # type: ignore[arg-type]
    for split in ("train", "val", "test"):
        for number, folder in enumerate(sorted((tree / split).iterdir())):
            folder.rename(tree / split / str(number))
    with pytest.raises(SettingError, match=r"train and data.root: val share class 0 .*, or number them differently"):
        ImagesDataModule(str(tree), **SMALL).setup("fit")  # type: ignore[arg-type]
    for split in ("val", "test"):
        for folder in (tree / split).iterdir():
            folder.rename(tree / split / f"{split} {folder.name}")
    ImagesDataModule(str(tree), **SMALL).setup("fit")  # type: ignore[arg-type]


def test_query_shots_fit_the_smallest_class(tree: Path):
    few = {key: value for key, value in SMALL.items() if key != "query_shots"}
    data = ImagesDataModule(str(tree), **few)  # type: ignore[arg-type]
    data.setup("test")
    assert data.query_shots == 1  # of 2 images beside 1 shot
    assert data.datasets["test"][0].query_inputs.shape[1] == 2
    with pytest.raises(
        SettingError, match=r"is 1 \+ 2, but class class 00 of the train split has 2 examples; lower one"
    ):
        ImagesDataModule(str(tree), **{**SMALL, "query_shots": 2}).setup("fit")  # type: ignore[arg-type]
    with pytest.raises(
        SettingError, match=r"is 2 \+ 1, but class class 00 of the train split has 2 examples; lower one"
    ):
        ImagesDataModule(str(tree), shots=2, **few).setup("fit")  # type: ignore[arg-type]


def test_classes_may_be_two_folders_deep(tmp_path: Path):
    for split, letters in (("train", "ab"), ("val", "cd"), ("test", "ef")):
        for letter in letters:
            make(tmp_path / split / letter, 2, 2 * "abcdef".index(letter))
    data = ImagesDataModule(str(tmp_path), class_depth=2, **SMALL)  # type: ignore[arg-type]
    data.setup("fit")
    assert list(data.classes_of("val")) == ["c/class 04", "c/class 05", "d/class 06", "d/class 07"]
    whole = ImagesDataModule(str(tmp_path), **SMALL)  # type: ignore[arg-type]
    assert {name: len(files) for name, files in whole.classes_of("train").items()} == {"a": 5, "b": 6}


def test_bad_trees_are_named(tmp_path: Path):
    make(tmp_path / "train", 3)
    with pytest.raises(SettingError, match=rf"data.root {tmp_path} has train but no folder val"):
        ImagesDataModule(str(tmp_path)).setup("fit")
    with pytest.raises(SettingError, match=rf"{tmp_path / 'nothing'} is not a folder"):
        ImagesDataModule(str(tmp_path / "nothing")).setup("fit")
    (tmp_path / "none").mkdir()
    with pytest.raises(SettingError, match=rf"data.root {tmp_path / 'none'} has no folders of images for train"):
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
