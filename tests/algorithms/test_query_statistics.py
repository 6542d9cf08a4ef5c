"""Queries normalized with the statistics of the support set, against a plain autograd loop with layers of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from maml_lightning import MAML, ConvNet, Episode, InnerLoop, SettingError
from maml_lightning.algorithms.unrolled import multi_step_weights
from tests.algorithms.test_statistics import OwnNorm, collected, freeze, gradient, network
from tests.reference import images, perturbed, relative_error

LR = 0.3


class Reference(nn.Module):
    """Batch normalization with the statistics of the first examples, by hand."""

    first: int | None = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, getattr(layer, "eps", 1e-5)

    def forward(self, x):
        part = x[: Reference.first].transpose(0, 1).flatten(1)
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, deviation = part.mean(1), (part.var(1, correction=0) + self.eps).sqrt()
        x = (x - mean.view(shape)) / deviation.view(shape)
        return x if self.weight is None else x * self.weight.view(shape) + self.bias.view(shape)


def by_hand(net: nn.Module, running: tuple[str, ...] = ()) -> nn.Module:
    net = copy.deepcopy(net)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, _BatchNorm | OwnNorm):
            if name in running:
                layer.eval()
            else:
                parent, _, own = name.rpartition(".")
                setattr(net.get_submodule(parent), own, Reference(layer))
    return net


def plain_loop(net: nn.Module, episode: Episode, steps: int, first_order: bool = False, weights=None):
    """The gradient of what is trained, and the predictions after each step."""
    weights = weights or [0.0] * steps + [1.0]
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    free = {name: start[name].requires_grad_() for name, value in net.named_parameters() if value.requires_grad}
    total, predictions = 0.0, []
    for x, y, query_x, query_y in zip(*episode, strict=True):
        fast, outputs = dict(free), []
        for k in range(steps + 1):
            Reference.first = len(x)
            outputs.append(functional_call(net, {**start, **fast}, (torch.cat([x, query_x]),))[len(x) :])
            Reference.first = None
            total = total + weights[k] * F.cross_entropy(outputs[-1], query_y) / episode.tasks
            if k < steps:
                loss = F.cross_entropy(functional_call(net, {**start, **fast}, (x,)), y)
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
                fast = {n: v - LR * g for (n, v), g in zip(fast.items(), slopes, strict=True)}
        predictions.append(torch.stack(outputs))
    gradients = torch.autograd.grad(total, list(free.values()))
    return dict(zip(free, gradients, strict=True)), torch.stack(predictions, 1).detach(), total.item()


NETWORKS = {
    "BatchNorm2d": lambda: network(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)),
    "ConvNet": lambda: perturbed(ConvNet(out_features=3, hidden_channels=4, blocks=2)),
    "own layer": lambda: network(OwnNorm(4)),
    "BatchNorm1d": lambda: collected(
        nn.Sequential(nn.Flatten(), nn.Linear(100, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    ),
    "BatchNorm1d of sequences": lambda: collected(
        nn.Sequential(nn.Flatten(1, 2), nn.BatchNorm1d(10), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3))
    ),
    "BatchNorm3d": lambda: collected(
        nn.Sequential(
            nn.Unflatten(2, (2, 5)), nn.Conv3d(1, 3, (1, 3, 3)), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(144, 3)
        )
    ),
}


def maml_of(net: nn.Module, steps: int = 2, **settings) -> MAML:
    settings = {"tasks_per_chunk": None, **settings}
    return MAML(net=net, inner_lr=LR, inner_steps=steps, query_statistics="support", **settings)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_exact_and_a_query_alone_gets_the_same_answer(name):
    net, episode = NETWORKS[name](), images(tasks=2)
    maml = maml_of(net)
    expected, predictions, _ = plain_loop(by_hand(net), episode, 2)
    assert relative_error(gradient(maml, episode), expected) < 1e-9
    for mode in (False, True):
        ours = torch.stack(maml.train(mode).trajectory(episode))
        assert torch.allclose(ours, predictions, rtol=1e-9)
    alone = episode._replace(query_inputs=episode.query_inputs[:, 2:3], query_targets=episode.query_targets[:, 2:3])
    assert torch.allclose(maml.trajectory(alone)[-1], predictions[-1][:, 2:3], rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "settings", "hooked"),
    [
        (1, {"tasks_per_chunk": 1}, False),
        (5, {"tasks_per_chunk": 2}, False),
        (2, {"flat_memory": True}, False),
        (2, {"first_order": True}, False),
        (2, {}, True),
        (2, {"multi_step_epochs": 5}, False),
        (0, {}, False),
    ],
    ids=["1 step, chunks of 1", "5 steps, chunks of 2", "flat memory", "first order", "untraced", "each step", "none"],
)
def test_it_is_exact_however_it_is_run(steps, settings, hooked):
    net, episode = network(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), images(tasks=3)
    freeze(net[0][1])
    if hooked:
        net[0][2].register_forward_hook(lambda layer, args, output: None)
    weights = multi_step_weights(steps, 0, settings.get("multi_step_epochs", 0))
    expected, _, _ = plain_loop(by_hand(net, ("0.1",)), episode, steps, settings.get("first_order", False), weights)
    assert relative_error(gradient(maml_of(net, steps, **settings), episode), expected) < 1e-9


@pytest.mark.long
def test_it_is_exact_compiled():
    net, episode = NETWORKS["BatchNorm1d"](), images(tasks=2)
    expected, _, _ = plain_loop(by_hand(net), episode, 1)
    assert relative_error(gradient(maml_of(net, 1, compile=True), episode), expected) < 1e-9


@pytest.mark.parametrize("algorithm", ["imaml", "reptile"])
def test_other_algorithms_evaluate_queries_so_as_well(algorithm):
    net, episode = network(nn.BatchNorm2d(4)), images(tasks=2)
    params = dict(net.named_parameters())
    loops = [InnerLoop(net, F.cross_entropy, None, proximal=2.0 * (algorithm == "imaml")) for _ in range(2)]
    loops[1].query_statistics = "support"
    batch, support = (loop.gradient(algorithm, params, episode, LR, 1) for loop in loops)
    assert not torch.allclose(batch.predictions, support.predictions)
    if algorithm == "imaml":
        assert torch.allclose(support.predictions, loops[1].trajectory(params, episode, LR, 1)[-1], rtol=1e-9)
    else:  # its adaptation sees no query set
        assert relative_error(support.gradient, batch.gradient) < 1e-12
    losses = [F.cross_entropy(p, y) for p, y in zip(support.predictions, episode.query_targets, strict=True)]
    assert torch.allclose(support.loss, torch.stack(losses).mean(), rtol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", [False, True])
def test_an_adapted_network_keeps_the_statistics_and_is_a_plain_module(name, mode):
    net, episode = NETWORKS[name](), images(tasks=2)
    maml = maml_of(net).train(mode)
    expected = plain_loop(by_hand(net), episode, 2)[1][-1, 1]
    x, y, query, _ = (part[1] for part in episode)
    adapted = maml.adapt(x, y)
    assert not adapted.training
    many = torch.cat([query, torch.randn(1000, *query.shape[1:], dtype=query.dtype)])
    for each in (adapted, adapted.train(), copy.deepcopy(adapted).eval()):
        assert torch.allclose(each(query), expected, rtol=1e-9)
        assert torch.allclose(each(query[:1]), expected[:1], rtol=1e-9)
        assert torch.allclose(each(many)[: len(query)], expected, rtol=1e-9)
    if name == "BatchNorm2d":
        assert set(net.state_dict()) == set(adapted.state_dict())
        part = adapted[0][0](x).transpose(0, 1).flatten(1)
        assert torch.allclose(adapted[0][1].running_mean, part.mean(1))
        assert torch.allclose(adapted[0][1].running_var, part.var(1, correction=0))


def test_an_adapted_network_is_exported_for_any_number_of_queries():
    net, episode = NETWORKS["ConvNet"](), images(tasks=1)
    x, y, query, _ = (part[0] for part in episode)
    adapted = maml_of(net).adapt(x, y)
    exported = torch.export.export(adapted, (query,), dynamic_shapes=({0: torch.export.Dim("queries")},)).module()
    for number in (1, 3, 6):
        assert torch.allclose(exported(query[:number]), adapted(query)[:number], rtol=1e-9)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(100), nn.Linear(100, 3)

    def forward(self, x):
        return self.head(self.norm(2 * self.norm(x.flatten(1)) + 1))


def test_a_layer_that_normalizes_twice_is_exact_and_cannot_be_kept():
    net, episode = perturbed(Twice()), images(tasks=2)
    maml = maml_of(net, 1)
    expected, predictions, _ = plain_loop(by_hand(net), episode, 1)
    assert relative_error(gradient(maml, episode), expected) < 1e-9
    assert torch.allclose(maml.trajectory(episode)[-1], predictions[-1], rtol=1e-9)
    with pytest.raises(SettingError, match=r"query_statistics support: BatchNorm1d normalizes several times"):
        maml.adapt(episode.support_inputs[0], episode.support_targets[0])


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(10), nn.Linear(100, 3)

    def forward(self, x):
        pooled = self.norm(x.mean((0, 1)))  # [10, 10] whatever the batch is
        return self.head((x + pooled).flatten(1))


def test_examples_that_are_mixed_before_normalization_are_refused():
    with pytest.raises(ValueError, match=r"query_statistics support needs .* got a batch of 10 for 12 examples"):
        maml_of(perturbed(Mixing())).trajectory(images(tasks=1))


def test_the_setting_is_checked_and_can_be_changed():
    with pytest.raises(SettingError, match=r"model\.query_statistics must be one of batch, support, running \(got"):
        MAML(net=nn.Linear(2, 2), query_statistics="all")
    net, episode = NETWORKS["ConvNet"](), images(tasks=1)
    maml = maml_of(net)
    support = maml.trajectory(episode)[-1]
    maml.query_statistics = "batch"
    batch = MAML(net=copy.deepcopy(net), inner_lr=LR, inner_steps=2).trajectory(episode)[-1]
    assert not torch.allclose(support, batch)
    assert torch.equal(maml.trajectory(episode)[-1], batch)
