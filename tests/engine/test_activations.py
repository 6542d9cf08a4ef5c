import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import Episode
from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.engine.kernels.activations import hardsigmoid, rrelu
from maml_lightning.engine.kernels.embedding import embedding_bag
from maml_lightning.engine.kernels.mode import task_operators
from tests.engine.test_kernels import second_derivative
from tests.reference import perturbed, reference, relative_error

GRID = torch.linspace(-4.1, 4.1, 84, dtype=torch.float64)  # between the corners


def test_hardsigmoid():
    assert torch.allclose(hardsigmoid(GRID), F.hardsigmoid(GRID), rtol=1e-14)
    x = GRID.clone()
    assert hardsigmoid(x, inplace=True) is x
    assert torch.allclose(x, F.hardsigmoid(GRID), rtol=1e-14)
    slopes = (GRID.abs() < 3).double() / 6
    (first,) = second_derivative(lambda x: hardsigmoid(x), GRID[None])
    weights, values = torch.linspace(1, 2, 84, dtype=torch.float64), hardsigmoid(GRID)
    assert torch.allclose(first[0], -values.sin() * slopes**2 * weights, rtol=1e-9, atol=1e-12)


def test_rrelu():
    assert torch.allclose(rrelu(GRID), F.rrelu(GRID), rtol=1e-14)
    torch.manual_seed(0)
    drawn = rrelu(GRID, 0.2, 0.3, training=True)
    slopes = (drawn / GRID)[GRID < 0]
    assert torch.equal(drawn[GRID > 0], GRID[GRID > 0])
    assert slopes.min() >= 0.2
    assert slopes.max() <= 0.3
    assert len(slopes.unique()) > 30
    x = GRID.clone()
    with task_operators():
        assert torch.rrelu_(x, 0.25, 0.25, True) is x
    assert torch.allclose(x, F.leaky_relu(GRID, 0.25), rtol=1e-14)


BAGS = {
    "mean": {},
    "sum": {"mode": "sum"},
    "max": {"mode": "max"},
    "weights": {"mode": "sum", "per_sample_weights": True},
    "padding": {"padding_idx": 2},
    "padding, max": {"padding_idx": 2, "mode": "max"},
    "offsets": {"offsets": torch.tensor([0, 2, 2, 5])},
    "offsets, sum": {"offsets": torch.tensor([0, 2, 2, 5, 6]), "mode": "sum", "include_last_offset": True},
    "offsets, max": {"offsets": torch.tensor([0, 2, 5]), "mode": "max"},
    "renormalized": {"max_norm": 0.5},
}


def bag_of(name):
    """Indices, and the settings of what sums up their embeddings."""
    settings = dict(BAGS[name])
    index = torch.tensor([[0, 1, 1], [2, 2, 2], [4, 2, 0]])
    index = index.flatten()[:6] if "offsets" in settings else index
    if settings.pop("per_sample_weights", False):
        settings["per_sample_weights"] = torch.rand(3, 3, dtype=torch.float64)
    return index, settings


@pytest.mark.parametrize("name", BAGS)
def test_embedding_bag_and_its_gradient_are_torchs(name):
    torch.manual_seed(0)
    index, settings = bag_of(name)
    results = []
    for bag in (embedding_bag, F.embedding_bag):
        weight = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4).requires_grad_()
        y = bag(index, weight * 1, **settings)  # a leaf cannot be renormalized
        results.append((y, *torch.autograd.grad(y.sin().sum(), weight)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.hardsigmoid(F.rrelu(self.bag(x))))


class Manual(Bag):
    def forward(self, x):
        return self.head(F.relu6(F.leaky_relu(self.bag.weight[x].mean(1), (1 / 8 + 1 / 3) / 2) + 3) / 6)


def test_exact_in_second_order():
    torch.manual_seed(0)
    x, y = torch.randint(0, 6, (2, 2, 3, 4)), torch.arange(3).repeat(2, 1)
    net, manual, episode = perturbed(Bag()), Manual().double(), Episode(x[0], y, x[1], y)
    manual.load_state_dict(net.state_dict())
    _, expected = reference(manual, episode, 0.5, 2, F.cross_entropy)
    loop = InnerLoop(net, F.cross_entropy, tasks_per_chunk=None)
    assert relative_error(loop.meta_gradient(dict(net.named_parameters()), episode, 0.5, 2).gradient, expected) < 1e-9
