"""What a network's state, copies, dtype and random draws do to a meta-step."""

import copy
import random
import re

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from maml_lightning import MAML, Episode, SettingError
from tests.zoo import images, python_state, random_layers, sequences
from tests.zoo.case import CLASSES, VECTOR, Case
from tests.zoo.test_zoo import QUICK, TOLERANCE, loop, module, step_error

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
PERCEPTRON = Case("perceptron", python_state.Perceptron, VECTOR)
TEMPERATURE = Case("temperature", python_state.Temperature, VECTOR)
NORM = Case("norm", lambda: images.warmed(images.ViewFlatten(images.conv(), nn.BatchNorm2d(4), nn.ReLU())))


def error(case: Case, maml: MAML, plain: nn.Module, number: int = 0) -> float:
    episode = case.episode(number)
    return step_error(maml, episode, loop(case, plain, episode, **QUICK))


def test_another_network_takes_effect():
    maml = module(PERCEPTRON, PERCEPTRON.network(), **QUICK)
    assert error(PERCEPTRON, maml, PERCEPTRON.network()) < TOLERANCE
    other, plain = PERCEPTRON.network(seed=8), PERCEPTRON.network(seed=8)
    other.act, plain.act = nn.Softplus(), nn.Softplus()
    maml.net = other
    assert error(PERCEPTRON, maml, plain) < TOLERANCE
    wider = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
    maml.net = wider
    assert error(PERCEPTRON, maml, copy.deepcopy(wider)) < TOLERANCE


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda maml: torch.optim.swa_utils.AveragedModel(maml).module])
def test_a_copy_and_its_original_have_a_state_each(copied):
    maml = module(TEMPERATURE, TEMPERATURE.network(), **QUICK)
    assert error(TEMPERATURE, maml, TEMPERATURE.network()) < TOLERANCE
    other, plain = copied(maml), TEMPERATURE.network()
    other.net.temperature = plain.temperature = 5.0
    assert error(TEMPERATURE, other, plain) < TOLERANCE
    assert error(TEMPERATURE, maml, TEMPERATURE.network()) < TOLERANCE


def test_a_copy_has_its_own_mode_and_running_statistics():
    maml = module(NORM, NORM.network(), **QUICK)
    assert error(NORM, maml, NORM.network()) < TOLERANCE
    other, plain = copy.deepcopy(maml), NORM.network().eval()
    other.net.eval()
    for net in (other.net, plain):
        net.body[1].running_mean += 1
    assert error(NORM, other, plain) < TOLERANCE
    assert error(NORM, maml, NORM.network()) < TOLERANCE


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_and_evaluating_change_nothing_in_the_network(training):
    net = NORM.network().train(training)
    before = copy.deepcopy(net.state_dict())
    maml = module(NORM, net, **QUICK)
    if not training:
        maml.training_step(NORM.episode(), 0).backward()
        maml.trajectory(NORM.episode())
        x, y, *_ = (part[0] for part in NORM.episode())
        maml.adapt(x, y)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(layer.training == training for layer in net.modules())


def test_a_checkpoint_keeps_the_loss(tmp_path):
    maml = MAML(nn.Linear(6, CLASSES), loss=F.mse_loss)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(maml)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = MAML.load_from_checkpoint(tmp_path / "a.ckpt", net=nn.Linear(6, CLASSES))
    assert loaded.loss is F.mse_loss


def test_hooks_run_at_each_call():
    net, seen = PERCEPTRON.network(), []
    net.b.register_forward_hook(lambda layer, args, output: seen.append(1))
    maml = module(PERCEPTRON, net, **QUICK)
    maml.training_step(PERCEPTRON.episode(), 0)
    first = len(seen)
    maml.training_step(PERCEPTRON.episode(), 0)
    assert 0 < first < len(seen)


def test_a_counter_counts():
    case = Case("counter", python_state.Counter, VECTOR)
    maml = module(case, case.network(), **QUICK)
    counts = []
    for _ in range(3):
        maml.training_step(case.episode(), 0)
        counts.append(maml.net.calls)
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("case", random_layers.RANDOM, ids=lambda case: case.name)
def test_random_layers_draw_anew_at_each_step(case):
    maml, losses = module(case, case.network(), **QUICK), []
    random.seed(0)
    for _ in range(6):
        maml.zero_grad()
        losses.append(maml.training_step(case.episode(), 0))
        losses[-1].backward()
        assert all(value.grad.isfinite().all() for value in maml.net.parameters())
    assert len({loss.item() for loss in losses}) > 2


@pytest.mark.parametrize("case", random_layers.RANDOM, ids=lambda case: case.name)
def test_the_seed_decides_what_random_layers_draw(case):
    maml, losses = module(case, case.network(), **QUICK), []
    maml.training_step(case.episode(), 0)  # what is done once is done
    for _ in range(2):
        torch.manual_seed(5)
        random.seed(5)
        losses.append(maml.training_step(case.episode(), 0).item())
    assert losses[0] == losses[1]


def test_tasks_draw_their_own_dropout_and_its_recomputation_the_same():
    case = next(case for case in random_layers.RANDOM if case.name.startswith("Dropout "))
    same = Episode(*(part[:1].expand(3, *part.shape[1:]) for part in case.episode()))
    gradients = {}
    for flat in (False, True):
        maml = module(case, case.network(), inner_steps=3, tasks_per_chunk=None, flat_memory=flat)
        outputs = maml.trajectory(same)[-1]
        assert not torch.allclose(outputs[0], outputs[1])
        maml.training_step(same, 0)
        torch.manual_seed(5)
        maml.training_step(same, 0).backward()
        gradients[flat] = torch.cat([value.grad.flatten() for value in maml.net.parameters()])
    assert torch.allclose(gradients[False], gradients[True], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", random_layers.RANDOM, ids=lambda case: case.name)
def test_random_layers_run_as_a_recorded_graph(case):
    maml = module(case, case.network(), **QUICK)
    maml.training_step(case.episode(), 0).backward()
    way = maml._inner_loop._executor.way(maml._inner_loop._state(3), 3)
    # Python draws, or an empty tensor that no task has a part in is filled.
    assert way == ("loop" if case.name.startswith(("LayerDrop", "StochasticDepth", "DropBlock")) else "traced")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["Dropout with p=0.5", "permuted Dropout", "TransformerEncoder with dropout"])
def test_the_mean_over_dropout_is_that_of_the_plain_loop(name):
    case = next(case for case in random_layers.RANDOM if case.name == name)
    maml, plain, episode = module(case, case.network(), **QUICK), case.network(), case.episode()
    ours = torch.tensor([maml.training_step(episode, 0).item() for _ in range(300)])
    theirs = torch.tensor([loop(case, plain, episode, **QUICK)[0].loss for _ in range(300)])
    deviation = ((ours.var() + theirs.var()) / 300).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * deviation


HALF = {
    "convolution and BatchNorm2d": Case(
        "conv", lambda: images.ViewFlatten(images.conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    ),
    "LSTM": sequences.series("LSTM", lambda: sequences.Recurrent(nn.LSTM)),
    "TransformerEncoder": sequences.series("TransformerEncoder", sequences.Encoder),
    "perceptron": PERCEPTRON,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF.values(), ids=list(HALF))
def test_half_precision_points_where_the_exact_gradient_does(case, dtype):
    net, episode = case.network(), case.episode()
    (expected,) = loop(case, case.network(), episode, **QUICK)
    maml = module(case, net.to(dtype), **QUICK)
    half = Episode(*(part.to(dtype) if part.is_floating_point() else part for part in episode))
    loss = maml.training_step(half, 0)
    loss.backward()
    ours = torch.cat([value.grad.flatten().double() for value in net.parameters()])
    theirs = torch.cat([value.flatten() for value in expected.gradient.values()])
    assert all(value.grad.dtype == dtype for value in net.parameters())
    assert loss.item() == pytest.approx(expected.loss, rel=0.1)
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_lazy_layers_are_initialized_or_refused_with_the_remedy():
    net = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(CLASSES)).double()
    episode = PERCEPTRON.episode()
    message = ""
    try:
        maml = module(PERCEPTRON, net, **QUICK)
        loss = maml.training_step(episode, 0)
    except SettingError as refusal:
        message = str(refusal)
        with torch.no_grad():
            net(episode.support_inputs[0])  # the remedy
        maml = module(PERCEPTRON, net, **QUICK)
        loss = maml.training_step(episode, 0)
    loss.backward()
    assert not message or re.search("(?i)lazy.*call it once", message)
    expected = loop(PERCEPTRON, copy.deepcopy(net), episode, **QUICK)
    assert step_error(maml, episode, expected) < TOLERANCE


@pytest.mark.parametrize("execution", ["traced", "vectorized"])
def test_torchscript_that_cannot_be_vectorized_is_named_with_the_remedy(execution):
    case = Case("scripted", python_state.scripted, VECTOR)
    maml = module(case, case.network(), execution=execution, first_order=True, **QUICK)
    with pytest.raises(
        SettingError, match=rf"^model.execution {execution} .*\(act\).*give the module .*set it to loop"
    ):
        maml.training_step(case.episode(), 0)


def test_torchscript_runs_in_first_order():
    case = Case("scripted", python_state.scripted, VECTOR)
    maml, episode = module(case, case.network(), first_order=True, **QUICK), case.episode()
    expected = loop(case, case.network(), episode, first_order=True, **QUICK)
    assert step_error(maml, episode, expected) < TOLERANCE
