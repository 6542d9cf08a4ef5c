"""The zoo of networks as a page: which are exact, how they are run, their speed and memory against a plain loop."""

import datetime
import logging
import platform
import re
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

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


def way(maml: MAML) -> str:
    """How the tasks of this module are run: traced, vectorized or loop."""
    loop = maml._inner_loop
    state = loop._executor.state(Model(loop.net, loop.loss, loop.optimizer, loop.proximal))
    return loop._executor.way(state)


def error(case: Case) -> float:
    """The largest relative error of two meta-steps in float64 against the plain loop, of loss and gradient."""
    net, plain = case.network(), case.network(plain=True)
    maml, errors = test_zoo.module(case, net, inner_steps=STEPS), []
    for number in range(2):
        episode = case.episode(number)
        expected = test_zoo.loop(case, plain, episode, STEPS)
        errors.append(test_zoo.step_error(maml, episode, expected))
        test_zoo.after_step(case, number, net, plain)
    return max(errors)


def single(case: Case, plain: bool, tasks: int) -> tuple[nn.Module, Episode]:
    """The network in float32 with the adapters' or all parameters, and ``tasks`` tasks."""
    net = case.network(plain)
    net = net.to(torch.complex64) if any(value.is_complex() for value in net.parameters()) else net.float()
    parts = case.episode(tasks=tasks)
    return net, Episode(*(part.float() if part.is_floating_point() else part for part in parts))


def measure(case: Case, tasks: int, rounds: int) -> Row:
    """Exactness in float64; time and peak memory of one meta-step of ``tasks`` tasks in float32, all defaults."""
    try:
        worst = error(case)
        (net, episode), (plain, _) = single(case, False, tasks), single(case, True, tasks)
        maml = test_zoo.module(case, net, inner_steps=STEPS)

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
    return Row(case.name, worst, way(maml), first, speed, peak_bytes(ours) / peak_bytes(theirs))


def _table(cases: Iterable[Case], tasks: int, rounds: int, seen: list[Row]) -> list[str]:
    lines = ["| network | exact, relative error | run | first step | speed | memory |", f"{'|---' * 6}|"]
    for case in cases:
        seen.append(measure(case, tasks, rounds))
        lines.append(seen[-1].cells())
        print(lines[-1], flush=True)
    return lines


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
    start, seen = time.perf_counter(), list[Row]()

    def chosen(cases: Iterable[Case]) -> list[Case]:
        return [case for case in cases if re.search(pattern, case.name)]

    installed = [
        c for c in families.CASES if (kind := c.name.split()[0]) not in families.OTHERS or families.installed(kind)
    ]
    usual = _table(chosen(USUAL), max(tasks // 4, 1), rounds, seen)
    small = _table(chosen(test_zoo.CASES), tasks, rounds, seen)
    known = _table(chosen(installed), max(tasks // 4, 1), rounds, seen)
    measured = [row for row in seen if row.way]
    minutes = (time.perf_counter() - start) / 60
    out.write_text("\n".join([
        "# Networks",
        "",
        f"{len(seen)} networks, each against a plain loop over tasks with `torch.autograd.grad(create_graph=True)` "
        "(`tests/zoo/loop.py`); the page is written by `python -m benchmarks networks`.",
        "",
        f"- exact: two meta-steps of {STEPS} inner steps in float64, second order; the largest error of loss and "
        "gradient relative to the loop's. 1e-9 counts as exact.",
        "- run: `traced`, as a recorded graph, vectorized over tasks; `vectorized`, without a graph; `loop`, task by "
        "task (`--model.execution`).",
        "- first step, speed, memory: float32, 5 support and 4 query examples per task, all settings at their "
        "defaults. The first step traces and measures the chunk size; speed is how many times as fast as the loop a "
        "later meta-step is; memory is the peak of its tensors, as a multiple of the loop's.",
        "",
        f"{sum(row.error < test_zoo.TOLERANCE for row in measured)} of {len(measured)} that run are exact; median "
        f"speed {statistics.median(row.speed for row in measured) if measured else 0:.2f}. Measured in "
        f"{minutes:.0f} minutes on {datetime.date.today():%Y-%m-%d} with torch {torch.__version__}, one thread, "
        f"{platform.machine()}.",
        "",
        f"## Of usual size ({max(tasks // 4, 1)} tasks)", "", *usual,
        "", f"## Small, one of each kind ({tasks} tasks)", "", *small,
        "", f"## Of other packages ({max(tasks // 4, 1)} tasks)", "", *known, "",
    ]))  # fmt: skip
