"""Graphs under autocast: the casts are in the graph, and nothing else is cast when it is replayed."""

import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_map

from maml_lightning import MAML, Episode, SettingError
from tests.zoo import test_zoo
from tests.zoo.loop import meta_gradient, relative_error

# Rules of GPUs that CPUs do not have: float32 comes out of these.
TO_FLOAT = ("softplus", "layer_norm", "group_norm", "exp", "log", "rsqrt", "log1p", "pow.Tensor_Scalar", "logsumexp")
WITH_DTYPE = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "linalg_vector_norm")


def run(operator, has_dtype, *args, **kwargs):
    with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastCPU)):
        if has_dtype:
            single = args[0].dtype in (torch.bfloat16, torch.float32)
            return operator(*args, **({"dtype": torch.float32} | kwargs) if single else kwargs)
        return operator(*tree_map(_widened, args))


def _widened(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


@pytest.fixture
def rules_of_gpus():
    """Autocast on the CPU with rules of GPUs."""
    library = torch.library.Library("aten", "IMPL")
    for name in TO_FLOAT + WITH_DTYPE:
        base, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, base), overload or "default")
        library.impl(name, partial(run, operator, name in WITH_DTYPE), "AutocastCPU")
    yield
    library._destroy()


def single(episode):
    return Episode(*(part.float() if part.is_floating_point() else part for part in episode))


NETWORKS = [
    *("conv, Mish, pool, view", "conv, GroupNorm, Tanh", "conv, InstanceNorm2d, Tanh"),
    *("MultiheadAttention, module", "TransformerEncoder", "LSTM", "squeeze-excite"),
]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run_as_graphs_with_the_rules_of_gpus(name, rules_of_gpus, caplog):
    case = test_zoo.BY_NAME[name]
    net, plain, episode = case.network().float(), case.network(plain=True), case.episode()
    expected = meta_gradient(plain, episode, case.lr, 2, case.loss)
    maml = test_zoo.module(case, net, inner_steps=2)
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            maml.zero_grad()
            maml.training_step(single(episode), 0).backward()
    assert "slower" not in caplog.text
    found = {name: value.grad.double() for name, value in net.named_parameters()}
    assert relative_error(found, expected.gradient) < 0.05


class Island(nn.Module):
    """Its last layer runs in float32, as parts do that bfloat16 is too coarse for."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


@pytest.mark.parametrize("execution", ["traced", "vectorized", "loop"])
def test_parts_without_autocast_stay_in_float32(execution):
    torch.manual_seed(0)
    net, x, y = Island(), torch.randn(3, 6, 4), torch.arange(3).repeat(3, 2)
    maml = MAML(net, inner_lr=0.5, inner_steps=1, execution=execution)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            before, _ = maml.trajectory(Episode(x, y, x, y))
    assert torch.allclose(before, net.head(x), rtol=1e-5)


class Asking(nn.Module):
    """Goes by the type of a layer's outputs: what is wrong about it is no rounding."""

    def __init__(self, layer, call=None):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 8), layer, nn.Linear(8, 3)
        self.call = call or layer.forward

    def forward(self, x):
        h = self.call(self.first(x))
        return self.head(3 * h if h.dtype == torch.bfloat16 else h)


def attention():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return Asking(layer, lambda h: layer(h[None], h[None], h[None])[0][0])


def product():
    layer = nn.Linear(8, 8)
    return Asking(layer, lambda h: torch.addmm(layer.bias, h, layer.weight))


TYPES = {
    "Linear": lambda: Asking(nn.Linear(8, 8)),
    "LayerNorm": lambda: Asking(nn.LayerNorm(8)),
    "LayerNorm(bias=False)": lambda: Asking(nn.LayerNorm(8, bias=False)),
    "GroupNorm": lambda: Asking(nn.GroupNorm(2, 8)),
    "PReLU": lambda: Asking(nn.PReLU(8)),
    "addmm": product,
    "attention": attention,
    "transformer": lambda: Asking(nn.TransformerEncoderLayer(8, 2, 16, 0.0)),
}


@pytest.mark.parametrize("execution", ["traced", "vectorized"])
def test_distances_run_vectorized(execution):
    torch.manual_seed(3)
    centers = nn.Linear(8, 8)
    net = Asking(centers, lambda h: torch.cdist(h, centers.weight))
    try:
        expected, _ = trained(net, "loop")
    except SettingError as error:
        pytest.skip(f"as torch {torch.__version__} cannot: {error}")
    gradient, _ = trained(net, execution)
    assert (gradient - expected).norm() < 0.05 * expected.norm()


def trained(net, execution):
    """Gradient and predictions of the second meta-step, whose graphs are known."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 6, 4), torch.arange(3).repeat(3, 2)
    maml = MAML(net, inner_lr=0.1, inner_steps=1, execution=execution)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            maml.zero_grad()
            maml.training_step(Episode(x, y, x, y), 0).backward()
        predictions = maml.trajectory(Episode(x, y, x, y))[-1]
    return torch.cat([value.grad.flatten() for value in net.parameters()]), predictions


@pytest.mark.parametrize("name", TYPES)
def test_layers_give_the_types_that_they_give_in_a_loop(name, caplog):
    torch.manual_seed(3)
    net = TYPES[name]()
    with caplog.at_level(logging.WARNING):
        gradient, predictions = trained(net, "auto")
    assert "slower" not in caplog.text
    expected, expected_predictions = trained(net, "loop")
    assert predictions.dtype == expected_predictions.dtype == torch.bfloat16
    assert (predictions - expected_predictions).norm() < 0.03 * expected_predictions.norm()
    assert (gradient - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_vectorized_without_a_graph(kind):
    """As on the first batch of each shape."""
    torch.manual_seed(3)
    layer = kind(8, 8)
    net = nn.Sequential(nn.Linear(4, 8), layer, Take(), nn.Linear(8, 3))
    gradient, predictions = trained(net, "vectorized")
    expected, expected_predictions = trained(net, "loop")
    assert (predictions - expected_predictions).norm() < 0.03 * expected_predictions.norm()
    assert (gradient - expected).norm() < 0.05 * expected.norm()


class Take(nn.Module):
    def forward(self, outputs):
        return outputs[0]
