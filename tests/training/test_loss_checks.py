"""What is said of a loss that does not take a network's outputs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maml_lightning import MAML, Episode, SettingError
from maml_lightning.training.loss_checks import check_loss

PIXELS = torch.arange(3).repeat(2, 4, 1)  # [2, 4, 3]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5, 5), (2, 1)])
def test_a_network_without_an_output_for_each_pixel_is_named(shape: tuple[int, ...]):
    with pytest.raises(SettingError, match=r"it takes outputs \[2, 3, 4, 3\] for these targets: give a network with"):
        check_loss(F.cross_entropy, torch.zeros(shape), PIXELS)


def test_another_loss_is_named_where_no_outputs_would_do():
    with pytest.raises(SettingError, match=r"give another, such as cross_entropy for classes, mse_loss for numbers"):
        check_loss(F.nll_loss, torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
    check_loss(F.cross_entropy, torch.zeros(2, 3, 4, 3), PIXELS)


class Several(nn.Module):
    """Returns a reconstruction and what it was made of, as ``kind`` makes it of both."""

    def __init__(self, kind):
        super().__init__()
        self.encoder, self.decoder, self.kind = nn.Linear(4, 2), nn.Linear(2, 4), kind

    def forward(self, x):
        code = self.encoder(x)
        return self.kind(self.decoder(code), code)


def of_places(outputs, targets):  # of examples 0 and 1 where outputs are one tensor
    return (outputs[0] - targets).square().mean() + outputs[1].square().mean()


def of_names(outputs, targets):
    return F.mse_loss(outputs["logits"], targets) + outputs["code"].square().mean()


def of_either(outputs, targets):
    return F.mse_loss(outputs if isinstance(outputs, torch.Tensor) else outputs[0], targets)


def step(kind, loss):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return MAML(Several(kind), inner_lr=0.1, loss=loss).training_step(Episode(x, x, x, x), 0)


@pytest.mark.parametrize(
    ("kind", "loss", "name"),
    [
        (lambda *both: both, of_places, "tuple"),
        (lambda *both: list(both), of_places, "list"),
        (lambda *both: dict(zip(("logits", "code"), both, strict=True)), of_names, "dict"),
        (lambda *both: SimpleNamespace(logits=both[0], code=both[1]), lambda o, y: o.code.square().mean(), "Simple"),
    ],
)
def test_a_loss_of_all_that_a_network_returns_is_refused(kind, loss, name):
    match = rf"takes all that model.net returns \({name}.*\[3, 4\]; let the network return one tensor \(torch.cat\)"
    with pytest.raises(SettingError, match=match):
        step(kind, loss)


@pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss(), of_either])
def test_a_loss_of_the_outputs_among_them_is_taken(loss):
    assert step(lambda *both: both, loss).item() == step(lambda first, second: first, loss).item() > 0


def test_classes_that_begin_at_1_are_said_to():
    x, y = torch.zeros(2, 3, 4), torch.tensor([1, 2, 3]).repeat(2, 1)
    said = r"but the episodes have 4 classes; give it 4 outputs, or subtract 1 from the targets, which are 1 to 3\.$"
    with pytest.raises(SettingError, match=said):
        MAML(nn.Linear(4, 3)).training_step(Episode(x, y, x, y), 0)


def test_classes_with_a_dimension_too_many_are_named():
    with pytest.raises(SettingError, match=r"it takes the targets as \[3\]: give them so, with \[\.\.\., 0\]"):
        check_loss(F.cross_entropy, torch.zeros(3, 3), torch.arange(3)[:, None])
    check_loss(F.cross_entropy, torch.zeros(3, 3), torch.arange(3)[:, None][..., 0])


class Weighed(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.scale, targets)


class Balanced(nn.Module):
    """Keeps a penalty for the loss as it runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.penalty = nn.Linear(4, 3), 0.0

    def forward(self, x):
        outputs = self.layer(x)
        self.penalty = outputs.square().mean()
        return outputs


def test_a_loss_that_reads_parameters_by_itself_is_said_once(recwarn):
    x, y = torch.rand(2, 6, 4), torch.arange(3).repeat(2, 2)
    net, balanced = nn.Linear(4, 3), Balanced()
    for read, module, loss in (
        (2, net, lambda outputs, targets: F.cross_entropy(outputs, targets) + net.weight.norm() + net.bias.norm()),
        (1, nn.Linear(4, 3), Weighed()),
        (0, balanced, lambda outputs, targets: F.cross_entropy(outputs, targets) + balanced.penalty),
        (0, nn.Linear(4, 3), F.cross_entropy),
    ):
        for _ in range(2):
            MAML(module, loss=loss).training_step(Episode(x, y, x + 1, y), 0)
        said = [str(warning.message) for warning in recwarn if "by itself" in str(warning.message)]
        recwarn.clear()
        assert len(said) == 2 * bool(read)
        assert all(f"reads {read} parameter(s) by itself" in line and "\n" not in line for line in said)
        assert all(value.requires_grad for value in module.parameters())
