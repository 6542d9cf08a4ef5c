"""Training and evaluation on torch's ``meta`` device: no value is read, and no tensor is on another device.

There reading a number raises, and so does an operator of tensors on two devices; a training step that runs there waits
for no GPU and mixes no devices. The checks that need values are left out, for there are none.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import LSTM
from maml_lightning import (
    MAML,
    MLP,
    ConvNet,
    ConvNet1d,
    Episode,
    GlyphsDataModule,
    GRUNet,
    InnerLoop,
    LastCheckpoint,
    ResNet12,
    SettingError,
    TextNet,
    devices,
)
from maml_lightning.command_line.errors import explain
from maml_lightning.engine import agreement, differentiation
from maml_lightning.engine.differentiation import by_autograd
from maml_lightning.engine.execution import Executor
from maml_lightning.engine.kernels import alone
from maml_lightning.engine.kernels.recurrence import recurrences
from maml_lightning.engine.kernels.swapping import swapping
from maml_lightning.engine.state import RandomState

META = torch.device("meta")
WAYS = 3


def episode(*shape: int, integers: bool = False, tasks: int = 2) -> Episode:
    def part(count: int) -> tuple[Tensor, Tensor]:
        size = (tasks, WAYS * count)
        x = torch.empty(*size, *shape, dtype=torch.int64 if integers else torch.float32, device=META)
        return x, torch.empty(size, dtype=torch.int64, device=META)

    return Episode(*part(1), *part(2))


def conv_net(**settings: Any) -> nn.Module:
    return ConvNet(out_features=WAYS, hidden_channels=2, blocks=1, **settings)


IMAGES = episode(1, 4, 4)
NETWORKS: dict[str, tuple[Any, Episode]] = {
    "ConvNet": (conv_net, IMAGES),
    "ConvNet, pooled": (lambda: conv_net(pooling=True), IMAGES),
    "ConvNet, TaskNorm": (lambda: conv_net(normalization="tasknorm"), IMAGES),
    "ResNet12, DropBlock": (
        lambda: ResNet12(out_features=WAYS, hidden_channels=(4,), drop_probability=0.2, drop_size=3),
        episode(3, 4, 4),
    ),
    "MLP": (lambda: MLP(4, WAYS, (8,)), episode(4)),
    "GRU": (lambda: GRUNet(2, WAYS, 4), episode(2, 2)),
    "LSTM": (lambda: LSTM(WAYS), episode(3, 16)),
    "ConvNet1d": (lambda: ConvNet1d(2, WAYS, 4, blocks=2), episode(8, 2)),
    "transformer": (lambda: TextNet(10, WAYS, 8, blocks=1, heads=2), episode(5, integers=True)),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, WAYS)), episode(4)),
    "running statistics": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, WAYS)),
        episode(4),
    ),
}
FAMILY: dict[str, dict[str, Any]] = {
    "MAML": {},
    "flat memory": {"flat_memory": True, "inner_steps": 3},
    "first order": {"first_order": True},
    "ANIL": {"adapted_parameters": "head"},
    "BOIL": {"adapted_parameters": "body"},
    "Meta-SGD": {"learn_inner_lr": "weight"},
    "LSLR": {"learn_inner_lr": "step"},
    "momentum": {"inner_optimizer": "momentum", "inner_weight_decay": 0.1},
    "Adam": {"inner_optimizer": "adam", "inner_clip_norm": 1.0},
    "iMAML": {"algorithm": "imaml"},
    "Reptile": {"algorithm": "reptile"},
    "prototypes": {"head": "prototypes"},
    "support statistics": {"query_statistics": "support"},
    "running statistics": {"query_statistics": "running", "adapted_parameters": "head"},
    "meta-curvature": {"meta_curvature": True},
    "per-step normalization": {"per_step_normalization": True},
    "MAML++": {"multi_step_epochs": 5, "learn_inner_lr": "step", "per_step_normalization": True},
}


def trains_and_evaluates(net: nn.Module, batch: Episode, **settings: Any) -> MAML:
    """Two training steps, with clipping and Adam, and an evaluation, all on the meta device."""
    maml = MAML(net, **{"inner_lr": 0.1, "inner_steps": 2, **settings}).to(META)
    optimizer = maml.configure_optimizers()
    for _ in range(2):  # the second replays what the first recorded
        optimizer.zero_grad()
        loss = maml.training_step(batch, 0)
        loss.backward()
        nn.utils.clip_grad_norm_(maml.parameters(), 1.0)
        optimizer.step()
        assert loss.device == META
        assert loss.shape == ()
    grads = {name: value.grad for name, value in maml.named_parameters() if value.requires_grad}
    assert all(grad is not None and grad.device == META for grad in grads.values())
    maml.eval()
    outputs = maml.trajectory(batch)
    assert [(output.shape, output.device) for output in outputs] == 3 * [((2, 2 * WAYS, WAYS), META)]
    rows = maml.scoring.rows(outputs, batch.query_targets, range(2))
    assert rows.shape == (2, 3 + 3)
    assert rows.device == META
    return maml


def each(names: Any, *others: str) -> list[tuple[str, str]]:
    """Each name traced, and some vectorized without a graph and in a loop."""
    return [*((name, "traced") for name in names), *((name, way) for name in others for way in ("vectorized", "loop"))]


@pytest.mark.parametrize(("name", "execution"), each(NETWORKS, "ConvNet", "GRU", "transformer", "dropout"))
def test_networks_on_the_meta_device(name, execution):  # one that does not run so raises
    make, batch = NETWORKS[name]
    trains_and_evaluates(make(), batch, execution=execution, eval_inner_steps=2)


@pytest.mark.parametrize(("name", "execution"), each(FAMILY, "iMAML", "prototypes", "support statistics"))
def test_the_family_on_the_meta_device(name, execution):
    trains_and_evaluates(conv_net(), IMAGES, execution=execution, eval_inner_steps=2, **FAMILY[name])


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_in_a_loop_off_the_cpu_have_a_second_derivative(layer, monkeypatch):
    def cudnn(*_: Any) -> None:
        raise RuntimeError("the derivative for '_cudnn_rnn_backward' is not implemented")

    recurrent = {nn.GRU: "gru", nn.LSTM: "lstm", nn.RNN: "rnn_tanh"}[layer]
    net = layer(2, 3).to(META)
    x = torch.empty(4, 1, 2, device=META)
    called, kernel = [], alone._off_the_cpu(cudnn, recurrences()[getattr(torch, recurrent)])

    def run(*args: Any) -> Any:
        called.append(args)
        return kernel(*args)

    places = [(owner, name, run if name == recurrent else own) for owner, name, own in alone._PLACES]
    monkeypatch.setattr(differentiation, "twice_differentiable", swapping(places))
    with by_autograd():
        (first,) = torch.autograd.grad(net(x)[0].sum(), net.weight_hh_l0, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), net.weight_hh_l0)
    assert len(called) == 1
    assert second.shape == net.weight_hh_l0.shape


def test_random_numbers_of_a_device_are_put_back(monkeypatch):
    drawn = {"cuda:1": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: drawn[str(device)].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: drawn.update({str(device): state}))
    state = RandomState(torch.device("cuda", 1))
    drawn["cuda:1"] = torch.tensor([2])
    assert not state.is_current()
    with state.restored():
        assert state.is_current()
        drawn["cuda:1"] = torch.tensor([3])
    assert drawn["cuda:1"] == 2
    state.restore()
    assert drawn["cuda:1"] == 1


def test_a_checkpoint_has_the_random_numbers_of_the_device_in_use_alone(monkeypatch):
    states = {"cuda:0": torch.tensor([5]), "cuda:1": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state}))
    first, second = LastCheckpoint(), LastCheckpoint()
    first._device, second._device = torch.device("cuda", 0), torch.device("cuda", 1)
    saved = first.state_dict()
    assert saved["cuda"] == [5]
    devices.set_random_states(second._device, [saved["cpu"], *saved["cuda"]])
    assert states["cuda:1"] == 5  # as the process of the first device continues


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_pinned_for_a_gpu_alone(device, monkeypatch):
    data = GlyphsDataModule(ways=2, train_episodes=32, train_classes=4, val_classes=4)
    data.setup("fit")
    assert not data.train_dataloader().pin_memory
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, overfit_batches=0)
    assert data.train_dataloader().pin_memory == (device == "cuda")


def test_rounding_of_tf32_is_no_disagreement(monkeypatch):
    assert not agreement._is_tf32(torch.device("cpu"))
    assert agreement._is_tf32(torch.device("cuda"))  # convolutions, unless switched off
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not agreement._is_tf32(torch.device("cuda"))


def test_a_graph_that_is_kept_keeps_no_example_of_its_cotangents():
    executor = Executor("traced")
    outputs, pullback = executor.vjp(lambda a, b: a * b, (0, 0), torch.rand(2, 3), torch.rand(2, 3))
    assert pullback(outputs).shape == (2, 3)
    (pair,) = executor._graphs.values()
    assert [cotangent.device for cotangent in pair.cotangents] == [META]


def test_an_index_out_of_range_on_a_gpu_is_explained(monkeypatch):
    error = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")

    def fails(*_: Any, **__: Any) -> None:
        raise error

    maml = MAML(nn.Linear(2, 3), inner_steps=1)
    x, y = torch.rand(1, 3, 2), torch.arange(3)[None]
    maml.training_step(Episode(x, y, x, y), 0)
    monkeypatch.setattr(InnerLoop, "gradient", fails)
    with pytest.raises(
        SettingError, match=r"^The GPU stopped at an index .* --trainer.accelerator cpu, which names it"
    ):
        maml.training_step(Episode(x, y, x, y), 0)
    assert explain(error).startswith("The GPU stopped at an index out of range, such as a class")
