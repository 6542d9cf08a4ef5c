"""The choice of a convolution by measurement, as on a GPU, with another clock and on the CPU."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

from maml_lightning import MAML, ConvNet, Episode
from maml_lightning.engine.kernels import convolution, convolution_layers, measured
from maml_lightning.engine.kernels.measured import Way, fastest

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the name of a way; notes what is timed."""
    taken, timed = {}, []

    def seconds(run, operands, device):
        timed.append((run, [tuple(operand.shape) for operand in operands], device))
        return taken[run]

    monkeypatch.setattr(measured, "_chosen", {})
    monkeypatch.setattr(measured, "_seconds", seconds)
    monkeypatch.setattr(measured, "shared_bytes", lambda device: 1000)
    return taken, timed


def ways(clock, **each):
    """Ways by name, of seconds and bytes."""
    taken, _ = clock
    made = {name: Way(lambda a, b: a, workspace) for name, (_, workspace) in each.items()}
    taken.update({way.run: each[name][0] for name, way in made.items()})
    return made


def one(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        ({"patches": (1.0, 900), "loop": (3.0, 0), "grouped": (2.0, 10)}, "patches"),
        ({"patches": (3.0, 900), "loop": (2.0, 0), "grouped": (1.0, 10)}, "grouped"),
        ({"patches": (1.0, 900), "loop": (1.09, 0), "grouped": (1.05, 10)}, "loop"),  # alike: least memory
        ({"patches": (1.0, 1001), "loop": (3.0, 0), "grouped": (2.0, 10)}, "grouped"),  # it has no room
        ({"patches": (1.0, 1001), "loop": (3.0, 0)}, "loop"),
        ({"patches": (1.0, 1002), "grouped": (3.0, 1001)}, "grouped"),  # none has
        ({"patches": (float("inf"), 900), "loop": (3.0, 0)}, "loop"),  # it raises
    ],
)
def test_the_fastest_that_has_room_is_taken(clock, each, expected):
    assert fastest("convolution", ways(clock, **each), one(2, 3), one(2, 4)) == expected


def test_each_shape_type_and_setting_is_measured_once(clock):
    _, timed = clock
    made = ways(clock, patches=(1.0, 5), loop=(2.0, 0))
    for _ in range(2):
        fastest("convolution", made, one(2, 3), one(2, 4))
    assert timed == [(way.run, [(2, 3), (2, 4)], CPU) for way in made.values()]
    for what, a in (("convolution", one(2, 5)), ("input", one(2, 3)), ("convolution", one(2, 3).double())):
        timed.clear()
        fastest(what, made, a, one(2, 4))
        assert len(timed) == 2


def test_a_deterministic_run_times_nothing(clock):
    _, timed = clock
    made = ways(clock, patches=(9.0, 5), loop=(2.0, 0))
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest("convolution", made, one(2, 3), one(2, 4)) == "patches"
        assert fastest("convolution", ways(clock, patches=(1.0, 2000), loop=(2.0, 0)), one(3), one(4)) == "loop"
    finally:
        torch.use_deterministic_algorithms(False)
    assert timed == []
    assert fastest("convolution", made, one(2, 3), one(2, 4)) == "loop"


def test_what_raises_takes_for_ever():
    def full(a, b):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measured._seconds(full, [one(1), one(1)], CPU) == float("inf")
    assert 0 < measured._seconds(torch.add, [one(1), one(1)], CPU) < 10


def test_without_memory_for_operands_the_smallest_is_taken(clock, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "rand", full)
    assert fastest("map", ways(clock, patches=(1.0, 5), loop=(2.0, 0)), one(2), one(3)) == "loop"


def test_random_numbers_and_modes_are_those_of_the_run_alone(monkeypatch):
    monkeypatch.setattr(measured, "_chosen", {})
    seen = []

    def run(a, b):
        seen.append((type(a), a.sum().item(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return a + b

    before = torch.get_rng_state()
    with FakeTensorMode() as mode, torch.autocast("cpu", torch.bfloat16):
        x = mode.from_tensor(torch.ones(2, 3))
        vmap(lambda y: (fastest("map", {"a": Way(run, 0), "b": Way(run, 1)}, x, x), y)[1])(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == 2 * (1 + measured.REPEATS)
    assert {(kind, grads, autocast) for kind, _, grads, autocast in seen} == {(Tensor, False, False)}


@pytest.mark.parametrize("way", ["patches", "task by task", "grouped"])
def test_the_gradient_is_exact_whatever_is_fastest(way, monkeypatch):
    torch.manual_seed(0)
    net = ConvNet(out_features=3, hidden_channels=4, blocks=2).double()
    x, y = torch.rand(2, 6, 1, 8, 8, dtype=torch.float64), torch.arange(3).repeat(2, 2)
    batch = Episode(x, y, x.flip(1), y.flip(1))

    def gradients():
        net.zero_grad()
        MAML(net, inner_steps=2).training_step(batch, 0).backward()
        return [value.grad for value in net.parameters()]

    expected, chosen = gradients(), []

    def choose(what, ways, a, b):
        chosen.append(way if way in ways else list(ways)[-1])
        return chosen[-1]

    monkeypatch.setattr(convolution, "MEASURED", {"cpu"})
    monkeypatch.setattr(convolution, "fastest", choose)
    for found, value in zip(gradients(), expected, strict=True):
        assert torch.allclose(found, value, rtol=1e-9, atol=1e-12)
    assert way in chosen


def test_a_shared_weight_has_a_way_of_its_own(monkeypatch):
    monkeypatch.setattr(convolution, "MEASURED", {"cpu"})
    seen = []
    monkeypatch.setattr(convolution, "fastest", lambda what, ways, a, b: seen.append(list(ways)) or list(ways)[-1])
    x, w = torch.rand(3, 2, 4, 7, 8), torch.rand(5, 4, 3, 3)
    run = vmap(lambda x, w: convolution_layers.conv2d(x, w), (0, None))
    assert torch.allclose(run(x, w)[1], torch.nn.functional.conv2d(x[1], w), atol=1e-5)
    dilated = vmap(grad(lambda w, x: convolution_layers.conv2d(x, w, dilation=2).sum()))
    dilated(w.expand(3, *w.shape), x)
    assert seen == [["patches", "one batch"], ["task by task", "grouped"], ["task by task", "grouped"]]


def test_on_the_cpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(convolution, "fastest", lambda *_: pytest.fail("measured"))
    x, w = torch.rand(3, 2, 4, 7, 8), torch.rand(3, 5, 4, 3, 3)
    for device in ("cpu", "meta"):
        assert vmap(convolution_layers.conv2d)(x.to(device), w.to(device)).shape == (3, 2, 5, 5, 6)


def test_two_runs_measure_really_and_agree(monkeypatch):
    """Not by another clock: whichever way is fastest here, the result is that of torch."""
    monkeypatch.setattr(convolution, "MEASURED", {"cpu"})
    monkeypatch.setattr(measured, "_chosen", {})
    x, w = torch.rand(3, 2, 4, 7, 8, dtype=torch.float64), torch.rand(3, 5, 4, 3, 3, dtype=torch.float64)
    found = vmap(lambda x, w: convolution_layers.conv2d(x, w, padding=1))(x, w)
    expected = torch.stack([torch.nn.functional.conv2d(a, b, padding=1) for a, b in zip(x, w, strict=True)])
    assert torch.allclose(found, expected, rtol=1e-12)
    assert set(measured._chosen.values()) <= {"patches", "task by task", "grouped"}
    assert len(measured._chosen) == 1
