"""TaskNorm and the part of a batch that normalization statistics are of."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, ConvNet
from maml_lightning.task_statistics import TaskNorm, statistics_of_first, statistics_part
from tests.algorithms.test_query_statistics import Reference, plain_loop
from tests.reference import images, perturbed, relative_error

LR = 0.3


class ByHand(nn.Module):
    """Equations 6 to 8 of Bronskill et al. (2020), one example and one channel at a time."""

    def __init__(self, layer: TaskNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.scale, self.offset = layer.weight, layer.bias, layer.scale, layer.offset

    def forward(self, x):
        support = x[: Reference.first]
        alpha = 1 / (1 + torch.exp(-(self.scale * len(support) + self.offset)))
        rows = []
        for example in x:
            channels = []
            for c, values in enumerate(example):
                m, v = support[:, c].mean(), support[:, c].var(correction=0)
                own_m, own_v = values.mean(), values.var(correction=0)
                mean = alpha * m + (1 - alpha) * own_m
                var = alpha * (v + (m - mean) ** 2) + (1 - alpha) * (own_v + (own_m - mean) ** 2)
                channels.append(self.weight[c] * (values - mean) / torch.sqrt(var + 1e-5) + self.bias[c])
            rows.append(torch.stack(channels))
        return torch.stack(rows)


def networks() -> tuple[nn.Module, nn.Module]:
    net = perturbed(ConvNet(out_features=3, hidden_channels=3, blocks=2, normalization="tasknorm"))
    by_hand = copy.deepcopy(net)
    for index in (1, 4):
        by_hand.body[index] = ByHand(by_hand.body[index])
    return net, by_hand


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3, 5), (4, 3, 2, 3, 4)])
def test_task_norm_is_that_of_the_paper(shape):
    layer, x = perturbed(TaskNorm(3)), torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(layer(x), ByHand(layer)(x), rtol=1e-9)
    Reference.first = 2
    with statistics_of_first(2, 4):
        assert torch.allclose(layer(x), ByHand(layer)(x), rtol=1e-9)
        assert not torch.allclose(layer(x), layer(x.flip(0)).flip(0))
    Reference.first = None


def test_its_extremes_are_batch_and_instance_normalization():
    layer, x = TaskNorm(3).double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    nn.init.constant_(layer.offset, 50.0)
    assert torch.allclose(layer(x), F.batch_norm(x, None, None, training=True), rtol=1e-9)
    nn.init.constant_(layer.scale, -50.0)
    assert torch.allclose(layer(x), F.instance_norm(x), rtol=1e-9)


def test_half_precision_comes_back():
    assert TaskNorm(3).bfloat16()(torch.randn(4, 3, 5, 5).bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("steps", "settings"),
    [(1, {"tasks_per_chunk": 1}), (2, {}), (2, {"first_order": True}), (3, {"flat_memory": True})],
)
def test_its_meta_gradient_is_exact(steps, settings):
    (net, by_hand), episode = networks(), images(tasks=2, size=6)
    maml = MAML(
        net=net, inner_lr=LR, inner_steps=steps, query_statistics="support", **{"tasks_per_chunk": None, **settings}
    )
    maml.training_step(episode, 0).backward()
    expected, predictions, _ = plain_loop(by_hand, episode, steps, settings.get("first_order", False))
    assert relative_error({name: value.grad for name, value in net.named_parameters()}, expected) < 1e-9
    x, y, query, _ = (part[0] for part in episode)
    adapted = maml.adapt(x, y)
    for each in (adapted, adapted.train(), copy.deepcopy(adapted)):
        assert torch.allclose(each(query), predictions[-1][0], rtol=1e-9)
        assert torch.allclose(each(query[:1]), predictions[-1][0, :1], rtol=1e-9)


def test_a_part_of_a_batch():
    x = torch.arange(12).view(6, 2)
    assert statistics_part(x) is x
    with statistics_of_first(2, 6):
        assert torch.equal(statistics_part(x), x[:2])
        assert torch.equal(statistics_part(x.view(12)), x.view(12)[:4])  # two parts of each example
        with pytest.raises(ValueError, match="got a batch of 4 for 6 examples"):
            statistics_part(x[:4])
        with statistics_of_first(1, 3):
            assert torch.equal(statistics_part(x), x[:2])
    assert statistics_part(x) is x
