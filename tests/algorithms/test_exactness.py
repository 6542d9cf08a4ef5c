"""What the meta-gradient owes to any network, beside the grid of settings in ``test_inner_loop``."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, MLP, ConvNet, Episode, InnerLoop
from tests.reference import images, perturbed, reference, relative_error


def parameters(net):
    return dict(net.named_parameters())


def convolution(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(4 * 100, 3))


@pytest.mark.parametrize("first_order", [False, True])
def test_without_inner_steps_it_is_the_gradient_of_the_query_loss(first_order):
    net, episode = perturbed(ConvNet(out_features=3, hidden_channels=4, blocks=2)), images()
    result = InnerLoop(net, F.cross_entropy, 3).meta_gradient(parameters(net), episode, 0.4, 0, first_order)
    loss, expected = reference(net, episode, 0.4, 0, F.cross_entropy)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert relative_error(result.gradient, expected) < 1e-9
    assert torch.allclose(result.predictions[1], net(episode.query_inputs[1]), rtol=1e-9)


@pytest.mark.parametrize(
    "net",
    [
        lambda: convolution(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        lambda: convolution(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh()),
    ],
    ids=["BatchNorm2d", "BatchNorm1d", "InstanceNorm2d"],
)
def test_a_network_with_running_statistics_is_exact_and_stays_so_in_evaluation(net):
    net, episode = perturbed(net()), images(tasks=3)
    maml = MAML(net=net, inner_lr=0.3, inner_steps=2, tasks_per_chunk=None)
    for _ in range(2):  # what ran before, and eval(), must not matter
        maml.zero_grad()
        maml.training_step(episode, 0).backward()
        _, expected = reference(net.train(), episode, 0.3, 2, F.cross_entropy)
        assert relative_error({name: value.grad for name, value in parameters(net).items()}, expected) < 1e-9
        maml.eval()


def test_finite_differences():
    net, episode, step = perturbed(MLP(100, 3, (5,))), images(), 1e-5
    loop, start = InnerLoop(net, F.cross_entropy, None), {name: v.detach() for name, v in parameters(net).items()}
    gradient = loop.meta_gradient(start, episode, 0.4, 3).gradient
    direction = {name: torch.randn_like(value) for name, value in start.items()}
    above, below = (
        loop.meta_gradient({name: v + sign * step * direction[name] for name, v in start.items()}, episode, 0.4, 3).loss
        for sign in (1, -1)
    )
    derivative = sum((gradient[name] * direction[name]).sum() for name in start)
    assert ((above - below) / (2 * step)).item() == pytest.approx(derivative.item(), rel=1e-6)


def test_the_meta_gradient_is_the_mean_over_tasks_and_leaves_the_parameters_alone():
    net, episode = perturbed(ConvNet(out_features=3, hidden_channels=4, blocks=2)), images()
    before = {name: value.detach().clone() for name, value in parameters(net).items()}
    loop = InnerLoop(net, F.cross_entropy, None)
    whole = loop.meta_gradient(parameters(net), episode, 0.4, 2)
    singles = [loop.meta_gradient(parameters(net), Episode(*(t[i : i + 1] for t in episode)), 0.4, 2) for i in range(4)]
    mean = {name: torch.stack([single.gradient[name] for single in singles]).mean(0) for name in before}
    assert relative_error(mean, whole.gradient) < 1e-12
    assert torch.allclose(torch.cat([single.predictions for single in singles]), whole.predictions, rtol=1e-9)
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in parameters(net).items())


@pytest.mark.parametrize("pooling", [False, True])
def test_under_bfloat16_it_points_where_the_exact_one_does(pooling):
    torch.manual_seed(3)
    net, episode = ConvNet(out_features=3, hidden_channels=16, blocks=2, pooling=pooling), images()
    episode = Episode(*(t.float() if t.is_floating_point() else t for t in episode))
    loop = InnerLoop(net, F.cross_entropy, None)
    exact = loop.meta_gradient(parameters(net), episode, 0.4, 2).gradient
    with torch.autocast("cpu", torch.bfloat16):
        half = loop.meta_gradient(parameters(net), episode, 0.4, 2)
    flat, flat_half = (torch.cat([g.flatten() for g in each.values()]) for each in (exact, half.gradient))
    assert all(value.dtype == torch.float32 for value in half.gradient.values())
    assert half.predictions.dtype == torch.bfloat16  # the inner loop did run in it
    assert F.cosine_similarity(flat, flat_half, dim=0) > 0.98
