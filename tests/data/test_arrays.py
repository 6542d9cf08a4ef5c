"""Arrays of any type and shape as episodes, from Python and from files; what cannot be used is one line."""

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from cli import main
from maml_lightning import ArraysDataModule, Episode, SettingError
from maml_lightning.data import array_files
from maml_lightning.data.examples import extremes
from maml_lightning.structures import by_place, mapped
from tests.runs import TINY, in_terminal, words

CLASSES, EXAMPLES = 6, 5
FEW = {"ways": 3, "shots": 2, "query_shots": 2, "meta_batch_size": 4, "train_episodes": 8, "val_episodes": 4}


def coded(*shape: int, first: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[6, 5, *shape]``: each value gives class and example, ``10 * class + example``."""
    values = 10 * (first + torch.arange(CLASSES))[:, None] + torch.arange(EXAMPLES)
    return values.reshape(CLASSES, EXAMPLES, *[1] * len(shape)).expand(-1, -1, *shape).to(dtype).contiguous()


def flat(values: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and labels, shuffled, the last class with an example more."""
    inputs, labels = values.flatten(0, 1), (first + torch.arange(CLASSES)).repeat_interleave(EXAMPLES)
    more = values[-1, -1:] + torch.ones((), dtype=values.dtype)
    inputs, labels = torch.cat([inputs, more]), torch.cat([labels, labels[-1:]])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return inputs[order], labels[order]


def first_batch(train: Any, **settings: Any) -> Episode:
    return next(iter(ArraysDataModule(train, **{**FEW, **settings}).train_dataloader()))


def codes(tensor: Tensor) -> Tensor:
    return tensor.reshape(*tensor.shape[:2], -1)[..., 0].real.long()


def check_codes(batch: Episode) -> None:
    """One class for each label, and no example twice."""
    support, query = codes(batch.support_inputs), codes(batch.query_inputs)
    for each, shots in ((support, 2), (query, 2)):
        classes = (each // 10).reshape(4, 3, shots)
        assert (classes == classes[..., :1]).all()
        assert all(len(set(task)) == 3 for task in classes[..., 0].tolist())
    assert torch.equal(support[:, ::2] // 10, query[:, ::2] // 10)
    assert all(len({*s, *q}) == 12 for s, q in zip(support.tolist(), query.tolist(), strict=True))
    assert batch.support_targets.tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    assert batch.query_targets.dtype == torch.int64


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (7,), (7, 3), (2, 4, 4), (2, 3, 4, 4)], ids=str)
def test_inputs_keep_their_values_type_and_shape(dtype: torch.dtype, shape: tuple[int, ...]):
    values = coded(*shape, dtype=dtype)
    for given in (values, flat(values), {"inputs": values.flatten(0, 1), "labels": flat(values)[1].sort().values[:-1]}):
        batch = first_batch(given)
        assert batch.support_inputs.shape == (4, 6, *shape)
        assert batch.query_inputs.dtype == dtype
        check_codes(batch)


def test_arrays_of_numpy_lists_and_lists_of_classes_are_the_same():
    values = coded(4)
    lists = [values[index] for index in range(CLASSES)]
    flipped = values.flip(0).numpy()[::-1]  # negative strides
    swapped = values.numpy().astype(">f4")
    for given in (values.numpy(), values.tolist(), lists, [each.numpy() for each in lists], flipped, swapped):
        for ours, theirs in zip(first_batch(given), first_batch(values), strict=True):
            assert torch.equal(ours, theirs)
    unequal = first_batch([each[: 4 + index % 2] for index, each in enumerate(lists)])
    check_codes(unequal)
    frozen = values.numpy().copy()
    frozen.flags.writeable = False
    check_codes(first_batch(frozen))


def test_pictures_of_uint8_are_scaled_and_it_is_said_once(caplog: pytest.LogCaptureFixture):
    values = coded(3, 4, 4, dtype=torch.uint8)
    other = coded(3, 4, 4, first=10, dtype=torch.uint8)
    with caplog.at_level("INFO"):
        data = ArraysDataModule(values, other, **FEW)
        data.setup("fit")
    (said,) = (message for message in caplog.messages if "uint8" in message)
    assert said == (
        "data.train: uint8 pictures [3, 4, 4] are scaled to [0, 1]; inputs of another type stay as they are."
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.support_inputs.dtype == torch.float32
    check_codes(batch._replace(**{part: getattr(batch, part) * 255 for part in ("support_inputs", "query_inputs")}))
    assert first_batch(coded(4, 4, dtype=torch.uint8)).support_inputs.shape == (4, 6, 1, 4, 4)


def test_bytes_that_are_no_pictures_stay_as_they_are():
    """Such as a mask beside token ids."""
    batch = first_batch(coded(7, dtype=torch.uint8))
    assert batch.support_inputs.dtype == torch.uint8
    check_codes(batch)


def test_inputs_may_be_dicts_and_tuples():
    tokens, mask = coded(7, dtype=torch.int64), coded(7, dtype=torch.bool)
    named = {"input_ids": tokens, "attention_mask": mask}
    labels = torch.arange(CLASSES).repeat_interleave(EXAMPLES)
    in_a_row = mapped(lambda leaf: leaf.flatten(0, 1), named)
    for given in (named, {**in_a_row, "labels": labels}, (in_a_row, labels), {"inputs": in_a_row, "labels": labels}):
        batch = first_batch(given)
        assert batch.query_inputs["attention_mask"].dtype == torch.bool
        check_codes(
            batch._replace(support_inputs=batch.support_inputs["input_ids"], query_inputs=batch[2]["input_ids"])
        )
    pair = first_batch((tokens, {"more": mask}))
    assert pair.support_inputs[1]["more"].shape == (4, 6, 7)
    assert list(by_place(pair.support_inputs)) == ["[0]", "[1]['more']"]


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        (torch.float32, (2,), torch.float32),
        (torch.bool, (4,), torch.float32),
        (torch.int32, (), torch.int64),
        (torch.uint8, (4, 4), torch.int64),
    ],
    ids=["numbers", "several labels", "classes", "pixels"],
)
def test_targets_of_each_example(dtype: torch.dtype, shape: tuple[int, ...], expected: torch.dtype):
    inputs, targets = coded(7), coded(*shape, dtype=dtype)
    for ways in (1, 2):
        batch = first_batch({"inputs": inputs, "targets": targets}, ways=ways)
        assert batch.query_targets.shape == (4, 2 * ways, *shape)
        assert batch.query_targets.dtype == expected
        if dtype != torch.bool:
            assert torch.equal(codes(batch.query_targets), codes(batch.query_inputs))
    rows, labels = flat(inputs)
    assert first_batch((rows, labels, rows[:, :1]), ways=1).support_targets.shape == (4, 2, 1)


def test_an_episode_depends_on_seed_split_and_index_alone():
    data = ArraysDataModule(flat(coded(4)), **FEW)
    dataset = data.make_dataset("train")
    batch = dataset.__getitems__([5, 3])
    torch.rand(3)
    assert torch.equal(ArraysDataModule(flat(coded(4)), **FEW).make_dataset("train")[3][0][0], batch[0][1])
    assert not torch.equal(ArraysDataModule(flat(coded(4)), seed=1, **FEW).make_dataset("train")[3][0][0], batch[0][1])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (coded(4)[:0], r"data.train is empty; give it examples"),
        (coded(4)[:, :0], r"data.train is empty"),
        (
            coded(4).index_fill(1, torch.tensor([3]), torch.nan),
            r"data.train: example 3, of class 0, .* NaN or infinite",
        ),
        (
            (coded(4).flatten(0, 1), torch.arange(30) // 5 - 1),
            r"data.train has label -1 at example 0; labels are class",
        ),
        ((coded(4).flatten(0, 1), torch.arange(29)), r"data.train has 29 labels, but inputs \[30, 4\]; give one label"),
        (
            {"inputs": coded(4).flatten(0, 1), "labels": torch.rand(30)},
            r"data.train has labels float32 \[30\]; give int",
        ),
        (
            [torch.rand(3, 4), torch.rand(3, 5)],
            r"data.train: class 1 is float32 \[3, 5\], but class 0 is float32 \[3, 4\]",
        ),
        ([[[1.0], [1.0, 2.0]]], r"data.train is not an array of numbers \(mixed shapes\); give an array \[classes"),
        (np.array([["a"]]), r"data.train is not an array of numbers \(<U1\)"),
        ("missing.npz", r"data.train missing.npz cannot be read \(No such file or directory\)"),
        ("train.csv", r"data.train train.csv is no .npz, .npy or .pt file"),
        (
            {"a": coded(4), "b": coded(4)[:, :3]},
            r"data.train\['b'\] has 6 classes of 3 examples, but data.train\['a'\] 6",
        ),
        ({"inputs": coded(4), "more": coded(4)}, r"data.train has inputs and more; give either"),
        (
            {"inputs": coded(4), "targets": coded(4)[:5]},
            r"data.train targets has 5 classes of 5 examples, but data.train",
        ),
        (coded(4)[:2], r"data.ways is 3, but the train split has 2 classes; lower data.ways"),
        ([*coded(4)[:3], torch.rand(2, 4)], r"shots is 2 \+ 2, but class 3 of the train split has 2 examples; lower"),
        (torch.rand(5), r"data.train is float32 \[5\]; give an array"),
        (None, r"data.train is not given; give an array"),
        ({}, r"data.train has no inputs"),
    ],
)
def test_what_cannot_be_used_names_split_class_and_remedy(folder: Path, train: Any, message: str):
    with pytest.raises(SettingError, match=message) as error:
        ArraysDataModule(train, **FEW).setup("fit")
    assert str(error.value).isprintable()


def test_names_of_classes_are_the_labels():
    inputs, labels = flat(coded(4), first=40)
    inputs[5] = torch.inf
    with pytest.raises(SettingError, match=rf"example 5, of class {int(labels[5])}, has a value"):
        ArraysDataModule((inputs, labels), **FEW).setup("fit")


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (coded(4), r"data.train and data.val share a class: all examples of class 0 of data.val are in data.train too"),
        (
            flat(coded(4, first=9), first=5),
            r"data.train and data.val share class 5; a class must be in one split alone",
        ),
        (coded(4, first=9).double(), r"data.val has examples float64 \[4\], but those of data.train are float32 \[4\]"),
        (coded(5, first=9), r"data.val has examples float32 \[5\], but those of data.train are float32 \[4\]"),
        (
            {"a": coded(4, first=9)},
            r"data.val has examples missing, but those of data.train are float32 \[4\]; give all",
        ),
    ],
)
@pytest.mark.parametrize("split", ["val", "test"])
def test_splits_must_be_disjoint_and_alike(val: Any, message: str, split: str):
    splits = {"val": coded(4, first=20), split: val}
    with pytest.raises(SettingError, match=message.replace("data.val", f"data.{split}")):
        ArraysDataModule(flat(coded(4)) if isinstance(val, tuple) else coded(4), **splits, **FEW).setup("fit")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, r"data.val has targets missing, but those of data.train are int64 \[2\]; give all splits"),
        (coded(2, dtype=torch.float32), r"data.val has targets float32 \[2\], but those of data.train are int64 \[2\]"),
        (coded(3, dtype=torch.int64), r"data.val has targets int64 \[3\], but those of data.train are int64 \[2\]"),
        ({"a": coded(2, dtype=torch.int64)}, r"data.val has targets missing, but those of data.train are int64 \[2\]"),
    ],
    ids=["missing", "type", "shape", "structure"],
)
def test_targets_of_all_splits_must_be_alike(targets: Any, message: str):
    train = {"inputs": coded(4), "targets": coded(2, dtype=torch.int64)}
    val = {"inputs": coded(4, first=9), **({} if targets is None else {"targets": targets})}
    with pytest.raises(SettingError, match=message):
        ArraysDataModule(train, val, **FEW).setup("fit")


def test_what_is_no_number_in_targets_is_said_to_be_there():
    targets = coded(2).index_fill(1, torch.tensor([3]), torch.nan)
    for given, place in ((targets, ""), ({"a": targets}, r"\['a'\]")):
        with pytest.raises(
            SettingError, match=rf"data.train targets{place}: example 3, of class 0, has a value that is"
        ):
            ArraysDataModule({"inputs": coded(4), "targets": given}, **FEW).setup("fit")


def test_a_picture_in_two_splits_is_found():
    train, val = coded(4, 4, dtype=torch.uint8), coded(4, 4, first=9, dtype=torch.uint8)
    val[2, 3] = train[1, 1]
    with pytest.raises(
        SettingError, match=r"share a picture: example 13 of data.val, of class 2, is in data.train too"
    ):
        ArraysDataModule(train, val, **FEW).setup("fit")
    ArraysDataModule(train.float(), val.float(), **FEW).setup("fit")  # rows of numbers may be alike by chance
    for shared in (
        [each.float().unsqueeze(2) for each in (train, val)],
        [{"picture": each, "more": torch.full((CLASSES, EXAMPLES), more)} for more, each in enumerate((train, val))],
    ):
        with pytest.raises(
            SettingError, match=r"share a picture: example 13 of data.val, of class 2, is in data.train"
        ):
            ArraysDataModule(*shared, **FEW).setup("fit")


def test_that_episodes_mix_tasks_with_targets_is_said_once(caplog: pytest.LogCaptureFixture):
    splits = [{"inputs": coded(4, first=first), "targets": coded(2)} for first in (0, 10)]
    with caplog.at_level("INFO"):
        ArraysDataModule(*splits, **FEW).setup("fit")
        ArraysDataModule(*splits, **{**FEW, "ways": 1}).setup("fit")
        ArraysDataModule(coded(4), coded(4, first=10), **FEW).setup("fit")
    assert [message for message in caplog.messages if "mixes" in message] == [
        "data.train has targets: each episode mixes the examples of 3 tasks (data.ways); data.ways 1 adapts to one "
        "task at a time."
    ]


def test_classes_numbered_from_0_in_each_split_are_different_classes(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        inputs, labels = flat(coded(4, first=9))
        ArraysDataModule(flat(coded(4)), (inputs[labels < 4], labels[labels < 4]), **FEW).setup("fit")
    assert "data.train and data.val each number their classes from 0; they count as different" in caplog.text


def test_the_same_numbers_in_two_splits_are_the_same_classes():
    """Such as the digits 0 to 9 of a training and a test set."""
    with pytest.raises(SettingError, match=r"share class 0 and 5 more; .*: split by class, or number them differently"):
        ArraysDataModule(flat(coded(4)), flat(coded(4, first=9)), **FEW).setup("fit")


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.pt"])
def test_a_file_of_another_format_is_said_to_be_one(folder: Path, name: str):
    Path(name).write_text("<html>not found</html>")
    with pytest.raises(
        SettingError, match=rf"data.train {re.escape(name)} cannot be read \(it is damaged or of another"
    ):
        ArraysDataModule(name, **FEW).setup("fit")


def test_missing_and_odd_labels_are_named():
    inputs, labels = flat(coded(4))
    with pytest.raises(SettingError, match=r"data.train has labels that are texts; number the classes, alike in all"):
        ArraysDataModule((inputs, np.array([f"c{label}" for label in labels])), **FEW).setup("fit")
    with pytest.raises(SettingError, match=r"data.train has labels that are texts; number the classes, alike in all"):
        ArraysDataModule({"inputs": inputs, "labels": [f"c{label}" for label in labels]}, **FEW).setup("fit")
    with pytest.raises(
        SettingError, match=r"data.train has no labels among x, y; name the arrays inputs .* and labels"
    ):
        ArraysDataModule({"x": inputs, "y": labels}, **FEW).setup("fit")
    with pytest.raises(
        SettingError, match=r"data.val has no labels, so that it is read as \[classes, examples, ...\]: "
    ):
        ArraysDataModule((inputs, labels), {"inputs": inputs}, **FEW).setup("fit")


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_file_is_run(folder: Path):
    objects = np.array([Harmful()], dtype=object)
    np.savez("a.npz", inputs=objects)
    np.save("a.npy", objects)
    torch.save({"inputs": Harmful()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    Path("b.npz").write_bytes(pickle.dumps(Harmful()))
    Path("b.npy").write_bytes(pickle.dumps(Harmful()))
    for name in ("a.npz", "a.npy", "a.pt", "b.pt", "b.npz", "b.npy"):
        with pytest.raises(
            SettingError, match=rf"data.train {re.escape(name)} cannot be read \(it holds Python objects"
        ):
            ArraysDataModule(name, **FEW).setup("fit")
    Path("c.npz").write_bytes(Path("a.npz").read_bytes()[:50])
    with pytest.raises(SettingError, match=r"data.train c.npz cannot be read \(it is damaged or of another format"):
        ArraysDataModule("c.npz", **FEW).setup("fit")
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", ["npz", "npy", "pt"])
def test_files_are_the_same_as_arrays(folder: Path, kind: str):
    inputs, labels = flat(coded(4))
    if kind == "npy":
        np.save("train.npy", coded(4).numpy())
        expected = first_batch(coded(4))
    else:
        expected = first_batch((inputs, labels))
        if kind == "npz":
            np.savez("train.npz", inputs=inputs.numpy(), labels=labels.numpy())
        else:
            torch.save({"inputs": inputs, "labels": labels}, "train.pt")
    for ours, theirs in zip(first_batch(f"train.{kind}"), expected, strict=True):
        assert torch.equal(ours, theirs)
    np.savez("alone.npz", coded(4).numpy())
    assert torch.equal(first_batch("alone.npz")[0], first_batch(coded(4))[0])
    np.savez("several.npz", input_ids=coded(4).numpy(), mask=coded(4).numpy())
    assert array_files.examples_of("several.npz", "data.train")[0].inputs.keys() == {"input_ids", "mask"}


def save_splits(folder: Path) -> dict[str, Any]:
    """Files of three splits of noisy vectors, and the flags of a tiny run on them."""
    generator = np.random.default_rng(0)
    for number, split in enumerate(("train", "val", "test")):
        centers = 3 * generator.normal(size=(8, 1, 6))
        inputs = (centers + generator.normal(size=(8, 7, 6))).astype(np.float32).reshape(-1, 6)
        np.savez(folder / f"{split}.npz", inputs=inputs, labels=np.arange(8).repeat(7) + 8 * number)
    flags = {
        key: value for key, value in TINY.items() if not key.endswith("classes") and not key.startswith("model.net")
    }
    return {
        **flags,
        "data": "ArraysDataModule",
        **{f"data.{split}": f"{split}.npz" for split in ("train", "val", "test")},
        "data.train_episodes": 80,
        "model.net": "maml_lightning.MLP",
        "model.net.in_features": 6,
    }


def test_from_the_command_line_its_config_runs_again_tests_and_resumes(folder: Path, capsys: pytest.CaptureFixture):
    flags = save_splits(folder)
    fit = main(words("fit", **flags))
    run = Path(fit.trainer.log_dir)
    settings = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    assert (settings["train"], settings["test"]) == ("train.npz", "test.npz")
    again = main(["fit", "--config", str(run / "config.yaml")])
    assert torch.equal(again.trainer.logged_metrics["val/loss"], fit.trainer.logged_metrics["val/loss"])
    test = main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "best.ckpt")])
    assert test.trainer.logged_metrics["test/accuracy"] > 0.6  # 1/3 by chance
    resumed = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main([*resumed, "--trainer.max_epochs=2"]).trainer.current_epoch == 2
    generator = np.random.default_rng(1)
    np.savez("train.npz", generator.normal(size=(8, 7, 6)).astype(np.float32))
    with pytest.warns(UserWarning, match=r"data.train holds other examples than the resumed run was trained on"):
        main([*resumed, "--trainer.max_epochs=2"])


@pytest.mark.long
def test_in_a_terminal_it_trains_and_tests_with_its_progress_bar(folder: Path):
    flags = save_splits(folder)
    for arguments in (words("fit", **flags), words("test", **flags, ckpt_path="last")):
        status, printed = in_terminal([sys.executable, "-m", "maml_lightning", *arguments])
        assert status == 0, printed
    assert "test/accuracy" in printed


def test_a_mistake_leaves_nothing(folder: Path):
    flags = save_splits(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(SettingError, match=r"data.train and data.val share a class"):
        main(words("fit", **{**flags, "data.val": "train.npz"}))
    assert sorted(folder.iterdir()) == before


def test_without_validation_no_validation_classes_are_needed(folder: Path):
    flags = {**save_splits(folder), "data.val": None}
    cli = main(words("fit", **flags, **{"trainer.limit_val_batches": 0}))
    assert cli.trainer.global_step == 20
    with pytest.raises(SettingError, match=r"data.val is not given; give an array"):
        main(words("fit", **flags))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_extremes_are_the_two_least_and_the_two_greatest_integers(dtype: torch.dtype, shape: tuple[int, ...]):
    inputs, labels = flat(coded(*shape, dtype=torch.int64))
    inputs = inputs.to(dtype)
    examples, _ = array_files.examples_of((inputs, labels), "data.train")
    found = dict(extremes(examples, "data.train"))
    values = inputs.long().reshape(len(inputs), -1)[:, 0]
    assert [values[row] for row in found.values()] == [0, 1, 54, 55]
    row = int((values == 54).nonzero()[0])
    assert f"data.train: example {row}, of class 5, has 54 to 54" in found
    floats, _ = array_files.examples_of((inputs.float(), labels, inputs.double()), "data.train")
    assert list(extremes(floats, "data.train"))[-1][0].startswith("data.train targets: example ")
    assert not list(extremes(floats._replace(targets=None), "data.train"))
