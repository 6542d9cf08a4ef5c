"""Meta-Curvature against a plain autograd loop with n-mode products by einsum, task by task in float64."""

import copy
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, MLP, ConvNet, Episode, SettingError
from maml_lightning.algorithms.curvature import identities, transformed
from tests.algorithms.test_family import NORMALIZED, Scaled, convolutional, own, recurrent
from tests.algorithms.test_family import VARIANTS as FAMILY
from tests.algorithms.test_prototypes import HeadFirst
from tests.reference import curved, family, images, perturbed, relative_error

LR, MODES = 0.3, ("output", "input", "filter")


def moved(maml):
    """With matrices and rates off their initial values."""
    torch.manual_seed(5)
    with torch.no_grad():
        for value in maml.adaptation.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return maml


def maml_of(net, **settings):
    return moved(MAML(net, **{"inner_lr": LR, "inner_steps": 1, "meta_curvature": True, **settings}).double())


def gradients(maml, episode):
    maml.zero_grad()
    loss = maml.training_step(episode, 0)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in maml.named_parameters() if value.grad is not None}


def assert_exact(net, meaning=None, episode=None, **settings):
    net = perturbed(net)
    untouched, episode = copy.deepcopy(net), episode or images(tasks=3)
    maml = maml_of(net, **settings)
    steps = maml.inner_steps
    loss, found = gradients(maml, episode)
    meaning = {
        "weights": [0.0] * steps + [1.0],
        "adapted": maml.adaptation.names,
        "inner_lr": maml.inner_lr,
        **(meaning or {}),
    }
    expected_loss, expected = family(maml, untouched, episode, F.cross_entropy, steps, **meaning)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert set(found) == set(expected)
    for part in ("net.", "adaptation.curvature.", "adaptation."):
        theirs = {name: value for name, value in expected.items() if name.startswith(part)}
        assert relative_error(found, theirs) < 1e-9
    assert all(value.abs().max() > 0 for name, value in found.items() if "curvature" in name)
    return maml


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_gradients_are_exact(steps, chunk):
    assert_exact(convolutional(), inner_steps=steps, tasks_per_chunk=chunk)


VARIANTS = {
    "first order": ({"first_order": True}, {"first_order": True}),
    "flat memory": ({"flat_memory": True}, {}),
    "vectorized": ({"execution": "vectorized"}, {}),
    "loop": ({"execution": "loop"}, {}),
    "head": ({"adapted_parameters": "head"}, {}),
    "body": ({"adapted_parameters": "body"}, {}),
    "patterns": ({"adapted_parameters": ["body.3.*"]}, {}),
    "a rate": ({"learn_inner_lr": "network"}, {}),
    "rates per tensor": ({"learn_inner_lr": "tensor"}, {}),
    "rates per step": ({"learn_inner_lr": "step"}, {}),
    "rates per weight": ({"learn_inner_lr": "weight"}, {}),
    "clipping": ({"inner_clip_norm": 0.1}, {"clip": 0.1}),
    "per-step normalization": NORMALIZED["per-step normalization"],
    **{name: FAMILY[name] for name in ("momentum", "Adam", "weight decay", "multi-step loss")},
    "all at once": (
        {**FAMILY["all at once"][0], "inner_clip_norm": 0.1, "flat_memory": True, "tasks_per_chunk": 2},
        {**FAMILY["all at once"][1], "clip": 0.1},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_exact_with_the_other_settings(name):
    settings, meaning = VARIANTS[name]
    assert_exact(convolutional(), meaning, inner_steps=2, **settings)


def wide():
    """Weights of one, three and five dimensions, and a scalar."""
    return nn.Sequential(
        Scaled(),
        nn.Flatten(2),
        nn.Conv1d(1, 2, 5, stride=5),
        nn.Unflatten(2, (2, 2, 5)),
        nn.Conv3d(2, 3, (2, 1, 3)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


@pytest.mark.parametrize("net", [own, recurrent, wide])
def test_gradients_of_any_network_are_exact(net):
    assert_exact(net(), inner_steps=2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiled_gradients_are_exact():
    assert_exact(MLP(100, 3, (5,)), compile=True, tasks_per_chunk=None)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (3, 4, 5), (3, 4, 2, 3), (2, 3, 2, 1, 2)])
def test_each_dimension_has_its_matrix(shape):
    torch.manual_seed(0)
    gradient = {"w": torch.randn(shape, dtype=torch.float64)}
    begin = identities(gradient)
    assert torch.equal(transformed(gradient, {n: m[0] for n, m in begin.items()})["w"], gradient["w"])
    matrices = {name: torch.randn_like(matrix) for name, matrix in begin.items()}
    expected = curved(gradient["w"], [matrices.get(f"w.{mode}") for mode in MODES])
    found = transformed(gradient, {name: matrix[0] for name, matrix in matrices.items()})["w"]
    assert torch.allclose(found, expected, rtol=1e-12)


def test_it_begins_as_maml():
    net, episode = perturbed(convolutional()), images()
    plain = gradients(MAML(copy.deepcopy(net), inner_lr=LR, inner_steps=2), episode)
    loss, found = gradients(MAML(net, inner_lr=LR, inner_steps=2, meta_curvature=True).double(), episode)
    assert loss == pytest.approx(plain[0], rel=1e-12)
    assert relative_error(found, plain[1]) < 1e-9


def test_without_it_nothing_is_learned_beside():
    assert list(MAML(convolutional()).adaptation.parameters()) == []


def test_adaptation_and_trajectory_use_the_matrices():
    net, episode = perturbed(convolutional()), images()
    maml = maml_of(net, eval_inner_steps=3, learn_inner_lr="step", inner_steps=2)
    outputs = maml.trajectory(episode)
    for task in (0, 3):
        adapted = maml.adapt(episode.support_inputs[task], episode.support_targets[task])
        assert torch.allclose(adapted(episode.query_inputs[task]), outputs[-1][task], rtol=1e-9)
    names = [name for name, _ in net.named_parameters()]
    fast = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
    x, y = episode.support_inputs[0], episode.support_targets[0]
    rates = maml.adaptation.learnt
    for k in range(3):
        loss = F.cross_entropy(torch.func.functional_call(net, fast, (x,)), y)
        grads = torch.autograd.grad(loss, list(fast.values()))
        for name, g in zip(names, grads, strict=True):
            keys = [f"{name.replace('.', '/')}/{mode}" for mode in MODES]
            g = curved(g, [maml.adaptation.curvature.get(key) for key in keys])
            rate = rates[name.replace(".", "/")][min(k, 1)]
            fast[name] = (fast[name] - rate * g).detach().requires_grad_()
    expected = torch.func.functional_call(net, fast, (episode.query_inputs[0],))
    assert torch.allclose(outputs[-1][0], expected, rtol=1e-9)


def test_frozen_matrices_stay_and_the_others_are_learned():
    maml = maml_of(perturbed(convolutional()), learn_inner_lr="tensor")
    _, whole = gradients(maml, images())
    maml.adaptation.curvature["head/weight/input"].requires_grad_(False)
    maml.adaptation.learnt["head/weight"].requires_grad_(False)
    _, found = gradients(maml, images())
    missing = {"adaptation.curvature.head/weight/input", "adaptation.learnt.head/weight"}
    assert set(whole) - set(found) == missing
    assert relative_error(whole, found) < 1e-9
    for value in maml.adaptation.parameters():
        value.requires_grad_(False)
    assert relative_error(whole, gradients(maml, images())[1]) < 1e-9


def prototypes_by_hand(net, maml, episode, steps):
    """The gradients of body and matrices; the head is a matrix of as many rows as there are classes."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in maml.named_parameters()}
    leaves = {name: value for name, value in leaves.items() if not name.startswith("net.head")}
    total = 0.0
    for x, y, query_x, query_y in zip(*episode, strict=True):

        def features(fast, x):
            return torch.relu(F.linear(x.flatten(1), fast["body.1.weight"], fast["body.1.bias"]))

        body = {name: leaves[f"net.{name}"] for name in ("body.1.weight", "body.1.bias")}
        means = torch.stack([features(body, x)[y == label].mean(0) for label in range(int(y.max()) + 1)])
        # Clones: a step's gradient does not go through the prototypes, the meta-gradient does.
        body = {name: value.clone() for name, value in body.items()}
        fast = {**body, "head.weight": 2 * means, "head.bias": -(means**2).sum(1)}

        def outputs(fast, x):
            return F.linear(features(fast, x), fast["head.weight"], fast["head.bias"])

        for _ in range(steps):
            loss = F.cross_entropy(outputs(fast, x), y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            for (name, value), g in zip(list(fast.items()), grads, strict=True):
                keys = [f"adaptation.curvature.{name.replace('.', '/')}/{mode}" for mode in MODES]
                fast[name] = value - LR * curved(g, [leaves.get(key) for key in keys])
        total = total + F.cross_entropy(outputs(fast, query_x), query_y) / episode.tasks
    total.backward()
    return total.item(), {name: value.grad for name, value in leaves.items()}


@pytest.mark.parametrize("ways", [3, 5])
def test_classes_of_prototypes_have_no_output_matrix(ways):
    net, episode = perturbed(MLP(100, 3, (6,))), images(tasks=2, ways=ways)
    maml = maml_of(net, head="prototypes", inner_steps=2)
    assert {name for name in maml.adaptation.curvature if name.startswith("head")} == {"head/weight/input"}
    expected_loss, expected = prototypes_by_hand(net, maml, episode, 2)
    loss, found = gradients(maml, episode)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for part in ("net.", "adaptation."):
        assert relative_error(found, {n: value for n, value in expected.items() if n.startswith(part)}) < 1e-9
    assert maml.trajectory(episode)[-1].shape == (2, 2 * ways, ways)
    adapted = maml.adapt(episode.support_inputs[0], episode.support_targets[0])
    assert torch.allclose(adapted(episode.query_inputs[0]), maml.trajectory(episode)[-1][0], rtol=1e-9)


def test_matrices_need_to_know_the_head_from_the_start():
    with pytest.raises(SettingError, match=r"head prototypes with model\.meta_curvature true needs .*\(head\) is also"):
        maml_of(perturbed(HeadFirst()), head="prototypes").training_step(images(), 0)
    with pytest.raises(SettingError, match=r"head with model\.meta_curvature true .*give model\.adapted_parameters \["):
        maml_of(perturbed(HeadFirst()), adapted_parameters="head").training_step(images(ways=2), 0)


class Words(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


def test_a_parameter_without_elements_keeps_its_gradient():
    net = nn.Sequential(nn.Linear(4, 3))
    net.register_parameter("none", nn.Parameter(torch.zeros(0, 6)))
    maml, x, y = MAML(net, meta_curvature=True), torch.rand(2, 6, 4), torch.arange(6).expand(2, 6) % 3
    maml.training_step(Episode(x, y, x, y), 0).backward()
    assert net[0].weight.grad.abs().sum() > 0
    assert net.none.grad.shape == (0, 6)


def test_a_huge_matrix_is_refused():
    with pytest.raises(SettingError, match=r"matrix of 50000 x 50000 for embedding\.weight \[50000, 4\].*leave embed"):
        MAML(Words(50000), meta_curvature=True)
    maml = MAML(Words(50000), meta_curvature=True, adapted_parameters=["head.*"])
    assert set(maml.adaptation.curvature) == {"head/weight/output", "head/weight/input", "head/bias/output"}


def test_embeddings_have_matrices():
    words = torch.randint(9, (3, 6, 5), generator=torch.Generator().manual_seed(0))
    y = images(tasks=3).support_targets
    assert_exact(Words(9), episode=Episode(words, y, words.flip(2), y.flip(1)), inner_steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "imaml"}, r"meta_curvature True is not supported here: model\.algorithm imaml does not diff"),
        ({"algorithm": "reptile"}, r"meta_curvature True is not supported here: model\.algorithm reptile does not"),
        ({"inner_steps": 0}, r"meta_curvature True is not supported here: model\.inner_steps is 0"),
    ],
)
def test_what_it_does_not_go_with_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        MAML(convolutional(), meta_curvature=True, **settings)


def test_a_parameter_that_was_frozen_has_no_matrix():
    net = perturbed(convolutional())
    net.head.weight.requires_grad_(False)
    maml = maml_of(net)
    gradients(maml, images())
    net.head.weight.requires_grad_(True)
    with pytest.raises(SettingError, match=r"meta_curvature true has no matrix for head\.weight \[3, "):
        maml.training_step(images(), 0)
    net.head.weight.requires_grad_(False)
    net.body[0].weight.requires_grad_(False)
    assert not any("head/weight" in name or "body/0" in name for name in gradients(maml, images())[1])


def test_another_network_has_no_matrix():
    maml = maml_of(perturbed(convolutional()))
    maml.net = perturbed(ConvNet(out_features=3, hidden_channels=6, blocks=2))
    with pytest.raises(SettingError, match=r"meta_curvature true has no matrix for body\.0\.weight \[6, 1, 3, 3\]"):
        maml.training_step(images(), 0)


def test_half_precision_keeps_small_changes_of_the_matrices():
    """In bfloat16, 1.001 is 1: a step with such matrices would be one without."""
    maml = MAML(convolutional(), inner_lr=LR, meta_curvature=True, adapted_parameters=["body.3.weight"])
    with torch.no_grad():
        maml.adaptation.curvature["body/3/weight/output"].mul_(1.001)
    episode = Episode(*(part.float() if part.is_floating_point() else part for part in images()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapted = maml.adapt(episode.support_inputs[0], episode.support_targets[0])
        with torch.no_grad():
            maml.adaptation.curvature["body/3/weight/output"].div_(1.001)
        plain = maml.adapt(episode.support_inputs[0], episode.support_targets[0])
    start, name = maml.net.body[3].weight, "body.3.weight"
    ratio = (adapted.get_parameter(name) - start).norm() / (plain.get_parameter(name) - start).norm()
    assert ratio.item() == pytest.approx(1.001, abs=2e-4)


def test_copies_and_pickles_have_the_matrices():
    maml, episode = maml_of(perturbed(convolutional())), images()
    expected = maml.trajectory(episode)[-1]
    for copied in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(copied.trajectory(episode)[-1], expected)
