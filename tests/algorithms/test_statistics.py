"""Which statistics normalization layers use, against a plain autograd loop of a network whose modes are set by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from maml_lightning import MAML, Episode, InnerLoop
from maml_lightning.algorithms.statistics import deciding, frozen, in_evaluation
from tests.reference import images, perturbed, relative_error

LR = 0.3


class OwnNorm(nn.Module):
    """A normalization layer that is none of torch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class CheckedNorm(nn.BatchNorm2d):
    """A layer of torch's with a forward of its own."""

    def forward(self, x):
        assert x.dim() == 4
        return super().forward(x)


class FrozenNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: buffers alone, and no mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.2), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        w, b, rv, rm = (v.reshape(1, -1, 1, 1) for v in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


def network(norm: nn.Module, second: nn.Module | None = None) -> nn.Sequential:
    layers = (nn.Conv2d(1, 4, 3, stride=2), norm, nn.Tanh(), nn.Conv2d(4, 4, 3), second or nn.Identity(), nn.ReLU())
    return collected(nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(16, 3)))


def collected(net: nn.Module) -> nn.Module:
    """In float64, with running statistics as of another data set."""
    net, generator = perturbed(net), torch.Generator().manual_seed(5)
    for name, value in net.named_buffers():
        if "running" in name:
            value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) + ("var" in name))
    return net


def freeze(layer: nn.Module) -> None:
    layer.requires_grad_(False)


# A network, and what is done to it before MAML is made; then which of its layers use running statistics.
CASES = {
    "frozen backbone": (lambda: network(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), lambda n: freeze(n[0]), "1 4"),
    "frozen layer": (lambda: network(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), lambda n: freeze(n[0][4]), "4"),
    "all in evaluation mode": (lambda: network(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), lambda n: n.eval(), "1 4"),
    "mixed": (lambda: network(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), lambda n: n[0][1].eval(), "1"),
    "without affine part, evaluation": (
        lambda: network(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, affine=False)),
        lambda n: n[0][4].eval(),
        "4",
    ),
    "without affine part, frozen": (lambda: network(nn.BatchNorm2d(4, affine=False)), lambda n: freeze(n[0]), "1"),
    "InstanceNorm2d": (
        lambda: network(
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.InstanceNorm2d(4, track_running_stats=True),
        ),
        lambda n: n[0][4].eval(),
        "4",
    ),
    "SyncBatchNorm": (lambda: network(nn.SyncBatchNorm(4), nn.SyncBatchNorm(4)), lambda n: n[0][1].eval(), "1"),
    "own layer": (lambda: network(OwnNorm(4), OwnNorm(4)), lambda n: n[0][1].eval(), "1"),
    "own forward": (lambda: network(CheckedNorm(4), CheckedNorm(4)), lambda n: n[0][1].eval(), "1"),
    "buffers alone": (lambda: network(FrozenNorm(4), nn.BatchNorm2d(4)), lambda n: n, "1"),
    "training mode": (lambda: network(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), lambda n: n, ""),
    "BatchNorm1d": (
        lambda: collected(
            nn.Sequential(
                nn.Flatten(), nn.Linear(100, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3)
            )
        ),
        lambda n: n[2].eval(),
        "2",
    ),
    "BatchNorm3d": (
        lambda: collected(
            nn.Sequential(
                nn.Unflatten(2, (2, 5)), nn.Conv3d(1, 3, (1, 3, 3)), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(144, 3)
            )
        ),
        lambda n: n[2].eval(),
        "2",
    ),
}


def plain_loop(net: nn.Module, episode: Episode, steps: int, first_order: bool = False):
    """The meta-gradient and each task's predictions, by autograd, of a network in the modes that it is in."""
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    free = {name: start[name].requires_grad_() for name, value in net.named_parameters() if value.requires_grad}
    total, predictions = 0.0, []
    for x, y, query_x, query_y in zip(*episode, strict=True):
        fast = dict(free)
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(net, {**start, **fast}, (x,)), y)
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            fast = {n: v - LR * g for (n, v), g in zip(fast.items(), slopes, strict=True)}
        predictions.append(functional_call(net, {**start, **fast}, (query_x,)))
        total = total + F.cross_entropy(predictions[-1], query_y) / episode.tasks
    gradients = torch.autograd.grad(total, list(free.values()))
    return dict(zip(free, gradients, strict=True)), torch.stack(predictions).detach()


def prepared(case: str) -> tuple[nn.Module, nn.Module]:
    """The network of a case, and a copy of it with the modes that a plain loop needs."""
    make, prepare, running = CASES[case]
    net = make()
    prepare(net)
    by_hand = copy.deepcopy(net).train()
    for name, layer in by_hand.named_modules():
        if hasattr(layer, "running_mean") and name.rpartition(".")[2] in running.split():
            layer.eval()
    return net, by_hand


def gradient(maml: MAML, episode: Episode) -> dict[str, torch.Tensor]:
    maml.zero_grad()
    maml.training_step(episode, 0).backward()
    return {name: value.grad for name, value in maml.net.named_parameters() if value.grad is not None}


def everything(net: nn.Module) -> tuple:
    """All that a network is, beside its parameters' values."""
    values = {name: value.clone() for name, value in net.named_buffers()}
    attributes = [{key: value for key, value in vars(layer).items() if key[0] != "_"} for layer in net.modules()]
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net.modules()]
    return list(net.state_dict()), values, attributes, hooks


def assert_same(before: tuple, after: tuple) -> None:
    assert before[0] == after[0]
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    assert before[2:] == after[2:]


@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_everywhere_and_nothing_in_the_network_changes(case):
    net, by_hand = prepared(case)
    before, episode = everything(net), images(tasks=2)
    maml = MAML(net=net, inner_lr=LR, inner_steps=2, tasks_per_chunk=None)
    expected, predictions = plain_loop(copy.deepcopy(by_hand), episode, 2)
    ours = gradient(maml, episode)
    assert ours.keys() == expected.keys()
    assert relative_error(ours, expected) < 1e-9
    assert_same(before, everything(net))
    modes = [layer.training for layer in net.modules()]
    for mode in (False, True):
        maml.train(mode)
        assert torch.allclose(maml.trajectory(episode)[-1], predictions, rtol=1e-9)
        adapted = maml.adapt(episode.support_inputs[1], episode.support_targets[1])
        for mode_of_copy in (False, True, False):
            assert torch.allclose(adapted.train(mode_of_copy)(episode.query_inputs[1]), predictions[1], rtol=1e-9)
        assert torch.allclose(maml(episode.query_inputs[0]), copy.deepcopy(by_hand)(episode.query_inputs[0]), rtol=1e-9)
    norms = [hasattr(layer, "running_mean") for layer in net.modules()]
    kept = [(mode, layer.training) for mode, layer, norm in zip(modes, net.modules(), norms, strict=True) if norm]
    assert all(mode == now for mode, now in kept)
    assert relative_error(gradient(maml, episode), expected) < 1e-9
    assert all(torch.equal(value, before[1][name]) for name, value in net.named_buffers())


@pytest.mark.parametrize(
    ("steps", "settings", "hooked"),
    [
        (1, {"tasks_per_chunk": 1}, False),
        (5, {"tasks_per_chunk": 2}, False),
        (2, {"flat_memory": True}, False),
        (2, {"first_order": True, "tasks_per_chunk": 2}, False),
        (2, {}, True),
    ],
    ids=["1 step, chunks of 1", "5 steps, chunks of 2", "flat memory", "first order", "untraced"],
)
@pytest.mark.parametrize("case", ["frozen backbone", "mixed"])
def test_it_is_exact_however_it_is_run(case, steps, settings, hooked):
    net, by_hand = prepared(case)
    if hooked:
        net[0][2].register_forward_hook(lambda layer, args, output: None)
    episode = images(tasks=3)
    maml = MAML(net=net, inner_lr=LR, inner_steps=steps, **{"tasks_per_chunk": None, **settings})
    expected, predictions = plain_loop(by_hand, episode, steps, settings.get("first_order", False))
    assert relative_error(gradient(maml, episode), expected) < 1e-9
    assert torch.allclose(maml.eval().trajectory(episode)[-1], predictions, rtol=1e-9)


def test_an_inner_loop_goes_by_what_the_network_is():
    net, by_hand = prepared("mixed")
    episode, params = images(tasks=2), dict(net.named_parameters())
    loop, expected = InnerLoop(net, F.cross_entropy, None), plain_loop(copy.deepcopy(by_hand), episode, 1)[0]
    assert relative_error(loop.meta_gradient(params, episode, LR, 1).gradient, expected) < 1e-9
    net[0][4].eval()
    by_hand[0][4].eval()
    expected = plain_loop(by_hand, episode, 1)[0]
    assert relative_error(loop.meta_gradient(params, episode, LR, 1).gradient, expected) < 1e-9


def test_a_network_is_put_back_after_an_error():
    net, _ = prepared("mixed")
    before = everything(net)
    decision = deciding(net)
    decision.__enter__()
    assert net[0][4].running_mean is None
    error = KeyboardInterrupt()
    assert not decision.__exit__(type(error), error, None)
    assert_same(before, everything(net))


def test_what_is_frozen():
    net = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2)), nn.BatchNorm1d(2)
    )
    assert frozen(net) == set()
    net[0][0].requires_grad_(False)
    assert frozen(net) == set()
    net[0][2].weight.requires_grad_(False)
    assert frozen(net) == set()
    net[0][2].bias.requires_grad_(False)
    assert frozen(net) == {"0.1", "0.2"}
    assert frozen(net, {"0.2.bias"}) == set()
    net[1].requires_grad_(False)
    assert frozen(net) is None
    assert frozen(net, {"1.weight"}) == {"0.1", "0.2"}
    assert in_evaluation(net) == set()
