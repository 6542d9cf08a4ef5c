"""Running statistics of a user's network, through Lightning's loops, copies and checkpoints."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from maml_lightning import MAML, Episode, GlyphsDataModule
from tests.algorithms.test_statistics import (
    LR,
    assert_same,
    collected,
    everything,
    freeze,
    gradient,
    network,
    plain_loop,
)
from tests.reference import images, relative_error


def maml_of(net: nn.Module, **settings) -> MAML:
    return MAML(net=net, inner_lr=LR, inner_steps=1, tasks_per_chunk=None, **settings)


def two_layers() -> nn.Sequential:
    return network(nn.BatchNorm2d(4), nn.BatchNorm2d(4))


def assert_running(maml: MAML, *running: str, episode: Episode | None = None) -> None:
    """The module evaluates as its network does with those layers in evaluation mode and the others in training."""
    episode, by_hand = episode or images(tasks=1), copy.deepcopy(maml.net).train()
    by_hand.requires_grad_(True)
    for name in running:
        by_hand.get_submodule(name).eval()
    frozen = [name for name, value in maml.net.named_parameters() if not value.requires_grad]
    for name in frozen if len(frozen) < len(list(maml.net.parameters())) else []:
        by_hand.get_parameter(name).requires_grad_(False)
    expected = plain_loop(by_hand, episode, 1)[1]
    assert torch.allclose(maml.trajectory(episode)[-1], expected, rtol=1e-9)
    adapted = maml.adapt(episode.support_inputs[0], episode.support_targets[0])
    assert torch.allclose(adapted(episode.query_inputs[0]), expected[0], rtol=1e-9)


def test_what_changes_later_counts_from_then_on():
    maml = maml_of(two_layers())
    assert_running(maml)
    maml.net[0][1].eval()
    assert_running(maml, "0.1")
    assert_running(maml.eval(), "0.1")
    assert_running(maml.train(), "0.1")
    freeze(maml.net[0][4])
    assert_running(maml, "0.1", "0.4")
    maml.eval()
    maml.net[0][4].requires_grad_(True)
    assert_running(maml, "0.1")
    maml.net[0][1].train()
    assert_running(maml)
    assert_running(maml.train())
    maml.net.eval()
    assert_running(maml, "0.1", "0.4")
    maml.net.train()
    assert_running(maml)


def test_evaluation_of_the_whole_is_none_of_its_layers():
    net = two_layers()
    net[0][1].eval()
    maml = maml_of(net).eval()
    assert not any(layer.training for layer in net.modules())
    assert_running(maml, "0.1")
    assert_running(pickle.loads(pickle.dumps(maml)), "0.1")
    maml.net = copy.deepcopy(net)
    assert_running(maml, "0.1")
    maml.train()
    assert [maml.net[0][i].training for i in (1, 4)] == [False, True]


def test_freezing_the_whole_is_none_of_its_layers():
    net = two_layers()
    freeze(net[0][4])
    maml = maml_of(net)
    expected = maml.trajectory(images())[-1]
    for twin in (maml, copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        twin.freeze()
        assert torch.equal(twin.trajectory(images())[-1], expected)
    assert_running(maml_of(two_layers()).eval())


def test_adapted_copies_are_copied_and_pickled():
    net = two_layers()
    net[0][1].eval()
    x, y, query, _ = (part[0] for part in images())
    adapted = maml_of(net).adapt(x, y)
    expected = adapted(query)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin.train()(query), expected)
        twin[0][1].running_mean += 1
        assert not torch.equal(twin.eval()(query), expected)
    assert torch.equal(adapted(query), expected)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.neck = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten())
        self.head = nn.Linear(64, 2)
        collected(self).float()

    def forward(self, x):
        return self.head(self.neck(self.body(x)))


@pytest.mark.filterwarnings("ignore:Found 5 module.s. in eval mode")  # Lightning says so, and leaves them as they are
@pytest.mark.parametrize("prepare", [lambda net: net.body.eval(), lambda net: freeze(net.body)], ids=["eval", "frozen"])
@pytest.mark.parametrize("averaged", [False, True], ids=["", "averaged"])
def test_training_validation_and_test_keep_running_statistics(prepare, averaged, tmp_path):
    net = Backbone()
    prepare(net)
    before = everything(net)
    data = GlyphsDataModule(ways=2, meta_batch_size=2, train_episodes=4, val_episodes=2, test_episodes=2)
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=2,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[EMAWeightAveraging(decay=0.5)] if averaged else [],
    )
    maml, seen = MAML(net=net, tasks_per_chunk=None), []
    layers = maml._statistics.layers
    maml._statistics.layers = lambda maml: seen.append(layers(maml)) or seen[-1]
    trainer.fit(maml, data)
    trainer.test(maml, data, verbose=False)
    assert len(seen) > 10
    assert set(seen) == {frozenset({"body.1"})}
    assert_same(before, everything(net))
    assert trainer.global_step == 4


def test_learned_by_step_is_not_frozen():
    net = two_layers()
    freeze(net[0][4])
    maml = maml_of(net, per_step_normalization=True)
    assert set(maml.adaptation.by_step) == {"0/1/weight", "0/1/bias"}
    assert_running(maml, "0.4")
    assert len(maml_of(net, per_step_normalization=True).adaptation.by_step) == 4  # all are frozen by now


def test_it_is_said_once_and_only_where_it_is_true(caplog):
    def said(net: nn.Module) -> int:
        caplog.clear()
        maml = maml_of(net)
        gradient(maml, images(tasks=1))
        maml.trajectory(images(tasks=1))
        return caplog.text.count("their running statistics are neither used nor updated")

    net = two_layers()
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        assert said(net) == 1
        assert "2 normalization layer(s), such as 0.1, use" in caplog.text
        assert said(net.eval()) == 0
        freeze(net.train()[0])
        assert said(net) == 0
        assert said(network(nn.BatchNorm2d(4, track_running_stats=False))) == 0


def test_checkpoints_of_earlier_releases_are_of_the_same_network(tmp_path):
    maml, path = maml_of(two_layers()), tmp_path / "old.ckpt"
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True, max_steps=0)
    trainer.strategy.connect(maml)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path)
    weights = checkpoint["state_dict"]
    for name in [name for name in weights if "running" in name or "tracked" in name]:
        del weights[name]
    weights["net.2.bias"] += 1
    torch.save(checkpoint, path)
    net = two_layers()
    net[0][1].running_mean += 1
    before = {name: value.clone() for name, value in net.named_buffers()}
    loaded = MAML.load_from_checkpoint(path, net=net)
    assert torch.equal(loaded.net[2].bias, weights["net.2.bias"])
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    other = maml_of(two_layers())
    other.begin_with(torch.load(path))
    assert torch.equal(other.net[2].bias, weights["net.2.bias"])


def test_new_checkpoints_bring_their_running_statistics(tmp_path):
    net, path = two_layers(), tmp_path / "new.ckpt"
    net[0][1].running_mean += 1
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True, max_steps=0)
    trainer.strategy.connect(maml_of(net))
    trainer.save_checkpoint(path)
    loaded = MAML.load_from_checkpoint(path, net=two_layers())
    assert torch.equal(loaded.net[0][1].running_mean, net[0][1].running_mean)


def test_the_gradient_is_exact_after_evaluation_and_freezing_of_the_whole():
    net = two_layers()
    net[0][1].eval()
    maml, expected = maml_of(net), None
    expected = plain_loop(copy.deepcopy(net), images(tasks=1), 1)[0]
    maml.freeze()
    maml.trajectory(images(tasks=1))
    maml.unfreeze()
    assert relative_error(gradient(maml, images(tasks=1)), expected) < 1e-9
