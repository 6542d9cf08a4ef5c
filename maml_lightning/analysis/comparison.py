"""Runs side by side, from their log folders: ``python -m maml_lightning.comparison RUN [RUN ...]``.

Draws validation accuracy (regression: mean squared error) against meta-steps and prints a table, a row for each run.
"""

import inspect
import json
import statistics
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.training.module import MAML

# Okabe and Ito's colours, distinct to colour-blind eyes; line styles tell apart what has the same colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
STYLES = ["-", "--", ":", "-."]
UNKNOWN = "\N{EN DASH}"
VARIATIONS = [
    "adapted_parameters",
    "learn_inner_lr",
    "multi_step_epochs",
    "first_order_epochs",
    "per_step_normalization",
    "inner_optimizer",
    "inner_weight_decay",
    "inner_clip_norm",
]  # settings that a label names where they are not the default
DPI = 150  # 1200 pixels: sharp at the width of a README

Curve = list[tuple[int, float]]


class Run(NamedTuple):
    """What a run's log folder tells.

    Args:
        name: its label.
        metric: ``accuracy`` (a fraction) or ``mse``.
        curve: meta-steps done, and the validation score then.
        ways: classes in an episode.
        test: what ``test_results.json`` holds.
        seconds_per_step: of one meta-step, the median of the epochs.
        peak_memory_mb: the largest of the epochs.
        minutes: meta-steps done, and the minutes that they took, validations included.
    """

    name: str
    metric: str
    curve: Curve
    ways: int | None = None
    test: dict | None = None
    seconds_per_step: float | None = None
    peak_memory_mb: float | None = None
    minutes: Curve | None = None

    @property
    def best(self) -> float:
        """The best validation score."""
        return (min if self.metric == "mse" else max)(score for _, score in self.curve)

    def minutes_to(self, score: float) -> float | None:
        """How long it took until a validation reached the score; None where none did, or that is not known."""
        sign = -1 if self.metric == "mse" else 1
        steps = next((steps for steps, value in self.curve if sign * value >= sign * score), None)
        return None if steps is None else self.minutes_at(steps)

    def minutes_at(self, steps: int) -> float | None:
        """How long so many meta-steps took, to the end of their epoch; None where that is not known."""
        return next((minutes for done, minutes in self.minutes or [] if done >= steps), None)


def read_run(folder: Path, name: str) -> Run:
    """Read a run from its log folder; of one that was resumed, what came before as well.

    Args:
        folder: such as ``lightning_logs/version_0``.
        name: its label.

    Raises:
        SettingError: there is no such folder, or no training with validation in its event files.
    """
    config = read_config(folder)
    history = [read_scalars(part) for part in lineage(folder)]
    metric = next((metric for metric in ("accuracy", "mse") if f"val/{metric}" in history[-1]), None)
    if metric is None or not any(tag.startswith("train/") for tag in history[-1]):
        raise SettingError(
            f"run {folder} holds no event files of a training with validation; give a run folder that fit wrote, such "
            "as lightning_logs/version_0."
        )

    def curve(tag: str) -> Curve:
        return joined(part.get(tag, []) for part in history)

    seconds, memory = ([cost for _, cost in curve(f"train/{tag}")] for tag in ("seconds_per_step", "peak_memory_mb"))
    minutes = [(step + 1, minutes) for step, minutes in curve("train/minutes")]
    return Run(
        name,
        metric,
        [(step + 1, score) for step, score in curve(f"val/{metric}")],  # Lightning's first step is 0
        _task(config)["ways"] if metric == "accuracy" else None,
        find_test(folder),
        statistics.median(seconds) if seconds else None,
        max(memory, default=None),
        minutes,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run's ``config.yaml``; none without one.

    Raises:
        SettingError: there is no such folder, or the file cannot be read.
    """
    if not folder.is_dir():
        raise SettingError(f"run {folder} is not a folder; give a run folder such as lightning_logs/version_0.")
    file = folder / "config.yaml"
    try:
        return yaml.safe_load(file.read_text()) or {} if file.exists() else {}
    except yaml.YAMLError as error:
        raise SettingError(f"{file} is damaged; remove it to compare without the run's settings.") from error


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Steps and values of each tag, from all event files of a folder in the order of their writing."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def joined(curves: Iterable[Curve]) -> Curve:
    """Curves in the order of their writing as one: where a resumption went back in steps, what it replaced is gone."""
    whole: Curve = []
    for step, value in chain.from_iterable(curves):
        while whole and whole[-1][0] >= step:
            whole.pop()
        whole.append((step, value))
    return whole


def lineage(folder: Path) -> list[Path]:
    """A run's folder, and before it those of the runs that it was resumed from, oldest first."""
    folders = [folder.resolve()]
    while True:
        earlier = run_of(read_config(folders[0]).get("ckpt_path"), folder)
        if earlier is None or earlier in folders:
            return folders
        folders.insert(0, earlier)


def run_of(checkpoint: str | None, beside: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it is there.

    Args:
        checkpoint: its path; a relative one began where the runs' ``lightning_logs`` lies, or begins here.
        beside: a run folder under the same ``lightning_logs``.
    """
    for start in (beside.resolve().parents[1], Path.cwd()) if checkpoint else ():
        folder = (start / str(checkpoint)).resolve().parent.parent
        if folder.is_dir():
            return folder
    return None


def find_test(folder: Path) -> dict | None:
    """The latest test of a run's checkpoint on tasks such as it was trained on, from the run's folder or those beside.

    Other tasks are other data, ways or shots.
    """
    tests = []
    for file in folder.resolve().parent.glob("*/test_results.json"):
        results = json.loads(file.read_text())
        own = file.parent == folder.resolve()
        same = run_of(results.get("checkpoint"), folder) == folder.resolve()
        if own or (same and _task(read_config(file.parent)) == _task(read_config(folder))):
            tests.append((file.stat().st_mtime, results))
    return max(tests, key=lambda test: test[0])[1] if tests else None


def labelled(words: Sequence[str]) -> list[tuple[str, Path]]:
    """The label and the folder of each run.

    A label that is not given is the algorithm, with the folder where two are alike; the folder where it is not known.

    Args:
        words: of each run its folder, or ``NAME=folder``.
    """
    split = [("", "", word) if Path(word).is_dir() else word.rpartition("=") for word in words]
    folders = [Path(folder) for *_, folder in split]
    names = [
        name or _algorithm(read_config(folder)) or str(folder)
        for (name, *_), folder in zip(split, folders, strict=True)
    ]
    return [
        (name if names.count(name) == 1 else f"{name} ({folder})", folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def table(runs: Sequence[Run], reach: Sequence[float] = ()) -> str:
    """The runs as a Markdown table; what is not known, or was not reached, is a dash.

    Args:
        runs: at least one, all with the same metric.
        reach: validation scores (accuracy as a fraction), each a column of the minutes until a run reached it.
    """
    metric = runs[0].metric
    score = {"accuracy": "accuracy, %", "mse": "mse"}[metric]
    columns = ["run", "meta-steps", f"test {score}", f"best validation {score}", "seconds per step", "peak memory, MB"]
    columns += ["minutes", *(f"minutes to {_score(metric, score)}" for score in reach)]
    rows = [
        columns,
        ["---"] * len(columns),
        *(
            [
                shown(run.name).replace("|", "\\|"),
                f"{run.curve[-1][0]:,}",
                UNKNOWN if run.test is None else tested(run.test),
                _score(metric, run.best),
                _number(run.seconds_per_step, ".3g"),
                _number(run.peak_memory_mb, ",.0f"),
                _number(run.minutes[-1][1] if run.minutes else None, ".1f"),
                *(_number(run.minutes_to(score), ".1f") for score in reach),
            ]
            for run in runs
        ),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def metric_of(results: dict[str, Any]) -> str:
    """What ``test_results.json`` is about: ``accuracy`` or ``mse``."""
    return "mse" if "mse" in results else "accuracy"


def tested(results: dict[str, Any]) -> str:
    """The score in ``test_results.json`` with its interval: ``98.70 ± 0.40``, in per cent, or ``0.14 ± 0.02``, mse."""
    metric = metric_of(results)
    interval = results.get("ci95")
    return _score(metric, results[metric]) + ("" if interval is None else f" ± {_score(metric, interval)}")


def draw(runs: Sequence[Run]) -> Figure:
    """Validation score against meta-steps, a line for each run.

    Args:
        runs: at least one, all with the same metric.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # no pyplot: nothing outside the figure changes
    axes = figure.add_subplot()
    for index, run in enumerate(runs):
        steps, scores = zip(*run.curve, strict=True)
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(steps, scores, style, color=colour, label=_label(run.name), linewidth=2, marker="o", markersize=4)
    if runs[0].metric == "mse":
        axes.set(ylabel="validation mean squared error", yscale="log")
    else:
        axes.set(ylabel="validation accuracy", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    for ways in sorted({run.ways for run in runs if run.ways}):
        axes.axhline(1 / ways, color="grey", linestyle=(0, (1, 2)), label=f"chance, {ways} classes")
    axes.set_xlabel("meta-steps")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    for label in axes.legend(edgecolor="none").get_texts():
        label.set_parse_math(False)  # a $ in a run's name is a $
    return figure


def compare(words: Sequence[str], output: Path, reach: Sequence[float] = ()) -> str:
    """Draw the runs into a file and return their table.

    Args:
        words: of each run its folder, or ``NAME=folder``.
        output: the PNG to write.
        reach: validation scores, each a column of the minutes until a run reached it.

    Raises:
        SettingError: a folder is no run's, the runs do not have the same metric, or the output is not named .png.
    """
    if output.suffix != ".png":
        raise SettingError(f"--output must end in .png (got {output}).")
    runs = [read_run(folder, name) for name, folder in labelled(words)]
    for run in runs:
        if run.metric != runs[0].metric:
            raise SettingError(
                f"run {run.name} has {run.metric}, run {runs[0].name} {runs[0].metric}; compare them in separate calls."
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(output, dpi=DPI)
    return table(runs, reach)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the words after ``python -m maml_lightning.comparison``; None takes them from ``sys.argv``.
    """
    parser = ArgumentParser("python -m maml_lightning.comparison", description="Draw runs into a PNG, print a table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="such as lightning_logs/version_0, or NAME=folder")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="the PNG to write (%(default)s)")
    parser.add_argument(
        "--reach",
        nargs="+",
        type=float,
        default=[],
        metavar="SCORE",
        help="validation accuracies from 0 to 1 (or mse), each a column of the minutes until a run reached it",
    )
    given = parser.parse_args(args)
    print(compare(given.runs, given.output, given.reach))


def _task(config: dict[str, Any]) -> dict[str, Any]:
    """What tasks a run's data are: the class of the data, ways and shots; unknown without a config."""
    data = config.get("data") or {}
    settings = data.get("init_args") or {}
    return {"data": data.get("class_path"), **{key: settings.get(key) for key in ("ways", "shots")}}


def _algorithm(config: dict[str, Any]) -> str:
    """Such as ``MAML, 5 inner steps, adapted_parameters head``; empty where the settings do not tell."""
    model = config.get("model") or {}
    if "inner_steps" not in model:
        return ""
    steps = model["inner_steps"]
    pretraining = ((config.get("data") or {}).get("init_args") or {}).get("pretraining")
    if not steps:
        return "pre-training" if pretraining else "without MAML"
    name = {"imaml": "iMAML", "reptile": "Reptile"}.get(model.get("algorithm", ""), "MAML")
    name = f"FO{name}" if model.get("first_order") else name
    defaults = {name: setting.default for name, setting in inspect.signature(MAML).parameters.items()}
    changed = [f"{key} {model[key]}" for key in VARIATIONS if model.get(key, defaults[key]) != defaults[key]]
    return ", ".join([name, f"{steps} inner step{'' if steps == 1 else 's'}", *changed])


def _label(name: str) -> str:
    """As matplotlib shows it: it would leave out one that begins with an underscore."""
    return f" {shown(name)}" if name.startswith("_") else shown(name)


def _score(metric: str, value: float) -> str:
    return f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.3g}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)
