"""Networks that take a gradient themselves need a third derivative, which the recurrent operators do not have."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, Episode
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
