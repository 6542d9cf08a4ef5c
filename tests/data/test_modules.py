"""What data modules share: checks, loaders, and that workers and batch sizes do not matter."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from maml_lightning import SettingError
from maml_lightning.data import EpisodicDataModule
from maml_lightning.episodes import Episode
from tests.data.numbers import Numbers, equal, joined
from tests.runs import LEAST


@pytest.mark.parametrize(("setting", "least"), [("ways", 2), *LEAST.items()])
def test_small_numbers_are_refused(setting: str, least: int):
    with pytest.raises(ValueError, match=rf"data.{setting} must be at least {least} \(got {least - 1}\)"):
        Numbers(**{setting: least - 1})


def whole(**settings: Any) -> Episode:
    module = Numbers(**settings)
    module.setup("fit")
    return joined(module.train_dataloader())


@pytest.mark.filterwarnings("ignore:.*will create 4 worker processes")
def test_workers_and_batch_size_do_not_matter():
    expected = whole()
    assert expected.tasks == 12
    assert equal(expected, whole(num_workers=1))
    assert equal(expected, whole(num_workers=4))
    assert equal(expected, whole(meta_batch_size=6))


def test_loaders_need_no_setup():
    assert [batch.tasks for batch in Numbers().test_dataloader()] == [4, 1]


def test_setup_loads_only_what_the_stage_needs():
    module = Numbers(rotations=True)
    module.setup("test")
    assert list(module.datasets) == ["test"]
    module.setup("fit")
    assert {split: data.classes for split, data in module.datasets.items()} == {"test": 7, "train": 28, "val": 7}


def test_rotations_of_evaluation_are_those_of_its_episodes_alone():
    plain, turned = Numbers(), Numbers(eval_rotations=True)
    for module in (plain, turned):
        module.setup("fit")
        module.setup("test")
    drawn = {split: data.drawn_rotations for split, data in turned.datasets.items()}
    assert drawn == {"train": False, "val": True, "test": True}
    assert equal(plain.datasets["train"][0], turned.datasets["train"][0])


class Recorder(LightningModule):
    """Keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[Episode] = []
        self.val_batches: list[Episode] = []

    def training_step(self, batch: Episode) -> Tensor:
        self.train_batches.append(batch)
        return self.weight * 0

    def validation_step(self, batch: Episode) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")  # the latter: Lightning's own
def test_lightning_passes_the_epochs_on():
    recorder, module = Recorder(), Numbers()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(recorder, datamodule=module)
    expected = module.datasets["train"].__getitems__(range(24))
    assert equal(expected, joined(recorder.train_batches))
    assert [batch.tasks for batch in recorder.val_batches] == [4, 4, 2] * 2
    assert equal(recorder.val_batches[0], recorder.val_batches[3])


@pytest.mark.parametrize(
    "images", [torch.rand(8, 20, 12, 12), torch.zeros(160, 12, 12, dtype=torch.uint8)], ids=["float", "no classes"]
)
def test_images_of_another_type_or_shape_name_what_load_split_must_give(images):
    class Own(EpisodicDataModule):
        def load_split(self, split):
            return images

    with pytest.raises(SettingError, match=r"Own\.load_split gives torch\.\w+ \[.*\]; give uint8 \(0 to 255\) images"):
        Own(ways=3).setup("fit")
