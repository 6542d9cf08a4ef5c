"""A head that starts from prototypes, against a plain autograd loop."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from maml_lightning import MAML, MLP, ConvNet, Episode, InnerLoop, SettingError
from maml_lightning.algorithms.unrolled import multi_step_weights
from tests.algorithms.test_query_statistics import Reference, by_hand
from tests.algorithms.test_statistics import freeze, gradient, network
from tests.reference import images, perturbed, relative_error

LR = 0.1


class HeadFirst(nn.Module):
    """A head that is registered before the body, and a linear layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(6, 2), nn.Sequential(nn.Flatten(), nn.Linear(100, 6), nn.Tanh())

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(64, 7)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def plain_loop(net, episode, steps, first_order=False, weights=None, adapted=None, of_support=False):
    """The gradient of all but the head, and the predictions after each step; the head is a matrix by hand."""
    weights = weights or [0.0] * steps + [1.0]
    body = {n: v.detach().clone() for n, v in net.named_parameters() if not n.startswith("head")}
    free = {n: v.requires_grad_() for n, v in body.items() if net.get_parameter(n).requires_grad}
    adapted = [n for n in free if adapted is None or n in adapted]
    twin, total, predictions = copy.deepcopy(net), 0.0, []
    twin.forward = twin.features
    for x, y, query_x, query_y in zip(*episode, strict=True):
        features = functional_call(twin, body, (x,))
        means = torch.stack([features[y == label].mean(0) for label in range(int(y.max()) + 1)])
        # Clones: a step's gradient does not go through the prototypes, the meta-gradient does.
        fast = {**{n: body[n].clone() for n in adapted}, "w": 2 * means, "b": -(means**2).sum(1)}
        outputs = []
        for k in range(steps + 1):
            Reference.first = len(x) if of_support else None
            both = functional_call(twin, {**body, **{n: fast[n] for n in adapted}}, (torch.cat([x, query_x]),))
            Reference.first = None
            alone = functional_call(twin, {**body, **{n: fast[n] for n in adapted}}, (query_x,))
            outputs.append((both[len(x) :] if of_support else alone) @ fast["w"].T + fast["b"])
            total = total + weights[k] * F.cross_entropy(outputs[-1], query_y) / episode.tasks
            if k < steps:
                support = functional_call(twin, {**body, **{n: fast[n] for n in adapted}}, (x,))
                loss = F.cross_entropy(support @ fast["w"].T + fast["b"], y)
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                if first_order:
                    slopes = [slope.detach() for slope in slopes]
                fast = {n: v - LR * g for (n, v), g in zip(fast.items(), slopes, strict=True)}
        predictions.append(torch.stack(outputs))
    gradients = torch.autograd.grad(total, list(free.values()))
    return dict(zip(free, gradients, strict=True)), torch.stack(predictions, 1).detach()


def maml_of(net: nn.Module, steps: int = 2, **settings) -> MAML:
    settings = {"tasks_per_chunk": None, **settings}
    return MAML(net=net, inner_lr=LR, inner_steps=steps, head="prototypes", **settings)


def unequal(tasks: int = 3) -> Episode:
    """Five classes with 1 to 4 support examples each, in no order."""
    episode = images(tasks=tasks, ways=5)
    targets = torch.tensor(
        [[0, 1, 1, 2, 2, 2, 3, 3, 3, 4], [4, 3, 1, 0, 0, 0, 0, 2, 2, 1], [2, 2, 2, 4, 1, 3, 0, 4, 4, 4]]
    )
    return episode._replace(support_targets=targets[:tasks])


@pytest.mark.parametrize("make", [HeadFirst, Convolutional])
@pytest.mark.parametrize("episode", [images(tasks=2), images(tasks=2, ways=6, shots=1), unequal(2)])
def test_it_is_exact_for_any_number_of_classes_and_shots(make, episode):
    net = perturbed(make())
    maml, (expected, predictions) = maml_of(net), plain_loop(net, episode, 2)
    ours = gradient(maml, episode)
    assert relative_error(ours, expected) < 1e-9
    assert all(ours[name].abs().max() == 0 for name in ours if name.startswith("head"))
    assert torch.allclose(torch.stack(maml.eval().trajectory(episode)), predictions, rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "settings", "hooked"),
    [
        (1, {"tasks_per_chunk": 1}, False),
        (5, {"tasks_per_chunk": 2}, False),
        (3, {"flat_memory": True}, False),
        (2, {"first_order": True}, False),
        (2, {}, True),
        (2, {"multi_step_epochs": 5}, False),
        (0, {}, False),
        (2, {"adapted_parameters": ["head.*"]}, False),
        (2, {"query_statistics": "support"}, False),
        (2, {"execution": "loop", "multi_step_epochs": 5}, False),
        (2, {"execution": "loop", "first_order": True}, False),
        (2, {"execution": "loop", "query_statistics": "support"}, False),
    ],
    ids=[
        *("chunks of 1", "5 steps", "flat memory", "first order", "untraced", "each step", "none", "head", "support"),
        *("loop, each step", "loop, first order", "loop, support"),
    ],
)
def test_it_is_exact_however_it_is_run(steps, settings, hooked):
    net, episode = perturbed(Convolutional()), unequal()
    if hooked:
        net.body[2].register_forward_hook(lambda layer, args, output: None)
    weights = multi_step_weights(steps, 0, settings.get("multi_step_epochs", 0))
    of_support = "query_statistics" in settings
    expected, predictions = plain_loop(
        by_hand(net) if of_support else net,
        episode,
        steps,
        settings.get("first_order", False),
        weights,
        ["none"] if "adapted_parameters" in settings else None,
        of_support,
    )
    maml = maml_of(net, steps, **settings)
    assert relative_error(gradient(maml, episode), expected) < 1e-9
    assert torch.allclose(torch.stack(maml.trajectory(episode)), predictions, rtol=1e-9)


def test_a_frozen_body_is_not_trained():
    net, episode = perturbed(Convolutional()), images(tasks=2)
    freeze(net.body[0])
    expected, _ = plain_loop(net, episode, 2)
    assert relative_error(gradient(maml_of(net), episode), expected) < 1e-9


@pytest.mark.parametrize("settings", [{"inner_optimizer": "adam"}, {"inner_optimizer": "momentum"}])
def test_other_inner_optimizers_are_exact_by_finite_differences(settings):
    net, episode = perturbed(HeadFirst()), images(tasks=2)
    maml = maml_of(net, inner_weight_decay=0.1, **settings)
    slope = gradient(maml, episode)["body.1.bias"][0].item()
    losses = []
    for move in (1e-5, -2e-5):
        with torch.no_grad():
            net.body[1].bias[0] += move
        losses.append(maml.training_step(episode, 0).item())
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_learned_rates_go_with_it():
    net, episode = perturbed(HeadFirst()), images(tasks=2)
    maml = maml_of(net, learn_inner_lr="step").double()
    torch.nn.utils.vector_to_parameters(torch.full((8,), LR, dtype=torch.float64), maml.adaptation.learnt.values())
    expected, _ = plain_loop(net, episode, 2)
    assert relative_error(gradient(maml, episode), expected) < 1e-9
    assert all(rate.grad.abs().min() > 0 for rate in maml.adaptation.learnt.values())


@pytest.mark.parametrize("query_statistics", ["batch", "support"])
def test_an_adapted_network_has_an_output_for_each_class(query_statistics):
    net, episode = perturbed(Convolutional()), unequal(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    maml = maml_of(net, query_statistics=query_statistics)
    expected = maml.trajectory(episode)[-1][0]
    x, y, query, _ = (part[0] for part in episode)
    for adapted in (maml.adapt(x, y), pickle.loads(pickle.dumps(maml.adapt(x, y)))):
        assert adapted.head.out_features == 5
        assert torch.allclose(adapted(query), expected, rtol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_norms_of_inner_updates():
    net, episode = perturbed(HeadFirst()), images(tasks=2)
    maml, (x, y, _, _) = maml_of(net), (part[1] for part in episode)
    before, after = (dict(maml.adapt(x, y, steps).named_parameters()) for steps in (0, 2))
    expected = torch.stack([(after[n] - value).square().sum() for n, value in before.items()]).sum().sqrt()
    assert maml.inner_update_norms(episode)[1].item() == pytest.approx(expected.item(), rel=1e-9)
    maml.eval_inner_steps = 0
    assert maml.inner_update_norms(episode).tolist() == [0, 0]


def test_a_class_without_examples_is_never_predicted_and_leaves_the_gradient_alone():
    net, episode = perturbed(HeadFirst()), images(tasks=2)
    gap = episode._replace(
        support_targets=episode.support_targets * 2 % 5, query_targets=episode.query_targets * 2 % 5
    )  # labels 0, 2 and 4
    maml, other = maml_of(net), maml_of(copy.deepcopy(net))
    assert relative_error(gradient(maml, gap), gradient(other, episode)) < 1e-9
    outputs = maml.trajectory(gap)[-1]
    assert outputs.softmax(-1)[..., [1, 3]].max() == 0
    assert torch.allclose(outputs[..., [0, 2, 4]], other.trajectory(episode)[-1], rtol=1e-9)


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(100, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(self.body(x.flatten(1)), F.normalize(self.weight))


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(1, 3, 10), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(100, 3, bias=False)),
        nn.Sequential(nn.Linear(10, 3), nn.Flatten(), nn.Unflatten(1, (3, 10)), nn.AvgPool1d(10), nn.Flatten()),
        Cosine(),
    ],
    ids=["convolution", "no bias", "no vectors", "cosine"],
)
def test_a_network_without_a_last_linear_layer_is_refused(net):
    with pytest.raises(SettingError, match=r"head prototypes needs a network whose last layer to run is an nn\.Linear"):
        maml_of(net.double()).training_step(images(tasks=2), 0)


def test_what_it_does_not_go_with_is_refused():
    net, episode = perturbed(HeadFirst()), images(tasks=2)
    for algorithm in ("imaml", "reptile"):
        with pytest.raises(SettingError, match=rf"head prototypes is not supported here: model\.algorithm {algorithm}"):
            maml_of(net, algorithm=algorithm)
    with pytest.raises(SettingError, match=r"learn_inner_lr weight is not supported here: with model\.head prototypes"):
        maml_of(net, learn_inner_lr="weight")
    with pytest.raises(SettingError, match=r"head must be one of learned, prototypes \(got mean\)"):
        MAML(net=net, head="mean")
    with pytest.raises(SettingError, match=r"not frozen and among model\.adapted_parameters"):
        maml_of(net, adapted_parameters=["body.*"]).training_step(episode, 0)
    with pytest.raises(SettingError, match=r"support examples of each query's class \(got a query of class 3, but 3 "):
        maml_of(net).training_step(episode._replace(query_targets=episode.query_targets + 1), 0)
    regression = Episode(*(torch.rand(2, 3, 100).double(), torch.rand(2, 3, 2).double()) * 2)
    with pytest.raises(SettingError, match=r"support targets that are classes \(got floats\)"):
        maml_of(net, loss=F.mse_loss).training_step(regression, 0)


def test_a_checkpoint_of_another_number_of_classes_is_loaded(tmp_path):
    def of(ways: int, **settings) -> MAML:
        net = ConvNet(out_features=ways, hidden_channels=4, blocks=2).double()
        return MAML(net=net, inner_lr=LR, head="prototypes", **settings)

    source, target, episode = of(20), of(3), images(tasks=1, ways=4)
    target.on_load_checkpoint(checkpoint := {"state_dict": source.state_dict()})
    target.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(target.trajectory(episode)[-1], source.trajectory(episode)[-1])
    narrower = MAML(net=ConvNet(out_features=20, hidden_channels=5, blocks=2), head="prototypes")
    with pytest.raises(SettingError, match="The checkpoint is of another network"):
        narrower.on_load_checkpoint({"state_dict": source.state_dict()})
    learned = MAML(net=ConvNet(out_features=3, hidden_channels=4, blocks=2))
    with pytest.raises(SettingError, match="The checkpoint is of another network"):
        learned.on_load_checkpoint({"state_dict": source.state_dict()})


def test_an_inner_loop_takes_it():
    net, episode = perturbed(MLP(100, 3, (5,))), images(tasks=2)
    loop, params = InnerLoop(net, F.cross_entropy, None), dict(net.named_parameters())
    loop.head = "prototypes"
    assert loop.meta_gradient(params, episode, LR, 1).gradient["head.weight"].abs().max() == 0
    assert network(nn.BatchNorm2d(4))[2].out_features == 3
