"""Gradients that are not finite, with a loss scaler and without, and what a meta-step reads from a GPU."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.weak import WeakIdKeyDictionary

from maml_lightning import MAML, ConvNet, GlyphsDataModule, NonFiniteError

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


class Overflowing(nn.Linear):
    """Finite outputs, and a gradient that is not."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs + (outputs - outputs.detach()).abs().sqrt()


def batches(count: int = 1) -> DataLoader:
    inputs, targets = torch.rand(2, 4, 4), torch.tensor([[0, 0, 1, 1]]).repeat(2, 1)
    return DataLoader([(inputs, targets, inputs, targets)] * count, batch_size=None)


def large(outputs: Tensor, targets: Tensor) -> Tensor:
    return 2.0**10 * F.cross_entropy(outputs, targets)


def scaled(scale: float, steps: int) -> tuple[Trainer, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return Trainer(max_steps=steps, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **QUIET), scaler


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_scaler_does_not_hide_a_gradient_that_it_did_not_break(scale):
    trainer, scaler = scaled(scale, steps=1)
    maml = MAML(Overflowing(4, 2), inner_steps=0)
    before = [value.clone() for value in maml.parameters()]
    with pytest.raises(NonFiniteError, match=r"meta-step 0 is not finite .*batches 0 to 0, whose outputs are finite"):
        trainer.fit(maml, batches())
    assert scaler.get_scale() == scale
    assert all(map(torch.equal, maml.parameters(), before))


def test_a_scaler_lowers_a_scale_that_is_too_large_and_what_it_skips_is_counted():
    trainer, scaler = scaled(2.0**127, steps=16)  # float32 ends at 2^128, and the gradient is some 2^9
    maml = MAML(nn.Linear(4, 2), inner_steps=0, outer_lr=0.1, loss=large)
    before = maml.net.weight.detach().clone()
    trainer.fit(maml, batches(16))
    skipped = int(trainer.callback_metrics["train/skipped_steps"])
    assert 3 <= skipped < 16
    assert scaler.get_scale() == 2.0 ** (127 - skipped)
    assert maml.net.weight.isfinite().all()
    assert not torch.equal(maml.net.weight, before)
    (state, *_) = trainer.optimizers[0].state.values()
    assert state["step"] == 16 - skipped


def test_a_run_whose_every_step_a_scaler_skips_stops():
    trainer, _ = scaled(2.0**127, steps=2)
    with pytest.raises(NonFiniteError, match="2 of 2 meta-steps were skipped"):
        trainer.fit(MAML(nn.Linear(4, 2), inner_steps=0, loss=large), batches(2))


def test_with_a_scaler_skip_leaves_out_a_gradient_that_it_did_not_break():
    trainer, scaler = scaled(2.0**16, steps=2)
    maml = MAML(Overflowing(4, 2), inner_steps=0, non_finite="skip")
    with pytest.raises(NonFiniteError, match="2 of 2 meta-steps were skipped"):
        trainer.fit(maml, batches(2))
    assert trainer.optimizers[0].state == {}
    assert scaler.get_scale() == 2.0**14  # as it does where it finds a gradient that is not finite


class WithHooks(MAML):
    """Has the hooks of a meta-step to itself, and calls none of MAML's."""

    def on_before_optimizer_step(self, optimizer):
        self.seen = [*getattr(self, "seen", []), self.net.weight.grad is not None]

    def on_train_start(self):
        self.started = True

    def on_train_end(self):
        self.ended = True


def test_a_subclass_with_hooks_of_its_own_logs_as_others_do():
    trainer = Trainer(max_steps=2, **QUIET)
    maml = WithHooks(nn.Linear(4, 2), inner_lr=0.1)
    trainer.fit(maml, batches(2))
    assert {"train/loss", "train/accuracy", "train/gradient_norm"} <= trainer.callback_metrics.keys()
    assert maml.seen == [True, True]
    assert maml.started
    assert maml.ended
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(maml, batches(2))
    assert [type(callback).__name__ for callback in trainer.callbacks].count("MetaSteps") == 1


def test_a_subclass_with_hooks_of_its_own_stops_and_skips_as_others_do():
    with pytest.raises(NonFiniteError, match="meta-step 0 is not finite"):
        Trainer(max_steps=1, **QUIET).fit(WithHooks(Overflowing(4, 2), inner_steps=0), batches())
    maml = WithHooks(Overflowing(4, 2), inner_steps=0, non_finite="skip")
    with pytest.raises(NonFiniteError, match="2 of 2 meta-steps were skipped"):
        Trainer(max_steps=2, **QUIET).fit(maml, batches(2))
    assert maml.seen == [False, False]


class OwnStep(MAML):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum() * float("nan")


def test_a_training_step_of_ones_own_stops_at_a_gradient_that_is_not_finite():
    with pytest.raises(NonFiniteError, match="gradient of step 0 is not finite"):
        Trainer(max_steps=1, **QUIET).fit(OwnStep(nn.Linear(4, 2)), batches())


READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "__contains__"}


class Reads(TorchFunctionMode):
    """Notes what reads a tensor's values, for which a GPU would be waited for; not of tensors made of Python's numbers.

    Those are on the CPU everywhere, like what is computed of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = []
        self.of_python = WeakIdKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        tensors = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Tensor)]
        known = bool(tensors) and all(tensor in self.of_python for tensor in tensors)
        if name in READS and self.steps and not known:
            self.steps[-1].append(name)
        result = func(*args, **(kwargs or {}))
        if name == "tensor" or (known and name != "to"):
            self.of_python.update({part: None for part in tree_leaves(result) if isinstance(part, Tensor)})
        return result


@pytest.mark.parametrize("settings", [{}, {"head": "prototypes"}, {"inner_optimizer": "adam"}], ids=str)
def test_a_meta_step_reads_from_the_device_once(settings):
    class Watched(MAML):
        def on_train_batch_start(self, *_):
            reads.steps.append([])

    maml = Watched(ConvNet(out_features=2, hidden_channels=2, blocks=1), inner_lr=0.1, inner_steps=2, **settings)
    data = GlyphsDataModule(
        ways=2, meta_batch_size=2, train_episodes=10, val_episodes=2, train_classes=4, val_classes=4
    )
    with Reads() as reads:
        Trainer(max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0, **QUIET).fit(maml, data)
    assert len(reads.steps) == 5
    more = 1 if "head" in settings else 0  # how many classes there are
    assert reads.steps[2:4] == [["tolist"] * (1 + more)] * 2  # the first are checked; the last ends the epoch
