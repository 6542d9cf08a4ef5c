"""Networks that read their scale from wherever Python can hide it, against the plain loop while it changes."""

import copy
import cProfile
import datetime
import gc
import importlib
import os
import random
import secrets
import sys
import time
import uuid
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.overrides import TorchFunctionMode
from torchmetrics import MeanMetric

from maml_lightning import MAML
from maml_lightning.engine.fingerprints import fingerprint
from tests.engine.test_trials import episode, gradient
from tests.reference import reference, relative_error

SCALE, SCALE_1 = 1.0, 1.0
TABLE = {"scale": 1.0}
HOLDER = SimpleNamespace(inner=SimpleNamespace(scale=1.0))
DISTRIBUTION = torch.distributions.Normal(0.0, 1.0)
OPTIMIZER = torch.optim.SGD([torch.zeros(1)], lr=1.0)
ARRAY, GENERATOR = np.ones(3), torch.Generator()
config = ModuleType("unforeseen_config")
config.scale = config.scale_1 = 1.0
sys.modules["unforeseen_config"] = config
static = staticmethod(lambda: TABLE["scale"])
FOLDER = SimpleNamespace(path=None)


class Own:
    __slots__ = ("scale",)


SLOTTED = Own()


class Net(nn.Module):
    scales: ClassVar = {"a": [1.0]}

    def __init__(self, scale):
        super().__init__()
        self.layer, self.scale, self.words = nn.Linear(4, 3), scale, {f"word {i}": 1.0 for i in range(100)}

    def forward(self, x):
        return self.layer(x) * self.scale(self)

    def __getattr__(self, name):
        return TABLE["scale"] if name == "hidden" else super().__getattr__(name)


def assign(name):
    return lambda net, value: globals().__setitem__(name, value)


def write_text(net, value):
    (FOLDER.path / "scale.txt").write_text(str(value))


def write_array(net, value):
    np.save(FOLDER.path / "scale.npy", np.array(value))


def write_tensor(net, value):
    torch.save(torch.tensor(value), FOLDER.path / "scale.pt")


def executed(net):
    found = {}
    exec("import tests.engine.test_unforeseen as own; scale = own.SCALE", found)
    return found["scale"]


def of_environment(net, value):
    os.environ["UNFORESEEN"] = str(value)


def of_table(net, value):
    TABLE["scale"] = value


def of_config(net, value):
    config.scale = value


def of_torch(net, value):
    torch.set_default_dtype(torch.float64 if value == 3 else torch.float32)
    torch.use_deterministic_algorithms(value == 2)


def read_lines(net):
    with open(FOLDER.path / "scale.txt") as file:
        return float(file.readline())


def read_named(net):
    with open(net.file) as file:
        return float(file.readline())


def by_default(net, table=TABLE):
    return table["scale"]


READ = {
    "eval": (lambda net: eval("SCALE"), assign("SCALE")),
    "exec": (executed, assign("SCALE")),
    "computed global": (lambda net: globals()[f"SCALE_{len('a')}"], assign("SCALE_1")),
    "computed name of a module": (
        lambda net: getattr(config, f"scale_{len('a')}"),
        lambda net, v: setattr(config, "scale_1", v),
    ),
    "computed name of an object": (
        lambda net: getattr(HOLDER.inner, "sca" + "le"),
        lambda net, v: setattr(HOLDER.inner, "scale", v),
    ),
    "variables of a module": (lambda net: vars(config)["scale"], lambda net, v: setattr(config, "scale", v)),
    "module by its name": (lambda net: sys.modules["unforeseen_config"].scale, of_config),
    "module imported by its name": (lambda net: importlib.import_module("unforeseen_config").scale, of_config),
    "default type": (lambda net: torch.tensor(0.1).double(), of_torch),
    "setting of torch": (lambda net: 1 + torch.are_deterministic_algorithms_enabled(), of_torch),
    "file": (read_lines, write_text),
    "pathlib": (lambda net: float((FOLDER.path / "scale.txt").read_text()), write_text),
    "os.open": (lambda net: float(os.read(os.open(FOLDER.path / "scale.txt", os.O_RDONLY), 9)), write_text),
    "np.load": (lambda net: float(np.load(FOLDER.path / "scale.npy")), write_array),
    "np.fromfile": (lambda net: float(np.loadtxt(FOLDER.path / "scale.txt")), write_text),
    "torch.load": (lambda net: torch.load(FOLDER.path / "scale.pt").item(), write_tensor),
    "environment": (lambda net: float(os.environ["UNFORESEEN"]), of_environment),
    "getenv": (lambda net: float(os.getenv("UNFORESEEN")), of_environment),
    "sys.argv": (lambda net: float(sys.argv[-1]), lambda net, v: sys.argv.__setitem__(-1, str(v))),
    "attribute of sys": (lambda net: sys.unforeseen, lambda net, v: setattr(sys, "unforeseen", v)),
    "distribution": (
        lambda net: DISTRIBUTION.scale,
        lambda net, v: setattr(DISTRIBUTION, "scale", torch.tensor(v)),
    ),
    "optimizer": (
        lambda net: OPTIMIZER.param_groups[0]["lr"],
        lambda net, v: OPTIMIZER.param_groups[0].update(lr=v),
    ),
    "static method as a variable": (lambda net: static(), of_table),
    "default argument": (by_default, of_table),
    "__getattr__": (lambda net: net.hidden, of_table),
    "slots": (lambda net: SLOTTED.scale, lambda net, v: setattr(SLOTTED, "scale", v)),
    "list in a class": (lambda net: net.scales["a"][0], lambda net, v: Net.scales["a"].__setitem__(0, v)),
    "large dictionary": (lambda net: net.words["word 7"], lambda net, v: net.words.update({"word 7": v})),
    "array": (lambda net: float(ARRAY[1]), lambda net, v: ARRAY.__setitem__(1, v)),
    "attribute of a tensor": (lambda net: net.layer.own, lambda net, v: setattr(net.layer, "own", v)),
    "lambda put into the network": (lambda net: net.layer.of(), lambda net, v: setattr(net.layer, "of", lambda: v)),
    "plain generator": (lambda net: 1 + next(net.steps), lambda net, v: setattr(net, "steps", iter([v] * 99))),
}


@pytest.fixture(autouse=True)
def _as_before(tmp_path, monkeypatch):
    FOLDER.path = tmp_path
    monkeypatch.setenv("UNFORESEEN", "1.0")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "1.0"])
    monkeypatch.setattr(sys, "unforeseen", 1.0, raising=False)
    yield
    of_torch(None, 1.0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", READ)
def test_the_gradient_follows_what_is_read(kind):
    torch.manual_seed(0)
    scale, change = READ[kind]
    net = Net(scale).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    for value in (1.0, 3.0, 3.0, 2.0):
        change(net, value)
        _, expected = reference(net, episode(), 0.1, 2, F.cross_entropy)
        assert relative_error(gradient(maml), expected) < 1e-9
    change(net, 1.0)


@pytest.mark.parametrize("profiler", [cProfile.Profile(), lambda *event: None])
def test_files_are_read_while_a_profiler_is_on(profiler):
    enable = profiler.enable if isinstance(profiler, cProfile.Profile) else lambda: sys.setprofile(profiler)
    net = Net(read_named).double()
    net.file = str(FOLDER.path / "scale.txt")  # a path changes as it is used
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    for value in (1.0, 3.0, 2.0):
        write_text(net, value)
        enable()
        try:
            own = gradient(maml)
            assert sys.getprofile() is profiler or sys.version_info >= (3, 12)
        finally:
            sys.setprofile(None)
        assert relative_error(own, reference(net, episode(), 0.1, 2, F.cross_entropy)[1]) < 1e-9


class Scaling(TorchFunctionMode):
    """Scales all that ``torch.tanh`` gives."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        return result * self.scale if function is torch.tanh else result


def test_the_users_own_modes_are_part_of_what_runs(caplog):
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    for scale in (1.0, 2.0, 2.0, 3.0):
        with Scaling(scale):
            _, expected = reference(net, episode(), 0.1, 2, F.cross_entropy)
            assert relative_error(gradient(maml), expected) < 1e-9
    with torch.device("cpu"):
        assert relative_error(gradient(maml), reference(net, episode(), 0.1, 2, F.cross_entropy)[1]) < 1e-9
    assert "slower" not in caplog.text


class Collecting(nn.Linear):
    """Collects garbage as it runs, which Python may do anywhere."""

    def forward(self, x):
        gc.collect()
        return super().forward(x)


def test_what_callbacks_of_the_garbage_collector_ask_is_not_the_networks(caplog):
    gc.callbacks.append(asks_the_time := lambda *_: time.perf_counter())
    try:
        gradient(MAML(nn.Sequential(Collecting(4, 3), nn.Tanh()).double(), inner_lr=0.1))
    finally:
        gc.callbacks.remove(asks_the_time)
    assert "slower" not in caplog.text


ASKED = {
    "time": lambda net: time.time(),
    "process_time": lambda net: time.process_time(),
    "thread_time_ns": lambda net: time.thread_time_ns(),
    "monotonic_ns": lambda net: time.monotonic_ns(),
    "gmtime": lambda net: time.gmtime().tm_sec,
    "os.times": lambda net: os.times().user,
    "datetime": lambda net: datetime.datetime.now().second,
    "date": lambda net: datetime.date.today().day,
    "uuid1": lambda net: uuid.uuid1().int,
    "uuid4": lambda net: uuid.uuid4().int,
    "secrets": lambda net: secrets.randbelow(9),
    "urandom": lambda net: os.urandom(1)[0],
    "SystemRandom": lambda net: random.SystemRandom().random(),
    "default_rng": lambda net: np.random.default_rng().random(),
    "default_rng of its own": lambda net: net.numbers.random(),
    "numpy": lambda net: np.random.rand(),
    "random": lambda net: random.random(),
    "input of a generator": lambda net: next(net.steps),
    "listdir": lambda net: len(os.listdir()),
    "exists": lambda net: os.path.exists("."),
}


@pytest.mark.parametrize("kind", ASKED)
def test_what_differs_at_each_call_is_asked_at_each_call(kind, caplog):
    net = Net(lambda net: 1 + 0 * ASKED[kind](net)).double()
    if "generator" in kind:
        net.steps = (i for i in range(999))
    net.numbers = np.random.default_rng(0)
    gradient(MAML(net, inner_lr=0.1, inner_steps=1))
    assert [r.message for r in caplog.records if "task by task" in r.message]


@pytest.mark.parametrize("part", [MeanMetric, LightningModule])
def test_parts_of_lightning_cost_no_time(part, caplog):  # what their packages hold is none of the network's
    net = nn.Sequential(nn.Linear(4, 3)).double()
    net.part = [part()]
    begin = time.process_time()
    fingerprint((net,))
    assert time.process_time() - begin < 0.3
    expected = reference(copy.deepcopy(net), episode(), 0.1, 2, F.cross_entropy)[1]
    assert relative_error(gradient(MAML(net, inner_lr=0.1, inner_steps=2)), expected) < 1e-9
    assert "slower" not in caplog.text


def test_a_plain_network_is_traced(caplog):
    net = Net(lambda net: TABLE["scale"]).double()
    expected = reference(copy.deepcopy(net), episode(), 0.1, 2, F.cross_entropy)[1]
    assert relative_error(gradient(MAML(net, inner_lr=0.1, inner_steps=2)), expected) < 1e-9
    assert "slower" not in caplog.text
