"""A data loader of the user's own is tried before anything is written, and draws afterwards as if it had not been."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from maml_lightning import MAML, MLP, SettingError
from maml_lightning.training.first_batches import first_of

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")


class Drawn(Dataset):
    """Episodes from random numbers of its own and of all libraries, whatever the index."""

    def __init__(self, classes: int = 3, features: int = 4) -> None:
        self.own, self.drawn, self.features = np.random.default_rng(0), 0, features
        self.labels = torch.arange(6) % classes

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple:
        self.drawn += 1
        numbers = self.own.random() + random.random() + np.random.random() + torch.rand(6, self.features)
        return numbers.float(), self.labels, numbers.float(), self.labels


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(max_steps=1, default_root_dir=folder, accelerator="cpu", **quiet, **settings)


def seeded() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"batch_size": 2, "shuffle": True}, {"batch_size": 3}])
def test_a_loader_draws_afterwards_as_if_nothing_had_been_drawn(settings: dict[str, Any]):
    seeded()
    untouched = [batch[0] for batch in DataLoader(Drawn(), **settings)]
    seeded()
    loader = DataLoader(Drawn(), **settings)
    batch = first_of(loader)
    assert batch[0].shape == (settings["batch_size"], 6, 4)
    assert loader.dataset.drawn == 0
    assert all(map(torch.equal, untouched, [found[0] for found in loader]))


def test_what_the_trainer_draws_is_the_same_too(tmp_path: Path):
    weights = []
    for hidden in (False, True):
        seeded()
        dataset = Drawn()
        if hidden:
            dataset.unpicklable = lambda: None  # so that it is not tried beforehand
        loader = DataLoader(dataset, batch_size=2, shuffle=True)
        assert (first_of(loader) is None) == hidden
        maml = MAML(MLP(4, 3))
        trainer(tmp_path, logger=False).fit(maml, loader)
        assert dataset.drawn == 2
        weights.append(torch.cat([value.detach().flatten() for value in maml.parameters()]))
    assert torch.equal(*weights)


def test_tensors_are_not_copied():
    dataset = TensorDataset(torch.zeros(2, 6, 4))
    assert first_of(DataLoader(dataset, batch_size=None))[0].data_ptr() == dataset.tensors[0].data_ptr()


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        raise AssertionError("read before its time")


def test_what_cannot_be_read_twice_is_not_read():
    assert first_of(DataLoader(Endless())) is None
    assert first_of(DataLoader(Drawn(), sampler=[5, 3])) is None
    assert first_of(DataLoader(Drawn(), batch_sampler=[[5, 3]])) is None
    dataset = Drawn()
    dataset.labels = None  # its own error is for the loader to raise
    assert first_of(DataLoader(dataset, batch_size=2)) is None


BAD = {
    r"model.net has 3 outputs, but the episodes have 4": Drawn(classes=4),
    r"model.net does not take the episodes' inputs, \[6, 5\]": Drawn(features=5),
    r"A batch of the data loader is a list of 1": TensorDataset(torch.zeros(4, 6, 4)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_loader_leaves_no_log_folder(message: str, tmp_path: Path):
    loader = DataLoader(BAD[message], batch_size=2)
    with pytest.raises(SettingError, match=message):
        trainer(tmp_path).fit(MAML(MLP(4, 3)), loader)
    assert [*tmp_path.iterdir()] == []


def test_bad_loaders_of_validation_and_test_leave_none_either(tmp_path: Path):
    bad = DataLoader(Drawn(features=5), batch_size=2)
    with pytest.raises(SettingError, match=r"The first episode of val: model.net does not take .* \[6, 5\]"):
        trainer(tmp_path).fit(MAML(MLP(4, 3)), DataLoader(Drawn(), batch_size=2), [bad])
    with pytest.raises(SettingError, match=r"model.net does not take the episodes' inputs, \[6, 5\]"):
        trainer(tmp_path).test(MAML(MLP(4, 3)), bad, verbose=False)
    assert [*tmp_path.iterdir()] == []


class Own(LightningDataModule):
    """Whose loaders need its setup, which Lightning calls after it has opened the log folder."""

    calls = 0

    def setup(self, stage: str | None = None) -> None:
        self.calls += 1
        self.dataset = Drawn()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=2)


def test_a_data_module_of_the_users_own_is_set_up_once(tmp_path: Path):
    data = Own()
    trainer(tmp_path, logger=False).fit(MAML(MLP(4, 3)), datamodule=data)
    assert (data.calls, data.dataset.drawn) == (1, 2)
