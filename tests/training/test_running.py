"""model.query_statistics running: statistics collected in training, for layers that no adapted parameter reaches."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from maml_lightning import MAML, ConvNet, Episode, GlyphsDataModule
from maml_lightning.algorithms.statistics import unreached
from maml_lightning.errors import SettingError
from tests.reference import images, perturbed

SETTINGS = {"query_statistics": "running", "inner_lr": 0.3, "tasks_per_chunk": None}


def network() -> nn.Sequential:
    """Only the second convolution and the head adapt; the first layer's features are the same for all tasks."""
    layers = (nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return perturbed(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)))


class ByKeyword(nn.Sequential):
    """A network that names the arguments of its normalization layers."""

    def forward(self, x):
        for layer in self:
            x = layer(input=x) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x


def maml_of(net: nn.Module, **settings) -> MAML:
    return MAML(net, **{**SETTINGS, "adapted_parameters": ["3.*", "6.*"], **settings})


def test_layers_that_no_adapted_parameter_reaches():
    inputs = images(tasks=1).support_inputs[0]
    assert unreached(network(), {"3.weight", "6.weight"}, inputs) == {"1"}
    assert unreached(network(), {"6.weight"}, inputs) == {"1", "4"}
    assert unreached(network(), {"0.weight"}, inputs) == frozenset()
    assert unreached(ByKeyword(*network()), {"0.weight"}, inputs) == frozenset()
    assert unreached(network(), {"1.weight"}, inputs) == {"1"}  # the layer's input does not depend on its own weight


def test_collected_as_in_ordinary_training():
    net, episode = network(), images(tasks=2)
    maml, by_hand = maml_of(net), copy.deepcopy(net).train()
    for _ in range(3):
        maml.training_step(episode, 0)
        by_hand(torch.cat([episode.support_inputs[0], episode.query_inputs[0]]))
    assert torch.allclose(net[1].running_mean, by_hand[1].running_mean, rtol=1e-12)
    assert torch.allclose(net[1].running_var, by_hand[1].running_var, rtol=1e-12)
    assert net[1].num_batches_tracked == 3
    assert net[4].num_batches_tracked == 0
    assert torch.equal(net[4].running_mean, torch.zeros(4))


def test_training_is_that_of_support():
    net, episode = network(), images(tasks=2)
    gradients = []
    for statistics in ("running", "support"):
        maml = maml_of(copy.deepcopy(net), query_statistics=statistics)
        maml.training_step(episode, 0).backward()
        gradients.append(torch.cat([value.grad.flatten() for value in maml.parameters()]))
    assert torch.equal(*gradients)


def by_autograd(net: nn.Module, episode: Episode, task: int) -> torch.Tensor:
    """Outputs on the queries after one step, the first normalization by running statistics, the second by the
    support set's: of a forward of support and queries together, written out."""
    x, q = episode.support_inputs[task], episode.query_inputs[task]
    params = dict(net.named_parameters())

    def outputs(params: dict, inputs: torch.Tensor, support: int) -> torch.Tensor:
        h = F.conv2d(inputs, params["0.weight"], params["0.bias"], stride=2)
        h = F.batch_norm(h, net[1].running_mean, net[1].running_var, params["1.weight"], params["1.bias"])
        h = F.conv2d(h.tanh(), params["3.weight"], params["3.bias"])
        var, mean = torch.var_mean(h[:support], (0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt() * params["4.weight"][:, None, None] + params["4.bias"][:, None, None]
        return F.linear(h.flatten(1), params["6.weight"], params["6.bias"])

    loss = F.cross_entropy(outputs(params, x, len(x)), episode.support_targets[task])
    names = [name for name in params if name[0] in "36"]
    steps = torch.autograd.grad(loss, [params[name] for name in names])
    fast = {name: params[name] - 0.3 * step for name, step in zip(names, steps, strict=True)}
    return outputs({**params, **fast}, torch.cat([x, q]), len(x))[len(x) :].detach()


@pytest.mark.parametrize(
    "settings", [{}, {"execution": "loop"}, {"tasks_per_chunk": 1}, {"flat_memory": True}], ids=str
)
def test_evaluation_against_a_loop_by_hand(settings):
    net, episode = network(), images(tasks=2)
    maml = maml_of(net, **settings)
    for _ in range(2):
        maml.training_step(episode, 0)
    for task in range(2):
        expected = by_autograd(net, episode, task)
        assert torch.allclose(maml.trajectory(episode)[-1][task], expected, rtol=1e-9)
        adapted = maml.adapt(episode.support_inputs[task], episode.support_targets[task]).eval()
        queries = episode.query_inputs[task]
        assert torch.allclose(adapted(queries), expected, rtol=1e-9)
        alone = torch.cat([adapted(query[None]) for query in queries])
        assert torch.allclose(alone, expected, rtol=1e-9)


def pickled(maml: MAML) -> MAML:
    return pickle.loads(pickle.dumps(maml))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_evaluate_alike(copied):
    episode = images(tasks=1)
    maml = maml_of(network())
    maml.training_step(episode, 0)
    expected = maml.eval().trajectory(episode)[-1]
    other = copied(maml)
    assert torch.equal(other.trajectory(episode)[-1], expected)
    maml.training_step(episode, 0)
    assert torch.equal(other.trajectory(episode)[-1], expected)


def test_fit_validate_and_checkpoint(tmp_path):
    data = GlyphsDataModule(ways=3, meta_batch_size=2, train_episodes=8, val_episodes=4, test_episodes=4)
    net = ConvNet(1, 3, hidden_channels=4)
    maml = MAML(net, adapted_parameters=["head.*"], query_statistics="running", head="prototypes")
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, num_sanity_val_steps=0, default_root_dir=tmp_path)
    trainer.fit(maml, data)
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [int(layer.num_batches_tracked) for layer in norms] == [4] * len(norms)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = MAML.load_from_checkpoint(tmp_path / "last.ckpt", net=ConvNet(1, 3, hidden_channels=4)).eval()
    episode = next(iter(data.test_dataloader()))
    assert torch.equal(again.trajectory(episode)[-1], maml.eval().trajectory(episode)[-1])
    other = MAML.load_from_checkpoint(
        tmp_path / "last.ckpt", net=ConvNet(1, 3, hidden_channels=4), query_statistics="support"
    )
    assert other.trajectory(episode)[-1].shape == (2, 3, 3)


def test_with_per_step_normalization_it_is_not_supported():
    with pytest.raises(SettingError, match=r"per_step_normalization True is not supported here: model.query_"):
        maml_of(network(), per_step_normalization=True)


def test_it_is_what_the_network_computes_with_its_own_weights():
    """The forward before adaptation, in evaluation mode, uses the collected statistics as the network's own does."""
    net, episode = network(), images(tasks=1)
    maml = maml_of(net, adapted_parameters="head")
    maml.training_step(episode, 0)
    maml.eval()
    expected = net(episode.query_inputs[0])
    assert torch.allclose(maml(episode.query_inputs[0]), expected, rtol=1e-12)
