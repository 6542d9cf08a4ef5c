"""A network is called with other tensors, wherever it keeps its own now."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML
from maml_lightning.algorithms import calling
from maml_lightning.algorithms.calling import call_with
from tests.engine.test_trials import episode, gradient
from tests.reference import reference, relative_error


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.b(torch.tanh(self.a(x))) * (1 + 0.01 * self.calls)


CHANGES = {
    "another layer": lambda net: setattr(net, "a", nn.Linear(4, 4)),
    "another parameter": lambda net: setattr(net.a, "weight", nn.Parameter(torch.ones(4, 4))),
    "a parameter less": lambda net: setattr(net.a, "bias", None),
    "a layer in between": lambda net: setattr(net, "b", nn.Sequential(net.b)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_were_replaced_get_the_tensors(change):
    net, x = Counting(), torch.rand(2, 4)
    with calling.calling(net):
        call_with(net, dict(net.named_parameters()), x)
        CHANGES[change](net)
        tensors = {name: torch.rand_like(value) for name, value in net.named_parameters()}
        own = dict(net.named_parameters())
        outputs = call_with(net, tensors, x)
    assert all(value is own[name] for name, value in net.named_parameters())
    net.calls -= 1
    assert torch.equal(outputs, torch.func.functional_call(net, tensors, (x,)))


def test_a_network_is_searched_for_its_tensors_once_in_a_meta_step(monkeypatch):
    found, places = [], calling._Places
    net = Counting().double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    gradient(maml)
    monkeypatch.setattr(calling, "_Places", lambda net: found.append(net) or places(net))
    gradient(maml)
    assert found == [net]


def test_tensors_are_put_back_after_an_error():
    net = nn.Linear(2, 3)
    own = dict(net.named_parameters())
    with pytest.raises(RuntimeError):
        call_with(net, {"weight": torch.ones(3, 5)}, torch.ones(1, 2))
    assert all(value is own[name] for name, value in net.named_parameters())


gate = torch.compile(lambda x: x * torch.sigmoid(x), backend="aot_eager")  # which has no second derivative


class CallsCompiled(nn.Module):
    """Calls a compiled function, or a compiled method of its own."""

    def __init__(self, method):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.hidden = torch.compile(self.own, backend="aot_eager") if method else lambda x: gate(self.a(x))

    def own(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        return self.b(self.hidden(x))


@pytest.mark.parametrize("execution", ["auto", "loop"])
@pytest.mark.parametrize("method", [False, True])
def test_a_compiled_function_in_a_network_is_exact_and_stays_usable(method, execution):
    torch.manual_seed(0)
    net = CallsCompiled(method).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2, execution=execution)
    for _ in range(2):
        with torch.compiler.set_stance("force_eager"):
            _, expected = reference(net, episode(), 0.1, 2, F.cross_entropy)
        assert relative_error(gradient(maml), expected) < 1e-9
        with torch.no_grad():
            assert net(episode().query_inputs[0]).isfinite().all()


@pytest.mark.parametrize(("name", "compiles"), [("eager", False), ("aot_eager", True), ("inductor", True)])
def test_the_backend_of_torch_cond_is_no_compiler(name, compiles, monkeypatch):
    """Else networks would run with a stance that breaks the gradient of `torch.cond`."""
    backends = {1: None, 2: torch._TorchCompileWrapper(name, None, None, False)}
    monkeypatch.setattr(torch._dynamo.eval_frame, "cached_backends", backends)
    assert calling._compiles() == compiles
