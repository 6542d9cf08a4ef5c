import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, ConvNet, Episode
from maml_lightning.engine.graphs import is_mutable
from maml_lightning.engine.kernels import group_normalization, mode, normalization
from maml_lightning.engine.recording import record
from tests.engine.test_kernels import assert_same_twice_differentiated
from tests.reference import reference
from tests.zoo.loop import meta_gradient, relative_error

OPERATORS = [torch.ops.maml_lightning.group_standardize, torch.ops.maml_lightning.group_project]
OPERATORS += [torch.ops.maml_lightning.group_second_derivative]


@pytest.fixture(params=[2**22, 700, 1], ids=["at once", "some examples at a time", "one at a time"])
def block(request, monkeypatch):
    monkeypatch.setattr(group_normalization, "BLOCK_BYTES", request.param)


def group(groups):
    """Ours and torch's own."""
    return (
        lambda x, *affine: group_normalization.group_norm(x, groups, *affine),
        lambda x, *affine: F.group_norm(x, groups, *affine),
    )


def by_hand(x, groups, weight, bias):
    wide = x.unflatten(1, (groups, -1))
    centered = wide - wide.flatten(2).mean(2)[(..., *[None] * (wide.dim() - 2))]
    variance = centered.square().flatten(2).mean(2)[(..., *[None] * (wide.dim() - 2))]
    shape = (-1, *[1] * (x.dim() - 2))
    return (centered / (variance + 1e-5).sqrt()).view(x.shape) * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("size", [(3, 4), (5,), (1, 1)])
def test_group_norm_and_its_second_derivative(groups, size, block):
    torch.manual_seed(0)
    tasks = [torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 6, *size), (6,), (6,))]
    assert_same_twice_differentiated(*group(groups), tasks)
    ours, hand = (lambda *args: group_normalization.group_norm(args[0], groups, *args[1:])), by_hand
    assert_same_twice_differentiated(ours, lambda x, w, b: hand(x, groups, w, b), tasks)


@pytest.mark.parametrize("size", [(3, 4), (5,)])
def test_instance_norm_and_its_second_derivative(size, block):
    torch.manual_seed(0)
    tasks = [torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 6, *size), (6,), (6,))]

    def ours(x, weight, bias):
        return normalization.instance_norm(x, None, None, weight, bias)

    assert_same_twice_differentiated(ours, lambda x, w, b: F.instance_norm(x, None, None, w, b), tasks)
    assert_same_twice_differentiated(normalization.instance_norm, F.instance_norm, tasks[:1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_of_memory_changes_no_value_and_is_kept(layout, block):
    torch.manual_seed(0)
    x, g = (torch.randn(7, 6, 3, 4, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    results = []
    for other in (torch.contiguous_format, layout):
        laid = x.clone(memory_format=other).requires_grad_()
        y = group_normalization.group_norm(laid, 3, weight, bias)
        (slope,) = torch.autograd.grad(y, laid, g, create_graph=True)
        results.append((y, slope, torch.autograd.grad(slope.sin().sum(), laid)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_give_what_a_compiler_gets_in_every_layout(groups, channels_last, block):
    torch.manual_seed(0)

    def images():
        x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
        return x.mT.contiguous().mT if channels_last else x

    def channels():
        return torch.rand(2, 5, 6, dtype=torch.float64)

    x, g, u = images(), images(), images()
    weight, bias, v, w = (channels() for _ in range(4))
    _, mean, r = mode.COMPILED[OPERATORS[0].default](x, weight, bias, groups, 1e-5)
    _, sum_gn, sum_g = mode.COMPILED[OPERATORS[1].default](x, g, weight, mean, r, groups)
    arguments = [
        (x, weight, bias, groups, 1e-5),
        (x, g, weight, mean, r, groups),
        (x, u, v, w, g, weight, mean, r, sum_gn, sum_g, groups),
    ]
    for operator, given in zip(OPERATORS, arguments, strict=True):
        leaves = [value for value in given if isinstance(value, torch.Tensor)]
        plain, numbers = mode.COMPILED[operator.default], given[len(leaves) :]
        graph, _ = record(lambda *own, plain=plain, numbers=numbers: [*plain(*own, *numbers)], leaves, {}, {})
        assert not any(is_mutable(node) for node in graph.nodes)  # a graph that writes in place is not cut
        for called, compiled in zip(operator(*given), plain(*given), strict=True):
            assert called.shape == compiled.shape
            assert torch.allclose(called, compiled, rtol=1e-11, atol=1e-13)


def test_gradgradcheck(block):
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 2, 3), 4, 4))
    for groups in (1, 2, 4):
        assert torch.autograd.gradcheck(group(groups)[0], (x, w, b), check_undefined_grad=False)
        assert torch.autograd.gradgradcheck(group(groups)[0], (x, w, b), check_undefined_grad=False)


def test_images_without_variance_have_finite_derivatives():
    x, weight, bias = torch.ones(2, 4, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True), torch.arange(4.0)
    y = group_normalization.group_norm(x, 2, weight, bias)
    assert torch.equal(y, bias[:, None, None].expand_as(x))
    first = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum(value.square().sum() for value in first), (x, weight))
    assert all(torch.isfinite(value).all() for value in (*first, *second))


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_far_from_zero_single_precision_loses_no_more_than_torchs_own(offset):
    torch.manual_seed(0)
    x, g, weight = torch.randn(6, 8, 7, 7) + offset, torch.randn(6, 8, 7, 7), torch.rand(8)

    def derivatives(function, dtype):
        inputs = [value.to(dtype).requires_grad_() for value in (x, weight)]
        y = function(inputs[0], inputs[1], torch.zeros(8, dtype=dtype))
        first = torch.autograd.grad(y, inputs, g.to(dtype), create_graph=True)
        return [y, *first, *torch.autograd.grad(sum((t * t.sin()).sum() for t in first), inputs)]

    ours, theirs = group(2)
    exact = derivatives(theirs, torch.float64)
    errors = [
        [((a - e).norm() / e.norm()).item() for a, e in zip(derivatives(f, torch.float32), exact, strict=True)]
        for f in (ours, theirs)
    ]
    assert all(a < 3 * b + 1e-6 for a, b in zip(*errors, strict=True))


def test_what_has_no_kernel_is_left_to_torch(monkeypatch):
    def fail(*args):
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(group_normalization, "normalize", fail)
    weight, bias = torch.rand(2, 4)
    half = torch.randn(3, 4, 5, 5, dtype=torch.bfloat16)
    for x, affine in (
        (half, (weight, bias)),
        (half, (weight.bfloat16(), bias.bfloat16())),
        (torch.randn(3, 4), (weight, bias)),
        (torch.randn(3, 4, 2, 2, 2), (weight, bias)),
        (torch.randn(0, 4, 2, 2), (weight, bias)),
    ):
        y = group_normalization.group_norm(x, 2, *affine)
        assert y.dtype == x.dtype
        expected = F.group_norm(x.float(), 2, weight, bias)
        assert torch.allclose(y.float(), expected, atol=0.05 if x.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("x", [torch.randn(3, 5, 4, 4), torch.randn(1, 2, 1, 1), torch.randn(4)])
def test_refusals_are_those_of_torch(x):
    errors = []
    for function in group(2):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
            function(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("normalization", ["group", "layer", "instance"])
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradient_is_that_of_the_plain_loop(normalization, first_order, monkeypatch, caplog):
    torch.manual_seed(0)
    monkeypatch.setattr(group_normalization, "BLOCK_BYTES", 20_000)
    net = ConvNet(1, 5, hidden_channels=16, blocks=2, normalization=normalization).double()
    images = [torch.rand(3, n, 1, 12, 12, dtype=torch.float64) for n in (5, 10)]
    episode = Episode(images[0], torch.arange(5).repeat(3, 1), images[1], torch.arange(5).repeat(3, 2))
    plain = copy.deepcopy(net)
    expected = meta_gradient(plain, episode, 0.1, 3, F.cross_entropy, first_order, outputs_before=False)
    maml = MAML(net, inner_lr=0.1, inner_steps=3, first_order=first_order)
    for _ in range(2):
        maml.zero_grad()
        maml.training_step(episode, 0).backward()
    found = {name: value.grad for name, value in net.named_parameters()}
    assert relative_error(found, expected.gradient) < 1e-10
    assert "slower" not in caplog.text


class Slope(nn.Module):
    """Classifies by normalized images and the gradient of their energy in the images, which has a third derivative."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()), nn.Linear(16 + 16, 3)

    def forward(self, x):
        slope = torch.func.grad(lambda x: self.body(x).square().sum())(x)
        return self.head(torch.cat([self.body(x).flatten(1), slope.flatten(1)], 1))


def test_a_third_derivative_is_taken_by_torchs_own_layer():
    torch.manual_seed(0)
    net, x = Slope().double(), torch.rand(2, 2, 6, 1, 4, 4, dtype=torch.float64)
    labels = torch.arange(3).repeat(2, 2)
    episode = Episode(x[0], labels, x[1], labels)
    _, expected = reference(copy.deepcopy(net), episode, 0.1, 1, F.cross_entropy)
    MAML(net, inner_lr=0.1, inner_steps=1).training_step(episode, 0).backward()
    assert relative_error({name: value.grad for name, value in net.named_parameters()}, expected) < 1e-10
