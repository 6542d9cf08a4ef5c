"""Loaders of one's own whose data are not finite."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from maml_lightning import MAML, Episode
from maml_lightning.errors import NonFiniteError


def batches(part=None, at=0):
    """Three batches of two tasks; in one of them a part has a NaN."""
    found = []
    for index in range(3):
        inputs, targets = torch.rand(2, 6, 4), torch.rand(2, 6, 1)
        episode = Episode(inputs, targets, inputs.clone(), targets.clone())
        if part is not None and index == at:
            getattr(episode, part)[1, 2, 0] = torch.nan
        found.append(episode)
    return DataLoader(found, batch_size=None)


def fit(train, val, tmp_path, **settings):
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        num_sanity_val_steps=0, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    maml = MAML(nn.Linear(4, 1), inner_lr=0.01, loss=nn.functional.mse_loss, **settings)
    trainer.fit(maml, train, val)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("part", Episode._fields)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_nan_names_split_batch_and_part(part, split, tmp_path):
    data = {"train": batches(), "val": batches(), split: batches(part, at=1)}
    with pytest.raises(
        NonFiniteError, match=f"Batch 1 of the {split} data has {part} with a value that is NaN or infi"
    ):
        fit(data["train"], data["val"], tmp_path)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_skip_leaves_such_a_batch_out(tmp_path):
    trainer = fit(batches("support_inputs"), batches(), tmp_path, non_finite="skip")
    assert trainer.callback_metrics["train/skipped_steps"] == 1
