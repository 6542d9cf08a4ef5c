"""Every member of the family, as a user sets it, against plain autograd task by task in float64."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maml_lightning import MAML, MLP, ConvNet, ResNet12, SettingError
from maml_lightning.algorithms import inner_loop
from tests.own_network import Branching
from tests.reference import family, images, perturbed, relative_error

LR, STEPS = 0.3, 2
LAST = [0.0] * STEPS + [1.0]

# settings of MAML, and what they mean to the reference
VARIANTS = {
    "MAML": ({}, {}),
    "FOMAML": ({"first_order": True}, {"first_order": True}),
    "annealed order, at first": ({"first_order_epochs": 2}, {"first_order": True}),
    "ANIL": ({"adapted_parameters": "head"}, {}),
    "first-order ANIL": ({"adapted_parameters": "head", "first_order": True}, {"first_order": True}),
    "BOIL": ({"adapted_parameters": "body"}, {}),
    "patterns": ({"adapted_parameters": ["*.weight"]}, {}),
    "one learned rate": ({"learn_inner_lr": "network"}, {}),
    "a rate per tensor": ({"learn_inner_lr": "tensor"}, {}),
    "LSLR": ({"learn_inner_lr": "step"}, {}),
    "Meta-SGD": ({"learn_inner_lr": "weight"}, {}),
    "first-order Meta-SGD": ({"learn_inner_lr": "weight", "first_order": True}, {"first_order": True}),
    "multi-step loss": ({"multi_step_epochs": 5}, {"weights": [0, 1 / 2, 1 / 2]}),
    "momentum": ({"inner_optimizer": "momentum"}, {"optimizer": "momentum"}),
    "Adam": ({"inner_optimizer": "adam", "inner_lr": 0.01}, {"optimizer": "adam"}),
    "first-order momentum": (
        {"inner_optimizer": "momentum", "first_order": True},
        {"optimizer": "momentum", "first_order": True},
    ),
    "weight decay": ({"inner_weight_decay": 0.1}, {"decay": 0.1}),
    "clipping": ({"inner_clip_norm": 0.5}, {"clip": 0.5}),
    "all at once": (
        {
            "adapted_parameters": "body",
            "learn_inner_lr": "step",
            "multi_step_epochs": 5,
            "inner_optimizer": "momentum",
            "inner_weight_decay": 0.1,
            "inner_clip_norm": 0.5,
        },
        {"weights": [0, 1 / 2, 1 / 2], "optimizer": "momentum", "decay": 0.1, "clip": 0.5},
    ),
}
NORMALIZED = {
    "per-step normalization": ({"per_step_normalization": True}, {}),
    "MAML++ at first": (
        {
            "per_step_normalization": True,
            "learn_inner_lr": "step",
            "multi_step_epochs": 5,
            "first_order_epochs": 2,
        },
        {"weights": [0, 1 / 2, 1 / 2], "first_order": True},
    ),
    "per-step normalization with ANIL": ({"per_step_normalization": True, "adapted_parameters": "head"}, {}),
}


def convolutional():
    return ConvNet(out_features=3, hidden_channels=4, blocks=2)


def assert_exact(net, changes, meaning, **settings):
    net = perturbed(net)
    untouched, episode = copy.deepcopy(net), images(tasks=2)
    maml = MAML(net=net, **{"inner_lr": LR, "inner_steps": STEPS, **changes, **settings}).double()
    with torch.no_grad():
        for value in maml.adaptation.parameters():
            value.mul_(1 + 0.3 * torch.rand_like(value))
    loss = maml.training_step(episode, 0)
    loss.backward()
    meaning = {"weights": LAST, "adapted": maml.adaptation.names, "inner_lr": maml.inner_lr, **meaning}
    expected_loss, expected = family(maml, untouched, episode, F.cross_entropy, STEPS, **meaning)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    found = {name: value.grad for name, value in maml.named_parameters() if value.grad is not None}
    assert set(found) == set(expected)
    for part in ("net.", "adaptation."):
        theirs = {name: value for name, value in expected.items() if name.startswith(part)}
        assert not theirs or relative_error(found, theirs) < 1e-9
    return found


@pytest.mark.parametrize("name", {**VARIANTS, **NORMALIZED})
def test_gradients_are_exact(name):
    assert_exact(convolutional(), *{**VARIANTS, **NORMALIZED}[name], tasks_per_chunk=None)


def own():
    return nn.Sequential(
        Scaled(), nn.Conv2d(1, 3, 3, stride=3), nn.LayerNorm([3, 3, 3]), nn.Flatten(), nn.Linear(27, 3)
    )


@pytest.mark.parametrize("name", {**VARIANTS, **NORMALIZED})
def test_own_networks_need_no_edits(name):
    assert_exact(own(), *{**VARIANTS, **NORMALIZED}[name], tasks_per_chunk=1, flat_memory=True)


@pytest.mark.parametrize("flat_memory", [False, True])
@pytest.mark.parametrize("name", {**VARIANTS, **NORMALIZED})
def test_gradients_are_exact_in_a_loop(name, flat_memory):
    assert_exact(convolutional(), *{**VARIANTS, **NORMALIZED}[name], execution="loop", flat_memory=flat_memory)


class Waves(nn.Module):
    """A complex weight and bias, and by choice real parameters besides."""

    def __init__(self, head=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(100, 3, dtype=torch.complex128) / 10)
        self.bias = nn.Parameter(3 + torch.randn(3, dtype=torch.complex128))  # where abs is smooth
        self.head = nn.Linear(3, 3) if head else nn.Identity()

    def forward(self, x):
        return self.head((x.flatten(1).to(self.weight.dtype) @ self.weight + self.bias).abs())


OF_WAVES = {
    **{name: VARIANTS[name] for name in ("Meta-SGD", "Adam", "momentum", "weight decay", "clipping")},
    "matrices": ({"meta_curvature": True, "inner_clip_norm": 0.5}, {"clip": 0.5}),
}


@pytest.mark.parametrize("settings", [{"tasks_per_chunk": None}, {"execution": "loop"}], ids=["traced", "loop"])
@pytest.mark.parametrize("head", [True, False], ids=["and real ones", "alone"])
@pytest.mark.parametrize("name", OF_WAVES)
def test_gradients_of_complex_parameters_are_exact(name, head, settings):
    torch.manual_seed(0)
    assert_exact(Waves(head), *OF_WAVES[name], **settings)


def test_the_update_norm_of_complex_parameters_is_that_of_the_parameters():
    maml, episode = MAML(Waves(), inner_lr=LR).double(), images(tasks=2)
    adapted = maml.adapt(episode.support_inputs[0], episode.support_targets[0])
    moves = [(a - b).abs().flatten() for a, b in zip(adapted.parameters(), maml.net.parameters(), strict=True)]
    assert maml.inner_update_norms(episode)[0].item() == pytest.approx(torch.cat(moves).norm().item(), rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"execution": "loop"}], ids=["traced", "loop"])
@pytest.mark.parametrize("name", ["MAML", "Meta-SGD", "clipping"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_has_the_gradients_of_one_in_double(dtype, name, settings, caplog):
    changes, meaning = VARIANTS[name]
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 4), nn.Tanh(), nn.Linear(4, 3), Scaled())
    net = perturbed(net).to(dtype)
    untouched, episode = copy.deepcopy(net).double(), images(tasks=2)
    maml = MAML(net=net, **{"inner_lr": LR, "inner_steps": STEPS, "tasks_per_chunk": None, **changes, **settings})
    meaning = {"weights": LAST, "adapted": maml.adaptation.names, "inner_lr": maml.inner_lr, **meaning}
    _, expected = family(copy.deepcopy(maml).double(), untouched, episode, F.cross_entropy, STEPS, **meaning)
    half = episode._replace(support_inputs=episode[0].to(dtype), query_inputs=episode[2].to(dtype))
    maml.training_step(half, 0).backward()
    found = {name: value.grad.double() for name, value in maml.named_parameters() if value.grad is not None}
    assert relative_error(found, expected) < 0.05
    adapted = maml.adapt(half.support_inputs[0], half.support_targets[0])
    assert {value.dtype for value in adapted.parameters()} == {dtype}
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adam_in_half_precision_moves_as_in_double(dtype):
    net, (x, y, *_) = perturbed(nn.Sequential(nn.Flatten(), nn.Linear(100, 4), nn.ReLU(), nn.Linear(4, 3))), images()
    with torch.no_grad():
        net[1].bias[0] -= 1000  # a unit that is not active: its gradients are zero
    moves = []
    for kind in (dtype, torch.float64):
        maml = MAML(copy.deepcopy(net).to(dtype).to(kind), inner_lr=0.1, inner_steps=2, inner_optimizer="adam")
        adapted = maml.adapt(x[0].to(kind), y[0])
        pairs = zip(adapted.parameters(), maml.net.parameters(), strict=True)
        moves.append(torch.cat([(a - b).double().flatten() for a, b in pairs]))
    assert (moves[0] - moves[1]).norm() / moves[1].norm() < 0.05


def test_a_network_that_runs_in_a_loop_is_measured_once(monkeypatch):
    runs, sweeps = [], []
    measure, sweep = inner_loop.inner.bytes_per_task, torch.autograd.backward
    monkeypatch.setattr(inner_loop.inner, "bytes_per_task", lambda *args: runs.append(args) or measure(*args))
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **kw: sweeps.append(args) or sweep(*args, **kw))
    maml, episode = MAML(convolutional(), inner_lr=LR, inner_steps=STEPS, execution="loop").double(), images(tasks=2)
    for _ in range(3):
        maml.training_step(episode, 0)
    assert len(runs) == 1
    assert len(sweeps) == 3 * 2  # of a meta-step, one through all steps of a task


class Rows(nn.Module):
    """An LSTM, or a transformer, over the rows of a picture."""

    def __init__(self, body):
        super().__init__()
        self.body, self.norm, self.head = body, nn.LayerNorm(4), nn.Linear(4, 3)
        self.entry = nn.Linear(10, 4)

    def forward(self, x):
        outputs = self.body(self.entry(x.squeeze(1)))
        return self.head(self.norm(outputs[0] if isinstance(outputs, tuple) else outputs).mean(1))


def recurrent():
    return Rows(nn.LSTM(4, 4, batch_first=True))


def transformer():
    return Rows(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, activation="gelu", batch_first=True))


def residual():
    return nn.Sequential(nn.ZeroPad2d(3), ResNet12(1, 3, (2, 2, 2, 2)))


NETWORKS = {"LSTM": recurrent, "transformer": transformer, "ResNet-12": residual}
MEMBERS = ["ANIL", "BOIL", "Meta-SGD", "LSLR", "momentum", "Adam", "per-step normalization"]


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("net", NETWORKS)
def test_the_family_is_exact_on_recurrent_and_residual_networks_and_transformers(net, member):
    assert_exact(NETWORKS[net](), *{**VARIANTS, **NORMALIZED}[member], tasks_per_chunk=None)


class Scaled(nn.Module):
    """A layer of one's own with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


def test_a_network_that_cannot_be_traced_learns_its_rates():
    assert_exact(Branching(), {"learn_inner_lr": "weight"}, {})


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiled_gradients_are_exact():
    settings = {"learn_inner_lr": "step", "adapted_parameters": "body"}
    assert_exact(MLP(100, 3, (5,)), settings, {}, compile=True, tasks_per_chunk=None)


def test_rates_do_not_matter_to_what_is_not_adapted():
    found = assert_exact(convolutional(), {"adapted_parameters": "head", "learn_inner_lr": "weight"}, {})
    assert {name for name in found if name.startswith("adaptation")} == {
        "adaptation.learnt.head/weight",
        "adaptation.learnt.head/bias",
    }


@pytest.mark.parametrize(("which", "same"), [("head", "body"), ("body", "head"), (["body.3.*"], "head")])
def test_adaptation_leaves_the_rest_as_it_is(which, same):
    net = perturbed(convolutional())
    maml, episode = MAML(net=net, adapted_parameters=which, inner_steps=2), images()
    adapted = maml.adapt(episode.support_inputs[0], episode.support_targets[0])
    changed = {name for name, value in adapted.named_parameters() if not torch.equal(value, net.get_parameter(name))}
    assert changed == set(maml.adaptation.names)
    assert not any(name.startswith(same) for name in changed)


def test_order_is_annealed_at_its_epoch():
    gradients, net = [], perturbed(convolutional())
    for settings, epoch in (({"first_order": True}, 0), ({}, 0), *(({"first_order_epochs": 2}, e) for e in (1, 2))):
        maml = MAML(net=copy.deepcopy(net), inner_lr=LR, inner_steps=2, tasks_per_chunk=None, **settings)
        type(maml).current_epoch = property(lambda self, epoch=epoch: epoch)
        try:
            maml.training_step(images(), 0).backward()
        finally:
            del type(maml).current_epoch
        gradients.append(torch.cat([value.grad.flatten() for value in maml.parameters()]))
    first, exact, before, after = gradients
    assert torch.equal(before, first)
    assert torch.equal(after, exact)
    assert not torch.allclose(first, exact, rtol=1e-2)


def test_evaluation_beyond_the_trained_steps_takes_the_last_rate_and_normalization():
    maml = MAML(
        net=perturbed(convolutional()),
        inner_steps=2,
        eval_inner_steps=4,
        learn_inner_lr="step",
        per_step_normalization=True,
    ).double()
    episode = images()
    outputs = maml.predict_step(episode, 0)
    assert outputs.shape == (4, 6, 3)
    alone = maml.adapt(episode.support_inputs[1], episode.support_targets[1])(episode.query_inputs[1]).softmax(-1)
    assert torch.allclose(outputs[1], alone, atol=1e-12)


def quadratic():
    """``L = (x (theta - target))^2`` in one weight: everything is a line of algebra."""
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(0.5)
    x = torch.tensor([[[1.0]]], dtype=torch.float64)
    return net, (x, 2 * x, 2 * x, x)


def test_reptile_moves_to_the_adapted_weights():
    net, episode = quadratic()
    episode = type(images())(*episode)
    maml = MAML(net=net, algorithm="reptile", inner_lr=0.05, inner_steps=2, loss=F.mse_loss)
    maml.training_step(episode, 0).backward()
    # support (1, 2) and query (2, 1) together: L = ((w - 2)^2 + (2 w - 1)^2) / 2, L' = 5 w - 4
    theta = 0.5
    for _ in range(2):
        theta -= 0.05 * (5 * theta - 4)
    assert net.weight.grad.item() == pytest.approx(0.5 - theta, rel=1e-12)


@pytest.mark.parametrize("make", [convolutional, own, recurrent, transformer, residual])
def test_reptile_direction_is_the_mean_over_tasks(make):
    net, episode = perturbed(make()), images()
    maml = MAML(net=net, algorithm="reptile", inner_lr=LR, inner_steps=2, tasks_per_chunk=3)
    maml.training_step(episode, 0).backward()
    moves = []
    for x, y, query_x, query_y in zip(*episode, strict=True):
        adapted = maml.adapt(torch.cat([x, query_x]), torch.cat([y, query_y]))
        moves.append(
            torch.cat([(a - b).flatten() for a, b in zip(net.parameters(), adapted.parameters(), strict=True)])
        )
    found = torch.cat([value.grad.flatten() for value in net.parameters()])
    assert torch.allclose(found, torch.stack(moves).mean(0).detach(), rtol=1e-9, atol=1e-12)


def test_implicit_gradient_is_the_exact_linear_solve():
    # Ridge regression: H = 2 X^T X / n is constant, so theta* = (H + mu)^-1 (2 X^T y / n + mu theta_0) and the
    # gradient (I + H / mu)^-1 dL_q/dtheta are solves of 4 x 4 systems.
    torch.manual_seed(0)
    net, mu = nn.Linear(4, 1, bias=False).double(), 0.7
    x, y, query_x, query_y = (torch.randn(2, 6, size, dtype=torch.float64) for size in (4, 1, 4, 1))
    maml = MAML(
        net=net,
        algorithm="imaml",
        inner_lr=0.3,
        inner_steps=200,
        proximal=mu,
        implicit_iterations=4,
        loss=F.mse_loss,
    )
    maml.training_step(type(images())(x, y, query_x, query_y), 0).backward()
    expected = torch.zeros(4, dtype=torch.float64)
    start, eye = net.weight.detach()[0], torch.eye(4, dtype=torch.float64)
    for task in range(2):
        hessian = 2 * x[task].T @ x[task] / 6
        best = torch.linalg.solve(hessian + mu * eye, 2 * x[task].T @ y[task][:, 0] / 6 + mu * start)
        gradient = 2 * query_x[task].T @ (query_x[task] @ best - query_y[task][:, 0]) / 6
        expected += torch.linalg.solve(eye + hessian / mu, gradient) / 2
    assert torch.allclose(net.weight.grad[0], expected, rtol=1e-8)


class Mixed(nn.Module):
    """Has parameters of two types."""

    def __init__(self, dtype):
        super().__init__()
        self.body, self.head = nn.Linear(100, 4).to(dtype), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.head(self.body(x.flatten(1).to(self.body.weight)).tanh().double())


def test_implicit_gradient_of_parameters_of_several_types():
    gradients = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        net = Mixed(dtype)
        MAML(net=net, algorithm="imaml", inner_lr=0.1, inner_steps=3).training_step(images(), 0).backward()
        assert net.body.weight.grad.dtype == dtype
        gradients.append({name: value.grad.double() for name, value in net.named_parameters()})
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("make", [own, recurrent, transformer])
@sdpa_kernel(SDPBackend.MATH)  # the others have no second derivative
def test_implicit_gradient_of_an_own_network_is_the_solve_with_its_hessian(make):
    net, episode, mu = perturbed(make()), images(tasks=2), 50.0
    maml = MAML(net=net, algorithm="imaml", inner_lr=0.1, inner_steps=3, proximal=mu, implicit_iterations=150)
    maml.training_step(episode, 0).backward()
    names, shapes = zip(*((name, value.shape) for name, value in net.named_parameters()), strict=True)
    expected = 0
    for x, y, query_x, query_y in zip(*episode, strict=True):

        def loss(flat, x, y):
            parts = flat.split([shape.numel() for shape in shapes])
            params = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
            return F.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

        solution = torch.cat([value.detach().flatten() for value in maml.adapt(x, y).parameters()])
        hessian = torch.autograd.functional.hessian(lambda flat, x=x, y=y: loss(flat, x, y), solution)
        gradient = torch.autograd.functional.jacobian(lambda flat, x=query_x, y=query_y: loss(flat, x, y), solution)
        expected = expected + torch.linalg.solve(torch.eye(len(solution)).double() + hessian / mu, gradient) / 2
    found = torch.cat([value.grad.flatten() for value in net.parameters()])
    assert (found - expected).norm() / expected.norm() < 1e-8


def smooth():
    net = MLP(100, 3, (5,))
    net.body[2] = nn.Tanh()  # smooth, so that the steps converge
    return net


@pytest.mark.parametrize(("make", "which"), [(smooth, "all"), (smooth, "head"), (Waves, "all"), (Waves, "head")])
def test_implicit_gradient_is_the_limit_of_many_proximal_steps(make, which):
    net = perturbed(make())
    untouched, episode, steps, mu = copy.deepcopy(net), images(tasks=2), 200, 20.0
    settings = {"algorithm": "imaml", "proximal": mu, "implicit_iterations": 60, "adapted_parameters": which}
    maml = MAML(net=net, inner_lr=0.02, inner_steps=steps, **settings)
    maml.training_step(episode, 0).backward()
    meaning = {"weights": [0.0] * steps + [1.0], "adapted": maml.adaptation.names, "inner_lr": 0.02, "proximal": mu}
    _, expected = family(maml, untouched, episode, F.cross_entropy, steps, **meaning)
    assert relative_error({name: value.grad for name, value in maml.named_parameters()}, expected) < 1e-8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "imaml", "learn_inner_lr": "step"}, "learn_inner_lr step .*imaml does not differentiate"),
        ({"algorithm": "imaml", "first_order": True}, "first_order True .*imaml"),
        ({"algorithm": "reptile", "multi_step_epochs": 3}, "multi_step_epochs 3 .*reptile"),
        ({"algorithm": "reptile", "adapted_parameters": "head"}, "adapted_parameters head .*not be learned"),
        ({"algorithm": "reptile", "inner_steps": 0}, "inner_steps must be at least 1 .*0"),
        ({"first_order": True, "first_order_epochs": 2}, "first_order_epochs 2 .*true in every epoch"),
        ({"inner_steps": 0, "learn_inner_lr": "weight"}, "learn_inner_lr weight .*no inner loop"),
        ({"adapted_parameters": "heads"}, "adapted_parameters .*heads.* matches no .*body.0.weight"),
        ({"adapted_parameters": ["head.*", "tail"]}, "adapted_parameters .*tail"),
        ({"inner_clip_norm": 0.0}, "inner_clip_norm must be above 0"),
        ({"inner_weight_decay": -1.0}, "inner_weight_decay must be at least 0"),
        ({"proximal": 0.0}, "proximal must be above 0"),
        ({"implicit_iterations": 0}, "implicit_iterations must be at least 1"),
    ],
)
def test_incompatible_settings_raise(settings, message):
    with pytest.raises(SettingError, match=message):
        MAML(net=convolutional(), **settings)


def test_per_step_normalization_needs_normalization_layers():
    with pytest.raises(SettingError, match=r"per_step_normalization is true, but model.net has no normalization"):
        MAML(net=MLP(4, 2), per_step_normalization=True)
