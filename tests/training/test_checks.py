"""What the first check of episodes, network and loss raises for, and what it leaves to the loss."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from maml_lightning import MAML, ArraysDataModule, Episode, FunctionDataModule, SettingError
from maml_lightning.training.checks import naming_misfits
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
        with pytest.raises(SettingError, match=rf"checkpoint.monitor is {monitor}, which is not .* one of {logged}"):
            trainer.fit(maml, datamodule=Datasets(name))
    assert list(tmp_path.iterdir()) == []


def test_a_class_below_0_is_named_with_the_remedy():
    with pytest.raises(SettingError, match=r"the episodes have class -1; .*CrossEntropyLoss with ignore_index -1"):
        step(nn.Linear(4, 3), of_classes([0, 1, -1, 0, 1, 2], [0] * 6))
    assert step(nn.Linear(4, 3), of_classes([0, 1, -1] * 2, [0] * 6), loss=nn.CrossEntropyLoss(ignore_index=-1)) > 0


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_inputs_of_another_type_than_the_networks_are_named_with_the_remedy(kind: str):
    inputs = (10 * SET).to(getattr(torch, kind))
    message = rf"inputs, \[6, 4\] {kind} \(.*the network takes them as float32: give them so, with .astype\(\"float32\""
    with pytest.raises(SettingError, match=message):
        MAML(nn.Linear(4, 3)).training_step(episode(of_classes([0, 1, 2] * 2, [0] * 6), inputs), 0)


def test_the_type_that_a_network_takes_is_its_own():
    targets = of_classes([0, 1, 2] * 2, [0] * 6)
    for net, kind, code in (
        (nn.Linear(4, 3).double(), "float64", r'.astype\("float64"\)'),
        (nn.Linear(4, 3).bfloat16(), "bfloat16", r".to\(torch.bfloat16\)"),
        (nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 3)), "int64", r'.astype\("int64"\)'),
    ):
        with pytest.raises(SettingError, match=rf"takes them as {kind}: give them so, with {code}"):
            MAML(net).training_step(episode(targets, (8 * SET).round()), 0)
    with pytest.raises(SettingError, match=r"the network takes float32: give them so, .*, in the shape that it takes"):
        MAML(nn.Linear(5, 3)).training_step(episode(targets, SET.double()), 0)
    with pytest.raises(SettingError, match=r"give a network for them, such as maml_lightning.ConvNet"):
        MAML(nn.Linear(5, 3)).training_step(episode(targets), 0)


def test_token_ids_without_an_embedding_are_named():
    net = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(8, 3))
    tokens = torch.arange(48).view(2, 6, 4) % 9
    with pytest.raises(SettingError, match=r"integers from 0 to 8: correct them, or .* \(num_embeddings 9 or more\)"):
        MAML(net).training_step(episode(of_classes([0, 1, 2] * 2, [0] * 6), tokens), 0)


@pytest.mark.parametrize(
    ("loss", "targets", "kind"),
    [
        (F.binary_cross_entropy_with_logits, torch.rand(2, 6, 3).round().long(), "float32"),
        (F.binary_cross_entropy_with_logits, torch.rand(2, 6, 3) > 0.5, "float32"),
        (F.huber_loss, torch.rand(2, 6, 3).double(), "float32"),  # whose gradient alone raises
        (F.cross_entropy, of_classes([0, 1, 2] * 2, [0] * 6).float(), "int64"),
        (wrapped, of_classes([0, 1, 2] * 2, [0] * 6).float(), "int64"),
    ],
    ids=["labels", "yes and no", "float64", "classes", "classes of ones own loss"],
)
def test_targets_of_another_type_than_the_loss_takes_are_named_with_the_remedy(loss, targets: Tensor, kind: str):
    with pytest.raises(SettingError, match=rf'model.loss .*with .astype\("{kind}"\)'):
        step(nn.Linear(4, 3), targets, loss=loss)


def test_labels_outside_0_to_1_are_refused():
    for value in (2.0, -1.0):
        targets = torch.zeros(2, 6, 3)
        targets[1, 4, 2] = value
        with pytest.raises(
            SettingError, match=rf"binary_cross_entropy_with_logits, but the .* the target {value:g}; it"
        ):
            step(nn.Linear(4, 3), targets, loss=F.binary_cross_entropy_with_logits)


def test_the_query_set_is_tried_as_well():
    classes = of_classes([0, 1, 2] * 2, [0] * 6)
    with pytest.raises(SettingError, match=r"does not take the episodes' inputs, \[6, 5\]"):
        MAML(nn.Linear(4, 3)).training_step(Episode(SET, classes, torch.rand(2, 6, 5), classes), 0)
    with pytest.raises(SettingError, match=r"model.net has 3 outputs, but the episodes have 4 classes"):
        MAML(nn.Linear(4, 3)).training_step(Episode(SET, classes, SET, classes + 1), 0)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (dict(zip(Episode._fields, episode(SET), strict=True)), "a dict;"),
        (tuple(episode(SET))[:3], "a tuple of 3;"),
        (torch.rand(4, 2, 6, 4), "a Tensor;"),
        ("abcd", "a str;"),
    ],
    ids=["dict", "three", "tensor", "text"],
)
def test_a_batch_that_has_not_four_parts_is_named(batch, what: str):
    with pytest.raises(SettingError, match=f"A batch of the data loader is {what} give an Episode, or a tuple of its"):
        MAML(nn.Linear(4, 3)).training_step(batch, 0)


CLASSES, EXAMPLES = 4, 8
TOKENS = nn.Sequential(nn.Embedding(10, 2), nn.Flatten(), nn.Linear(6, 3))


def pixels(first: int, **changes: int) -> dict[str, Tensor]:
    """A split with a label for each of 2 numbers; changes are the label of example 5, and what else is in it."""
    generator = torch.Generator().manual_seed(first)
    size = CLASSES * EXAMPLES
    targets = torch.randint(3, (size, 2), generator=generator)
    targets[:, 0] = -100  # left out by the loss
    targets[5, 1] = changes.get("label", 0)
    labels = first + torch.arange(size) // EXAMPLES
    return {"inputs": torch.rand(size, 1, 2, generator=generator), "labels": labels, "targets": targets}


def tokens(first: int, token: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(first)
    size = CLASSES * EXAMPLES
    inputs = torch.randint(10, (size, 3), generator=generator)
    inputs[5, 1] = token
    return {"inputs": inputs, "labels": first + torch.arange(size) // EXAMPLES}


def labels(first: int, value: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(first)
    size = CLASSES * EXAMPLES
    targets = torch.rand(size, 3, generator=generator).round()
    targets[5, 1] = value
    inputs = torch.rand(size, 4, generator=generator)
    return {"inputs": inputs, "labels": first + torch.arange(size) // EXAMPLES, "targets": targets}


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("make", "bad", "net", "loss", "message"),
    [
        (
            pixels,
            {"label": 4},
            nn.Conv1d(1, 3, 1),
            F.cross_entropy,
            " targets: .* 4: .* 3 outputs, .* ignore_index 4",
        ),
        (pixels, {"label": -1}, nn.Conv1d(1, 3, 1), F.cross_entropy, " targets: .* -1: .*episodes have class -1"),
        (tokens, {"token": 12}, TOKENS, F.cross_entropy, ": .* 12: model.net does not take .* integers from . to 12"),
        (labels, {"value": 2.0}, nn.Linear(4, 3), F.binary_cross_entropy_with_logits, " targets: .* 2: .* target 2"),
    ],
    ids=["classes of pixels", "negative classes", "token ids", "labels"],
)
def test_numbers_of_any_split_that_network_or_loss_do_not_take_are_named_before_training(
    make, bad, net, loss, message: str, split: str, tmp_path
):
    splits = {name: make(first) for name, first in (("train", 0), ("val", 10), ("test", 20))}
    settings = {"shots": 1, "query_shots": 1, "meta_batch_size": 2, "train_episodes": 2, "val_episodes": 2}
    settings["ways"] = 3 if make is tokens else 1

    def fit(given) -> None:
        trainer = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False)
        trainer.fit(MAML(net, loss=loss), ArraysDataModule(**given, **settings))

    first = {"train": 0, "val": 10, "test": 20}[split]
    place = f"data.{split}{message}".replace(": .*", f": example 5, of class {first}, has .*", 1)
    with pytest.raises(SettingError, match=place):
        fit({**splits, split: make(first, **bad)})
    assert list(tmp_path.iterdir()) == []


def test_the_first_episode_of_each_split_is_tried_before_training(tmp_path):
    def task(seed: int, index: int):
        return SET[0], torch.arange(6) % 3, SET[1], torch.arange(6) % 3

    def other(seed: int, index: int):
        return SET[0], torch.arange(6) % 4, SET[1], torch.arange(6) % 4

    data = FunctionDataModule(task, other, meta_batch_size=2, train_episodes=2, val_episodes=2)
    trainer = Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False)
    with pytest.raises(SettingError, match=r"The first episode of val: model.net has 3 outputs, but the .* 4 classes"):
        trainer.fit(MAML(nn.Linear(4, 3)), data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", [1, 3], ids=["support", "query"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_out_of_range_in_a_later_episode_is_named(split: str, late: int, tmp_path):
    def task(seed: int, index: int):
        parts = [SET[0], torch.arange(6) % 3, SET[1], torch.arange(6) % 3]
        parts[late] = parts[late] + (index == 1)
        return tuple(parts)

    def good(seed: int, index: int):
        return SET[0], torch.arange(6) % 3, SET[1], torch.arange(6) % 3

    functions = {"train": good, "val": good, split: task}
    data = FunctionDataModule(*functions.values(), meta_batch_size=2, train_episodes=2, val_episodes=2)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    with pytest.raises(SettingError, match=rf"{split}.*, task 1 of a batch: model.net has 3 outputs, but .* 4 classes"):
        trainer.fit(MAML(nn.Linear(4, 3)), data)


def test_a_failure_that_is_none_of_the_data_stays_as_it_is():
    maml, batch = MAML(nn.Linear(4, 3)), episode(of_classes([0, 1, 2] * 2, [0] * 6))
    with pytest.raises(ValueError, match="of my own"), naming_misfits(maml, batch):
        raise ValueError("of my own")


class Gradientless(nn.Linear):
    """Has parameters that require gradients, and outputs without one, in a way of each kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(4, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                return super().forward(x)
        return super().forward(x).detach()


@pytest.mark.parametrize("kind", ["no_grad", "detach"])
def test_outputs_without_a_gradient_are_refused(kind: str):
    x, y = torch.rand(2, 6, 4), torch.arange(3).repeat(2, 2)
    with pytest.raises(SettingError, match=r"returns outputs without a gradient .* take torch\.no_grad\(\), \.detach"):
        MAML(Gradientless(kind)).training_step(Episode(x, y, x, y), 0)


class OtherInEvaluation(nn.Linear):
    def __init__(self, kind: str) -> None:
        super().__init__(4, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return scores if self.training else scores.detach() if self.kind == "detach" else scores.argmax(-1)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("detach", r"outputs without a gradient in evaluation mode, .* take torch\.no_grad\(\), \.detach\(\)"),
        ("argmax", r"int64 outputs in evaluation mode, .* take argmax\(\) out of its forward"),
    ],
)
def test_outputs_that_lack_a_gradient_in_evaluation_mode_alone_are_told_so(kind: str, what: str):
    x, y = torch.rand(2, 6, 4), torch.arange(3).repeat(2, 2)
    with pytest.raises(SettingError, match=what):
        MAML(OtherInEvaluation(kind)).training_step(Episode(x, y, x, y), 0)


class Masked(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x * mask)


def test_arguments_that_forward_lacks_are_named():
    x, y = torch.rand(2, 6, 4), torch.arange(3).repeat(2, 2)
    maml = MAML(Masked(4, 3))
    with pytest.raises(SettingError, match=r"argument: 'mask'\); give a tuple of the arguments .* by name: x, mask\."):
        maml.training_step(Episode(x, y, x, y), 0)
    assert maml.training_step(Episode((x, x), y, {"x": x, "mask": x}, y), 0).isfinite()


X, Y = torch.rand(6, 4), torch.arange(3).repeat(2)


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (X.numpy(), Y, "support_inputs must be a tensor, .*; it holds ndarray. Make tensors of it"),
        (X.tolist(), Y.tolist(), "support_inputs must be a tensor, .*; it holds float. Make tensors of it"),
        (X, Y[:5], r"one target per support input: got support_inputs \[1, 6, 4\] and support_targets \[1, 5\]"),
        (X, Y + 1, "or subtract 1 from the targets, which are 1 to 3"),
        (X, Y.float(), "targets are floats"),
        (X[:, :3], Y, r"does not take the episodes' inputs, \[6, 3\]"),
        (X.double(), Y, r"the network takes them as float32"),
    ],
)
def test_a_support_set_that_does_not_fit_is_named(inputs, targets, said: str):
    maml = MAML(nn.Linear(4, 3)).eval()
    with pytest.raises(SettingError, match=f"^MAML.adapt takes the support set of one task, .*: .*{said}"):
        maml.adapt(inputs, targets)
    assert maml.adapt(X, Y)(X).shape == (6, 3)


def test_a_list_of_batches_in_place_of_a_loader_is_named(tmp_path):
    batch = episode(torch.arange(3).repeat(2, 2))
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    with pytest.raises(
        SettingError, match=r"is a list of 1; .* fit got a list, give it DataLoader\(list, batch_size=N"
    ):
        trainer.fit(MAML(nn.Linear(4, 3)), [batch], DataLoader([batch], batch_size=None))
