"""Runs side by side, from their log folders: ``python -m maml_lightning.comparison RUN [RUN ...]``.

Draws validation accuracy (regression: mean squared error) against meta-steps and prints a table, a row per run.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from maml_lightning.analysis.runs import Run, labelled, read_run
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

# Okabe and Ito's colors, distinct to color-blind eyes; line styles distinguish lines of the same color.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
STYLES = ["-", "--", ":", "-."]
UNKNOWN = "\N{EN DASH}"
DPI = 150  # 1200 pixels: sharp at the width of a README


def table(runs: Sequence[Run], reach: Sequence[float] = ()) -> str:
    """The runs as a Markdown table; what is not known, or was not reached, is a dash.

    Args:
        runs: at least one, all with the same metric.
        reach: validation scores (accuracy as a fraction), each a column of the minutes until a run reached it.
    """
    metric = runs[0].metric
    score = {"accuracy": "accuracy, %"}.get(metric, metric)
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
    """What ``test_results.json`` is about: ``accuracy``, ``mse``, or else what stands first in it."""
    return next((metric for metric in ("mse", "accuracy") if metric in results), next(iter(results)))


def tested(results: dict[str, Any]) -> str:
    """The score in ``test_results.json`` with its interval: ``98.70 ± 0.40``, in per cent, or ``0.14 ± 0.02``, mse."""
    metric = metric_of(results)
    interval = results.get("ci95")
    return _score(metric, results[metric]) + ("" if interval is None else f" ± {_score(metric, interval)}")


def draw(runs: Sequence[Run]) -> Figure:
    """Validation score against meta-steps, a line for each run, with its 95 % interval as a band where it is known.

    The axis shows what differs: the chance of guessing a class is drawn where the scores come near it.

    Args:
        runs: at least one, all with the same metric.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # no pyplot: nothing outside the figure changes
    axes = figure.add_subplot()
    for index, run in enumerate(runs):
        steps, scores = zip(*run.curve, strict=True)
        style = STYLES[index // len(COLORS) % len(STYLES)]
        color = COLORS[index % len(COLORS)]
        axes.plot(steps, scores, style, color=color, label=_label(run.name), linewidth=2, marker="o", markersize=4)
        if half := dict(run.intervals or []):
            widths = [half.get(step, 0.0) for step in steps]
            below, above = (
                [score + sign * width for score, width in zip(scores, widths, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(steps, below, above, color=color, alpha=0.15, linewidth=0)
    if runs[0].metric == "mse":
        axes.set(ylabel="validation mean squared error", yscale="log")
    elif runs[0].metric != "accuracy":
        axes.set(ylabel=f"validation {runs[0].metric}")
    else:
        axes.set(ylabel="validation accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    low, high = axes.get_ylim()
    for ways in sorted({run.ways for run in runs if run.ways}):
        if low - (high - low) / 4 < 1 / ways:
            axes.axhline(1 / ways, color="grey", linestyle=(0, (1, 2)), label=f"chance, {ways} classes")
    if len(tasks := {run.task for run in runs}) == 1:
        axes.set_title(_label(tasks.pop()), parse_math=False)
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


def _label(name: str) -> str:
    """As matplotlib shows it: it would leave out one that begins with an underscore."""
    return f" {shown(name)}" if name.startswith("_") else shown(name)


def _score(metric: str, value: float) -> str:
    return f"{100 * value:.2f}" if metric == "accuracy" else f"{value:.3g}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)
