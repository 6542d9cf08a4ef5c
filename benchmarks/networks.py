"""The zoo of networks as a page: which are exact, how they are run, their speed and memory against a plain loop."""

import datetime
import logging
import platform
import re
import statistics
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from benchmarks.measure import seconds
from maml_lightning import MAML, ConvNet, ConvNet1d, Episode, GRUNet, ResNet12, SettingError, TextNet
from maml_lightning.algorithms.steps import Model
from tests.zoo import families, test_lora, test_zoo
from tests.zoo.case import CLASSES, Case
from tests.zoo.loop import meta_gradient
from tests.zoo.memory import peak_bytes

STEPS = 3
CPU = torch.device("cpu")


def _with_lora() -> nn.Module:
    add_lora = test_lora.documented()["add_lora"]  # its page's code draws random numbers the first time
    torch.manual_seed(0)
    return add_lora(TextNet(1000, CLASSES, blocks=2))


USUAL = [
    Case("ConvNet, 64 filters, 28x28", lambda: ConvNet(1, CLASSES), (1, 28, 28)),
    Case("ConvNet, 64 filters, max-pooled, 84x84", lambda: ConvNet(3, CLASSES, pooling=True), (3, 84, 84)),
    Case("ResNet12, a quarter of its width, 84x84", lambda: ResNet12(3, CLASSES, (16, 40, 80, 160)), (3, 84, 84)),
    Case("GRUNet, 50 times", lambda: GRUNet(3, CLASSES), (50, 3)),
    Case("LSTM, 64 features, 50 times", lambda: test_zoo.sequences.Recurrent(nn.LSTM, hidden=64), (50, 4)),
    Case("ConvNet1d, 200 times", lambda: ConvNet1d(3, CLASSES), (200, 3)),
    Case("TextNet, 2 blocks, 32 tokens", lambda: TextNet(1000, CLASSES, blocks=2), (32,), 1000),
    Case("LoRA of TextNet, 2 blocks, 32 tokens", _with_lora, (32,), 1000),
]  # fmt: skip


class Row(NamedTuple):
    """What was measured of one network; ``note`` says why the rest is missing."""

    name: str
    error: float = 0.0
    way: str = ""
    first: float = 0.0
    speed: float = 0.0
    memory: float = 0.0
    note: str = ""

    def cells(self) -> str:
        exact = self.note or (
            f"yes, {self.error:.0e}" if self.error < test_zoo.TOLERANCE else f"**no, {self.error:.0e}**"
        )
        rest = [self.way, f"{self.first:.1f} s", f"{self.speed:.2f}", f"{self.memory:.2f}"] if self.way else [""] * 4
        return f"| {self.name} | {exact} | {' | '.join(rest)} |"


def way(maml: MAML, tasks: int) -> str:
    """How so many tasks of this module are run: traced, vectorized or loop."""
    loop = maml._inner_loop
    state = loop._executor.state(Model(loop.net, loop.loss, loop.optimizer, loop.proximal))
    return loop._executor.way(state, tasks)


def error(case: Case) -> float:
    """The largest relative error of two meta-steps in float64 against the plain loop, of loss and gradient.

    Where calls change buffers that the outputs depend on, each usual way of a loop to treat them counts: new for each
    call, for each task, or never.
    """
    net, plain = case.network(), case.network(plain=True)
    maml, errors = test_zoo.module(case, net, inner_steps=STEPS), []
    for number in range(2):
        episode = case.episode(number)
        if case.stateful:
            plain.load_state_dict(net.state_dict())
        expected = test_zoo.loop(case, plain, episode, STEPS)
        errors.append(test_zoo.step_error(maml, episode, expected))
        test_zoo.after_step(case, number, net, plain)
    return max(errors)


def single(case: Case, plain: bool, tasks: int) -> tuple[nn.Module, Episode]:
    """The network and ``tasks`` tasks in float32; with complex parameters, which have no such cast, as they are."""
    net, parts = case.network(plain), case.episode(tasks=tasks)
    if any(value.is_complex() for value in net.parameters()):
        return net, parts
    return net.float(), Episode(*(part.float() if part.is_floating_point() else part for part in parts))


def measure(case: Case, tasks: int, rounds: int) -> Row:
    """Exactness in float64; time and peak memory of one meta-step of ``tasks`` tasks in float32, all defaults."""
    try:
        worst = error(case)
        net, episode = single(case, False, tasks)
        plain, _ = single(case, isinstance(net, OptimizedModule), tasks)  # with checkpoints, where there are
        maml = MAML(net, inner_lr=case.lr, loss=case.loss, inner_steps=STEPS)

        def ours() -> None:
            maml.training_step(episode, 0).backward()

        def theirs() -> None:
            meta_gradient(plain, episode, case.lr, STEPS, case.loss, buffers="kept", outputs_before=False)

        first = seconds(ours, CPU)
        ours()
        theirs()
    except SettingError as refusal:
        return Row(case.name, note=f"refused: {str(refusal).splitlines()[0]}")
    except Exception as failure:
        return Row(case.name, note=f"**fails**: {(str(failure).splitlines() or [type(failure).__name__])[0]}")
    taken = [(seconds(theirs, CPU), seconds(ours, CPU)) for _ in range(rounds)]
    speed = statistics.median(loop / own for loop, own in taken)
    return Row(case.name, worst, way(maml, tasks), first, speed, peak_bytes(ours) / peak_bytes(theirs))


def chosen(pattern: str) -> list[tuple[Case, bool]]:
    """The networks whose names match, and whether they are of usual size."""
    others = [c for c in families.CASES if (k := c.name.split()[0]) not in families.OTHERS or families.installed(k)]
    all_cases = [*((case, True) for case in USUAL), *((c, False) for c in test_zoo.CASES), *((c, True) for c in others)]
    return [(case, usual) for case, usual in all_cases if re.search(pattern, case.name)]


def networks(pattern: str = "", tasks: int = 16, rounds: int = 5, out: Path = Path("docs/networks.md")) -> None:
    """Measure the zoo of networks against a plain loop over tasks, and write the page.

    Args:
        pattern: regular expression of the names to measure; without one, all are measured.
        tasks: in a meta-batch; a quarter of them for networks of usual size.
        rounds: of each time; the median counts.
        out: the page.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for case, usual in chosen(pattern):
        rows.append(measure(case, max(tasks // 4, 1) if usual else tasks, rounds))
        print(rows[-1].cells(), flush=True)
    measured = f"{datetime.date.today():%Y-%m-%d} with torch {torch.__version__}, one thread, {platform.machine()}"
    out.write_text(page(rows, tasks, measured))


def page(rows: list[Row], tasks: int, measured: str) -> str:
    """The page: the rows by kind, one for each that ``GROUPS`` names, and what was refused.

    Args:
        rows: all that were measured.
        tasks: in a meta-batch of the small networks.
        measured: when, with what and where.
    """
    exact = [row for row in rows if row.way and row.error < test_zoo.TOLERANCE]
    run, by_name = [row for row in rows if row.way], {row.name: row for row in rows}
    lines = [INTRODUCTION.format(
        rows=len(rows), exact=len(exact), run=len(run), steps=STEPS, tasks=tasks, few=max(tasks // 4, 1),
        measured=measured, speed=statistics.median(row.speed for row in run) if run else 0,
    )]  # fmt: skip
    for title, names in GROUPS.items():
        found = [by_name[name] for name in names if name in by_name and not by_name[name].note.startswith("refused")]
        if found:
            head = ["| network | exact, relative error | run | first step | speed | memory |", f"{'|---' * 6}|"]
            lines += [f"## {title}", "", *head, *(row.cells() for row in found), ""]
    refused = [f"- {row.name}: {row.note.removeprefix('refused: ')}" for row in rows if row.note.startswith("refused")]
    return "\n".join([*lines, REFUSED, *refused, ""])


INTRODUCTION = """# Networks

{rows} networks were each compared with a plain loop over tasks, `torch.autograd.grad(create_graph=True)` of
`tests/zoo/loop.py`. {exact} of {run} that run are exact; the median speed is {speed:.1f} times the loop's. The tables
have one network of each kind. `python -m benchmarks networks` measures and writes this page.

- **exact**: two meta-steps of {steps} inner steps in float64, second order; the largest error of loss and gradient
  relative to the loop's. An error below 1e-9 counts as exact.
- **run**: `traced`, as a recorded graph that is vectorized over tasks; `vectorized`, without a graph; `loop`, task by
  task (`--model.execution`). The package chooses the way; if it is not `traced`, a message says why.
- **first step**, **speed**, **memory**: in float32 with {tasks} tasks ({few} for networks of usual size and those of
  other packages) of 5 support and 4 query examples, all settings at their defaults. The first step records the graph.
  Speed is how many times as fast as the loop a later meta-step is: the median of rounds in one process that alternate
  between loop and package. Memory is the peak of a meta-step's tensors as a multiple of the loop's, which holds one
  task at a time; fewer tasks together (`--model.tasks_per_chunk`) take less.

Measured on {measured}.
"""

REFUSED = """## What runs task by task

A network runs task by task, with the side effects of a plain loop, if it draws Python's random numbers, sets a seed,
changes its attributes or parameters (as an embedding does when `max_norm` rescales a vector), or writes to its inputs.
So does a network with a branch on values, `.item()`, or a size that depends on values, such as `x[mask]` or a packed
sequence. Multiply by the mask, or use `torch.where` or a padded batch, to train it as a recorded graph. torchvision's
StochasticDepth runs task by task, too, unless its probability is 0.
Random layers of other networks draw different numbers than a loop, from the same distribution. An attribute that is a
tensor is compared at each step; register a large one as a buffer.

## What is not run

Each of these raises an error of one line that names the setting and the remedy:

- TorchScript in a network, in second order: PyTorch's second derivatives of it are wrong. Give the module that it was
  made of, or set `--model.first_order true`.
- Lazy layers that have no values yet: call the network once on an example before it is given.
- A network inside `DataParallel` or `DistributedDataParallel`: give the network inside; several devices are the
  Trainer's to use (`--trainer.devices`).
- An operator whose derivative PyTorch lacks: set `--model.first_order true`, or use another operator. An example is
  the third derivative of batch normalization, for a network that takes a gradient of itself. PyTorch 2.6 does not
  refuse it, and gets it wrong.
- A loss with trainable parameters of its own, or one that reads those of the network, such as a penalty: make them
  parameters of the network, and add penalties to what your `training_step` returns.
- Second-order gradients that need inputs which the network has overwritten (a plain loop fails, too): let it work on
  `x.clone()`.

Of the networks measured:
"""

# The rows of the page, one for each kind of network; the rest is measured, too, and counts in its first lines.
GROUPS: dict[str, tuple[str, ...]] = {
    "Of usual size": tuple(case.name for case in USUAL),
    "Convolutions and what is built of them": (
        "conv, view", "conv, BatchNorm2d, ReLU, MaxPool2d, view", "grouped convolution, Tanh",
        "depthwise-separable convolution, Tanh", "transposed convolution, Tanh",
        "weight standardization convolution, Tanh", "channels last convolution, Tanh", "Conv1d", "Conv3d",
        "ResNet block", "DenseNet block", "memory-efficient DenseNet block", "squeeze-excite", "U-Net",
    ),
    "Normalization": (
        "conv, BatchNorm2d, Tanh", "BatchNorm2d in evaluation mode", "frozen pretrained backbone", "FrozenBatchNorm2d",
        "conv, GroupNorm, Tanh", "conv, LayerNorm, Tanh", "conv, InstanceNorm2d, Tanh", "conv, RMSNorm, Tanh",
        "weight_norm", "spectral_norm", "spectral_norm in evaluation mode", "old weight_norm", "old spectral_norm",
    ),
    "Activations and pooling": (
        "conv, ELU, Flatten", "conv, SiLU, Flatten", "conv, Hardsigmoid, Flatten", "conv, MaxPool2d(2, dilation=2)",
        "conv, AdaptiveAvgPool2d(3)", "FractionalMaxPool2d", "Dropout in evaluation mode", "StochasticDepth with p=0",
    ),
    "Recurrent": (
        "LSTM", "GRU", "RNN", "LSTM, bidirectional, 2 layers", "LSTM, packed", "LSTMCell",
        "out[:, i] = h, torch.zeros",
    ),
    "Attention": (
        "MultiheadAttention, module", "scaled_dot_product_attention, plain", "TransformerEncoder", "ViT", "GPT",
    ),
    "Tokens, losses and other layers": (
        "Embedding", "Embedding(max_norm)", "EmbeddingBag(mean)", "masked tokens", "checkpoint", "Bilinear",
        "complex parameters", "mse_loss",
    ),
    "What depends on more than tensors": (
        "attribute changed", "module global changed", "tensor attribute", "hook added", "hooks", "branch on the data",
        "counter", "running mean in use", "module registered twice", "tied weights", "autograd in forward",
        "autograd.Function", "frozen parameter", "TorchScript submodule", "compiled", "LayerDrop with p=0",
    ),
    "Families of other packages": tuple(case.name for case in families.CASES),
}  # fmt: skip
