import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, MLP, InnerLoop, SettingError
from maml_lightning.algorithms.algorithm import Algorithm
from maml_lightning.algorithms.registry import ALGORITHMS, find_algorithm
from maml_lightning.algorithms.steps import adapt, query_gradient
from maml_lightning.engine.chunks import add_sum
from tests.reference import images, perturbed


def sign_gradient(setup, chunk, total, settings):
    """First-order MAML with the signs of each task's query gradient."""
    fast = adapt(setup, chunk.support_inputs, chunk.support_targets)
    (gradient, shared), loss, predictions = query_gradient(setup, fast, setup.steps, chunk)
    add_sum(total.gradient, {name: value.sign() for name, value in {**gradient, **shared}.items()}, setup.steps)
    return loss, predictions


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "toy", Algorithm(sign_gradient, unsupported={"first_order": "is first order"}))


@pytest.mark.parametrize("adapted", ["all", "head"])
@pytest.mark.parametrize("tasks_per_chunk", ["auto", None, 1])
def test_a_new_algorithm_is_a_function_and_a_line(toy, adapted, tasks_per_chunk):
    net, episode = perturbed(MLP(100, 3, (5,))), images()
    settings = {"inner_lr": 0.1, "inner_steps": 2, "adapted_parameters": adapted, "tasks_per_chunk": tasks_per_chunk}
    maml = MAML(net=net, algorithm="toy", **settings)
    maml.training_step(episode, 0).backward()
    expected = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    for x, y, query_x, query_y in zip(*episode, strict=True):
        adapted_net = maml.adapt(x, y)
        loss = F.cross_entropy(adapted_net(query_x), query_y)
        gradients = torch.autograd.grad(loss, list(adapted_net.parameters()))
        for (name, _), gradient in zip(adapted_net.named_parameters(), gradients, strict=True):
            expected[name] += gradient.sign() / episode.tasks
    for name, value in net.named_parameters():
        assert torch.equal(value.grad, expected[name])


def test_a_new_algorithm_trains(toy):
    net, episode = perturbed(MLP(100, 3, (5,))), images()
    maml = MAML(net=net, algorithm="toy", inner_lr=0.1)
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = maml.training_step(episode, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_an_unknown_algorithm_raises_with_the_names_there_are():
    with pytest.raises(SettingError, match=r"model\.algorithm must be one of maml, imaml, reptile \(got anil\)\."):
        find_algorithm("anil")
    with pytest.raises(SettingError, match=r"got anil"):
        MAML(net=nn.Linear(1, 1), algorithm="anil")


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if ALGORITHMS[name].min_inner_steps])
def test_too_few_steps_raise(algorithm):
    net = perturbed(MLP(100, 3))
    loop = InnerLoop(net, F.cross_entropy, proximal=1.0)
    with pytest.raises(
        SettingError, match=rf"inner_steps must be at least 1 with model.algorithm {algorithm} \(got 0\)"
    ):
        loop.gradient(algorithm, dict(net.named_parameters()), images(), 0.1, 0)


def test_unsupported_settings_are_settings_of_maml():
    settings = inspect.signature(MAML).parameters
    for algorithm in ALGORITHMS.values():
        assert set(algorithm.unsupported) <= set(settings)
