"""Any map-style dataset as episodes: tuples and dicts, in memory and on demand, split by class."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from cli import main
from maml_lightning import DatasetDataModule, SettingError
from maml_lightning.data import map_style
from maml_lightning.data.reading import as_tensors
from tests.data.numbers import equal
from tests.own_datasets import Vectors
from tests.runs import TINY, words

FEW = {"ways": 2, "shots": 2, "query_shots": 2, "meta_batch_size": 4, "train_episodes": 8, "val_episodes": 4}


class Listed:
    """A dataset of a list; what a torch.utils.data.Dataset must be and no more."""

    def __init__(self, examples: list[Any]):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def coded(classes: int = 10, examples: int = 4) -> list[tuple[Tensor, int]]:
    """Inputs [3] that give class and example, ``10 * class + example``, classes mixed."""
    numbers = [(10 * label + place, label) for place in range(examples) for label in range(classes)]
    return [(torch.full((3,), float(code)), label) for code, label in numbers]


def batch(examples: Any, **settings: Any):
    return next(iter(DatasetDataModule(examples, **{**FEW, **settings}).train_dataloader()))


def test_classes_are_split_and_episodes_are_of_one_split():
    data = DatasetDataModule(Listed(coded()), **FEW)
    data.setup()
    found = [set(data.classes_of(split)) for split in ("train", "val", "test")]
    assert [len(each) for each in found] == [6, 2, 2]
    assert len(set.union(*found)) == 10
    assert DatasetDataModule(Listed(coded()), split_seed=1, **FEW).classes_of("train") != sorted(found[0])
    for split, classes in zip(("train", "val", "test"), found, strict=True):
        episodes = data.datasets[split].__getitems__(range(50))
        codes = torch.cat([episodes.support_inputs, episodes.query_inputs], 1)[..., 0].long()
        assert set((codes // 10).flatten().tolist()) == classes
        assert all(len(set(task)) == 8 for task in codes.tolist())
        assert torch.equal(codes[:, :4] // 10, codes[:, 4:] // 10)


def test_given_classes_and_names():
    named = [(inputs, f"class {label}") for inputs, label in coded()]
    classes = {"train": ["class 1", "class 5"], "val": ["class 0", "class 2"], "test": ["class 3", "class 4"]}
    data = DatasetDataModule(Listed(named), classes=classes, **FEW)
    data.setup()
    assert set((data.datasets["val"].__getitems__(range(20)).query_inputs[..., 0] // 10).flatten().tolist()) == {0, 2}


def test_datasets_of_their_own_for_each_split():
    examples = coded()
    parts = [
        Listed([each for each in examples if each[1] in labels]) for labels in (range(4), range(4, 7), range(7, 10))
    ]
    data = DatasetDataModule(*parts, **FEW)
    data.setup()
    assert data.datasets["test"].classes == 3
    assert data.datasets["test"][0].query_inputs.min() >= 70
    with pytest.raises(SettingError, match=r"data.dataset \(train\) and data.dataset \(val\) share class 0 and 3 more"):
        DatasetDataModule(parts[0], parts[0], parts[2], **FEW).setup("fit")


def test_dicts_as_hugging_face_gives_them():
    examples = [{"input_ids": torch.full((5,), int(x[0])), "mask": x > 0, "label": torch.tensor(y)} for x, y in coded()]
    both = batch(Listed(examples))
    assert both.support_inputs.keys() == {"input_ids", "mask"}
    assert both.support_inputs["input_ids"].dtype == torch.int64
    one = batch(Listed(examples), inputs=["input_ids"])
    assert torch.equal(one.support_inputs, both.support_inputs["input_ids"])
    targets = batch(Listed(examples), inputs=["input_ids"], target="mask", ways=1)
    assert targets.query_targets.shape == (4, 2, 3)
    assert targets.query_targets.dtype == torch.float32
    plural = [{"x": each["input_ids"], "labels": each["label"]} for each in examples]
    assert torch.equal(batch(Listed(plural)).support_inputs, one.support_inputs)
    texts = [{**each, "text": "a word"} for each in examples]
    with pytest.raises(SettingError, match=r"have text of str, which is no number, array or picture; leave it out by"):
        batch(Listed(texts))
    with pytest.raises(
        SettingError, match=r"data.label kind is not in the dataset's examples, which have input_ids, mask"
    ):
        batch(Listed(examples), label="kind")


def test_several_inputs_in_a_tuple():
    examples = [(x, {"more": np.asarray(x)}, 3, y) for x, y in coded()]
    found = batch(Listed(examples)).support_inputs
    assert [found[0].shape, found[1]["more"].shape, found[2].shape] == [(4, 4, 3), (4, 4, 3), (4, 4)]
    assert torch.equal(batch(Listed(examples), inputs=[0]).support_inputs, found[0])


def test_pictures_of_pillow_and_torchvision():
    shades = [Image.new("L", (6, 4), 10 * label + place) for place in range(4) for label in range(10)]
    gray = batch(Listed([(shade, index % 10) for index, shade in enumerate(shades)]))
    assert gray.support_inputs.shape == (4, 4, 1, 4, 6)
    assert ((gray.support_inputs * 255).round() // 10 == (gray.support_inputs * 255).round() // 10).all()
    assert gray.query_inputs.max() <= 1
    fake = FakeData(60, (3, 8, 8), num_classes=8, transform=v2.PILToTensor())
    assert batch(fake, shots=1, query_shots=1).query_inputs.shape == (4, 2, 3, 8, 8)


def test_what_does_not_fit_into_memory_is_read_on_demand(monkeypatch: pytest.MonkeyPatch, caplog):
    inside = batch(Listed(coded()))
    monkeypatch.setattr(map_style, "SHARE_OF_MEMORY", 0)
    with caplog.at_level("INFO"):
        assert equal(batch(Listed(coded())), inside)
    assert "40 examples of 12 bytes do not fit into memory; they are read when they are drawn" in caplog.text


class Noisy(Listed):
    """With random transforms, of inputs and targets alike."""

    def __getitem__(self, index):
        shift = torch.rand(1)
        return self.examples[index][0] + shift, self.examples[index][0] + shift, self.examples[index][1]


def test_random_transforms_do_not_depend_on_the_memory(monkeypatch: pytest.MonkeyPatch):
    found = []
    for share in (0, 0.5):
        monkeypatch.setattr(map_style, "SHARE_OF_MEMORY", share)
        found.append(batch(Noisy(coded()), target=1))
    assert equal(*found)


@pytest.mark.parametrize("share", [0, 0.5])
def test_random_transforms_of_a_dataset_are_the_same_at_any_time(share: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(map_style, "SHARE_OF_MEMORY", share)
    data = [DatasetDataModule(Noisy(coded()), target=1, **FEW).make_dataset("train") for _ in range(2)]
    torch.manual_seed(1)
    first, again = data[0].__getitems__([3, 5]), data[1][5]
    assert torch.equal(first.query_inputs[1], again.query_inputs[0])
    assert torch.equal(first.query_inputs, first.query_targets)
    assert len(first.query_inputs.frac().unique()) > 4


def test_listed_labels_are_used_where_examples_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(map_style, "SHARE_OF_MEMORY", 0)

    class Counting(Listed):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    agreeing, others = Counting(coded(examples=40)), Counting(coded(examples=40))
    agreeing.targets = [label for _, label in agreeing.examples]  # type: ignore[attr-defined]
    others.targets = [label + 1 for _, label in others.examples]  # type: ignore[attr-defined]
    for dataset, most in ((agreeing, 20), (others, 410)):
        assert DatasetDataModule(dataset, **FEW).classes_of("train") == DatasetDataModule(
            Listed(coded()), **FEW
        ).classes_of("train")
        assert dataset.read <= most
    assert others.read > 400


@pytest.mark.parametrize(
    ("examples", "settings", "message"),
    [
        ([], {}, r"data.dataset Listed is empty; give one with examples"),
        ([(torch.rand(3), -1)] * 4, {}, r"data.label: the dataset has the label '-1'; give integers from 0, or names"),
        ([(torch.rand(3), 0.5)] * 4, {}, r"data.label: the dataset has the label '0.5'"),
        ([*coded()[:-1], (torch.rand(4), 9)], {}, r"example 39 is \['inputs'\] float32 \[4\], but example 0"),
        ([*coded()[:-1], (coded()[0][0] * torch.nan, 9)], {}, r"example 39, of class 9, has a value that is NaN"),
        ([torch.rand(3)], {}, r"data.dataset gives examples of Tensor; give tuples \(input, label\), or dicts"),
        (coded(), {"shots": 4}, r"shots is 4 \+ 2, but class \d of the train split has 4 examples"),
        (coded(), {"classes": {"train": [0, 1], "val": [1, 2], "test": [3]}}, r"dataset \(val\) share class 1; a"),
        (coded(), {"classes": {"train": [0, 99], "val": [1], "test": [2]}}, r"class 99 in train, but the dataset"),
        (coded(), {"classes": {"train": [0, 1, 0], "val": [2], "test": [3]}}, r"class 0 twice in train; leave one"),
        (coded(), {"classes": {"train": [0]}}, r"data.classes has train, not train, val and test"),
        (coded(), {"test_dataset": Listed(coded())}, r"test_dataset is given, but not data.val_dataset; give"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(examples: list[Any], settings: dict[str, Any], message: str):
    with pytest.raises(SettingError, match=message):
        DatasetDataModule(Listed(examples), **{**FEW, **settings}).setup()


def test_by_class_path_in_a_config_that_runs_again(folder: Path):
    flags = {
        key: value for key, value in TINY.items() if not key.endswith("classes") and not key.startswith("model.net")
    }
    flags |= {"data": "DatasetDataModule", "data.dataset": "tests.own_datasets.Vectors", "data.dataset.size": 6}
    flags |= {"model.net": "maml_lightning.MLP", "model.net.in_features": 6, "data.ways": 2, "data.train_episodes": 80}
    fit = main(words("fit", **flags))
    run = Path(fit.trainer.log_dir)
    dataset = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["dataset"]
    assert dataset == {"class_path": "tests.own_datasets.Vectors", "init_args": {"size": 6, "dictionary": False}}
    again = main(["fit", "--config", str(run / "config.yaml")])
    assert torch.equal(again.trainer.logged_metrics["val/loss"], fit.trainer.logged_metrics["val/loss"])
    assert fit.trainer.checkpoint_callback.monitor == "val/accuracy"
    assert isinstance(fit.datamodule.given["train"], Vectors)


class Broken(Listed):
    """Gives all examples but one."""

    def __getitem__(self, index):
        if index == 7:
            raise FileNotFoundError("no such\nfile")
        return self.examples[index]


@pytest.mark.parametrize("share", [0, 0.5])
def test_an_example_that_a_dataset_does_not_give_is_named(share: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(map_style, "SHARE_OF_MEMORY", share)
    with pytest.raises(SettingError, match=r"Broken does not give example 7 \(FileNotFoundError no such file\); give"):
        batch(Broken(coded()))
    with pytest.raises(SettingError, match=r"data.dataset is a DataLoader; give the dataset that it loads"):
        batch(DataLoader(Listed(coded())))
    with pytest.raises(SettingError, match=r"data.dataset set does not give example 0 \(TypeError"):
        batch({1, 2})


def test_targets_of_datasets_must_be_alike():
    parts = [[(x, x[: 2 + (first == 4)], y) for x, y in coded() if first <= y < first + 3] for first in (0, 4, 7)]
    with pytest.raises(
        SettingError, match=r"\(val\) has targets float32 \[3\], but those of data.dataset \(train\) are"
    ):
        DatasetDataModule(*map(Listed, parts), target=1, **FEW).setup("fit")


def test_places_may_count_from_the_end():
    examples = [(x, y, x + 1000) for x, y in coded()]
    expected = batch(Listed(examples), inputs=[0], label=1, target=2, ways=1)
    for settings in (
        {"label": 1, "target": -1},
        {"label": -2, "target": 2},
        {"label": -2, "target": -1, "inputs": [-3]},
    ):
        assert equal(batch(Listed(examples), ways=1, **settings), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257 * 100], [257 * 7, 65535]], np.uint16), [[0, 100], [7, 255]]),
        (np.array([[0, 257 * 100], [257 * 7, 65535]], np.int32), [[0, 100], [7, 255]]),
        (np.array([[0.0, 0.2], [0.4, 1.0]], np.float32), [[0, 51], [102, 255]]),
        (np.array([[[0, 0], [9, 255]], [[9, 0], [255, 255]]], np.uint8), [[255, 9], [255, 255]]),  # gray, transparency
    ],
    ids=["16 bits", "32 bits", "floats", "transparent"],
)
def test_pictures_of_any_mode_keep_their_brightness(values: np.ndarray, expected: list):
    assert as_tensors(Image.fromarray(values))[0].tolist() == expected


def test_a_picture_whose_range_is_unknown_is_refused():
    with pytest.raises(SettingError, match=r"examples has values 0 to 3, but floats are read as 0 to 1: scale them"):
        as_tensors(Image.fromarray(np.array([[0.0, 3.0]], np.float32)))


def test_a_value_that_is_nan_is_named_when_it_is_read_on_demand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(map_style, "SHARE_OF_MEMORY", 0)
    with pytest.raises(SettingError, match=r"data.dataset: example \d+ has a value that is NaN or infinite; replace"):
        batch(Listed([(x * torch.nan, y) for x, y in coded()]))
