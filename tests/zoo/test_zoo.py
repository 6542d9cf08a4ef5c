"""Sixty networks and more against the plain loop of ``loop.py``, in float64."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

from maml_lightning import MAML, Episode, SettingError
from tests.zoo import images, python_state, random_layers, sequences
from tests.zoo.case import Case
from tests.zoo.loop import Result, meta_gradient, relative_error

CASES = [*images.CASES, *sequences.CASES, *python_state.CASES, *random_layers.CASES]
BY_NAME = {case.name: case for case in CASES}
TOLERANCE = 1e-9
SETTINGS = {
    "1 step": {"inner_steps": 1, "tasks_per_chunk": 2},
    "3 steps, all": {"inner_steps": 3, "tasks_per_chunk": None},
    "3 steps, one by one": {"inner_steps": 3, "tasks_per_chunk": 1},
    "3 steps, auto": {"inner_steps": 3, "tasks_per_chunk": "auto"},
    "first order": {"inner_steps": 3, "tasks_per_chunk": 2, "first_order": True},
    "first order, auto": {"inner_steps": 1, "tasks_per_chunk": "auto", "first_order": True},
}
QUICK = {"inner_steps": 2, "tasks_per_chunk": 2}


def module(case: Case, net: nn.Module, **settings) -> MAML:
    if case.stateful:  # the order of tasks counts
        settings["tasks_per_chunk"] = 1
    return MAML(net, inner_lr=case.lr, loss=case.loss, **settings)


def loop(case: Case, net: nn.Module, episode: Episode, inner_steps: int, first_order: bool = False, **ignored):
    """What the plain loop gives: one result, or for stateful networks one of each way to treat their buffers."""
    results, state = [], {name: value.clone() for name, value in net.state_dict().items()}
    for way in ("call", "task", "kept") if case.stateful else ("call",):
        results.append(meta_gradient(net, episode, case.lr, inner_steps, case.loss, first_order, way))
        if case.stateful:
            net.load_state_dict(state)
    return results


def step_error(maml: MAML, episode: Episode, expected: list[Result]) -> float:
    """The largest relative error of loss and gradient of a training step."""
    maml.zero_grad()
    loss = maml.training_step(episode, 0)
    loss.backward()
    ours = {name: value.grad for name, value in maml.net.named_parameters() if value.requires_grad}
    return min(
        max(relative_error(ours, result.gradient), abs(loss.item() - result.loss) / abs(result.loss))
        for result in expected
    )


def leaked(net: nn.Module) -> list[str]:
    """Attributes of a network that hold tensors of a transform or of a trace."""
    return [
        f"{layer}.{name}" if layer else name
        for layer, module in net.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if isinstance(value, FakeTensor)
        or (isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value))
    ]


def refused(case: Case, run: Callable[[], None]) -> bool:
    """Whether the case may be and is refused in one line; raises what else went wrong."""
    try:
        run()
    except SettingError as error:
        if case.refusal and re.search(case.refusal, str(error)) and "\n" not in str(error):
            return True
        raise
    return False


def touched(case: Case) -> set[str]:
    """The buffers that a call of the network changes."""
    net = case.network()
    before = {name: value.clone() for name, value in net.named_buffers()}
    with torch.no_grad():
        net(case.episode().support_inputs[0])
    return {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}


def check_untouched(case: Case, net: nn.Module, before: dict[str, torch.Tensor], objects: list[int]) -> None:
    """The network has the parameters that it had; at most a buffer changes that calling it changes."""
    after = net.state_dict()
    gone = [name for name in before if name not in after]
    assert not gone, f"{gone} of the network are gone"
    assert objects == [id(value) for value in net.parameters()], "the network's parameters are other objects"
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    allowed = changed and (changed if case.stateful else touched(case))
    assert set(changed) <= set(allowed), f"{changed} of the network changed"
    assert not leaked(net), f"{leaked(net)} hold tensors of a transform"


def after_step(case: Case, number: int, *networks: nn.Module) -> None:
    """Move the parameters, and after the first step make the case's change."""
    for network in networks:
        with torch.no_grad():
            for value in network.parameters():
                value += 0.01
        if case.change and number == 0:
            case.change(network)


def check_steps(case: Case, **settings) -> None:
    """Two meta-steps: the second replays what the first traced, with other parameters and after a change."""
    net, plain = case.network(), case.network(plain=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    objects = [id(value) for value in net.parameters()]
    maml = module(case, net, **settings)
    for number in range(2):
        episode = case.episode(number)
        if case.stateful:
            plain.load_state_dict(net.state_dict())
        try:
            expected = loop(case, plain, episode, **settings)
        except RuntimeError as error:  # a plain loop cannot do it either
            with pytest.raises(SettingError, match=r"^[^\n]*$"):
                step_error(maml, episode, [])
            pytest.skip(f"refused, as the plain loop cannot run it: {str(error).splitlines()[0]}")
        error = step_error(maml, episode, expected)
        assert error < TOLERANCE, f"step {number}: relative error {error:.1e}"
        check_untouched(case, net, before, objects)
        after_step(case, number, net, plain)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        objects = [id(value) for value in net.parameters()]


def check_adapt(case: Case) -> None:
    """``adapt`` gives the loop's fast weights, as a network of the same kind."""
    net, plain, episode = case.network(), case.network(plain=True), case.episode(tasks=1)
    expected = loop(case, plain, episode, 3)
    support_x, support_y, query_x, _ = (part[0] for part in episode)
    adapted = module(case, net, inner_steps=3).adapt(support_x, support_y)
    assert not leaked(net)
    assert not leaked(adapted)
    with torch.no_grad():
        outputs = adapted(query_x)
    errors = [((outputs - e.outputs[0][-1]).norm() / e.outputs[0][-1].norm()).item() for e in expected]
    assert min(errors) < TOLERANCE, f"adapt: relative error {min(errors):.1e}"


def check_trajectory(case: Case) -> None:
    """Evaluation gives the loop's outputs before adaptation and after each step, in inference mode."""
    net, plain, episode = case.network(), case.network(plain=True), case.episode()
    expected = loop(case, plain, episode, 2)
    maml = module(case, net, inner_steps=1, eval_inner_steps=2)
    for _ in range(2):
        with torch.inference_mode():
            outputs = maml.trajectory(episode)
        assert len(outputs) == 3
        errors = [
            max(
                ((outputs[k][task] - result.outputs[task][k]).norm() / result.outputs[task][k].norm()).item()
                for k in range(3)
                for task in range(episode.tasks)
            )
            for result in expected
        ]
        assert min(errors) < TOLERANCE, f"trajectory: relative error {min(errors):.1e}"


def check_copies(case: Case) -> None:
    """Deep copies, pickles and checkpoints of a module that has run give what it gives."""
    net, plain, episode = case.network(), case.network(plain=True), case.episode(1)
    maml = module(case, net, **QUICK)
    maml.training_step(case.episode(0), 0).backward()
    maml.zero_grad()
    if case.stateful:
        plain.load_state_dict(net.state_dict())
    expected = loop(case, plain, episode, **QUICK)
    state = {name: value.clone() for name, value in maml.state_dict().items()}
    copies = {"deepcopy": lambda: copy.deepcopy(maml), "pickle": lambda: pickle.loads(pickle.dumps(maml))}
    for name, probe in {"deepcopy": copy.deepcopy, "pickle": pickle.dumps}.items():
        used = case.network()
        used(case.episode().support_inputs[0])
        try:
            probe(used)  # what torch cannot copy, nobody can
        except Exception:
            del copies[name]

    def loaded() -> MAML:
        other = module(case, case.network(seed=5), **QUICK)
        other.load_state_dict(state)
        return other

    for name, make in {**copies, "state_dict": loaded}.items():
        error = step_error(make(), episode, expected)
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


# Where tasks are vectorized, PyTorch warns of operators that it then runs one by one.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
COMPANIONS = {"trajectory": check_trajectory, "copies": check_copies}
quick = [case for case in CASES if case.quick]
ids = {"ids": lambda value: value.name if isinstance(value, Case) else None}


@pytest.mark.parametrize("case", quick, **ids)
def test_two_meta_steps_are_those_of_the_plain_loop(case):
    refused(case, lambda: check_steps(case, **QUICK))


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", CASES, **ids)
def test_all_settings_are_those_of_the_plain_loop(case, settings):
    refused(case, lambda: check_steps(case, **SETTINGS[settings]))


@pytest.mark.parametrize("case", [case for case in CASES if not case.change], **ids)
def test_adapt_is_that_of_the_plain_loop(case):
    refused(case, lambda: check_adapt(case))


@pytest.mark.exhaustive
@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("case", CASES, **ids)
def test_evaluation_and_copies_are_those_of_the_plain_loop(case, companion):
    if case.change:
        pytest.skip("differs from another case between steps alone")
    if case.stateful and companion == "trajectory":
        pytest.skip("its outputs depend on how often it was called before")
    refused(case, lambda: COMPANIONS[companion](case))
