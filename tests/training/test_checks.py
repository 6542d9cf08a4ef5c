"""What the first check of episodes, network and loss raises for, and what it leaves to the loss."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from maml_lightning import MAML, Episode, SettingError
from tests.structures import CASES, episode_of

SET = torch.rand(2, 6, 4)  # inputs of two tasks


def episode(targets: Tensor, inputs: Tensor = SET) -> Episode:
    return Episode(inputs, targets, inputs, targets)


def step(net: nn.Module, targets: Tensor, **settings) -> Tensor:
    return MAML(net, inner_lr=0.1, **settings).training_step(episode(targets), 0)


def of_classes(*tasks: list[int]) -> Tensor:
    return torch.tensor(tasks)


def test_tasks_may_lack_classes():
    full, without_last, one = [0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1], [0] * 6
    for tasks in ((without_last, full), (full, without_last), (one, full), (one, one), (without_last, without_last)):
        assert step(nn.Linear(4, 3), of_classes(*tasks)).isfinite()


def test_a_class_without_an_output_is_found_in_any_task():
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        with pytest.raises(SettingError, match=r"model.net has 3 outputs, but the episodes have 5 classes; give it 5"):
            step(nn.Linear(4, 3), of_classes([0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0]), loss=loss)
    with pytest.raises(SettingError, match=r"model.net has 1 outputs, but the episodes have 2 classes"):
        step(nn.Linear(4, 1), of_classes([0, 1] * 3, [0, 1] * 3))
    # 9 is left out by this loss
    targets = of_classes([0, 1, 9, 9, 2, 0], [0, 1, 2, 0, 9, 0])
    assert step(nn.Linear(4, 3), targets, loss=nn.CrossEntropyLoss(ignore_index=9)).isfinite()
    pixels = torch.full((2, 6, 4), 3)
    with pytest.raises(SettingError, match=r"model.net has 3 outputs, but the episodes have 4 classes"):
        MAML(nn.Conv1d(1, 3, 1)).training_step(episode(pixels, torch.rand(2, 6, 1, 4)), 0)


def test_a_loss_of_ones_own_decides_about_its_classes():
    def ordinal(outputs: Tensor, targets: Tensor) -> Tensor:  # two thresholds for three classes
        above = targets.unsqueeze(-1) > torch.arange(2)
        return F.binary_cross_entropy_with_logits(outputs, above.to(outputs.dtype))

    assert step(nn.Linear(4, 2), of_classes([0, 1, 2] * 2, [2, 1, 0] * 2), loss=ordinal).isfinite()


def wrapped(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def test_what_a_loss_of_ones_own_cannot_compute_is_refused():
    with pytest.raises(SettingError, match=r"model.loss wrapped cannot be computed from outputs \[6, 3\] and .*bounds"):
        step(nn.Linear(4, 3), of_classes([0, 1, 2, 3, 4, 5], [0] * 6), loss=wrapped)


def shuffled_pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, shuffled_pairs], ids=lambda loss: loss.__name__
)
def test_targets_that_would_be_broadcast_are_refused(loss):
    numbers = torch.rand(2, 6)
    expected = r"model.net gives outputs \[6, 1\], but the episodes' targets are \[6\]; give it outputs of that shape"
    with pytest.raises(SettingError, match=expected):
        step(nn.Linear(4, 1), numbers, loss=loss)
    with pytest.raises(SettingError, match=expected.replace(r"\[6\];", r"\[6\] int64;")):
        step(nn.Linear(4, 1), of_classes([0, 1, 0, 1, 0, 1], [0] * 6), loss=shuffled_pairs)


def test_a_loss_that_takes_other_shapes_is_not_refused():
    def squeezed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs.squeeze(-1), targets)

    for numbers in (torch.rand(2, 6), torch.tensor([[-1.0, 1.0, -2, 2, 3, 0.5], [0.0] * 6])):
        net = nn.Linear(4, 1)
        assert step(net, numbers, loss=squeezed).isfinite()
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        assert step(net, numbers, loss=squeezed).isfinite()


def test_floats_as_classes_are_refused_unless_they_are_probabilities():
    assert step(nn.Linear(4, 3), torch.rand(2, 6, 3).softmax(-1)).isfinite()
    for targets, size in ((torch.rand(2, 6, 3), 3), (torch.ones(2, 6, 1), 1), (torch.rand(2, 6), 3)):
        with pytest.raises(SettingError, match=r"model.loss is cross_entropy, but the episodes' targets are floats"):
            step(nn.Linear(4, size), targets)


class Datasets(LightningDataModule):
    """The episodes of a case, as data modules of the package have them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        given = [episode_of(CASES[name]) for _ in range(2)]

        class Given(Dataset):
            def __len__(self):
                return len(given)

            def __getitem__(self, index):
                return given[index]

        self.datasets = {"train": Given()}

    def train_dataloader(self):
        return DataLoader(self.datasets["train"], batch_size=None)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
@pytest.mark.parametrize("name", ["integers", "dict"])
def test_integer_inputs_stay_integers_under_a_trainer(name, precision, tmp_path):
    maml = MAML(CASES[name].net(), inner_lr=0.1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    seen = []
    layer = maml.net.embedding if name == "dict" else maml.net[0]
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    trainer.fit(maml, datamodule=Datasets(name))
    assert set(seen) == {torch.int64}
    assert trainer.callback_metrics["val/accuracy"] >= 0


def test_a_score_that_is_not_logged_cannot_be_monitored(tmp_path):
    for name, monitor, logged in (
        ("labels", "val/accuracy", "val/loss"),
        ("dict", "val/mse", "val/accuracy, val/loss"),
    ):
        maml = MAML(CASES[name].net(), loss=CASES[name].loss)
        callback = ModelCheckpoint(monitor=monitor)
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, callbacks=[callback], default_root_dir=tmp_path
        )
        with pytest.raises(SettingError, match=f"checkpoint.monitor is {monitor}, which is not .* one of {logged}"):
            trainer.fit(maml, datamodule=Datasets(name))
    assert list(tmp_path.iterdir()) == []
