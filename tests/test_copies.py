"""A MAML acts by what it is now: copies, pickles, another network, other modes, attributes and frozen parameters."""

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from maml_lightning import MAML, MLP, Episode, GlyphsDataModule, InnerLoop, SettingError
from tests.reference import images, perturbed, reference, relative_error


def gradients(maml: MAML, episode: Episode | None = None) -> dict[str, torch.Tensor]:
    maml.zero_grad()
    maml.training_step(images() if episode is None else episode, 0).backward()
    return {name: value.grad for name, value in maml.named_parameters() if value.grad is not None}


def assert_exact(maml: MAML, net: nn.Module, steps: int = 2) -> None:
    """The meta-gradient, and the predictions of a network that is adapted, are those of ``net`` in a plain loop."""
    assert_exact_gradient(maml, net, steps)
    x, y, query, _ = (part[0] for part in images())
    fast = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
    for _ in range(steps):
        slopes = torch.autograd.grad(F.cross_entropy(functional_call(net, fast, (x,)), y), list(fast.values()))
        fast = {n: v - 0.3 * g for (n, v), g in zip(fast.items(), slopes, strict=True)}
    assert torch.allclose(maml.trajectory(images())[-1][0], functional_call(net, fast, (query,)), rtol=1e-9)


def assert_exact_gradient(maml: MAML, net: nn.Module, steps: int) -> None:
    _, expected = reference(net, images(), 0.3, steps, F.cross_entropy)
    assert relative_error(gradients(maml), {f"net.{name}": value for name, value in expected.items()}) < 1e-9


def perceptron(*layers: nn.Module) -> nn.Module:
    return perturbed(nn.Sequential(nn.Flatten(), nn.Linear(100, 5), *layers, nn.Linear(5, 3)))


def maml_of(net: nn.Module, **settings) -> MAML:
    return MAML(net=net, inner_lr=0.3, **{"inner_steps": 2, "tasks_per_chunk": None, **settings})


FAMILY = {
    "MAML": {},
    "Meta-SGD": {"learn_inner_lr": "weight"},
    "Meta-Curvature": {"meta_curvature": True},
    "Adam, clipped": {"inner_optimizer": "adam", "inner_clip_norm": 1.0, "inner_weight_decay": 0.1},
    "momentum, per step": {"inner_optimizer": "momentum", "per_step_normalization": True},
    "iMAML": {"algorithm": "imaml"},
    "Reptile": {"algorithm": "reptile"},
}


@pytest.mark.parametrize("member", FAMILY)
def test_copies_and_pickles_give_the_same_gradients_and_predictions(member):
    layers = (nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh())
    maml = maml_of(perceptron(*layers), **{"inner_steps": 1, **FAMILY[member]}).double()
    expected, predictions = gradients(maml), maml.trajectory(images())[-1]
    for twin in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        ours = gradients(twin)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], value) for name, value in expected.items())
        assert torch.equal(twin.trajectory(images())[-1], predictions)


def test_a_copy_follows_its_own_mode():
    maml = maml_of(perceptron(nn.Dropout(0.5)))
    gradients(maml)
    teacher = copy.deepcopy(maml).eval()
    plain = perceptron(nn.Identity())
    plain.load_state_dict(maml.net.state_dict())
    assert_exact(teacher, plain)
    assert maml.net.training
    assert not torch.equal(maml.trajectory(images())[-1], maml.trajectory(images())[-1])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.temperature = 1.0

    def forward(self, x):
        return x * self.scale * self.temperature


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda maml: AveragedModel(maml).module], ids=["copy", "average"])
def test_a_copy_has_buffers_of_its_own(copied):
    maml = maml_of(perceptron(Scaled()))
    gradients(maml)
    twin = copied(maml)
    twin.net[2].scale.fill_(3)
    assert_exact(twin, twin.net)
    assert_exact(maml, maml.net)


def test_averaged_copies_train_and_are_validated(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    data = GlyphsDataModule(ways=2, meta_batch_size=2, train_episodes=8, val_episodes=4, train_classes=8, val_classes=8)
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[EMAWeightAveraging(decay=0.5)],
    )
    maml = MAML(net=net, tasks_per_chunk=None)
    trainer.fit(maml, data)
    assert trainer.global_step == 8
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_another_network_is_used_from_then_on():
    maml = maml_of(perceptron(nn.Tanh()))
    gradients(maml)
    for other in (
        perceptron(nn.Sigmoid()),
        perturbed(MLP(100, 3, (4, 4))),
        perturbed(nn.Sequential(nn.Flatten(), nn.Linear(100, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))),
    ):
        maml.net = other
        assert_exact(maml, other)
    maml.net = perturbed(MLP(100, 2))
    with pytest.raises(SettingError, match=r"model\.net has 2 outputs, but the episodes have 3 classes"):
        maml.training_step(images(), 0)


def test_another_network_that_learnt_rates_do_not_fit_is_refused():
    maml = maml_of(perceptron(), learn_inner_lr="weight")
    maml.net = perturbed(MLP(100, 3, (5,)))
    with pytest.raises(SettingError, match=r"learn_inner_lr weight has no rate for body\.1\.weight"):
        maml.training_step(images(), 0)


def test_another_loss_and_inner_learning_rate_are_used_from_then_on():
    maml = MAML(net=perceptron(), inner_lr=0.1, inner_steps=2)
    gradients(maml)
    maml.inner_lr = 0.3
    assert_exact(maml, maml.net)
    maml.loss = lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=0.5)
    _, expected = reference(maml.net, images(), 0.3, 2, maml.loss)
    assert relative_error(gradients(maml), {f"net.{name}": value for name, value in expected.items()}) < 1e-9


def frozen_reference(net: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """A plain loop over what requires a gradient."""
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    free = {name: start[name].requires_grad_() for name, value in net.named_parameters() if value.requires_grad}
    total = 0.0
    for x, y, query_x, query_y in zip(*images(), strict=True):
        fast = dict(free)
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(net, {**start, **fast}, (x,)), y)
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: v - 0.3 * g for (n, v), g in zip(fast.items(), slopes, strict=True)}
        total = total + F.cross_entropy(functional_call(net, {**start, **fast}, (query_x,)), query_y) / images().tasks
    return {f"net.{n}": g for n, g in zip(free, torch.autograd.grad(total, list(free.values())), strict=True)}


def test_freezing_and_unfreezing_count_from_then_on():
    maml = maml_of(perceptron(nn.Tanh()))
    for frozen in ((), ("1.weight", "1.bias"), ("3.bias",), ()):
        for name, value in maml.net.named_parameters():
            value.requires_grad_(name not in frozen)
        ours, expected = gradients(maml), frozen_reference(maml.net, 2)
        assert set(ours) == set(expected)
        assert relative_error(ours, expected) < 1e-9
        before, after = maml.net.state_dict(), maml.adapt(*(part[0] for part in images()[:2])).state_dict()
        assert {name for name in before if torch.equal(before[name], after[name])} == set(frozen)


def test_what_was_frozen_at_first_is_adapted_when_unfrozen():
    net = perceptron(nn.Tanh())
    net[1].requires_grad_(False)
    maml = maml_of(net)
    assert set(gradients(maml)) == {"net.3.weight", "net.3.bias"}
    net[1].requires_grad_(True)
    assert_exact(maml, net)


def test_a_network_frozen_as_a_whole_adapts_what_it_did():
    maml = maml_of(perceptron(), adapted_parameters="head")
    expected = maml.trajectory(images())
    maml.freeze()
    assert all(torch.equal(a, b) for a, b in zip(maml.trajectory(images()), expected, strict=True))
    assert not torch.equal(expected[0], expected[-1])


def test_unfreezing_what_has_no_learnt_rate_is_refused():
    net = perceptron()
    net[1].requires_grad_(False)
    maml = maml_of(net, learn_inner_lr="tensor")
    net[1].requires_grad_(True)
    with pytest.raises(SettingError, match=r"learn_inner_lr tensor has no rate for 1\.weight"):
        maml.training_step(images(), 0)


class Steered(nn.Module):
    """What is done to ``x`` depends on Python alone."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x):
        return self.how(self, x)


def counted(self, x):
    self.calls += 1
    return x * self.calls


def drawn(self, x):
    return x * random.random()


@pytest.mark.parametrize("how", [counted, drawn])
def test_what_python_does_at_each_call_is_done(how, caplog):
    net = perceptron(Steered(how)).eval()
    loop, params = InnerLoop(net, F.cross_entropy, None), dict(net.named_parameters())
    first, second = (loop.trajectory(params, images(), 0.3, 0)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    assert caplog.text.count("runs task by task") == 1


def test_attributes_layers_and_modes_that_change_between_steps_are_followed(caplog):
    net = perceptron(Scaled(), nn.Tanh())
    maml = maml_of(net)
    assert_exact(maml, net)
    net[2].temperature = 5.0
    assert_exact(maml, net)
    net[3] = nn.Sigmoid()
    assert_exact(maml, net)
    net[2].temperature = 1.0
    assert_exact(maml, net)
    assert "untraced" not in caplog.text


def test_an_attribute_that_changes_at_each_step_is_followed(caplog):
    net = perceptron(Scaled())
    maml = maml_of(net, inner_steps=1)
    for step in range(10):
        net[2].temperature = 1 + step / 10
        assert_exact_gradient(maml, net, 1)
    assert caplog.text.count("runs without a recorded graph") == 1
    assert_exact(maml, net, 1)


def test_forward_hooks_fire_at_each_step():
    net, calls = perceptron(nn.Tanh()), []
    maml = maml_of(net)
    assert_exact(maml, net)
    handle = net[2].register_forward_hook(lambda layer, args, output: calls.append(1) or 2 * output)
    assert_exact(maml, net)
    count = len(calls)
    assert_exact(maml, net)
    assert len(calls) > count > 0
    handle.remove()
    assert_exact(maml, net)


def test_dead_networks_are_not_kept():
    maml = maml_of(perceptron(nn.Tanh()))
    gradients(maml)
    gone = weakref.ref(maml.net)
    maml.net = perceptron(nn.Sigmoid())
    gradients(maml)
    gc.collect()
    assert gone() is None


class Versioned(nn.Linear):
    """Like torchvision's MNASNet, it takes only state dicts with the version of a saved one."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 1:
            raise ValueError("version should be set to 1")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_network_that_loads_in_its_own_way_adapts():
    torch.manual_seed(0)
    net, x, y = Versioned(4, 3), torch.rand(6, 4), torch.arange(3).repeat(2)
    adapted = MAML(net, inner_lr=0.5, inner_steps=1).adapt(x, y)
    slope = torch.autograd.grad(F.cross_entropy(net(x), y), net.weight)[0]
    assert torch.allclose(adapted.weight, net.weight - 0.5 * slope)


def test_weights_of_copied_recurrent_layers_are_one_piece_of_memory(monkeypatch):  # else GPUs warn at each call
    flattened = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda layer: flattened.append(layer))
    net, x, y = Recurrent(), torch.rand(6, 5, 4), torch.arange(3).repeat(2)
    maml = MAML(net, inner_lr=0.5, inner_steps=1)
    flattened.clear()
    adapted = maml.adapt(x, y)
    assert adapted.rnn in flattened


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))
