"""Which parameters adapt, where the head is registered before the body or cannot be told by its place."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning import MAML, ConvNet, Episode, SettingError
from maml_lightning.algorithms.adaptation import adapted_names, last_layer
from tests.reference import family, perturbed, relative_error

HEAD = ["head.weight", "head.bias"]
BODY = ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def episode() -> Episode:
    generator = torch.Generator().manual_seed(1)
    y = torch.tensor([0, 1, 2]).repeat(2, 2)
    return Episode(*(t for _ in range(2) for t in (torch.rand(2, 6, 4, generator=generator, dtype=torch.float64), y)))


@pytest.mark.parametrize(("which", "names"), [("head", HEAD), ("body", BODY)])
def test_a_head_that_is_registered_first_is_the_head(which, names):
    net, untouched = perturbed(HeadFirst()), perturbed(HeadFirst())
    untouched.load_state_dict(net.state_dict())
    maml = MAML(net, inner_lr=0.3, inner_steps=2, adapted_parameters=which)
    meaning = {"weights": [0.0, 0.0, 1.0], "adapted": names, "inner_lr": 0.3}
    _, expected = family(maml, untouched, episode(), F.cross_entropy, 2, **meaning)
    maml.training_step(episode(), 0).backward()
    found = {name: value.grad for name, value in maml.named_parameters()}
    assert relative_error(found, {name: value for name, value in expected.items() if name in found}) < 1e-9
    adapted = MAML(net, inner_lr=0.3, adapted_parameters=which).adapt(episode()[0][0], episode()[1][0])
    changed = [n for n, value in adapted.named_parameters() if not torch.equal(value, net.get_parameter(n))]
    assert sorted(changed) == sorted(names)


class Functional(nn.Module):
    """Its head is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.head.weight, self.head.bias)


class Attending(nn.Module):
    """Ends with a layer whose own last layer is not called; a parameter of its own comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.encoder = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x.unsqueeze(1) + self.token)
        return self.attention(x, x, x)[0].squeeze(1)


class Refining(nn.Module):
    """Its first layer runs again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.first(x)))


def test_the_last_layer_is_the_registered_one_where_it_runs_last():
    x, image = torch.rand(6, 4), torch.rand(6, 1, 28, 28)
    for net, inputs, name in (
        (nn.Linear(4, 3), x, ""),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Tanh()), x, "2"),
        (ConvNet(hidden_channels=4, blocks=2), image, "head"),
        (Functional(), x, "head"),
        (Attending(), x, "attention.out_proj"),
    ):
        assert last_layer(net, inputs) == name
        assert adapted_names(net, "head", last_layer(net, inputs)) == adapted_names(net, "head")
    assert last_layer(Refining(), x) == "first"
    assert last_layer(HeadFirst(), x) == "head"
    assert last_layer(nn.ReLU(), x) is None
    assert last_layer(HeadFirst(), torch.rand(6, 9)) is None


class WithAuxiliary(nn.Module):
    """A second head that only pretraining calls, or one of its own that is read and not called."""

    def __init__(self, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.head, self.body, self.pretraining_head = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).tanh()
        return F.linear(x, self.head.weight, self.head.bias) if self.functional else self.head(x)


@pytest.mark.parametrize("functional", [False, True])
def test_a_layer_that_does_not_run_is_no_head(functional):
    net = perturbed(WithAuxiliary(functional))
    adapted = MAML(net, adapted_parameters="head").adapt(episode()[0][0], episode()[1][0])
    assert not torch.equal(adapted.head.weight, net.head.weight)
    assert torch.equal(adapted.body.weight, net.body.weight)


class Tied(nn.Module):
    """A head whose weight is that of the body, and by choice a norm whose weight is that of another."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 4, bias=bias)
        self.head.weight, self.second.weight = self.body.weight, self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.body(x)).tanh()))


def test_a_shared_parameter_belongs_to_each_of_its_layers():
    norms = ["first.weight", "first.bias", "second.bias"]
    for bias in (True, False):
        net, of_head = perturbed(Tied(bias)), ["body.weight", *["head.bias"] * bias]
        assert adapted_names(net, "head") == of_head
        assert adapted_names(net, "body") == ["body.bias", *norms]
        assert adapted_names(net, ["head.*"]) == of_head
        assert adapted_names(net, "head.weight") == ["body.weight"]
        maml = MAML(net, adapted_parameters="head", inner_steps=2)
        maml.training_step(episode(), 0).backward()
        assert maml.adaptation.names == of_head


def test_a_shared_normalization_weight_has_one_value_for_each_step():
    net, untouched = perturbed(Tied()), perturbed(Tied())
    maml = MAML(net, inner_lr=0.3, inner_steps=2, per_step_normalization=True)
    assert set(maml.adaptation.by_step) == {"first/weight", "first/bias", "second/bias"}
    maml.training_step(episode(), 0).backward()
    meaning = {"weights": [0.0, 0.0, 1.0], "adapted": ["body.weight", "body.bias", "head.bias"], "inner_lr": 0.3}
    _, expected = family(maml, untouched, episode(), F.cross_entropy, 2, **meaning)
    assert relative_error({name: value.grad for name, value in maml.named_parameters()}, expected) < 1e-9


class FrozenLast(nn.Module):
    """A frozen layer that is registered last and runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.features = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)
        self.features.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.features(x)).tanh())


@pytest.mark.parametrize("settings", [{}, {"learn_inner_lr": "tensor"}, {"meta_curvature": True}])
def test_a_frozen_layer_that_is_registered_last_is_no_head(settings):
    for which, names in (("head", ["head.weight", "head.bias"]), ("body", ["body.weight", "body.bias"])):
        maml = MAML(perturbed(FrozenLast()), adapted_parameters=which, **settings)
        maml.training_step(episode(), 0).backward()
        assert maml.adaptation.names == names


def test_a_frozen_head_is_not_adapted():
    net = perturbed(HeadFirst())
    net.head.requires_grad_(False)
    with pytest.raises(SettingError, match=r"head.* matches no trainable parameter"):
        MAML(net, adapted_parameters="head", learn_inner_lr="tensor").training_step(episode(), 0)


def test_looking_for_the_head_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).train()
    net[1].eval()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    assert last_layer(net, torch.rand(6, 4, generator=torch.Generator())) == "3"
    assert [layer.training for layer in net] == [True, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_learned_rates_need_to_know_the_head_from_the_start():
    for which, learn, given in (
        ("head", "tensor", r"\[head\.\*\]"),
        ("body", "weight", r"\[body\.0\.\*, body\.2\.\*\]"),
    ):
        maml = MAML(perturbed(HeadFirst()), adapted_parameters=which, learn_inner_lr=learn)
        for _ in range(2):
            with pytest.raises(SettingError, match=rf"last layer to run \(head\) .* \(body.2\); give .*{given}"):
                maml.training_step(episode(), 0)
    maml = MAML(perturbed(HeadFirst()), adapted_parameters="head.*", learn_inner_lr="tensor")
    maml.training_step(episode(), 0).backward()
    assert maml.adaptation.learnt["head/weight"].grad.abs() > 0
    maml = MAML(perturbed(HeadFirst()), adapted_parameters="head", learn_inner_lr="network")
    maml.training_step(episode(), 0).backward()
    assert maml.adaptation.learnt["all"].grad.abs() > 0


def test_frozen_parameters_and_another_network_keep_their_head():
    x, y = episode()[0][0], episode()[1][0]

    def changed(maml: MAML) -> set[str]:
        pairs = maml.adapt(x, y).named_parameters()
        return {name for name, value in pairs if not torch.equal(value, maml.net.get_parameter(name))}

    maml = MAML(perturbed(HeadFirst()), adapted_parameters="head")
    maml.freeze()
    assert changed(maml) == set(HEAD)
    maml.unfreeze()
    maml.net.head.bias.requires_grad_(False)
    assert changed(maml) == {"head.weight"}
    maml.net = perturbed(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    assert changed(maml) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("head.0", r"\['head\.0'\] matches no .*; did you mean head\.\*\? They are head\.weight, "),
        ("body.2", r"\['body\.2'\] matches no .*; for all of the layer's, give body\.2\.\*\.$"),
        ("haed", r"\['haed'\] matches no .*; did you mean head\? They are head\.weight, head\.bias, body"),
        ("zzz", r"\['zzz'\] matches no trainable parameter of model\.net; they are head\.weight, "),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_one_that_does(pattern, said):
    with pytest.raises(SettingError, match=said):
        MAML(HeadFirst(), inner_lr=0.1, adapted_parameters=pattern)


def test_the_names_of_a_large_network_are_not_all_said():
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    with pytest.raises(SettingError, match=r"they are 0\.weight, .*9\.bias, \.\.\. \(100 in all\)\.$") as error:
        adapted_names(net, "zzz")
    assert len(str(error.value)) < 400


def test_parameters_in_place_of_their_names_are_refused():
    net = HeadFirst()
    with pytest.raises(SettingError, match=r"adapted_parameters takes names \(got Parameter\)"):
        MAML(net, inner_lr=0.1, adapted_parameters=list(net.head.parameters()))


def test_a_frozen_network_is_said_to_be_frozen():
    with pytest.raises(SettingError, match=r"model\.net has no trainable parameter: .* all are frozen"):
        MAML(HeadFirst().requires_grad_(False), inner_lr=0.1)
