"""Omniglot: the tree, its cache, its splits, and everything that may be wrong with them."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maml_lightning.data import OmniglotDataModule, omniglot, packs
from maml_lightning.data.omniglot import load_characters, split_characters
from maml_lightning.errors import SettingError


@pytest.fixture
def small_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of three characters; drawing ``d`` of character ``c`` is a black bar of ``5 (c + 1)`` rows and a dot."""
    monkeypatch.setattr(omniglot, "PARTS", {"images_background": {"Greek": 2}, "images_evaluation": {"ULOG": 1}})
    monkeypatch.setattr(omniglot, "SHAPE", (3, 20, 28, 28))
    names = ["images_background/Greek/character01", "images_background/Greek/character02"]
    for character, name in enumerate([*names, "images_evaluation/ULOG/character01"]):
        folder = tmp_path / "omniglot-py" / name
        folder.mkdir(parents=True)
        for drawing in range(20):
            pixels = np.full((105, 105), 255, np.uint8)
            pixels[: 15 * (character + 1)] = 0
            pixels[60 + drawing :, 60:64] = 0
            Image.fromarray(pixels).convert("1").save(folder / f"{character:04}_{drawing + 1:02}.png")
    return tmp_path


def test_packing_inverts_reduces_and_keeps_the_order(small_root: Path):
    images = load_characters(small_root)
    assert (images.shape, images.dtype) == ((3, 20, 28, 28), np.uint8)
    # 15 of 105 rows are 4 of 28: ink above, paper below, where Lanczos no longer rings
    for character in range(3):
        edge = 4 * (character + 1)
        assert (images[character, :, : edge - 2, :10] > 250).all()
        assert (images[character, :, edge + 3 :, :10] < 5).all()
    assert images[0, 0, 18, 16] > 128 > images[0, 19, 18, 16]  # the dot's line begins at row 16, and at row 21


def test_the_second_start_reads_the_cache_alone(small_root: Path, monkeypatch: pytest.MonkeyPatch):
    images = load_characters(small_root)
    monkeypatch.setattr(omniglot, "pack", None)
    assert np.array_equal(load_characters(small_root), images)


def test_a_tree_with_other_contents_is_packed_again(small_root: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    before = load_characters(small_root)
    first, other = (small_root / f"omniglot-py/images_background/Greek/character0{number}" for number in (1, 2))
    for drawing in range(20):  # the second's bars in the first's files, of the same sizes and times
        file = first / f"0000_{drawing + 1:02}.png"
        content, times = (other / f"0001_{drawing + 1:02}.png").read_bytes(), file.stat()
        file.write_bytes(content[: times.st_size].ljust(times.st_size, b"\0"))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if file.stat().st_size != len(content):
            file.write_bytes(content)
    after = load_characters(small_root)
    assert not np.array_equal(after[0], before[0])
    assert np.array_equal(after[0], before[1])
    assert np.array_equal(after[1:], before[1:])
    assert "again: images_background/Greek/character01/0000_01.png has changed" in caplog.text
    (other / "0001_01.png").rename(other / "0001_00.png")
    assert np.array_equal(load_characters(small_root), after)
    assert "character02/0001_00.png is new" in caplog.text


def test_the_same_bytes_at_another_time_are_not_packed_again(small_root: Path, monkeypatch: pytest.MonkeyPatch):
    images = load_characters(small_root)
    monkeypatch.setattr(omniglot, "pack", None)
    for file in small_root.rglob("*.png"):
        os.utime(file, (1, 1))
    assert np.array_equal(load_characters(small_root), images)


def test_a_cache_without_its_tree_is_used_but_not_with_a_part_of_it(small_root: Path):
    images = load_characters(small_root)
    shutil.rmtree(small_root / "omniglot-py" / "images_evaluation")
    assert "Omniglot is not at" in refusal(small_root)
    shutil.rmtree(small_root / "omniglot-py" / "images_background")
    assert np.array_equal(load_characters(small_root), images)


def test_what_killed_runs_left_is_removed(small_root: Path):
    folder = small_root / "omniglot-py"
    script = (
        "import sys; from maml_lightning.data import packs, omniglot; print(packs.temporary(omniglot.Path('p.npz')))"
    )
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    left = folder / ended.stdout.strip().replace("p.npz", "packed_28.npz")
    left.touch()
    mine, old = folder / packs.temporary(folder / "packed_28.npz"), folder / f".packed_28.npz.{'0' * 32}"
    mine.touch()
    old.touch()
    os.utime(old, (1, 1))
    load_characters(small_root)
    assert sorted(file.name for file in folder.glob(".*")) == [mine.name]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "shape", "dtype", "text", "object", "alone"])
def test_a_damaged_cache_is_made_anew(small_root: Path, damage: str):
    images = load_characters(small_root)
    cache = small_root / "omniglot-py" / "packed_28.npz"
    whole = cache.read_bytes()
    with np.load(cache) as packed:
        arrays = dict(packed)
    if damage == "shape":
        np.savez(cache, **{**arrays, "images": images[:2]})
    elif damage == "dtype":
        np.savez(cache, **{**arrays, "images": images.astype(np.float32)})
    elif damage == "alone":  # as other versions wrote it
        np.savez(cache, images=images)
    elif damage == "object":
        np.savez(cache, images=np.array([{}], dtype=object))
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        cache.write_bytes({"cut": whole[:middle], "flip": flipped, "empty": b"", "text": b"hello"}[damage])
    assert omniglot.read_cache(cache) is None
    assert np.array_equal(load_characters(small_root), images)
    assert np.array_equal(np.load(cache)["images"], images)


def test_two_at_once_leave_one_whole_cache(small_root: Path):
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(load_characters, [small_root, small_root])
    cache = small_root / "omniglot-py" / "packed_28.npz"
    assert np.array_equal(first, second)
    assert np.array_equal(np.load(cache)["images"], first)
    assert sorted(path.name for path in cache.parent.iterdir()) == [
        "images_background",
        "images_evaluation",
        cache.name,
    ]


def test_a_full_disk_leaves_nothing_behind(small_root: Path, monkeypatch: pytest.MonkeyPatch):
    def fill_the_disk(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", fill_the_disk)
    with pytest.warns(UserWarning, match=r"packed_28.npz could not be written .*No space left"):
        images = load_characters(small_root)
    assert images.shape == (3, 20, 28, 28)
    names = sorted(path.name for path in (small_root / "omniglot-py").iterdir())
    assert names == ["images_background", "images_evaluation"]


def test_a_folder_that_cannot_be_written_is_packed_in_memory(small_root: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert load_characters(small_root).shape == (3, 20, 28, 28)


def refusal(root: Path, **settings: Any) -> str:
    """The message of the error; nothing may have been written."""
    before = sorted(root.rglob("*"))
    with pytest.raises(SettingError) as error:
        load_characters(root, **settings)
    assert sorted(root.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_tree_names_the_place_and_the_ways_out(tmp_path: Path):
    message = refusal(tmp_path)
    assert f"Omniglot is not at {tmp_path}/omniglot-py/images_background" in message
    assert "--data.download true" in message
    assert "configs/glyphs_5way_1shot.yaml" in message


def test_a_missing_drawing_is_named(small_root: Path):
    folder = small_root / "omniglot-py/images_background/Greek/character02"
    (folder / "0001_07.png").unlink()
    (folder / "._0001_07.png").touch()  # what an archive made on a Mac leaves
    assert f"{folder} has 19 of 20 drawings" in refusal(small_root)


def test_a_missing_character_is_named(small_root: Path):
    folder = small_root / "omniglot-py/images_evaluation/ULOG"
    (folder / "character01").rename(small_root / "elsewhere")
    assert f"{folder} has 0 of 1 characters" in refusal(small_root)


def test_a_truncated_image_is_named(small_root: Path):
    file = small_root / "omniglot-py/images_background/Greek/character01/0000_03.png"
    for content in (file.read_bytes()[:-40], file.read_bytes()[:20], b""):
        file.write_bytes(content)
        assert f"{file} cannot be read (it is not a complete image); unzip the Omniglot archive" in refusal(small_root)


def test_an_image_of_another_size_is_named(small_root: Path):
    file = small_root / "omniglot-py/images_background/Greek/character01/0000_03.png"
    Image.new("1", (28, 28)).save(file)
    assert f"{file} is (28, 28) pixels large, not (105, 105); unzip the Omniglot archive" in refusal(small_root)


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error downloading\nfrom nowhere")

    monkeypatch.setattr(omniglot, "download_and_extract_archive", fail)
    message = refusal(tmp_path, download=True)
    assert f"could not be fetched into {tmp_path}/omniglot-py (Error downloading from nowhere)" in message
    assert "configs/glyphs_5way_1shot.yaml" in message


def test_a_download_uses_the_archives_that_are_there(small_root: Path, monkeypatch: pytest.MonkeyPatch):
    folder = small_root / "omniglot-py"
    for part in ("images_background", "images_evaluation"):
        shutil.make_archive(str(folder / part), "zip", folder, part)
        shutil.rmtree(folder / part)
    monkeypatch.setattr(omniglot, "download_and_extract_archive", None)
    assert load_characters(small_root, download=True).shape == (3, 20, 28, 28)


def test_a_complete_tree_is_not_fetched_again(small_root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(omniglot, "fetch", None)
    assert load_characters(small_root, download=True).shape == (3, 20, 28, 28)


def test_finn_splits_are_fixed():
    splits = split_characters("finn")
    assert {split: len(characters) for split, characters in splits.items()} == {"train": 1100, "val": 100, "test": 423}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1623))
    # pinned: figures compare only as long as these stay
    assert {split: characters[:4].tolist() for split, characters in splits.items()} == {
        "train": [1533, 1329, 158, 761],
        "val": [1108, 622, 384, 1040],
        "test": [79, 885, 127, 526],
    }


def test_lake_splits_by_alphabet():
    splits = split_characters("lake")
    # the background's 964 characters, less Balinese 24, Early Aramaic 22, Greek 24, Korean 40 and Latin 26
    assert {split: len(characters) for split, characters in splits.items()} == {"train": 828, "val": 136, "test": 659}
    assert splits["test"].tolist() == list(range(964, 1623))
    # Alphabet of the Magi 20, Anglo-Saxon 29, Arcadian 26, Armenian 41, Asomtavruli 40: Balinese begins at 156
    assert splits["val"][:24].tolist() == list(range(156, 180))
    assert not set(splits["train"]) & set(splits["val"])


def test_episodes_can_keep_to_one_alphabet(monkeypatch: pytest.MonkeyPatch):
    number = np.arange(1623, dtype=np.uint32).view(np.uint8).reshape(1623, 1, 2, 2)  # each character's pixels say which
    monkeypatch.setattr(omniglot, "load_characters", lambda root, download: number.repeat(20, 1))
    module = OmniglotDataModule(split="lake", within_alphabet=True, ways=20, rotations=False, meta_batch_size=100)
    names = np.array(omniglot.alphabet_names())
    seen = {}
    for split, loader in {
        "train": module.train_dataloader(),
        "val": module.val_dataloader(),
        "test": module.test_dataloader(),
    }.items():
        pixels = (next(iter(loader)).query_inputs * 255).round().to(torch.uint8).flatten(2).numpy()
        alphabets = names[np.ascontiguousarray(pixels).view(np.uint32)[..., 0]]  # [100, 20]
        assert (alphabets == alphabets[:, :1]).all()
        seen[split] = {str(name) for name in alphabets[:, 0]}
    assert seen["val"] == set(omniglot.LAKE_VAL_ALPHABETS)  # 5 alphabets in 100 draws: one is missed once in 10^9
    assert seen["test"] <= set(omniglot.PARTS["images_evaluation"])
    # those with fewer than 20 characters are left out
    small = {"Tagalog", "Blackfoot_(Canadian_Aboriginal_Syllabics)", "Ojibwe_(Canadian_Aboriginal_Syllabics)"}
    assert not seen["train"] & (small | seen["val"] | set(omniglot.PARTS["images_evaluation"]))
    assert len(seen["train"]) > 15


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"data.split must be finn or lake \(got vinyals\)"):
        OmniglotDataModule(split="vinyals")  # type: ignore[arg-type]


def test_the_whole_of_omniglot(omniglot_root: Path):
    module = OmniglotDataModule(root=str(omniglot_root), ways=20, shots=5, query_shots=15, meta_batch_size=2)
    module.prepare_data()
    module.setup()
    assert {split: data.classes for split, data in module.datasets.items()} == {"train": 4400, "val": 100, "test": 423}
    ink = torch.cat(
        [data.images[: 20 * (data.classes if split != "train" else 1100)] for split, data in module.datasets.items()]
    )
    assert ink.float().mean().item() / 255 == pytest.approx(0.0840, abs=5e-4)  # of PIL's Lanczos over all drawings
    batch = next(iter(module.test_dataloader()))
    assert batch.support_inputs.shape == (2, 100, 1, 28, 28)
    assert batch.query_inputs.shape == (2, 300, 1, 28, 28)

    again = OmniglotDataModule(root=str(omniglot_root), ways=20, shots=5, query_shots=15, meta_batch_size=2)
    again.setup("test")  # from the cache, without prepare_data
    assert torch.equal(next(iter(again.test_dataloader())).query_inputs, batch.query_inputs)

    crowded = OmniglotDataModule(root=str(omniglot_root), ways=101)
    with pytest.raises(ValueError, match=r"data.ways is 101, but the val split has 100 classes"):
        crowded.setup("validate")


def test_a_full_disk_is_named_and_holds_no_part_of_a_cache(omniglot_root: Path, small_disk: Path):
    folder = small_disk / "omniglot-py"
    folder.mkdir()
    for part in ("images_background", "images_evaluation"):
        (folder / part).symlink_to(omniglot_root / "omniglot-py" / part)
    with pytest.warns(UserWarning, match=r"packed_28.npz could not be written .*No space left on device"):
        images = load_characters(small_disk)
    assert images.shape == (1623, 20, 28, 28)
    assert sorted(path.name for path in folder.iterdir()) == ["images_background", "images_evaluation"]
