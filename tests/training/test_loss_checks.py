"""What is said of a loss that does not take a network's outputs."""

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


def named(*both):
    return dict(zip(("logits", "code"), both, strict=True))


@pytest.mark.parametrize(
    ("kind", "loss"), [(lambda *both: both, of_places), (lambda *both: list(both), of_places), (named, of_names)]
)
def test_a_loss_of_all_that_a_network_returns_gets_it(kind, loss):
    def joined(outputs, targets):
        return loss(kind(outputs[:, :4], outputs[:, 4:]), targets)

    assert step(kind, loss).item() == pytest.approx(step(lambda *both: torch.cat(both, 1), joined).item(), rel=1e-6)


def test_what_a_loss_of_all_does_not_take_is_said_of_all():
    x = torch.zeros(2, 3, 4)
    whole = r"computed from outputs \{logits: \[3, 4\], code: \[3, 2\]\}"
    with pytest.raises(SettingError, match=rf"{whole} .*\(KeyError 'cod'\)"):
        step(named, lambda o, y: o["cod"].mean())
    with pytest.raises(SettingError, match=rf"{whole} .*\(The size of tensor a"):
        step(named, lambda o, y: (o["code"] - y[:2]).mean())
    with pytest.raises(SettingError, match=r"Using a target size"):
        step(lambda *both: (both[0][:, :1], both[1]), lambda o, y: F.mse_loss(o[0], y) + o[1].mean())
    with pytest.raises(SettingError, match=r"model.net returns dict of a, b, with no tensor to take as its outputs"):
        step(lambda a, b: {"a": a, "b": b}, F.mse_loss)
    with pytest.raises(SettingError, match=r"model.net returns outputs without a gradient in evaluation mode"):
        step(lambda *both: (both[0].detach(), both[1].detach()), of_places)
    assert MAML(Several(named), loss=of_names)(x[0]).shape == (3, 4)


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


class Scaled(nn.Module):
    """A loss that learns how much to scale the outputs."""

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


class Listed(nn.Module):
    """Reads a weight from a list of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.weights = [self.layer.weight]

    def forward(self, x):
        return self.layer(x) * self.weights[0].norm()


def classes():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(2, 3, 4, generator=generator), torch.arange(3).repeat(2, 1)
    return Episode(x, labels, x, labels)


def penalized(net, detached=False):
    def loss(outputs, targets):
        weight = net.weight.detach() if detached else net.weight
        return F.cross_entropy(outputs, targets) + weight.square().sum()

    return loss


def test_a_parameter_that_would_get_no_gradient_is_refused():
    scaled = Scaled()
    with pytest.raises(SettingError, match=r"^model.loss has a parameter \(scale\), which would get no gradient"):
        MAML(nn.Linear(4, 3), loss=scaled).training_step(classes(), 0)
    MAML(nn.Linear(4, 3), loss=scaled.requires_grad_(False)).training_step(classes(), 0)
    with pytest.raises(SettingError, match=r"^layer.weight of model.net is read where neither its adapted value nor"):
        MAML(Listed()).training_step(classes(), 0)


def test_so_is_a_penalty_on_the_network_in_its_loss():
    net = nn.Linear(4, 3)
    with pytest.raises(SettingError, match=r"^weight of model.net is read [^\n]*add penalties to what training_step"):
        MAML(net, loss=penalized(net)).training_step(classes(), 0)
    MAML(net, loss=penalized(net, detached=True)).training_step(classes(), 0)


def test_a_penalty_that_the_network_keeps_is_taken():
    net = Balanced()
    MAML(net, loss=lambda outputs, targets: F.cross_entropy(outputs, targets) + net.penalty).training_step(classes(), 0)
