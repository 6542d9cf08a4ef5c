"""What a recording notes of operators is what they do; it leaves no mode active, also where it cannot be recorded."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from maml_lightning import MAML
from maml_lightning.engine.recording import record
from maml_lightning.engine.tracing import quiet, trace
from tests.engine.test_trials import episode, gradient
from tests.reference import reference, relative_error


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        parts = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
        return self.body(torch.cat(list(parts.unbind())))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_in_a_loop_and_not_into_the_recursion_limit(caplog):
    net = Nested()
    ours = gradient(MAML(net, inner_lr=0.1, inner_steps=2))
    assert relative_error(ours, reference(net, episode(), 0.1, 2, F.cross_entropy)[1]) < 1e-9
    assert "of a NestedTensor cannot be recorded" in caplog.text
    assert not _get_current_dispatch_mode_stack()


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


X = torch.rand(2, 3, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x * x, x.mT * x.mT, x * x, x.mT * x.mT, x[:1] * x],
        lambda x: [x.sum(0), x.sum(0, keepdim=True), x.sum(1), x.sum((0, 1)), x.sum(0, dtype=torch.float64)],
        lambda x: [n * 2 for n in (x, x.int(), x)] + [n * 2.0 for n in (x, x.int(), x.double())],
        lambda x: [x.to(torch.float64), x.to(torch.float64), x.mT.to(torch.float64), x.to(torch.int64)],
        lambda x: [F.layer_norm(x, (4,)), F.layer_norm(x.mT, (3,)), F.layer_norm(x, (4,))],
        lambda x: [F.hardswish(x), F.leaky_relu(x.mT), F.gelu(x[:, :, ::2]), F.hardswish(x.expand(5, 2, 3, 4)[0])],
        lambda x: [*x.topk(2), *x.mT.topk(2), *x.topk(2)],
        lambda x: [torch.where(x > 0.5, x, 0.0), torch.where(x.mT > 0.5, x.mT, x.mT), x / 2, x.mT / 2],
    ],
)
def test_results_of_operators_seen_before_are_noted_as_they_are(function):
    graph, _ = record(function, [X], {}, {})
    (outputs,) = (node.args[0] for node in graph.nodes if node.op == "output")
    assert [described(node.meta["val"]) for node in outputs] == list(map(described, function(X)))
    assert len({id(node.meta["val"]) for node in outputs}) == len(outputs)


def test_gradients_that_are_not_asked_for_are_noted_as_none():
    def function(x):
        _, mean, r = torch.native_layer_norm(x, [4], None, None, 1e-5)
        for asked in masks:
            gradients = torch.ops.aten.native_layer_norm_backward(x, x, [4], mean, r, x[0, 0], x[0, 0], asked)
            found.append([gradient is not None for gradient in gradients])
        return [x]

    masks, found = [[True, False, False], [True, False, False], [True, True, True], [True, False, False]], []
    record(function, [X], {}, {})
    assert found == masks


def test_a_function_that_writes_in_place_runs_once_to_be_recorded():
    def function(x):
        runs.append(x)
        return [x.sin().relu_().add_(torch.tensor([1.0, 2.0, 3.0, 4.0])), x.cos()]

    runs = []
    graph, constants = trace(function, [X], False)
    replay = fx.GraphModule(constants, graph)
    assert len(runs) == 1
    assert not any(node.target is torch.ops.aten.relu_.default for node in graph.nodes)
    assert all(map(torch.equal, replay(X), function(X)))
    assert all(map(torch.equal, replay(-X), function(-X)))


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_not_searched_for_while_recording(collects):
    try:
        (gc.enable if collects else gc.disable)()
        with quiet():
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        gc.enable()
