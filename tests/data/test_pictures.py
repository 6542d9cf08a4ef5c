"""Augmentation and normalization of pictures: a function of the episode alone, and of training alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from cli import main
from maml_lightning import MAML, ArraysDataModule, GlyphsDataModule, InputSpec, SettingError
from maml_lightning.data import EpisodeDataset, support_set
from maml_lightning.data.pictures import Preparation
from maml_lightning.training.loading import measured
from tests.data.numbers import Numbers, equal
from tests.runs import TINY, words

COLORS = torch.arange(6 * 5 * 3 * 4 * 4, dtype=torch.uint8).view(6, 5, 3, 4, 4)


def colors(**settings: Any) -> EpisodeDataset:
    return EpisodeDataset(COLORS, "train", 10, ways=3, shots=2, query_shots=2, **settings)


def test_normalization_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel():
    plain = colors()[0]
    mean, std = [0.5, 0.25, 0.125], [0.5, 2.0, 0.25]
    found = colors(pictures=Preparation(mean, std))[0]
    for channel in range(3):
        for before, after in ((plain.support_inputs, found.support_inputs), (plain.query_inputs, found.query_inputs)):
            expected = (before[:, :, channel] - mean[channel]) / std[channel]
            torch.testing.assert_close(after[:, :, channel], expected, rtol=1e-6, atol=1e-7)
    one = colors(pictures=Preparation([0.5]))[0]
    assert torch.equal(one.query_inputs, plain.query_inputs - 0.5)


def test_normalization_is_of_all_splits_and_augmentation_of_training():
    data = Numbers(mean=0.5, std=[0.1], augmentation=[v2.RandomErasing(p=1.0)])
    for split in ("train", "val", "test"):
        dataset = data.make_dataset(split)
        assert dataset.pictures.mean == [0.5]
        assert len(dataset.pictures.augmentation) == (split == "train")
        assert dataset[0].support_inputs.min() < 0


def test_pictures_normalized_in_an_unknown_way_are_not_specified():
    """Pictures to classify are read in [0, 1]: a network of normalized ones would see others than it was trained on."""
    assert InputSpec.of(colors()[0].query_inputs, 3) is not None
    assert InputSpec.of(colors(pictures=Preparation([0.5], [0.25]))[0].query_inputs, 3) is None


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, picture: Tensor) -> Tensor:
        self.seen.append(picture)
        return picture


def test_transforms_receive_each_picture_alone_as_uint8_and_results_are_scaled():
    recorder = Recorder()
    found = colors(pictures=Preparation(augmentation=[recorder]))[0]
    assert equal(found, colors()[0])
    assert len(recorder.seen) == 12
    assert {(each.dtype, each.shape) for each in recorder.seen} == {(torch.uint8, (3, 4, 4))}


def test_augmented_episodes_depend_on_seed_split_and_index_alone():
    transforms = [v2.RandomHorizontalFlip(), v2.RandomCrop(4, padding=2), v2.ColorJitter(0.5)]
    settings: dict[str, Any] = {"pictures": Preparation(augmentation=transforms)}
    batch = colors(**settings).__getitems__([7, 3])
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    alone = colors(**settings)[3]
    assert torch.equal(torch.rand(3), expected)  # the global generator is as it was
    assert torch.equal(batch.support_inputs[1], alone.support_inputs[0])
    assert torch.equal(batch.query_inputs[1], alone.query_inputs[0])
    assert not torch.equal(alone.support_inputs, colors()[3].support_inputs)
    seeds = [colors(seed=seed, **settings).draw([0])[0] for seed in (0, 1)]
    assert not torch.equal(*seeds)


def test_each_picture_and_each_set_has_numbers_of_its_own():
    class Noise:
        def __call__(self, picture: Tensor) -> Tensor:
            return torch.rand(picture.shape)

    found = colors(pictures=Preparation(augmentation=[Noise()])).__getitems__([0, 1])
    values = torch.cat([found.support_inputs[..., 0, 0, 0].flatten(), found.query_inputs[..., 0, 0, 0].flatten()])
    assert len(values.unique()) == len(values)


def test_pretraining_is_augmented_as_well():
    dataset = colors(pretraining=True, pictures=Preparation(augmentation=[v2.RandomHorizontalFlip(1.0)]))
    plain = colors(pretraining=True)[0]
    assert torch.equal(dataset[0].query_inputs, plain.query_inputs.flip(-1))


def test_pictures_may_be_scaled_by_the_augmentation():
    scaled = colors(pictures=Preparation(augmentation=[v2.ToDtype(torch.float32, scale=True)]))[0]
    torch.testing.assert_close(scaled.query_inputs, colors()[0].query_inputs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mean": [0.1, 0.2]}, r"data.mean \[0.1, 0.2\] has 2 values .* examples are \[3, 4, 4\]; give"),
        ({"std": [0.0]}, r"data.std must be above 0 \(got \[0.0\]\)"),
        ({"augmentation": [lambda picture: picture[..., : 1 + int(torch.randint(2, ()))]]}, r"data.augmentation gives"),
        ({"augmentation": [v2.RandomCrop(9)]}, r"RandomCrop does not take an example uint8 \[3, 4, 4\]"),
        ({"mean": [float("nan")]}, r"data.mean must be finite \(got \[nan\]\)"),
        ({"std": [float("inf")]}, r"data.std must be finite \(got \[inf\]\)"),
        ({"mean": [123.7], "std": [58.4]}, r"data.mean \[123.7\] is not in the scale of \[0, 1\].* divide mean"),
        ({"augmentation": v2.RandomHorizontalFlip()}, r"must be a list .* \(got RandomHorizontalFlip\); put"),
        ({"augmentation": [v2.RandomHorizontalFlip]}, r"has the class RandomHorizontalFlip; give a transform"),
        ({"augmentation": ["RandomCrop"]}, r"data.augmentation has 'RandomCrop'; give a transform"),
        ({"augmentation": [v2.Resize(6)]}, r"gives uint8 \[3, 6, 6\] of an example's uint8 \[3, 4"),
        ({"augmentation": [v2.ToDtype(torch.float32)]}, r"gives pictures of .* have 0 to 1; scale by ToDtype"),
        ({"augmentation": [v2.ToDtype(torch.float64, scale=True)]}, r"gives float64 \[3, 4, 4\] of an "),
        ({"augmentation": [lambda picture: (picture, picture)]}, r"data.augmentation gives"),
        ({"augmentation": [lambda picture: None]}, r"data.augmentation gives NoneType; give transforms whose results"),
    ],
)  # fmt: skip
def test_what_cannot_be_applied_is_named(data: dict[str, Any], message: str):
    with pytest.raises(SettingError, match=message):
        ArraysDataModule(COLORS, ways=3, **data).make_dataset("train").__getitems__(range(8))
    with pytest.raises(SettingError, match=r"data.mean is for pictures \[C, H, W\], but examples are \[4\]; leave"):
        ArraysDataModule(torch.rand(6, 5, 4), ways=3, mean=0.5).make_dataset("train")


def test_by_class_path_in_a_config_that_runs_again(folder: Path):
    (folder / "augmented.yaml").write_text(
        "data:\n  class_path: GlyphsDataModule\n  init_args:\n    mean: 0.1\n    std: [0.5]\n    augmentation:\n"
        "    - {class_path: torchvision.transforms.v2.RandomCrop, init_args: {size: 28, padding: 2}}\n"
        "    - torchvision.transforms.v2.RandomHorizontalFlip\n"
    )
    flags = {key: value for key, value in TINY.items() if key != "data"}
    fit = main(["fit", "--config=augmented.yaml", *words(**flags)])
    run = Path(fit.trainer.log_dir)
    settings = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    assert [each["class_path"].split(".")[-1] for each in settings["augmentation"]] == [
        "RandomCrop",
        "RandomHorizontalFlip",
    ]
    again = main(["fit", "--config", str(run / "config.yaml")])
    assert torch.equal(again.trainer.logged_metrics["val/loss"], fit.trainer.logged_metrics["val/loss"])
    assert isinstance(again.datamodule, GlyphsDataModule)
    assert again.datamodule.datasets["train"][0].support_inputs.min() < 0
    more = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert main(more).trainer.current_epoch == 2


@pytest.mark.parametrize("kind", [torch.int16, torch.int64, torch.uint16, torch.bool])
def test_integers_that_are_no_pictures_are_not_normalized(kind: torch.dtype):
    for name in ("mean", "std"):
        with pytest.raises(SettingError, match=rf"data.{name} needs pictures of floats or uint8, but"):
            ArraysDataModule(COLORS.to(kind), ways=3, **{name: 0.5}).make_dataset("train")  # type: ignore[arg-type]


def test_pictures_with_targets_of_pixels_are_not_augmented():
    settings: dict[str, Any] = {"ways": 1, "augmentation": [v2.RandomHorizontalFlip(1.0)]}
    with pytest.raises(SettingError, match=r"data.augmentation changes inputs alone, but their targets \[4, 4\] are"):
        ArraysDataModule({"inputs": COLORS, "targets": COLORS[:, :, 0]}, **settings).make_dataset("train")
    ArraysDataModule({"inputs": COLORS, "targets": COLORS[:, :, 0, 0]}, **settings).make_dataset("train")


@pytest.mark.parametrize("settings", [{}, {"std": 4.0}, {"mean": [0.5, 0.25, 0.125], "std": 0.25}])
def test_a_network_records_how_its_pictures_are_normalized(settings: dict[str, Any], tmp_path: Path):
    """Not guessed from values: a deviation above 1 leaves them in [0, 1]."""
    data = ArraysDataModule(COLORS, ways=3, meta_batch_size=2, train_episodes=2, **settings)
    maml = MAML(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)))
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, limit_val_batches=0, enable_checkpointing=False,
        default_root_dir=tmp_path, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(maml, data)
    assert maml.inputs is not None
    assert (maml.inputs.mean, maml.inputs.std) == (data.pictures.mean, data.pictures.std)
    plain = COLORS[0].float() / 255
    assert torch.equal(maml.inputs.normalized(plain), data.pictures.prepare(COLORS[0], 1, [0]))


def test_a_specification_without_normalization_is_read():
    earlier = {"ways": 5, "channels": 1, "side": 28, "background": None}
    assert measured({"inputs": earlier})[1] == InputSpec(5, 1, 28, None)
    assert measured({"inputs": {**earlier, "mean": [0.5], "std": None}})[1] == InputSpec(5, 1, 28, None, [0.5])
    assert measured({"inputs": {**earlier, "other": 1}})[1] is None
    assert measured({"inputs": {"ways": 5}})[1] is None


@pytest.mark.usefixtures("folder")
def test_own_pictures_are_normalized_as_those_of_training_were(folder: Path):
    fit = main(words("fit", **TINY, **{"data.mean": 0.1, "data.std": 0.5}))
    pixels = np.zeros((6, 28, 28), np.uint8)
    for index, picture in enumerate(pixels):
        picture[8 : 12 + 2 * index, 6 : 20 - index] = 255
        place = folder / ("support" if index < 3 else "query") / f"class{index % 3}"
        place.mkdir(parents=True)
        Image.fromarray(picture).save(place / "one.png")
    best = Path(fit.trainer.log_dir) / "checkpoints" / "best.ckpt"
    flags = {"data": "SupportQueryDataModule", "data.support": "support", "data.query": "query"}
    predict = main(words("predict", **flags, ckpt_path=best))
    assert predict.model.inputs.mean == [0.1]
    (episode,) = predict.datamodule.predict_dataloader()
    assert torch.allclose(episode.support_inputs[0, :, 0], (torch.from_numpy(pixels[:3]) / 255 - 0.1) / 0.5)
    inputs, *_ = support_set(folder / "support", predict.model.inputs)
    assert torch.equal(inputs, episode.support_inputs[0])
