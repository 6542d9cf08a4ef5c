"""Attention and recurrence inside tasks: exact, and the inference paths of torch's layers are not taken."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import Episode
from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.engine.kernels import recurrence
from tests.reference import perturbed, reference, relative_error

LENGTH, FEATURES = 4, 6


def sequences(tasks=2, count=4):
    torch.manual_seed(0)
    x = torch.randn(2, tasks, count, LENGTH, FEATURES, dtype=torch.float64)
    y = torch.arange(count).remainder(3).repeat(tasks, 1)
    return Episode(x[0], y, x[1], y)


def lstm(**settings):
    return nn.LSTM(FEATURES, 5, **settings)


class Recurrent(nn.Module):
    def __init__(self, layer, initial=False):
        super().__init__()
        self.layer, self.initial = layer, initial
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x):
        x = x if self.layer.batch_first else x.transpose(0, 1)
        state = ()
        if self.initial:
            size = (self.layer.num_layers * (2 if self.layer.bidirectional else 1), x.shape[not self.layer.batch_first])
            h, c = (torch.full((*size, self.layer.hidden_size), value, dtype=x.dtype) for value in (0.3, -0.2))
            state = ((h, c) if isinstance(self.layer, nn.LSTM) else h,)
        output, last = self.layer(x, *state)
        last = last[0] * last[1] if isinstance(last, tuple) else last
        return self.head(output.mean(1 if self.layer.batch_first else 0) + last.sum())


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = lstm(proj_size=2, num_layers=2), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1))[0].mean(0))


class Cells(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 3)

    def forward(self, x):
        state = None
        for now in x.unbind(1):
            state = self.cell(now, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Attention(nn.Module):
    def __init__(self, causal=False, mask=False):
        super().__init__()
        self.causal, self.mask = causal, mask
        self.to_qkv, self.head = nn.Linear(FEATURES, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if self.mask else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


class MultiHead(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(FEATURES, 2, batch_first=True), nn.Linear(FEATURES, 3)
        self.need_weights = need_weights

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=self.need_weights)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, dropout=0.0, batch_first=True, **settings)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


NETWORKS = {
    "LSTM": lambda: Recurrent(lstm()),
    "LSTM, two layers": lambda: Recurrent(lstm(num_layers=2, batch_first=True)),
    "LSTM, bidirectional": lambda: Recurrent(lstm(bidirectional=True, batch_first=True), initial=True),
    "LSTM, no bias": lambda: Recurrent(lstm(bias=False)),
    "LSTM, projection": Projected,
    "GRU": lambda: Recurrent(nn.GRU(FEATURES, 5, 2, bidirectional=True), initial=True),
    "RNN": lambda: Recurrent(nn.RNN(FEATURES, 5, batch_first=True)),
    "RNN with ReLU": lambda: Recurrent(nn.RNN(FEATURES, 5, nonlinearity="relu"), initial=True),
    "LSTMCell": lambda: Cells(nn.LSTMCell(FEATURES, 5)),
    "GRUCell": lambda: Cells(nn.GRUCell(FEATURES, 5)),
    "RNNCell": lambda: Cells(nn.RNNCell(FEATURES, 5)),
    "attention": Attention,
    "causal attention": partial(Attention, causal=True),
    "masked attention": partial(Attention, mask=True),
    "MultiheadAttention": partial(MultiHead, need_weights=False),
    "MultiheadAttention with weights": partial(MultiHead, need_weights=True),
    "TransformerEncoder": Encoder,
    "TransformerEncoder, norm first": partial(Encoder, norm_first=True, activation="gelu"),
}


# In evaluation torch's attention layers take a path of their own where they can; recurrent layers do not.
ATTENTION = [name for name in NETWORKS if name.startswith(("Multi", "Trans"))]
MODES = [*[(name, True) for name in NETWORKS], *[(name, False) for name in ATTENTION]]


@pytest.mark.parametrize(("name", "training"), MODES)
def test_exact(name, training):
    torch.manual_seed(1)
    net = perturbed(NETWORKS[name]()).train(training)
    episode = sequences()
    loop = InnerLoop(net, F.cross_entropy, tasks_per_chunk=None)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = reference(net, episode, 0.1, 2, F.cross_entropy)
    ours = loop.meta_gradient(dict(net.named_parameters()), episode, 0.1, 2).gradient
    assert relative_error(ours, expected) < 1e-9
    with torch.no_grad():
        before = loop.trajectory(dict(net.named_parameters()), episode, 0.1, 1)[0][1]
        assert torch.allclose(before, net(episode.query_inputs[1]), rtol=1e-9)


OWN = nn.RNNBase.flatten_parameters


class Flattening(nn.Module):
    """Puts the weights of its recurrent layer into one piece of memory at each call, as cuDNN's layers do on GPUs."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        assert nn.RNNBase.flatten_parameters is not OWN  # a graph cannot record that, and autograd does not know it
        self.rnn.flatten_parameters()
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("execution", ["traced", "vectorized", "loop"])
def test_weights_of_recurrent_layers_stay_where_they_are(execution):
    net, x, y = Flattening(), torch.rand(2, 3, 5, 3), torch.arange(3).expand(2, 3)
    loop = InnerLoop(net, F.cross_entropy, execution=execution)
    loop.gradient("maml", dict(net.named_parameters()), Episode(x, y, x, y), 0.1, 1)
    assert nn.RNNBase.flatten_parameters is OWN


def test_packed_sequences_have_a_second_derivative_on_gpus():
    enabled = []

    def own(*args):
        enabled.append(torch.backends.cudnn.enabled)

    assert torch.backends.cudnn.enabled
    recurrence._layers("lstm", own, torch.rand(3, 2), torch.tensor([2, 1]), (), [], True, 1, 0.0, True, False)
    assert enabled == [False]
    assert torch.backends.cudnn.enabled
