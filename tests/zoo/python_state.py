"""Networks whose result depends on more than their tensors, and on who else has them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import CLASSES, VECTOR, Case

FACTOR = 1.0  # of `GlobalFactor`


class Perceptron(nn.Module):
    """Two linear layers, with a place for what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES)

    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(x))


class Temperature(Perceptron):
    temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


class Settings(Perceptron):
    """A plain object holds the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"nested": [1.0]}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.settings["nested"][0]


class GlobalFactor(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * FACTOR


class TensorAttribute(Perceptron):
    """A tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class BufferNumber(Perceptron):
    """Reads the number in a buffer."""

    def __init__(self, number: int | float) -> None:
        super().__init__()
        self.register_buffer("number", torch.tensor(number))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.number.item()


class Branch(Perceptron):
    """Which branch is taken depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.b(hidden if x.sum() > 0 else -2 * hidden)


class Item(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + x.abs().max().item())


class Numpy(Perceptron):
    """A scale that NumPy computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(abs(x.detach().numpy()).max())


class Counter(Perceptron):
    """A counter that the result does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        return super().forward(x)


class Store(Perceptron):
    """The last activations are kept as an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.hidden(x)
        return self.b(self.last)


class Running(Perceptron):
    """A running mean that the result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return super().forward(x - self.mean)


class Twice(nn.Module):
    """One module registered under two names."""

    def __init__(self, sequential: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Sequential(self.a, nn.Tanh()) if sequential else self.a
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Tied(nn.Module):
    """One tensor in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class TiedTransposed(nn.Module):
    """A weight and its transpose, in a module without a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 4), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.a(x)), self.a.weight.T))


class OwnParameters(Perceptron):
    """The forward pass asks for its parameters' device and sum of squares."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).device)
        return super().forward(x) * (1 + 0.01 * sum(value.square().sum() for value in self.parameters()))


class Gradient(Perceptron):
    """The input's gradient is a feature: autograd inside of the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.hidden(x).sum(), x, create_graph=True)
        return self.b(torch.tanh(slope))


class Square(torch.autograd.Function):
    """A function with a backward of its own, without rules for ``torch.func``."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class OwnFunction(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Square.apply(self.hidden(x)))


class Unused(Perceptron):
    """A layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 2)


class FirstHalf(Perceptron):
    """Its first parameter is of another dtype than the others, and unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(2))

    def double(self) -> nn.Module:
        super().double()
        self.first.data = self.first.data.bfloat16()
        return self


class Autocast(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class NoGradPart(Perceptron):
    """A part of the network that no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.a(x))
        return self.b(self.hidden(x) * gate)


def doubled(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 2 * output


def halved(layer: nn.Module, args: tuple) -> tuple:
    return (args[0] / 2,)


def hooked() -> nn.Module:
    net = Perceptron()
    net.a.register_forward_hook(doubled)
    net.b.register_forward_pre_hook(halved)
    return net


def backward_hooked() -> nn.Module:
    net = Perceptron()
    net.b.register_full_backward_hook(lambda layer, inputs, outputs: (2 * inputs[0],))
    return net


def scripted() -> nn.Module:
    net = Perceptron()
    net.act = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    return net


def compiled() -> nn.Module:
    return torch.compile(Perceptron(), backend="eager")


def frozen() -> nn.Module:
    net = Perceptron()
    net.a.weight.requires_grad_(False)
    return net


def class_attribute() -> nn.Module:
    return type("Own", (Temperature,), {})()


def global_factor() -> nn.Module:
    global FACTOR
    FACTOR = 1.0
    return GlobalFactor()


def set_factor(net: nn.Module) -> None:
    global FACTOR
    FACTOR = 3.0


def vector(name: str, make, change=None, **options) -> Case:
    return Case(name, make, VECTOR, change=change, **options)


CASES = [
    vector("attribute changed", Temperature, lambda net: setattr(net, "temperature", 5.0)),
    vector(
        "nested attribute changed",
        Settings,
        lambda net: net.settings["nested"].append(net.settings["nested"].pop() + 4),
    ),
    vector("class attribute changed", class_attribute, lambda net: setattr(type(net), "temperature", 5.0)),
    vector("module global changed", global_factor, set_factor),
    vector("tensor attribute", TensorAttribute),
    vector("tensor attribute replaced", TensorAttribute, lambda net: setattr(net, "scale", 5 * net.scale)),
    vector("number in a buffer changed", lambda: BufferNumber(1), lambda net: net.number.fill_(5)),
    vector("number in a float buffer changed", lambda: BufferNumber(1.0), lambda net: net.number.fill_(5)),
    vector("tensor attribute changed in place", TensorAttribute, lambda net: net.scale.mul_(5)),
    vector("layer replaced", Perceptron, lambda net: setattr(net, "act", nn.ReLU())),
    vector("forward replaced", Perceptron, lambda net: setattr(net, "forward", lambda x: net.b(net.a(x)))),
    vector("hook added", Perceptron, lambda net: net.a.register_forward_hook(doubled)),
    vector("parameter frozen between steps", Perceptron, lambda net: net.a.weight.requires_grad_(False)),
    vector("parameter unfrozen between steps", frozen, lambda net: net.a.weight.requires_grad_(True)),
    vector("parameter replaced", Perceptron, lambda net: setattr(net.a, "weight", nn.Parameter(net.a.weight * 2))),
    vector("dropout.p changed", lambda: with_dropout(0.0), lambda net: setattr(net.act[1], "p", 1.0)),
    vector("mode changed", lambda: with_norm(), lambda net: net.eval()),
    vector("hooks", hooked),
    vector("backward hook", backward_hooked),
    vector("branch on the data", Branch),
    vector(".item()", Item),
    vector("NumPy in forward", Numpy),
    vector("counter", Counter),
    vector("activations stored", Store),
    vector("running mean in use", Running, stateful=True),
    vector("module registered twice", Twice),
    vector("module registered twice, in a Sequential", lambda: Twice(sequential=True)),
    vector("tied weights", Tied),
    vector("tied weights, transposed", TiedTransposed),
    vector("iterates over its parameters", OwnParameters),
    vector("autograd in forward", Gradient, refusal="torch.func"),
    vector("autograd.Function", OwnFunction),
    vector("unused layer", Unused),
    vector("first parameter of another dtype", FirstHalf),
    vector("autocast off in forward", Autocast),
    vector("no_grad in forward", NoGradPart),
    vector("frozen parameter", frozen),
    vector("TorchScript submodule", scripted, refusal="(?i)script"),
    vector("compiled", compiled, plain=Perceptron),
]


def with_dropout(p: float) -> nn.Module:
    net = Perceptron()
    net.act = nn.Sequential(nn.Tanh(), nn.Dropout(p))
    return net


def with_norm() -> nn.Module:
    net = Perceptron()
    net.act = nn.Sequential(nn.LayerNorm(6), nn.Dropout(0.0))
    return net
