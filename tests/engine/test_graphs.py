import torch
from torch.fx.experimental.proxy_tensor import make_fx

from maml_lightning.engine.tracing import trace

aten = torch.ops.aten


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def traced(function, *inputs):
    graph = trace(lambda *leaves: [function(*leaves)], list(inputs), False)
    assert torch.allclose(graph(*inputs)[0], function(*inputs))
    return targets(graph)


def test_equal_expressions_are_computed_once():
    x = torch.rand(3, 3)
    assert traced(lambda x: x.sin() * x.sin(), x) == [aten.sin.default, aten.mul.Tensor]


def test_random_draws_are_left_alone():
    x = torch.rand(100)
    draws = targets(trace(lambda x: [torch.rand_like(x), torch.rand_like(x)], [x], False))
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


def test_make_fx_is_what_is_assumed():
    graph = make_fx(lambda x: x.relu(), tracing_mode="fake")(torch.rand(3))
    assert "val" in next(node for node in graph.graph.nodes if node.op == "call_function").meta


def test_copies_for_the_networks_own_code_are_dropped():
    x = torch.rand(2, 3, 4, 5).permute(0, 2, 3, 1)
    assert traced(lambda x: x.contiguous().view(2, -1).sin(), x) == [aten.reshape.default, aten.sin.default]
    strided = traced(lambda x: x.contiguous().as_strided((2, 2), (60, 2)).sin(), x)
    assert strided == [aten.clone.default, aten.as_strided.default, aten.sin.default]
