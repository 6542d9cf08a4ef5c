"""Networks that take a gradient themselves need a third derivative, which some kernels do not have."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, Episode, SettingError
from tests.reference import reference, relative_error


class Energy(nn.Module):
    """Classifies by outputs of a recurrent layer and their gradient in the inputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.energy, self.head = layer(3, 4, batch_first=True), nn.Linear(4, 1, bias=False), nn.Linear(7, 3)

    def last(self, x):
        return self.layer(x)[0][:, -1]

    def forward(self, x):
        slope = torch.func.grad(lambda x: self.energy(self.last(x)).sum())(x)
        return self.head(torch.cat([self.last(x), slope.mean(1)], 1))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_in_a_gradient_of_the_network_is_exact_in_float32(layer):
    torch.manual_seed(0)
    net = Energy(layer)
    x, query = torch.rand(2, 6, 5, 3), torch.rand(2, 6, 5, 3)
    episode = Episode(x, torch.arange(3).repeat(2, 2), query, torch.arange(3).repeat(2, 2))
    maml = MAML(net, inner_lr=1.0, inner_steps=1)
    maml.training_step(episode, 0).backward()
    exact = Episode(x.double(), episode.support_targets, query.double(), episode.query_targets)
    _, expected = reference(copy.deepcopy(net).double(), exact, 1.0, 1, F.cross_entropy)
    found = {name: value.grad.double() for name, value in net.named_parameters()}
    assert relative_error(found, expected) < 5e-6


class ByHand(nn.BatchNorm1d):
    """Batch normalization in terms of operators that torch differentiates as often as one likes."""

    def forward(self, x):
        centered = x - x.mean(0)
        return self.weight * centered * (centered.square().mean(0) + self.eps).rsqrt() + self.bias


class Slope(nn.Module):
    """Classifies by normalized features and the gradient of their energy in the inputs."""

    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), layer)
        self.energy, self.head = nn.Linear(4, 1, bias=False), nn.Linear(7, 3)

    def forward(self, x):
        slope = torch.func.grad(lambda x: self.energy(self.body(x).tanh()).sum())(x)
        return self.head(torch.cat([self.body(x), slope], 1))


def normalized():
    torch.manual_seed(0)
    by_hand = Slope(ByHand(4)).double()
    net = Slope(nn.BatchNorm1d(4)).double()
    net.load_state_dict(by_hand.state_dict())
    x, query = torch.rand(2, 6, 3).double(), torch.rand(2, 6, 3).double()
    return net, by_hand, Episode(x, torch.arange(3).repeat(2, 2), query, torch.arange(3).repeat(2, 2))


def refused_by_torch():
    x, weight = torch.rand(4, 3, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
    total = F.batch_norm(x, None, None, weight, training=True).tanh().square().sum()
    with contextlib.suppress(RuntimeError):
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, x, create_graph=True)
            total = gradient.sin().sum()
        return False
    return True


@pytest.mark.parametrize("execution", ["auto", "traced", "vectorized", "loop"])
def test_a_third_derivative_of_batch_normalization_is_never_taken_for_zero(execution):
    net, _, episode = normalized()
    if execution in ("auto", "loop") and not refused_by_torch():
        pytest.skip("this torch's own third derivative of batch normalization is wrong, and not refused")
    with pytest.raises(SettingError, match=r"derivative[^\n]*model.first_order|model.execution \w+ does not work"):
        MAML(net, inner_lr=1.0, inner_steps=1, execution=execution).training_step(episode, 0)


class SlopeInWeight(Slope):
    """The same with the gradient in a weight that counts as a constant, and small."""

    def forward(self, x):
        linear, norm = self.body
        weight = linear.weight.detach()
        slope = torch.func.grad(lambda weight: self.energy(norm(x @ weight.T).tanh()).sum())(weight)
        return self.head(torch.cat([self.body(x), slope.sum(0).expand(len(x), 3) / 100], 1))


def test_a_part_that_is_not_differentiated_is_exact_in_float32():
    torch.manual_seed(0)
    net, by_hand, (_, _, episode) = SlopeInWeight(nn.BatchNorm1d(4)), SlopeInWeight(ByHand(4)).double(), normalized()
    by_hand.load_state_dict(net.state_dict())
    single = Episode(*(part.float() if part.is_floating_point() else part for part in episode))
    MAML(net, inner_lr=1.0, inner_steps=1).training_step(single, 0).backward()
    _, expected = reference(by_hand, episode, 1.0, 1, F.cross_entropy)
    found = {name: value.grad.double() for name, value in net.named_parameters()}
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("execution", ["auto", "vectorized"])
def test_a_first_order_gradient_needs_no_third_derivative(execution):
    net, by_hand, episode = normalized()
    maml = MAML(net, inner_lr=1.0, inner_steps=1, first_order=True, execution=execution)
    maml.training_step(episode, 0).backward()
    _, expected = reference(by_hand, episode, 1.0, 1, F.cross_entropy, first_order=True)
    found = {name: value.grad for name, value in net.named_parameters()}
    assert relative_error(found, expected) < 1e-9
