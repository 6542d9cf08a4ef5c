"""Benchmarks, on generated files of the formats that torchvision reads: nothing can be downloaded here."""

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100, Flowers102

from cli import main
from maml_lightning import BenchmarkDataModule, SettingError
from maml_lightning.data.benchmark_classes import SUPERCLASSES, Benchmark, benchmark_classes
from tests.runs import TINY, words

NAMES = sorted(name for names in SUPERCLASSES.values() for name in names)
FEW: dict[str, Any] = {"ways": 3, "query_shots": 2, "meta_batch_size": 4, "train_episodes": 8, "val_episodes": 4}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images a class in training and two in test, of one color that gives class and image."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    digests = {}
    for part, first in (("train", 0), ("test", 2)):
        labels = np.tile(np.arange(100), 2)
        images = np.zeros((200, 3, 1024), np.uint8)
        images[:, 0], images[:, 1] = labels[:, None], np.repeat(first + np.arange(2), 100)[:, None]
        content = {"data": images.reshape(200, 3072), "fine_labels": labels.tolist(), "coarse_labels": [0] * 200}
        (folder / part).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}))
    for part in ("train", "test", "meta"):
        digests[part] = hashlib.md5((folder / part).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", digests["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": digests["meta"]})
    return tmp_path


@pytest.mark.parametrize(("benchmark", "sizes"), [("cifar-fs", [64, 16, 20]), ("fc100", [60, 20, 20])])
def test_splits_are_disjoint_and_of_the_published_sizes(benchmark: Any, sizes: list[int]):
    splits = benchmark_classes(benchmark)
    assert [len(splits[split]) for split in ("train", "val", "test")] == sizes  # type: ignore[index]
    assert sorted(name for names in splits.values() for name in names) == NAMES
    assert len(NAMES) == 100
    if benchmark == "fc100":  # whole superclasses
        for names in SUPERCLASSES.values():
            assert sum(bool(set(names) & set(found)) for found in splits.values()) == 1


@pytest.mark.parametrize("benchmark", ["cifar-fs", "fc100"])
def test_episodes_are_of_the_splits_classes_and_both_parts_of_the_files(root: Path, benchmark: Any):
    data = BenchmarkDataModule(benchmark, str(root), **FEW)
    data.setup()
    for split, names in benchmark_classes(benchmark).items():
        batch = data.datasets[split].__getitems__(range(200))
        assert batch.support_inputs.shape == (200, 3, 3, 32, 32)
        assert batch.query_inputs.shape == (200, 6, 3, 32, 32)
        support, query = (
            (inputs[..., 0, 0] * 255).round().long() for inputs in (batch.support_inputs, batch.query_inputs)
        )
        assert {NAMES[label] for label in support[..., 0].flatten().tolist()} == set(names)
        assert torch.equal(support[:, :, 0], query[:, ::2, 0])
        assert set(support[..., 1].flatten().tolist()) == {0, 1, 2, 3}
        assert (query[:, ::2, 1] != support[..., 1]).all()


def test_grayscale_is_the_luminance(root: Path):
    data = BenchmarkDataModule("cifar-fs", str(root), channels=1, **FEW)
    assert data.make_dataset("train")[0].query_inputs.shape == (1, 6, 1, 32, 32)


def test_missing_or_changed_files_are_one_line(root: Path):
    with pytest.raises(
        SettingError, match=r"CIFAR-100 \(cifar-100-python\) is not there, or incomplete .* set data.root"
    ):
        BenchmarkDataModule("fc100", str(root / "nowhere"), **FEW).prepare_data()
    (root / "cifar-100-python" / "test").write_bytes(b"other")
    with pytest.raises(SettingError, match=r"CIFAR-100 \(cifar-100-python\) is not there, or incomplete") as error:
        BenchmarkDataModule("fc100", str(root), **FEW).setup("fit")
    assert str(error.value).isprintable()
    with pytest.raises(SettingError, match=r"data.benchmark must be one of cifar-fs, fc100, .* \(got cifar\)"):
        BenchmarkDataModule("cifar", str(root))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"data.size must be 32 with data.benchmark fc100 \(got 84\)"):
        BenchmarkDataModule("fc100", str(root), size=84)


def test_from_the_command_line_the_network_takes_its_channels(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    flags = {key: value for key, value in TINY.items() if not key.endswith("classes") and key != "data"}
    flags = {
        "data": "BenchmarkDataModule",
        "data.benchmark": "fc100",
        "data.root": root,
        **flags,
        "data.query_shots": 2,
    }
    cli = main(words("fit", **flags))
    assert cli.model.net.body[0].in_channels == 3
    assert cli.trainer.global_step == 2


OF_FILES: dict[Benchmark, list[int]] = {"aircraft": [70, 15, 15], "flowers": [71, 15, 16], "dtd": [33, 7, 7]}
PARTS = ("train", "val", "test")


def picture(file: Path, label: int, part: int) -> None:
    """Wider than high: a stripe at each side, which is cropped, beside the color of class and part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((20, 40, 3), 255, np.uint8)
    pixels[:, 10:30] = label, 50 * part, 0
    Image.fromarray(pixels).save(file, "PNG")  # whatever the name says: JPEG would change the colors


def make_files(benchmark: Benchmark, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A picture of each class in each of torchvision's parts; the names of the classes by label."""
    classes = [name for names in benchmark_classes(benchmark).values() for name in names]
    names = sorted(classes, key=int) if benchmark == "flowers" else sorted(classes)
    if benchmark == "flowers":
        from scipy.io import savemat  # as torchvision reads them

        folder, ids = root / "flowers-102", np.arange(1, 3 * len(names) + 1)
        for number in ids.tolist():
            picture(folder / f"jpg/image_{number:05d}.jpg", (number - 1) % 102, (number - 1) // 102)
        savemat(folder / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
        savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), np.split(ids, 3), strict=True)))
        known = {"image": Flowers102._file_dict["image"]}
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
            known[key] = (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        monkeypatch.setattr(Flowers102, "_file_dict", known)
        return names
    for number, part in enumerate(PARTS):
        lines = []
        for label, name in enumerate(names):
            if benchmark == "aircraft":
                lines.append(f"{label:03d}{number} {name}")
                picture(root / f"fgvc-aircraft-2013b/data/images/{label:03d}{number}.jpg", label, number)
            else:
                lines.append(f"{name}/{name}_{number}.jpg")
                picture(root / f"dtd/dtd/images/{lines[-1]}", label, number)
        file = "fgvc-aircraft-2013b/data/images_variant_{}.txt" if benchmark == "aircraft" else "dtd/dtd/labels/{}1.txt"
        (root / file.format(part)).parent.mkdir(exist_ok=True)
        (root / file.format(part)).write_text("\n".join(lines) + "\n")
    if benchmark == "aircraft":
        (root / "fgvc-aircraft-2013b/data/variants.txt").write_text("\n".join(names) + "\n")
    return names


@pytest.mark.parametrize("benchmark", OF_FILES)
def test_pictures_are_of_the_published_classes_and_of_all_of_torchvisions_parts(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if benchmark == "flowers":
        pytest.importorskip("scipy")
    names = make_files(benchmark, tmp_path, monkeypatch)
    splits = benchmark_classes(benchmark)
    assert [len(splits[split]) for split in PARTS] == OF_FILES[benchmark]  # type: ignore[index]
    assert len({name for found in splits.values() for name in found}) == sum(OF_FILES[benchmark])
    data = BenchmarkDataModule(benchmark, str(tmp_path), size=8, **{**FEW, "query_shots": 2, "ways": 5})
    data.setup()
    for split in PARTS:
        batch = data.datasets[split].__getitems__(range(100))  # type: ignore[index]
        assert batch.support_inputs.shape == (100, 5, 3, 8, 8)
        inputs = torch.cat([batch.support_inputs, batch.query_inputs], 1)
        assert inputs[:, :, 2].max() < 0.1  # cropped to the square at the center
        labels, parts = (inputs[:, :, :2, 4, 4] * 255).round().long().unbind(2)
        assert {names[label] for label in labels.unique().tolist()} == set(splits[split])  # type: ignore[index]
        assert set(parts.unique().tolist()) == {0, 50, 100}
        assert (tmp_path / ".packed" / f"{benchmark}_{split}_3x8.npy").is_file()


def test_pictures_have_the_usual_size_and_their_own_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_files("dtd", tmp_path, monkeypatch)
    assert BenchmarkDataModule("dtd", str(tmp_path), **FEW).make_dataset("val")[0].query_inputs.shape[2:] == (3, 84, 84)
    gray = BenchmarkDataModule("dtd", str(tmp_path), size=9, channels=1, **FEW)
    assert gray.make_dataset("val")[0].query_inputs.shape[2:] == (1, 9, 9)


def test_a_missing_class_or_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SettingError, match=r"FGVC-Aircraft \(fgvc-aircraft-2013b\) is not there, or incomplete"):
        BenchmarkDataModule("aircraft", str(tmp_path), **FEW).setup("fit")
    make_files("dtd", tmp_path, monkeypatch)
    (tmp_path / "dtd/dtd/images/grid/grid_1.jpg").unlink()
    with pytest.raises(SettingError, match=r"grid_1\.jpg cannot be read"):
        BenchmarkDataModule("dtd", str(tmp_path), **FEW).setup("fit")
    for file in (tmp_path / "dtd/dtd/labels").iterdir():
        file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("grid/")))
    with pytest.raises(SettingError, match=r"DTD \(dtd\) has no pictures of grid, of the val split; remove it and"):
        BenchmarkDataModule("dtd", str(tmp_path), **FEW).setup("fit")


def test_without_scipy_flowers_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "flowers-102/jpg").mkdir(parents=True)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SettingError, match=r"data.benchmark flowers needs scipy.*: pip install scipy"):
        BenchmarkDataModule("flowers", str(tmp_path), **FEW).prepare_data()
