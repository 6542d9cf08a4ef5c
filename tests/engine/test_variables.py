"""Which variables code reads: whatever of them changes, a graph that was recorded before is not replayed."""

import array
import datetime
import sys
import time
import weakref
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from maml_lightning import MAML, Episode
from maml_lightning.engine import variables
from maml_lightning.engine.fingerprints import fingerprint
from tests.engine.test_trials import episode, gradient
from tests.reference import reference, relative_error

SCALE = 1.0
CONTEXT = ContextVar("CONTEXT", default=1.0)
package, settings = ModuleType("a_package"), ModuleType("a_package.settings")
package.settings = settings


class Descriptor:
    scale = 1.0

    def __get__(self, owner, kind):
        return self.scale


OBJECT = Descriptor()
REFERENCE = weakref.ref(OBJECT)


class Net(nn.Module):
    """A linear layer whose outputs are multiplied by ``scale(net)``."""

    part, descriptor = SimpleNamespace(scale=1.0), Descriptor()

    class Options:
        scale = 1.0

    def __init__(self, scale):
        super().__init__()
        self.layer, self.scale, self.bytes = nn.Linear(4, 3), scale, array.array("d", [1.0])
        self.get = {"scale": 1.0}.get

    def forward(self, x):
        return self.layer(x) * self.scale(self)


def scaled():
    return scaled.scale


def imported(net):
    import a_package.settings

    return a_package.settings.scale


def imported_from(net):
    from a_package.settings import scale

    return scale


def recursive(net, depth=2):
    return recursive(net, depth - 1) if depth else SCALE


def set_global(net, value):
    globals()["SCALE"] = value


def of_settings(net, value):
    settings.scale = value


VARIABLES = {
    "module of a module": (lambda net: package.settings.scale, of_settings),
    "import in a function": (imported, of_settings),
    "import of a name in a function": (imported_from, of_settings),
    "globals()": (lambda net: globals()["SCALE"], set_global),
    "sys.modules": (lambda net: getattr(sys.modules[__name__], "SCALE"), set_global),  # noqa: B009
    "recursive function": (recursive, set_global),
    "variable of the context": (lambda net: CONTEXT.get(), lambda net, value: CONTEXT.set(value)),
    "object of the class": (lambda net: net.part.scale, lambda net, value: setattr(Net.part, "scale", value)),
    "descriptor": (lambda net: net.descriptor, lambda net, value: setattr(vars(Net)["descriptor"], "scale", value)),
    "class in the class": (lambda net: net.Options.scale, lambda net, value: setattr(Net.Options, "scale", value)),
    "attribute of a function": (lambda net: scaled(), lambda net, value: setattr(scaled, "scale", value)),
    "bytes of an array": (lambda net: net.bytes[0], lambda net, value: net.bytes.__setitem__(0, value)),
    "method of a dictionary": (lambda net: net.get("scale"), lambda net, value: net.get.__self__.update(scale=value)),
    "weak reference": (lambda net: REFERENCE().scale, lambda net, value: setattr(OBJECT, "scale", value)),
}


def test_a_variable_of_an_installed_module_that_code_names_is_another_fingerprint(monkeypatch):
    installed = ModuleType("installed_settings")
    installed.__file__ = f"{variables._INSTALLED[0]}/installed_settings.py"
    installed.scale_1 = 1.0
    monkeypatch.setitem(sys.modules, "installed_settings", installed)
    net = Net(of_installed)
    before = fingerprint((net,))
    assert fingerprint((net,)) == before
    installed.scale_1 = 3.0
    assert net.scale(net) == 3.0
    assert fingerprint((net,)) != before


def of_installed(net, step=1):
    import installed_settings

    return getattr(installed_settings, f"scale_{step}")


def test_code_that_a_notebook_reloads_in_place_is_another_fingerprint():
    namespace: dict = {}
    exec("def read(net): return 1.0", namespace)
    net = Net(namespace["read"])
    before = fingerprint((net,))
    assert fingerprint((net,)) == before
    namespace["read"].__code__ = compile("lambda net: 3.0", "cell", "eval").co_consts[0]  # as %autoreload does
    assert namespace["read"](net) == 3.0
    assert fingerprint((net,)) != before


@pytest.mark.parametrize("folder", ["user/.local/lib/python3.11/site-packages", "usr/lib/python3/dist-packages"])
def test_packages_of_the_user_and_of_the_system_are_installed_ones(monkeypatch, tmp_path, folder):
    module = ModuleType("a_package_elsewhere")
    module.__file__ = str(tmp_path / folder / "a_package_elsewhere.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    variables.is_installed.cache_clear()
    assert variables.is_installed(module.__name__)
    assert not variables.is_installed(__name__)
    variables.is_installed.cache_clear()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    for name, module in {"a_package": package, "a_package.settings": settings}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for _, set_scale in VARIABLES.values():
        set_scale(Net(None), 1.0)
    yield
    set_global(None, 1.0)


@pytest.mark.parametrize("kind", VARIABLES)
def test_a_change_of_a_variable_is_another_fingerprint(kind):
    scale, set_scale = VARIABLES[kind]
    net = Net(scale)
    set_scale(net, 1.0)
    before = fingerprint((net,))
    assert fingerprint((net,)) == before
    set_scale(net, 3.0)
    assert net.scale(net) == 3.0
    assert fingerprint((net,)) != before
    set_scale(net, 1.0)
    assert fingerprint((net,)) == before


def test_the_gradient_follows_a_variable_of_a_module():
    net = Net(VARIABLES["module of a module"][0]).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    for scale in (1.0, 3.0):
        settings.scale = scale
        _, expected = reference(net, episode(), 0.1, 2, F.cross_entropy)
        assert relative_error(gradient(maml), expected) < 1e-9


class OfTheEpoch(LightningModule):
    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(4, 3), read

    def forward(self, x):
        return self.layer(x) * self.read(self)


@pytest.mark.parametrize(
    ("read", "changes"),
    [
        (lambda net: 1 + net.current_epoch, True),
        (lambda net: 1 + net.trainer.current_epoch, True),
        (lambda net: 1 + net.trainer.fit_loop.epoch_progress.current.completed, True),
        (lambda net: 1, False),
    ],
)
def test_the_epoch_counts_where_it_is_read(read, changes):
    net = OfTheEpoch(read)
    net.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    before = fingerprint((net,))
    net.trainer.fit_loop.epoch_progress.current.completed = 1
    assert net.current_epoch == 1
    assert (fingerprint((net,)) != before) == changes


def test_hooks_of_all_modules_count():
    net = nn.Linear(4, 3)
    before = fingerprint((net,))
    handle = nn.modules.module.register_module_forward_hook(lambda layer, args, output: 2 * output)
    during = fingerprint((net,))
    handle.remove()
    assert before == fingerprint((net,)) != during


def test_objects_nested_too_deeply_are_never_the_same():
    net = nn.Linear(4, 3)
    net.chain = None
    for _ in range(2000):
        net.chain = [net.chain]
    assert fingerprint((net,)) != fingerprint((net,))


COUNT, HISTORY = 0, []


def counted_globally(net, outputs):
    global COUNT
    COUNT += 1
    return 1 + 0.1 * COUNT


def listed(net, outputs):
    HISTORY.append(torch.ones(()))
    return 1 + 0.1 * sum(HISTORY)


def of_class(net, outputs):
    Net.Options.scale += 1
    return Net.Options.scale


def of_function(net, outputs):
    of_function.calls = getattr(of_function, "calls", 0) + 1
    return 1 + 0.1 * of_function.calls


def of_default(net, outputs, seen=[]):  # noqa: B006
    seen.append(1)
    return 1 + 0.1 * len(seen)


def of_context(net, outputs):
    CONTEXT.set(CONTEXT.get() + 1)
    return CONTEXT.get()


class Written(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), scale

    def forward(self, x):
        outputs = self.layer(x)
        return outputs * self.scale(self, outputs)


@pytest.mark.parametrize("scale", [counted_globally, listed, of_class, of_function, of_default, of_context])
def test_what_is_written_to_variables_is_written_as_in_a_loop(scale):
    def clear():
        global COUNT
        COUNT = 0
        HISTORY.clear()
        Net.Options.scale = 1.0
        of_function.__dict__.clear()
        of_default.__defaults__[0].clear()
        CONTEXT.set(1.0)

    torch.manual_seed(0)
    net = Written(scale).double()
    clear()
    expected = [reference(net, episode(), 0.1, 2, F.cross_entropy)[1] for _ in range(2)]
    clear()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    for each in expected:
        assert relative_error(gradient(maml), each) < 1e-9


def of_clock(net, outputs):
    return 1 + 0 * time.perf_counter()


def of_date(net, outputs):
    return 1 + 0 * datetime.datetime.now().year


def printing(net, outputs):
    print("called", end="")
    return 1


@pytest.mark.parametrize(
    ("scale", "why"),
    [
        (of_clock, "reads the clock"),
        (of_date, "reads the clock"),
        (printing, "prints"),
        (listed, "changes its own"),
        (scaled, ""),
    ],
)
def test_what_is_asked_of_the_world_outside_is_asked_at_each_call(scale, why, caplog):
    scaled.scale = 1.0
    net = Written((lambda net, outputs: scaled()) if scale is scaled else scale).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=1)
    gradient(maml)
    lines = [record.message for record in caplog.records if "slower" in record.message]
    assert [why in line for line in lines] == [True] * bool(why)


def test_a_file_is_read_anew(tmp_path):
    file = tmp_path / "scale.txt"
    net = Written(lambda net, outputs: float(file.read_text())).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=1)
    for scale in ("1.0", "3.0"):
        file.write_text(scale)
        _, expected = reference(net, episode(), 0.1, 1, F.cross_entropy)
        assert relative_error(gradient(maml), expected) < 1e-9


UNSET: ContextVar[float] = ContextVar("UNSET")
mean, model = 1.0, None  # globals named as what the code below reads of tensors and of itself


class ReadsUnset(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(4, 3)

    def forward(self, x):
        return self.model(x) * UNSET.get(1.0) + x.mean()


class Frozen(type):
    def __setattr__(cls, name, value):
        raise AttributeError("frozen")


class Fixed(metaclass=Frozen):
    layers = (1.0, [2.0])


class ReadsFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * Fixed.layers[1][0]


class Scaled(dict):
    scale = 1.0


class ReadsScaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.settings = nn.Linear(4, 3), Scaled(a=1)

    def forward(self, x):
        return self.layer(x) * self.settings.scale


def steps_of(net, steps=4):
    torch.manual_seed(0)
    x, y = torch.rand(2, 6, 4, dtype=torch.float64), torch.arange(3).repeat(2, 2)
    maml = MAML(net.double(), inner_lr=0.3, inner_steps=2)
    sizes = []
    for _ in range(steps):
        maml.training_step(Episode(x, y, x, y), 0).backward()
        sizes.append(len(repr(fingerprint((net,)))))
    return maml, sizes


def test_a_variable_of_the_context_that_is_not_set_stays_so():
    steps_of(ReadsUnset())
    assert UNSET.get("unset") == "unset"


def test_a_global_that_holds_the_module_or_is_named_like_a_method_does_not_count(monkeypatch):
    monkeypatch.setitem(globals(), "model", steps_of(ReadsUnset())[0])
    net = ReadsUnset()
    before = fingerprint((net,))
    monkeypatch.setitem(globals(), "mean", 2.0)
    assert fingerprint((net,)) == before
    _, sizes = steps_of(net, steps=6)
    assert len(set(sizes)) == 1  # no fingerprint contains those before it


def test_variables_that_cannot_be_written_stay():
    maml, _ = steps_of(ReadsFixed())
    assert Fixed.layers == (1.0, [2.0])
    assert all(value.grad.isfinite().all() for value in maml.net.parameters())


def test_attributes_of_a_container_of_the_users_own_kind_count():
    net = ReadsScaled()
    before = fingerprint((net,))
    net.settings.scale = 2.0
    assert fingerprint((net,)) != before
