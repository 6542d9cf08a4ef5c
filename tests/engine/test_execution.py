import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

from maml_lightning import MAML, Episode, InnerLoop
from maml_lightning.engine import execution
from maml_lightning.engine.execution import FEW, Executor
from maml_lightning.engine.fingerprints import fingerprint
from maml_lightning.engine.jobs import Job
from maml_lightning.engine.states import PATIENCE
from maml_lightning.structures import mapped
from tests.reference import relative_error


def test_the_second_derivative_of_mse_loss_is_traced(caplog):
    executor, x = Executor(), torch.rand(4, 3, dtype=torch.float64)
    derivative = grad(lambda p: F.mse_loss(p**3, torch.zeros_like(p)))
    outputs, pullback = executor.vjp(derivative, (0,), x)
    assert torch.allclose(outputs, 2 * x**5)  # the mean of p^6 over 3
    assert torch.allclose(pullback(torch.ones_like(x)), 10 * x**4)
    assert "untraced" not in caplog.text


def test_pullback_is_that_of_autograd():
    executor, x = Executor(), torch.rand(4, 3, dtype=torch.float64)
    outputs, pullback = executor.vjp(lambda p, x: {"w": (p["w"] * x).sin()}, (None, 0), {"w": torch.ones_like(x[0])}, x)
    assert torch.allclose(outputs["w"], x.sin())
    assert torch.allclose(pullback({"w": torch.full_like(x, 2)})["w"], 2 * x * x.cos())


@pytest.mark.parametrize("tasks", [3, FEW])
def test_a_shape_that_came_later_runs_without_a_graph_until_recording_it_pays(tasks):
    executor = Executor()

    def run(length, times=1):
        state = executor.state(())
        p, x = torch.rand(2, tasks, length, dtype=torch.float64)
        for _ in range(times):
            outputs, pullback = executor.vjp(state.bind(sine), (0, 0), p, x)
            torch.testing.assert_close(outputs, (p * x).sin(), rtol=1e-9, atol=0)
            torch.testing.assert_close(pullback(torch.ones_like(x)), x * (p * x).cos(), rtol=1e-9, atol=0)

    run(3)
    assert len(executor._graphs) == 1
    run(4, times=2 * PATIENCE)  # inner steps of one meta-step
    for _ in range(PATIENCE):
        run(4)
    assert len(executor._graphs) == 1
    run(4)
    assert len(executor._graphs) == 2


def sine(objects, p, x):
    return (p * x).sin()


class Masked(nn.Module):
    """A mean over tokens that are not masked; as in transformers, a mask that hides nothing is left out."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = nn.Linear(4, 3), reads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.layer(x).tanh()
        if (self.reads or not torch.compiler.is_compiling()) and mask.all():
            return x.mean(1)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def masked_episode(tasks: int, full: bool) -> Episode:
    def part(examples: int) -> tuple:
        mask = torch.arange(5) < (5 if full else torch.randint(1, 5, (tasks, examples, 1)))
        inputs = {"x": torch.randn(tasks, examples, 5, 4), "mask": mask.expand(tasks, examples, 5).double()}
        return inputs, torch.randint(3, (tasks, examples))

    return Episode(*part(4), *part(3))


def difference_from_loop(net: nn.Module, maml: MAML, episode: Episode, **settings) -> float:
    gradients, settings = [], {"inner_lr": 0.1, "inner_steps": 2, **settings}
    for module in (maml, MAML(net, **settings, execution="loop")):
        module.zero_grad()
        module.training_step(episode, 0).backward()
        gradients.append({name: value.grad.clone() for name, value in net.named_parameters()})
    return relative_error(*gradients)


def way(maml: MAML, tasks: int) -> str:
    return maml._inner_loop._executor.way(maml._inner_loop._state(tasks), tasks)


def test_a_network_that_reads_no_values_where_it_is_compiled_is_traced():
    torch.manual_seed(0)
    net = Masked(reads=False).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    for full in (True, False, True):
        episode = mapped(lambda part: part.double() if part.is_floating_point() else part, masked_episode(3, full))
        assert difference_from_loop(net, maml, episode) < 1e-9
    assert way(maml, 3) == "traced"
    assert not torch.compiler.is_compiling()


class Mean(nn.Module):
    """Over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Outputs(nn.Module):
    """The last outputs of a recurrent layer."""

    def forward(self, results: tuple) -> Tensor:
        return results[0][:, -1]


@pytest.mark.parametrize(
    ("layers", "tasks", "looped"),
    [
        ([Mean()], 3, True),
        ([Mean()], FEW, False),
        ([Mean(), nn.Dropout(0.5)], 3, False),  # other numbers would be drawn than with a graph
        ([nn.GRU(4, 4, batch_first=True), Outputs()], 3, False),
    ],
)
def test_few_tasks_whose_shape_has_no_graph_yet_run_in_a_loop(layers, tasks, looped, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 3)).double()
    maml, calls = MAML(net, inner_lr=0.1, inner_steps=2, tasks_per_chunk=None), []
    monkeypatch.setattr(Job, "in_loop", lambda job, run=Job.in_loop: (calls.append(job.tasks()), run(job))[1])
    for length in (5, 6):
        x, y = torch.randn(tasks, 4, length, 4, dtype=torch.float64), torch.randint(3, (tasks, 4))
        calls.clear()
        maml.training_step(Episode(x, y, x, y), 0)
    assert (tasks in calls) == looped
    assert difference_from_loop(net.eval(), maml, Episode(x, y, x, y)) < 1e-9


class Scaled(nn.Module):
    """Scales the gradient of its features, of the second derivative in a loop alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).tanh()
        if features.requires_grad:
            features.register_hook(lambda gradient: 1.3 * gradient)
        return self.head(features)


@pytest.mark.parametrize("settings", [{}, {"flat_memory": True}, {"tasks_per_chunk": 1}, {"tasks_per_chunk": None}])
@pytest.mark.parametrize("tasks", [3, FEW])
def test_the_first_meta_step_is_exact_where_a_pullback_differs_from_the_loop(tasks, settings):
    torch.manual_seed(0)
    net = Scaled().double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2, **settings)
    for _ in range(2):
        x, y = torch.randn(tasks, 6, 4, dtype=torch.float64), torch.randint(3, (tasks, 6))
        assert difference_from_loop(net, maml, Episode(x, y, x, y)) < 1e-9


def test_small_gradients_are_compared_beside_the_large_ones_of_an_optimizers_state():
    torch.manual_seed(0)
    net = Scaled().double()
    settings = {"inner_lr": 0.01, "inner_steps": 1, "inner_optimizer": "adam"}
    maml = MAML(net, **settings)
    for _ in range(2):
        x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(3, (3, 6))
        assert difference_from_loop(net, maml, Episode(x, y, x, y), **settings) < 1e-9


@pytest.mark.parametrize("tasks", [3, FEW])
@pytest.mark.parametrize("settings", [{}, {"inner_optimizer": "adam"}, {"first_order": True}, {"execution": "loop"}])
def test_sparse_gradients_are_those_of_dense_ones(settings, tasks):
    x, y = torch.randint(9, (tasks, 6, 2)), torch.randint(3, (tasks, 6))
    gradients = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3)).double()
        MAML(net, inner_lr=0.1, inner_steps=2, **settings).training_step(Episode(x, y, x, y), 0).backward()
        gradients.append({name: value.grad for name, value in net.named_parameters()})
    assert relative_error(*gradients) < 1e-9


def test_few_tasks_that_cannot_be_traced_run_in_a_loop_and_many_vectorized(caplog):
    torch.manual_seed(0)
    net = Chosen().double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2, tasks_per_chunk=None)
    for tasks, expected in ((3, "loop"), (FEW, "vectorized")):
        x, y = torch.randn(tasks, 4, 4, dtype=torch.float64), torch.randint(3, (tasks, 4))
        assert difference_from_loop(net, maml, Episode(x, y, x, y)) < 1e-9
        assert way(maml, tasks) == expected
    assert "runs task by task" in caplog.text
    assert "runs without a recorded graph" in caplog.text


def test_few_tasks_that_run_in_a_loop_need_no_fingerprint_of_the_network(monkeypatch):
    taken = []
    monkeypatch.setattr(execution, "fingerprint", lambda objects: taken.append(objects) or fingerprint(objects))
    torch.manual_seed(0)
    net = Chosen().double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2, tasks_per_chunk=None)

    def step(tasks: int) -> int:
        taken.clear()
        x, y = torch.randn(tasks, 4, 4, dtype=torch.float64), torch.randint(3, (tasks, 4))
        assert difference_from_loop(net, maml, Episode(x, y, x, y)) < 1e-9
        maml.trajectory(Episode(x, y, x, y))
        return len(taken)

    assert step(3) > 0  # on trial
    net.mask = ~net.mask  # takes effect all the same
    assert step(3) == 0
    assert step(FEW) > 0


class Owner(nn.Module):
    """A loss with a parameter of its own, which the inner loop does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(outputs, targets)


def test_a_loop_leaves_gradients_of_what_it_is_given_alone():
    torch.manual_seed(0)
    net, loss, x, y = Chosen().double(), Owner(), torch.randn(3, 4, 4, dtype=torch.float64), torch.randint(3, (3, 4))
    net.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    loop = InnerLoop(net, loss, execution="loop")
    found = loop.meta_gradient(dict(net.named_parameters()), Episode(x, y, x, y), 0.1, 2).gradient
    assert torch.equal(found["unused"], torch.zeros(2))
    assert found["layer.weight"].norm() > 0
    assert all(value.grad is None for value in (*net.parameters(), *loss.parameters()))


class Chosen(nn.Module):
    """Which features count is read from values that do not depend on the task, as edges of a graph are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("mask", torch.tensor([True, False, True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, self.mask])
