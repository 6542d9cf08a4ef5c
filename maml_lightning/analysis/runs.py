"""What the log folders of runs hold: settings, validation scores, costs and tests."""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maml_lightning.errors import SettingError

# What makes MAML plain: a run's label names the settings that differ.
PLAIN_MAML = {
    "adapted_parameters": "all",
    "learn_inner_lr": None,
    "multi_step_epochs": 0,
    "first_order_epochs": 0,
    "per_step_normalization": False,
    "query_statistics": "batch",
    "head": "learned",
    "meta_curvature": False,
    "inner_optimizer": "sgd",
    "inner_weight_decay": 0.0,
    "inner_clip_norm": None,
}

Curve = list[tuple[int, float]]


class Run(NamedTuple):
    """What a run's log folder holds.

    Args:
        name: its label.
        metric: ``accuracy`` (a fraction), ``mse``, or what else was logged of the validation, such as ``loss``.
        curve: meta-steps done, and the validation score then.
        ways: classes in an episode.
        test: what ``test_results.json`` holds.
        seconds_per_step: of one meta-step, the median of the epochs.
        peak_memory_mb: the largest of the epochs.
        minutes: meta-steps done, and the minutes that they took, validations included.
        intervals: meta-steps done, and half the width of the 95 % interval of the validation score.
        task: its data, ways and shots in words; empty where they are unknown.
    """

    name: str
    metric: str
    curve: Curve
    ways: int | None = None
    test: dict | None = None
    seconds_per_step: float | None = None
    peak_memory_mb: float | None = None
    minutes: Curve | None = None
    intervals: Curve | None = None
    task: str = ""

    @property
    def best(self) -> float:
        """The best validation score."""
        return (min if self.lower_is_better else max)(score for _, score in self.curve)

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower score is a better one."""
        return any(word in ("mse", "loss", "error", "mae", "rmse") for word in self.metric.split("_"))

    def minutes_to(self, score: float) -> float | None:
        """How long it took until a validation reached the score; None where none did, or that is not known."""
        sign = -1 if self.lower_is_better else 1
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
    scores = (tag.removeprefix("val/") for tag in history[-1] if tag.startswith("val/"))
    logged = sorted(score for score in scores if not re.search(r"_step_|_ci95$", score))
    of_its_own = [metric for metric in logged if metric not in ("accuracy", "mse", "loss")]
    metric = next((metric for metric in ("accuracy", "mse", *of_its_own, "loss") if metric in logged), None)
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
        [(step + 1, half) for step, half in curve(f"val/{metric}_ci95")],
        task_text(config),
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
        name or algorithm_text(read_config(folder)) or str(folder)
        for (name, *_), folder in zip(split, folders, strict=True)
    ]
    return [
        (name if names.count(name) == 1 else f"{name} ({folder})", folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def _task(config: dict[str, Any]) -> dict[str, Any]:
    """What tasks a run's data are: the class of the data, ways and shots; unknown without a config."""
    data = config.get("data") or {}
    settings = data.get("init_args") or {}
    return {"data": data.get("class_path"), **{key: settings.get(key) for key in ("ways", "shots")}}


def task_text(config: dict[str, Any]) -> str:
    """The tasks in words, such as ``5-way 1-shot of GlyphsDataModule``; empty without any settings of the data."""
    task = _task(config)
    words = [f"{task[number]}-{number[:-1]}" for number in ("ways", "shots") if task[number]]
    kind = str(task["data"] or "").rpartition(".")[2]
    return " ".join([*words, *(["of"] if words and kind else []), kind]).strip()


def algorithm_text(config: dict[str, Any]) -> str:
    """The algorithm in words, such as ``MAML, 5 inner steps, adapted_parameters head``.

    Args:
        config: a run's settings. Without any of the model, the text is empty.
    """
    model = config.get("model") or {}
    if "inner_steps" not in model:
        return ""
    steps = model["inner_steps"]
    pretraining = ((config.get("data") or {}).get("init_args") or {}).get("pretraining")
    if not steps:
        return "pre-training" if pretraining else "without MAML"
    name = {"imaml": "iMAML", "reptile": "Reptile"}.get(model.get("algorithm", ""), "MAML")
    name = f"FO{name}" if model.get("first_order") else name
    changed = [f"{key} {model[key]}" for key, plain in PLAIN_MAML.items() if model.get(key, plain) != plain]
    return ", ".join([name, f"{steps} inner step{'' if steps == 1 else 's'}", *changed])
