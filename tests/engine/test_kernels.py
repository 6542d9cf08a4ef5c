from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from maml_lightning.engine.kernels import (
    convolution,
    convolution_layers,
    layout,
    lstm,
    mode,
    normalization,
    patches,
    recurrent_unit,
)


def second_derivative(function, x, *parameters):
    """Per task, of a scalar of the gradient, with respect to everything."""

    def scalar(x, *parameters):
        gradients = grad(lambda x, *p: function(x, *p).sin().sum(), tuple(range(1 + len(parameters))))(x, *parameters)
        return sum((g * torch.linspace(1, 2, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in gradients)

    return vmap(grad(scalar, tuple(range(1 + len(parameters)))))(x, *parameters)


def assert_same_twice_differentiated(ours, theirs, tasks):
    """Of two tasks: outputs of each alone, and second derivatives of ``ours`` vectorized over both."""
    one = [task[1] for task in tasks]
    assert torch.allclose(ours(*one), theirs(*one), rtol=1e-12)
    derivatives = second_derivative(ours, *tasks)
    for task in range(2):
        one = [t[task].clone().requires_grad_() for t in tasks]
        first = torch.autograd.grad(theirs(*one).sin().sum(), one, create_graph=True)
        weights = [torch.linspace(1, 2, g.numel(), dtype=g.dtype).view_as(g) for g in first]
        for a, e in zip(derivatives, torch.autograd.grad(first, one, weights), strict=True):
            assert torch.allclose(a[task], e, rtol=1e-9, atol=1e-12)


CONVOLUTIONS = [
    ("conv2d", (3, 4, 7, 8), (5, 4, 3, 3), {}),
    ("conv2d", (3, 4, 7, 8), (5, 4, 3, 3), {"stride": 2, "padding": 1}),
    ("conv2d", (3, 4, 7, 8), (5, 4, 2, 3), {"stride": (2, 1), "padding": (0, 2)}),
    ("conv2d", (3, 4, 7, 8), (5, 4, 1, 1), {}),
    ("conv2d", (3, 4, 7, 8), (5, 4, 1, 1), {"stride": 2}),
    ("conv2d", (3, 4, 7, 8), (5, 4, 3, 1), {"padding": "same"}),
    ("conv2d", (3, 4, 7, 8), (5, 4, 2, 4), {"padding": "same", "dilation": (1, 3)}),
    ("conv2d", (3, 4, 7, 8), (5, 4, 3, 3), {"dilation": 2, "padding": "valid"}),
    ("conv2d", (3, 4, 7, 8), (6, 2, 3, 3), {"groups": 2, "stride": 2, "padding": 1}),
    ("conv2d", (3, 4, 7, 8), (4, 1, 3, 3), {"groups": 4, "padding": 2, "dilation": (1, 2)}),
    ("conv2d", (3, 4, 7, 8), (8, 1, 3, 2), {"groups": 4}),
    ("conv2d", (4, 7, 8), (5, 4, 3, 3), {"padding": 1}),
    ("conv1d", (3, 4, 8), (5, 4, 3), {"stride": 2, "padding": 1}),
    ("conv1d", (3, 4, 8), (5, 4, 2), {"padding": "same"}),
    ("conv1d", (3, 4, 8), (4, 1, 3), {"groups": 4, "dilation": (2,)}),
    ("conv1d", (4, 8), (5, 4, 3), {}),
    ("conv_transpose2d", (3, 4, 5, 6), (4, 5, 3, 2), {"stride": 2, "padding": (1, 0), "output_padding": (1, 0)}),
    ("conv_transpose2d", (3, 4, 5, 6), (4, 3, 3, 3), {"groups": 2, "dilation": 2}),
    ("conv_transpose1d", (3, 4, 5), (4, 5, 3), {"stride": 2, "output_padding": 1}),
    ("conv_transpose1d", (4, 5), (4, 5, 3), {}),
]


@pytest.fixture(params=[2**20, 0, "GPU"], ids=["within a cache", "beyond a cache", "grouped as on a GPU"])
def cache(request, monkeypatch):
    if request.param == "GPU":
        monkeypatch.setattr(convolution, "MEASURED", {"cpu"})
        monkeypatch.setattr(convolution, "fastest", lambda what, ways, a, b: list(ways)[-1])
    else:
        monkeypatch.setattr(layout, "CACHE_BYTES", request.param)


def with_settings(function, settings):
    return lambda *args: function(*args, **settings)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own
@pytest.mark.parametrize(("name", "images", "kernel", "settings"), CONVOLUTIONS)
def test_convolution_and_its_second_derivative(name, images, kernel, settings, cache):
    torch.manual_seed(0)
    channels = kernel[1 if "transpose" in name else 0] * (settings.get("groups", 1) if "transpose" in name else 1)
    x, w, b = (torch.randn(2, *shape, dtype=torch.float64) for shape in (images, kernel, (channels,)))
    for bias in ((), (b,)):
        ours, theirs = (with_settings(getattr(module, name), settings) for module in (convolution_layers, F))
        assert torch.allclose(ours(x[0], w[0], *(t[0] for t in bias)), theirs(x[0], w[0], *(t[0] for t in bias)))
        for task, results in enumerate(zip(*second_derivative(ours, x, w, *bias), strict=True)):
            one = [t[task : task + 1] for t in (x, w, *bias)]
            for a, e in zip(results, second_derivative(theirs, *one), strict=True):
                assert torch.allclose(a, e[0], rtol=1e-10, atol=1e-10)


def test_batch_norm_and_its_second_derivative(cache):
    torch.manual_seed(0)
    shapes = ((3, 4, 5, 6), (4,), (4,))
    tasks = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]

    def ours(x, weight, bias):
        return normalization.batch_norm(x, None, None, weight, bias, True)

    def plain(x, weight, bias):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]

    one = [tensor[0] for tensor in tasks]
    assert torch.allclose(ours(*one), F.batch_norm(one[0], None, None, *one[1:], True))
    for a, e in zip(second_derivative(ours, *tasks), second_derivative(plain, *tasks), strict=True):
        assert torch.allclose(a, e, rtol=1e-10, atol=1e-10)


def test_batch_norm_of_constant_input_is_its_bias():
    x, weight, bias = torch.ones(2, 3, 4, 4), torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    y = normalization.batch_norm(x, None, None, weight, bias, True)
    assert torch.equal(y, bias[:, None, None].expand_as(x))


def test_replacement_is_active_inside_only(monkeypatch):
    seen = []
    monkeypatch.setitem(mode.REPLACEMENTS, F.batch_norm, lambda *a, **k: seen.append(1) or a[0])
    layer, x = torch.nn.BatchNorm2d(3, track_running_stats=False), torch.rand(2, 3, 4, 4)
    layer(x)
    assert not seen
    with mode.TaskKernels():
        layer(x)
    assert seen == [1]


def test_shared_weight_and_shared_input(cache):
    torch.manual_seed(0)
    x, w = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64), torch.randn(3, 5, 4, 3, 3, dtype=torch.float64)
    for in_dims, args in (((0, None), (x, w[0])), ((None, 0), (x[0], w)), ((1, 2), (x.movedim(0, 1), w.movedim(0, 2)))):
        results = []
        for function in (convolution_layers.conv2d, F.conv2d):
            gradient = grad(lambda x, w, f=function: f(x, w, stride=2, padding=1).sin().sum(), (0, 1))
            results.append(vmap(gradient, in_dims)(*args))
        for a, e in zip(*results, strict=True):
            assert torch.allclose(a, e, rtol=1e-10, atol=1e-10)


def test_patches_of_one_channel_whatever_its_stride():
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    seen = patches.im2col(x.permute(0, 2, 3, 1), [3, 3], [2, 2], [0, 0])
    assert torch.equal(seen.flatten(1, 2).mT, F.unfold(x, 3, stride=2))


@pytest.mark.parametrize("op", mode.COMPILED)
def test_what_a_compiler_gets_is_what_is_called_otherwise(op):
    torch.manual_seed(0)
    window = ([3, 2], [2, 1], [1, 0])
    images, scale = torch.randn(4, 2, 6, 5, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    pooling = ([3, 2], [2, 1], [1, 0], [1, 1], True)
    several, channels = images[0], torch.rand(2, 6, 5, dtype=torch.float64)
    pooled, indices = torch.ops.aten.max_pool2d_with_indices(images[0], *pooling)
    arguments = {
        "max_pool2d_with_indices": (images[0], *pooling),
        "max_pool2d_with_indices_backward": (pooled, images[0], *pooling, indices),
        "im2col": (images[0], *window),
        "col2im": (torch.randn(2, 3, 4, 18, dtype=torch.float64), [6, 5], *window),
        "standardize": (images, 1e-5),
        "project": (images, images.flip(0), scale),
        "second_derivative": (images, scale, scale, images.flip(0), scale, images.sin(), scale, scale, scale),
        "group_standardize": (several, channels, channels, 5, 1e-5),
        "group_project": (several, several.flip(0), *[channels] * 3, 5),
        "group_second_derivative": (several, several.sin(), *[channels] * 2, several.flip(0), *[channels] * 5, 5),
    }[op._schema.name.split("::")[1]]
    for called, fused in zip(*map(pytree.tree_leaves, (op(*arguments), mode.COMPILED[op](*arguments))), strict=True):
        assert called.shape == fused.shape
        assert torch.allclose(called, fused, rtol=1e-12, atol=1e-12)


def test_images_in_any_layout_are_normalized_where_they_leave_the_cache():
    torch.manual_seed(0)
    images = torch.randn(2, 4, 70, 16, 160)
    for x in (images, images.permute(0, 1, 3, 4, 2), images[..., ::2], images[:, 1:, 1:]):
        assert layout.leaves_cache(x, x[0].numel())
        scale = torch.rand(2, x.shape[-1])
        for name, arguments in (("standardize", (x, 1e-5)), ("project", (x, x.flip(0), scale))):
            results = getattr(torch.ops.maml_lightning, name)(*arguments), getattr(normalization, name)(*arguments)
            for found, expected in zip(*results, strict=True):
                assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3 if expected.dim() == 2 else 1e-5)


def test_sum_over_tasks_is_the_sum():
    value = torch.randn(3, 3, 3, 4, 5, dtype=torch.float64).permute(0, 4, 3, 1, 2)
    assert torch.allclose(layout.sum_over_tasks(value), value.sum(0))
    assert torch.equal(layout.sum_over_tasks(torch.arange(3.0)), torch.tensor(3.0))


def test_kernel_layout_keeps_values():
    weight = torch.randn(5, 4, 3, 3)
    assert torch.equal(layout.kernel_layout(weight), weight)
    assert layout.kernel_layout(weight).permute(2, 3, 1, 0).is_contiguous()


def test_gradgradcheck():
    torch.manual_seed(0)
    x, w, b, g = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5, 4), (2, 3, 3, 2), 2, 3))

    def convolve(x, w, b):
        return convolution_layers.conv2d(x, w, b, stride=(2, 1), padding=(1, 0))

    def normalize(x, weight, bias):
        return normalization.batch_norm(x, None, None, weight, bias, True)

    for function, inputs in ((convolve, (x, w, b)), (normalize, (x, g, (g + 1).detach().requires_grad_()))):
        assert torch.autograd.gradcheck(function, inputs, check_undefined_grad=False)
        assert torch.autograd.gradgradcheck(function, inputs, check_undefined_grad=False)


def test_batch_norm_without_variance_has_finite_derivatives():
    tasks = [torch.ones(2, 2, 3, 4, 4), torch.ones(2, 3), torch.zeros(2, 3)]
    derivatives = second_derivative(lambda x, w, b: normalization.batch_norm(x, None, None, w, b, True), *tasks)
    assert all(torch.isfinite(value).all() for value in derivatives)


def test_what_is_left_to_torch_is_torchs():
    x = torch.rand(2, 4, 6, 6)
    mean, var, weight, bias = torch.rand(4), torch.rand(4) + 1, torch.rand(4), torch.rand(4)
    for call in ((mean, var, weight, bias, False), (None, None, None, None, True)):
        assert torch.equal(normalization.batch_norm(x, *call), F.batch_norm(x, *call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 parameters", "parameters alike"])
def test_batch_norm_returns_what_torch_does(dtype, parameters):
    x, weight, bias = torch.randn(4, 3, 5, 5).to(dtype), torch.rand(3) + 0.5, torch.rand(3)
    weight, bias = (
        value.to(dtype if parameters is None or dtype == torch.float64 else parameters) for value in (weight, bias)
    )
    ours, theirs = (f(x, None, None, weight, bias, True) for f in (normalization.batch_norm, F.batch_norm))
    assert ours.dtype == theirs.dtype == dtype
    assert torch.allclose(
        ours.double(), theirs.double(), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


def test_lstm_layer_is_torchs_twice_differentiated():
    torch.manual_seed(0)
    tasks = [torch.randn(2, *s, dtype=torch.float64) for s in ((4, 3, 20), (3, 5), (3, 5), (20, 5))]
    layer = torch.nn.LSTM(20, 5, bias=False)

    def theirs(x, h, c, weight):
        outputs, (_, last) = torch.func.functional_call(
            layer, {"weight_ih_l0": torch.eye(20, dtype=x.dtype), "weight_hh_l0": weight}, (x, (h[None], c[None]))
        )
        return torch.cat([outputs.flatten(), last.flatten()])

    def ours(*args):
        outputs, _, last = lstm.lstm_layer(*args)
        return torch.cat([outputs.flatten(), last.flatten()])

    assert_same_twice_differentiated(ours, theirs, tasks)


def test_gradgradcheck_of_an_lstm_layer():
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 8), (2, 2), (2, 2), (8, 2))]
    assert torch.autograd.gradcheck(lstm.lstm_layer, inputs)
    assert torch.autograd.gradgradcheck(lstm.lstm_layer, inputs)


UNITS = {"gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN, "rnn_relu": lambda *a: torch.nn.RNN(*a, nonlinearity="relu")}


@pytest.mark.parametrize("kind", UNITS)
def test_recurrent_layer_is_torchs_twice_differentiated(kind):
    torch.manual_seed(0)
    size = 15 if kind == "gru" else 5
    tasks = [torch.randn(2, *s, dtype=torch.float64) for s in ((4, 3, size), (3, 5), (size, 5), (size,))]
    layer = UNITS[kind](size, 5)

    def theirs(x, h, weight, bias):
        own = {"weight_ih_l0": torch.eye(size, dtype=x.dtype), "bias_ih_l0": x.new_zeros(size)}
        own |= {"weight_hh_l0": weight, "bias_hh_l0": bias}
        return torch.func.functional_call(layer, own, (x, h[None]))[0].flatten()

    def ours(*args):
        return recurrent_unit.recurrent_layer(kind, *args).flatten()

    assert_same_twice_differentiated(ours, theirs, tasks)


@pytest.mark.parametrize("kind", UNITS)
def test_gradgradcheck_of_a_recurrent_layer(kind):
    torch.manual_seed(0)
    size = 6 if kind == "gru" else 2
    inputs = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, size), (2, 2), (size, 2), (size,))
    ]
    layer = partial(recurrent_unit.recurrent_layer, kind)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
