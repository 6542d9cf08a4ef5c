import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from maml_lightning.engine.graphs import simplify
from maml_lightning.engine.kernels.mode import task_operators
from maml_lightning.engine.tracing import trace

aten = torch.ops.aten


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def replay(function, *inputs):
    graph, constants = trace(function, list(inputs), False)
    return fx.GraphModule(constants, graph)


def traced(function, *inputs):
    graph = replay(lambda *leaves: [function(*leaves)], *inputs)
    assert torch.allclose(graph(*inputs)[0], function(*inputs))
    return targets(graph)


def test_equal_expressions_are_computed_once():
    x = torch.rand(3, 3)
    assert traced(lambda x: x.sin() * x.sin(), x) == [aten.sin.default, aten.mul.Tensor]


def test_random_draws_are_left_alone():
    x = torch.rand(100)
    draws = targets(replay(lambda x: [torch.rand_like(x), torch.rand_like(x)], x))
    assert draws == [aten.rand_like.default] * 2


def test_work_in_place_becomes_work_on_copies():
    assert aten.add_.Tensor not in traced(lambda x: x.sin().add_(1) + x.sin(), torch.rand(100))


def test_sums_of_products_are_gathered():
    a, b, c, d = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    assert traced(lambda a, b, c, d: (a @ b).mT + (c @ d).mT, a, b, c, d)[-1] != aten.add.Tensor
    views = traced(lambda a, b, c, d: a.bmm(b).view(2, 9) + c.bmm(d).view(2, 9), a, b, c, d)
    assert views == [aten.bmm.default, aten.baddbmm.default, aten.reshape.default]
    shared = traced(lambda a, b, c: a.bmm(b) + a.bmm(b) + c, a, b, c)
    assert shared == [aten.bmm.default, aten.add.Tensor, aten.add.Tensor]


def test_zeros_are_not_added():
    x = torch.rand(3)
    assert traced(lambda x: torch.zeros_like(x) + x.sin(), x) == [aten.sin.default]
    assert aten.add.Tensor in traced(lambda x: torch.zeros_like(x) + x.sum(), x)


def test_copies_for_the_networks_own_code_are_dropped():
    x = torch.rand(2, 3, 4, 5).permute(0, 2, 3, 1)
    assert traced(lambda x: x.contiguous().view(2, -1).sin(), x) == [aten.reshape.default, aten.sin.default]
    strided = traced(lambda x: x.contiguous().as_strided((2, 2), (60, 2)).sin(), x)
    assert strided == [aten.clone.default, aten.as_strided.default, aten.sin.default]


def test_zeros_without_memory_are_recorded():
    w, x = torch.rand(2, 4), torch.rand(2, 3, 4)

    def second_derivative(w, x):
        step = torch.func.grad(lambda w: nn.L1Loss()(x @ w, torch.ones(3)))
        outputs, pullback = torch.func.vjp(step, w)
        return pullback(outputs)[0]

    graph = replay(lambda w, x: [torch.func.vmap(second_derivative)(w, x)], w, x)
    assert torch.equal(graph(w, x)[0], torch.zeros(2, 4))


def test_what_depends_on_values_is_not_recorded():
    for function in (lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x * float(x.max() > 1)):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            trace(lambda x, function=function: [function(x)], [torch.rand(3)], False)


def test_numbers_that_are_known_without_values_are_recorded():
    assert traced(lambda x: x * torch.tensor(2.0).item(), torch.rand(3))[-1] == aten.mul.Tensor


def test_tensors_that_are_no_arguments_are_constants():
    scale = torch.rand(3)
    graph = replay(lambda x: [x * scale], torch.rand(3))
    assert torch.equal(graph(torch.ones(3))[0], scale)


def test_a_network_that_writes_to_its_layers_results_keeps_no_copies():
    w, x, ones = torch.rand(2, 5), torch.rand(2, 6, 5, 1, 1), torch.ones(5)  # one pixel: contiguous in any layout

    def step(w, x):
        y = F.batch_norm(x * w.view(5, 1, 1), None, None, ones, ones, training=True)
        return F.relu(y, inplace=True).square().sum()

    def second_derivative(w, x):
        outputs, pullback = torch.func.vjp(torch.func.grad(lambda w: step(w, x)), w)
        return pullback(outputs)[0]

    with task_operators():
        names = traced(torch.func.vmap(second_derivative), w, x)
    assert not {aten.clone.default, aten.as_strided.default} & set(names)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_group_norm_off_the_cpu_takes_images_in_torchs_own_layout(device):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4, 3, 3, device=device)
    turned = graph.call_function(torch.ops.aten.permute.default, (x, [0, 1, 3, 2]))
    turned.meta["val"] = x.meta["val"].permute(0, 1, 3, 2)
    norm = graph.call_function(torch.ops.aten.native_group_norm.default, (turned, None, None, 2, 4, 9, 2, 1e-5))
    graph.output(norm)
    simplify(graph)
    (image,) = norm.all_input_nodes
    assert image.target is {"cpu": torch.ops.aten.permute, "meta": torch.ops.aten.contiguous}[device].default
