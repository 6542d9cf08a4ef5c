"""What CUDA graphs would replay, by tapes on the CPU (``tapes.py``): exact, never stale, or not captured at all."""

import contextlib
import copy
import gc
import pickle
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from maml_lightning import MAML, Episode
from maml_lightning.algorithms import registry
from maml_lightning.algorithms.algorithm import Algorithm
from maml_lightning.engine import captures, cuda_graphs, states
from maml_lightning.engine.captures import Captures
from maml_lightning.engine.execution import Executor
from tests.engine.tapes import captured, memory, replays, tapes  # noqa: F401
from tests.test_devices import FAMILY, IMAGES, NETWORKS, conv_net

pytestmark = pytest.mark.usefixtures("tapes")
# Calls of a function before the first whose result is a replay's; the first training step chooses the size of chunks.
BEFORE = captures.WARM_UP + 3


@pytest.fixture(autouse=True)
def recorded_when_it_comes_again(monkeypatch):
    """A further shape is recorded in its second meta-step, so that few steps show its capture."""
    monkeypatch.setattr(states, "PATIENCE", 0)


def episode(seed, tasks=2, shape=(1, 4, 4), ways=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randperm(ways, generator=generator) for _ in range(tasks)])
    support, queries = (torch.rand(tasks, n * ways, *shape, generator=generator) for n in (1, 2))
    return Episode(support, labels, queries, torch.cat([labels, labels], 1))


def gradients(maml, batch):
    maml.zero_grad()
    loss = maml.training_step(batch, 0)
    loss.backward()
    return [loss.detach(), *(value.grad.clone() for value in maml.parameters() if value.grad is not None)]


def trained(maml, batches):
    """Losses and gradients of training steps, and the outputs of evaluations, one after the other."""
    optimizer, results = maml.configure_optimizers(), []
    for batch in batches:
        results.append(gradients(maml, batch))
        optimizer.step()
    maml.eval()
    return [*results, *(maml.trajectory(batch) for batch in batches)]


def make(net=conv_net, **settings):
    torch.manual_seed(0)
    return MAML(net(), **{"inner_lr": 0.1, "inner_steps": 2, **settings})


@contextlib.contextmanager
def no_captures():
    kept = dict(cuda_graphs.CAPTURERS)
    cuda_graphs.CAPTURERS.clear()
    try:
        yield
    finally:
        cuda_graphs.CAPTURERS.update(kept)


def same(results, expected):
    """Whether nested lists of tensors are the same to the last bit."""
    pairs = [pair for both in zip(results, expected, strict=True) for pair in zip(*both, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", FAMILY)
def test_replays_of_the_family_are_exact_to_the_last_bit(name):
    maml, batches = make(**FAMILY[name]), [episode(seed) for seed in range(BEFORE + 3)]
    assert same(*twice(maml, batches))
    assert captured() == 2  # in training and in evaluation
    assert replays() == 2 * (3 + 2)
    inputs = [tensor for entry in entries(maml) for tensor in entry.graph.inputs]
    own = {memory(tensor) for tensor in inputs}
    assert all(set(tape.read) <= own for each in cuda_graphs.CAPTURERS["cpu"].all for tape in each.tapes)


def twice(maml, batches):
    """What :func:`trained` gives with captures, and without."""
    start = copy.deepcopy(maml.state_dict())
    with no_captures():
        for _ in range(2):  # what comes for the first time runs without a graph, and rounds otherwise
            expected = trained(maml.train(), batches)
            maml.load_state_dict(start)
    assert captured() == 0
    return trained(maml.train(), batches), expected


def entries(maml):
    """What was captured, or found not to be."""
    known = maml._loop._captures._entries.values()
    return [entry for entry in known if entry.graph is not None or entry.why]


def on_meta(net, batch, monkeypatch, **settings):
    """What is known of the training steps of a module on the meta device, once they are captured."""
    monkeypatch.setattr(captures, "WARM_UP", 1)
    maml = MAML(net, inner_lr=0.1, inner_steps=2, tasks_per_chunk=2, **settings).to("meta")
    for _ in range(1 + captures.ATTEMPTS):
        maml.training_step(batch, 0)
    return entries(maml)


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_captured_without_a_value_or_a_tensor_on_another_device(name, monkeypatch):
    settings = {name: value for name, value in FAMILY[name].items() if name != "inner_steps"}
    (entry,) = on_meta(conv_net(), IMAGES, monkeypatch, **settings)
    assert (entry.why, captured()) == ("", 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_captured_unless_they_draw_random_numbers(name, monkeypatch):
    net, batch = NETWORKS[name]
    (entry,) = on_meta(net(), batch, monkeypatch)
    draws = "drop" in name.lower()
    assert ("draws random numbers" in entry.why) == draws
    assert captured() == (not draws)


@pytest.mark.parametrize("settings", [{"tasks_per_chunk": 2}, {"tasks_per_chunk": 1, "flat_memory": True}], ids=str)
def test_chunks_of_tasks_and_float64_are_exact(settings):
    batches = [episode(seed, tasks=3, shape=(4,)) for seed in range(BEFORE + 2)]
    batches = [Episode(*(p.double() if p.is_floating_point() else p for p in batch)) for batch in batches]
    assert same(*twice(make(layers, **settings).double(), batches))
    assert captured() == 2


def test_what_was_returned_is_not_overwritten_by_the_next_replay():
    maml = make()
    kept = []
    for seed in range(BEFORE + 3):
        loss = maml.training_step(episode(seed), 0)
        outputs = maml.trajectory(episode(seed))
        kept.append((loss, outputs, loss.detach().clone(), [output.clone() for output in outputs]))
    assert replays() == (3 + 1) + (3 + 2)
    assert all(torch.equal(loss, value) and same([a], [b]) for loss, a, value, b in kept)


CHANGES = {
    "an attribute": lambda maml: setattr(maml.net.head if hasattr(maml.net, "head") else maml.net[0], "own", 1),
    "a layer's setting": lambda maml: setattr(maml.net[1], "negative_slope", 0.5),
    "a layer": lambda maml: maml.net.insert(1, nn.Tanh()),
    "a frozen parameter": lambda maml: maml.net[0].weight.requires_grad_(False),
    "the inner learning rate": lambda maml: setattr(maml, "inner_lr", 0.3),
    "the inner steps": lambda maml: setattr(maml, "inner_steps", 3),
    "first order": lambda maml: setattr(maml, "first_order", True),
    "first order for some epochs": lambda maml: setattr(maml, "first_order_epochs", 1),
    "multi-step weights": lambda maml: setattr(maml, "multi_step_epochs", 5),
    "the loss": lambda maml: setattr(maml, "loss", smoothed),
    "the algorithm": lambda maml: setattr(maml, "algorithm", "reptile"),
    "new weights": lambda maml: maml.net.load_state_dict({n: v + 1 for n, v in maml.net.state_dict().items()}),
    "new memory": lambda maml: setattr(maml.net[0].weight, "data", maml.net[0].weight.data * 2),
    "other parameters": lambda maml: setattr(maml.net[0], "bias", nn.Parameter(torch.ones(4))),
    "a buffer": lambda maml: setattr(maml.net[2], "offset", torch.full((4,), 2.0)),
    "float64": lambda maml: maml.double(),
    "evaluation mode": lambda maml: maml.net[2].eval(),
}


def smoothed(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.3)


class Offset(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x):
        return x + self.offset if self.training else x * self.offset.sum()


def layers():
    return nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1), Offset(), nn.Linear(4, 3))


def of_type(batch, maml):
    dtype = next(maml.parameters()).dtype
    return Episode(*(part.to(dtype) if part.is_floating_point() else part for part in batch))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_replays_nothing_stale(name):
    def results():
        maml, found = make(layers), []
        for seed in range(2 * BEFORE + 2):
            if seed == BEFORE + 1:
                CHANGES[name](maml)
            found.append(gradients(maml, of_type(episode(seed, shape=(4,)), maml)))
        return found

    with no_captures():
        expected = results()
    assert same(results(), expected)
    assert replays() >= 2 + 2
    assert any(not torch.equal(a, b) for a, b in zip(expected[-1], expected[BEFORE], strict=False))


def test_new_shapes_other_modes_and_switches_have_graphs_of_their_own(monkeypatch):
    maml = make(layers)

    for seed in range(BEFORE + 1):
        maml.training_step(episode(seed, shape=(4,)), 0)
    assert (captured(), replays()) == (1, 2)
    maml.training_step(episode(0, tasks=3, shape=(4,)), 0)
    with torch.autocast("cpu", torch.bfloat16):
        maml.training_step(episode(0, shape=(4,)), 0)
    assert replays() == 2
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    maml.training_step(episode(0, shape=(4,)), 0)
    assert replays() == 2
    torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(True)
    maml.training_step(episode(0, shape=(4,)), 0)
    torch.use_deterministic_algorithms(False)
    assert replays() == 2
    maml.training_step(episode(0, shape=(4,)), 0)
    assert replays() == 3


@pytest.mark.parametrize(
    "settings", [{"execution": "traced"}, {"execution": "vectorized"}, {"execution": "loop"}], ids=str
)
def test_only_execution_auto_is_captured(settings):
    maml = make(layers, **settings)
    for seed in range(BEFORE):
        maml.training_step(episode(seed, shape=(4,)), 0)
    assert captured() == 0


def test_a_compiled_network_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    maml = make(layers, compile=True)
    for seed in range(BEFORE):
        maml.training_step(episode(seed, shape=(4,)), 0)
    assert captured() == 0


def test_a_failed_capture_changes_nothing_and_is_the_last(tapes, caplog):  # noqa: F811
    maml, batches = make(), [episode(seed) for seed in range(BEFORE + 2)]
    tapes.fails = "operation not permitted when stream is capturing"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert same(*twice(maml, batches))
    assert torch.equal(torch.get_rng_state(), before)
    assert entries(maml)[0].why == tapes.fails
    tapes.fails = ""
    trained(maml.train(), batches)
    assert (captured(), replays()) == (0, 0)
    assert not [record for record in caplog.records if record.name.startswith("maml_lightning")]


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(self.layer(x), 0.5, self.training))


@pytest.mark.parametrize("flat", [False, True])
def test_dropout_draws_anew_at_each_step_as_without_captures(flat):
    def results():
        maml = make(Dropping, flat_memory=flat)
        torch.manual_seed(3)
        found = [gradients(maml, episode(0, shape=(4,))) for _ in range(BEFORE + 2)]
        maml.eval()
        return [*found, *(maml.trajectory(episode(0, shape=(4,))) for _ in range(BEFORE + 2))]

    with no_captures():
        expected = results()
    found = results()
    assert same(found, expected)
    assert not torch.equal(found[BEFORE][1], found[BEFORE + 1][1])
    assert captured() == 1  # evaluation draws nothing


class WithEffects(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


def test_a_network_with_effects_runs_at_each_call():
    maml = make(lambda: WithEffects(4, 3))
    for seed in range(BEFORE):
        maml.training_step(episode(seed, shape=(4,)), 0)
    before = maml.net.calls
    maml.training_step(episode(0, shape=(4,)), 0)
    assert maml.net.calls > before
    assert captured() == 0


def test_an_algorithm_of_ones_own_is_captured_only_if_it_says_so(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(len(calls))
        return registry.ALGORITHMS["maml"].meta_gradient(*args)

    for capturable in (False, True):
        calls.clear()
        monkeypatch.setitem(registry.ALGORITHMS, "mine", Algorithm(counted, capturable=capturable))
        maml = make(layers, algorithm="mine")
        for seed in range(BEFORE + 3):
            maml.training_step(episode(seed, shape=(4,)), 0)
        assert captured() == capturable
        assert (len(calls) == BEFORE + 3) == (not capturable)


def square(objects, x):
    return x * x


def squares(run, x):
    return {"square": run(square, x)}


def bound(function):
    """A function that runs by an executor, through captures of it, and those captures."""
    executor = Executor()
    own = Captures(executor)

    def call(x):
        state = executor.state(())  # each call is a meta-step

        def run(part, x):
            return executor(state.bind(part), (0,), x)

        return own(partial(function, run), "key", state, x)

    return call, own


def test_results_are_those_of_the_arguments_at_each_call():
    call, own = bound(squares)
    for i in range(BEFORE + 3):
        x = torch.full((2, 3), float(i))
        assert torch.equal(call(x)["square"], x * x)
    assert replays() == 2 + 3
    (entry,) = own._entries.values()
    assert entry.agrees


def test_a_replay_that_differs_is_not_taken(monkeypatch):
    class Frozen(cuda_graphs.CAPTURERS["cpu"]):
        def capture(self, function):
            return super().capture(function)._replace(replay=lambda: None)

    monkeypatch.setitem(cuda_graphs.CAPTURERS, "cpu", Frozen)
    call, own = bound(squares)
    for i in range(1, BEFORE + 4):
        assert torch.equal(call(torch.full((2, 3), float(i)))["square"], torch.full((2, 3), float(i * i)))
    (entry,) = own._entries.values()
    assert entry.why.startswith("its replay is not what it gives itself: it differs")
    assert entry.graph is None


def test_what_is_not_finite_says_nothing_of_a_replay():
    call, own = bound(squares)
    for _ in range(BEFORE + 2):
        call(torch.full((2, 3), float("nan")))
    (entry,) = own._entries.values()
    assert not entry.agrees
    call(torch.ones(2, 3))
    assert entry.agrees


def double(objects, x):
    return x * 2


def test_a_function_that_writes_to_its_arguments_is_not_captured():
    def adds(run, x):
        y = run(double, x)
        x += 1
        return y

    call, own = bound(adds)
    for _ in range(BEFORE):
        x = torch.ones(2)
        assert torch.equal(call(x), torch.full((2,), 2.0))
    (entry,) = own._entries.values()
    assert entry.why == "it writes to its arguments"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * x[0].item(), "reads values"),
        (lambda x: x[x > 0], "reads a mask"),
        (lambda x: x.nonzero().float(), "reads values"),
        (lambda x: x + torch.empty(2, device="meta").dim(), "on meta"),
    ],
)
def test_what_cannot_be_captured_is_found_before(function, why):
    call, own = bound(lambda run, x: function(run(double, x)))
    for _ in range(BEFORE):
        assert torch.equal(call(torch.ones(2)), function(torch.full((2,), 2.0)))
    (entry,) = own._entries.values()
    assert why in entry.why
    assert captured() == 0


def test_graphs_that_are_not_used_make_room(monkeypatch):
    monkeypatch.setattr(captures, "IDLE_CALLS", 10)
    call, own = bound(squares)
    for size in range(1, captures.MAX_CAPTURES + 2):
        for _ in range(BEFORE):
            call(torch.ones(size))
    assert captured() == captures.MAX_CAPTURES + 1
    kept = [entry.graph is not None for entry in own._entries.values()]
    assert kept == [False] + [True] * captures.MAX_CAPTURES
    assert sum(each.released for each in cuda_graphs.CAPTURERS["cpu"].all) == 1


def test_more_signatures_than_there_is_room_for_are_not_captured_in_turn():
    call, own = bound(squares)
    for _ in range(2 * BEFORE):
        for size in range(1, captures.MAX_CAPTURES + 3):
            call(torch.ones(size))
    assert captured() == captures.MAX_CAPTURES
    assert len(own._entries) == captures.MAX_CAPTURES + 2


def test_signatures_without_end_are_forgotten():
    call, own = bound(squares)
    for size in range(1, captures.MAX_SIGNATURES + 5):
        call(torch.ones(size))
    assert len(own._entries) == captures.MAX_SIGNATURES


def test_the_memory_of_a_released_graph_is_free():
    call, own = bound(squares)
    for _ in range(BEFORE):
        call(torch.ones(3))
    (entry,) = own._entries.values()
    held = [weakref.ref(tensor) for tensor in (*entry.graph.inputs, *entry.graph.captured.outputs)]
    own.release()
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    assert torch.equal(call(torch.full((3,), 2.0))["square"], torch.full((3,), 4.0))


def test_where_memory_runs_out_graphs_give_way():
    full = []

    def needs_memory(run, x):
        if full and any(entry.graph for entry in own._entries.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return squares(run, x)

    call, own = bound(needs_memory)
    for _ in range(BEFORE):
        call(torch.ones(3))
    full.append(True)
    assert torch.equal(call(torch.full((4,), 2.0))["square"], torch.full((4,), 4.0))
    assert all(entry.graph is None for entry in own._entries.values())
    with pytest.raises(torch.OutOfMemoryError):  # no graph has the memory
        Captures(own.executor)(raises, "key", own.executor.state(()), torch.ones(2))


def raises(_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_copies_and_pickles_begin_anew():
    maml = make(layers)
    for seed in range(BEFORE):
        maml.training_step(episode(seed, shape=(4,)), 0)
    for other in (copy.deepcopy(maml._loop), pickle.loads(pickle.dumps(maml._loop))):
        assert other._captures._entries == {}
        assert other._captures.executor is other._executor


class Cuda:
    """Stands for torch.cuda; notes what is called."""

    def __init__(self, monkeypatch, fails):
        self.calls, self.fails = [], fails
        stream = SimpleNamespace(device_index=0)
        values = {
            "Stream": lambda device: "side stream",
            "graph_pool_handle": lambda: (0, 1),
            "is_current_stream_capturing": lambda: False,
            "current_stream": lambda device: stream,
            "set_stream": lambda value: self.calls.append(("set_stream", value is stream)),
            "synchronize": lambda device: self.calls.append("synchronize"),
            "default_generators": [
                SimpleNamespace(
                    clone_state=lambda: "before",
                    graphsafe_set_state=lambda state: self.calls.append(("random numbers", state)),
                )
            ],
            "CUDAGraph": lambda: SimpleNamespace(
                replay=lambda: self.calls.append("replay"), reset=lambda: self.calls.append("reset")
            ),
            "device": lambda device: contextlib.nullcontext(),
            "graph": self.graph,
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def end(self, device, pool):
        self.calls.append(("end", device, pool))
        raise RuntimeError("it is not recording")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.calls.append(("begin", pool, stream, capture_error_mode))
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError("capture was invalidated")
        self.calls.append("end")


def test_a_cuda_graph_is_captured_on_a_stream_of_its_own(monkeypatch):
    cuda = Cuda(monkeypatch, fails=False)
    graphs = cuda_graphs.CudaGraphs(torch.device("cuda", 0))
    result = graphs.capture(lambda: [torch.ones(2)])
    assert cuda.calls == [("begin", (0, 1), "side stream", "thread_local"), "end"]
    result.replay()
    assert cuda.calls[-1] == "replay"
    result.release()
    assert cuda.calls[-2:] == ["synchronize", "reset"]
    assert result.outputs == []


@pytest.mark.parametrize("fails", [True, False])
def test_a_capture_that_fails_puts_stream_random_numbers_and_memory_back(monkeypatch, fails):
    cuda = Cuda(monkeypatch, fails)
    graphs = cuda_graphs.CudaGraphs(torch.device("cuda", 0))
    with pytest.raises((ValueError, RuntimeError)):
        graphs.capture(lambda: [int("a value that is read")])
    after = [("set_stream", True), ("random numbers", "before"), ("end", 0, (0, 1)), "synchronize"]
    assert cuda.calls[1:] == after


def test_a_capture_inside_of_a_capture_raises(monkeypatch):
    Cuda(monkeypatch, fails=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="under way"):
        cuda_graphs.CudaGraphs(torch.device("cuda", 0)).capture(list)
