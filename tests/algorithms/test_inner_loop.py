import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from maml_lightning import MAML, MLP, ConvNet, Episode, InnerLoop, SettingError
from tests.own_network import Branching
from tests.reference import images, perturbed, reference, relative_error


def parameters(net):
    return dict(net.named_parameters())


def convolution(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(4 * 100, 3))


@pytest.mark.parametrize("tasks_per_chunk", [1, 3, None, "auto"])
@pytest.mark.parametrize("flat_memory", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_training_step_leaves_the_exact_meta_gradient(steps, first_order, flat_memory, tasks_per_chunk):
    net, episode = perturbed(ConvNet(out_features=3, hidden_channels=4, blocks=2)), images()
    settings = {"first_order": first_order, "flat_memory": flat_memory, "tasks_per_chunk": tasks_per_chunk}
    maml = MAML(net=net, inner_lr=0.4, inner_steps=steps, **settings)
    loss = maml.training_step(episode, 0)
    loss.backward()
    expected_loss, expected = reference(net, episode, 0.4, steps, F.cross_entropy, first_order)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert relative_error({name: value.grad for name, value in parameters(net).items()}, expected) < 1e-9


NETWORKS = {
    "strided": lambda: ConvNet(out_features=3, hidden_channels=4, blocks=3),
    "pooled": lambda: ConvNet(out_features=3, hidden_channels=4, blocks=2, pooling=True),
    "perceptron": lambda: MLP(100, 3, (8,)),
    # trap 1: layers whose second derivative is wrong when taken outside of vmap
    "BatchNorm2d": lambda: convolution(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(inplace=True)),
    "BatchNorm2d without affine": lambda: convolution(nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
    "InstanceNorm2d": lambda: convolution(nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
    "LayerNorm": lambda: convolution(nn.LayerNorm([4, 10, 10]), nn.Tanh()),
    "GroupNorm": lambda: convolution(nn.GroupNorm(2, 4), nn.Tanh()),
    "BatchNorm1d": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(100, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 3)
    ),
    "grouped": lambda: convolution(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Tanh()),
    "dilated": lambda: convolution(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Tanh()),
    "same": lambda: convolution(nn.Conv2d(4, 4, (3, 1), padding="same"), nn.Tanh()),
    "untraceable": Branching,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_exact(name):
    net, episode = perturbed(NETWORKS[name]()), images(tasks=3)
    loop = InnerLoop(net, F.cross_entropy)
    result = loop.meta_gradient(parameters(net), episode, 0.3, 2)
    loss, expected = reference(net, episode, 0.3, 2, F.cross_entropy)
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert relative_error(result.gradient, expected) < 1e-9


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_hand_derived_scalar(steps):
    # y = w x, support (1, 2), query (2, 1): L_s = (w - 2)^2, w' = w - 2a (w - 2), so w' - 2 = (1 - 2a)(w - 2).
    # L_q = (2 w_S - 1)^2, dL_q/dw = 4 (2 w_S - 1) (1 - 2a)^S; first order drops the power.
    w, a = 0.5, 0.1
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(w)
    tensor = torch.tensor([[[1.0]]], dtype=torch.float64)
    loop, episode = InnerLoop(net, F.mse_loss), Episode(tensor, 2 * tensor, 2 * tensor, tensor)
    adapted = 2 + (1 - 2 * a) ** steps * (w - 2)
    for first_order, factor in ((False, (1 - 2 * a) ** steps), (True, 1)):
        result = loop.meta_gradient(parameters(net), episode, a, steps, first_order)
        assert result.gradient["weight"].item() == pytest.approx(4 * (2 * adapted - 1) * factor, rel=1e-12)
        assert result.loss.item() == pytest.approx((2 * adapted - 1) ** 2, rel=1e-12)


def test_second_order_differs_from_first_order():
    net, episode = perturbed(ConvNet(out_features=3, hidden_channels=4, blocks=2)), images()
    loop = InnerLoop(net, F.cross_entropy)
    first, second = (loop.meta_gradient(parameters(net), episode, 0.4, 1, order).gradient for order in (True, False))
    assert relative_error(first, second) > 0.01


@settings(max_examples=5, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 4))
def test_order_and_chunks_of_tasks_do_not_matter(order, chunk):
    net, episode = perturbed(MLP(100, 3, (5,))), images()
    shuffled = Episode(*(tensor[list(order)] for tensor in episode))
    whole = InnerLoop(net, F.cross_entropy).meta_gradient(parameters(net), episode, 0.4, 2)
    parts = InnerLoop(net, F.cross_entropy, chunk).meta_gradient(parameters(net), shuffled, 0.4, 2)
    assert relative_error(parts.gradient, whole.gradient) < 1e-12
    assert torch.allclose(parts.predictions, whole.predictions[list(order)], rtol=1e-12)


def test_dropout_draws_a_mask_for_each_task_and_step():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(100, 3)).double()
    episode = images(tasks=1)
    episode = Episode(*(tensor.repeat(6, *[1] * (tensor.dim() - 1)) for tensor in episode))
    loop = InnerLoop(net, F.cross_entropy)
    first, second = (loop.meta_gradient(parameters(net), episode, 0.4, 1) for _ in range(2))
    assert len({row.sum().item() for row in first.predictions}) == 6
    assert not torch.equal(first.predictions, second.predictions)


def test_dropout_is_off_in_evaluation_also_after_training():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(100, 3)).double()
    loop, episode = InnerLoop(net, F.cross_entropy), images()
    trained = loop.trajectory(parameters(net), episode, 0.4, 1)
    evaluated = [loop.trajectory(parameters(net.eval()), episode, 0.4, 1) for _ in range(2)]
    assert not torch.equal(trained[1], evaluated[0][1])
    assert torch.equal(evaluated[0][1], evaluated[1][1])
    without = nn.Sequential(net[0], net[2])
    plain = {name.replace("2.", "1."): value for name, value in parameters(net).items()}
    assert torch.allclose(InnerLoop(without, F.cross_entropy).trajectory(plain, episode, 0.4, 1)[1], evaluated[0][1])


def test_half_a_sweep_agrees_with_dropout_recomputed():
    # The mask of a recomputed step is the mask of the step: with one fast weight path the two settings agree.
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(100, 3)).double()
    episode, results = images(), []
    for flat_memory in (False, True):
        torch.manual_seed(5)
        results.append(
            InnerLoop(net, F.cross_entropy, None, flat_memory).meta_gradient(parameters(net), episode, 0.4, 3)
        )
    assert relative_error(results[1].gradient, results[0].gradient) < 1e-12


def test_zero_tasks_per_chunk_raises():
    with pytest.raises(SettingError, match=r"tasks_per_chunk must be at least 1.*got 0"):
        InnerLoop(nn.Linear(1, 1), F.mse_loss, 0)


def test_memory_is_flat_where_asked_for_or_where_it_would_run_short(monkeypatch):
    net, episode = perturbed(MLP(100, 3, (5,))), images()
    loop = InnerLoop(net, F.cross_entropy, None)
    plenty = loop.meta_gradient(parameters(net), episode, 0.4, 3)
    assert not loop.flat
    monkeypatch.setattr("maml_lightning.engine.memory.free_bytes", lambda device: 1000)
    short = loop.meta_gradient(parameters(net), episode, 0.4, 3)
    assert loop.flat
    assert relative_error(short.gradient, plenty.gradient) < 1e-12


def live_peak(run):
    """Most bytes of tensors that were alive at once, made by ``run``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def test_flat_memory_holds_one_step_and_the_fast_weights():
    net, episode, tasks = ConvNet(out_features=3, hidden_channels=8, blocks=2), images(tasks=4), 4
    episode = Episode(*(part.float() if part.is_floating_point() else part for part in episode))
    fast_weights = 4 * tasks * sum(value.numel() for value in net.parameters())
    peaks = {}
    for flat_memory, steps in ((True, 2), (True, 12), (False, 12)):
        loop = InnerLoop(net, F.cross_entropy, None, flat_memory)
        loop.meta_gradient(parameters(net), episode, 0.1, steps)
        peaks[flat_memory, steps] = live_peak(
            lambda loop=loop, steps=steps: loop.meta_gradient(parameters(net), episode, 0.1, steps)
        )
    assert peaks[True, 12] - peaks[True, 2] == 10 * (fast_weights + torch.get_rng_state().nbytes)
    assert peaks[True, 2] < peaks[False, 12] / 5  # two steps' worth would be a sixth; the last one's is freed in time
