"""Benchmarks of CIFAR-100, on generated files of its format: nothing can be downloaded here."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from cli import main
from maml_lightning import BenchmarkDataModule, SettingError
from maml_lightning.data.benchmarks import SUPERCLASSES, benchmark_classes
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
    with pytest.raises(SettingError, match=r"data.benchmark must be cifar-fs or fc100 \(got cifar\)"):
        BenchmarkDataModule("cifar", str(root))  # type: ignore[arg-type]


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
