"""Reproducible accuracies: run an experiment as a user would, and record it with everything needed to repeat it."""

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cli import main
from maml_lightning.analysis.comparison import UNKNOWN, metric_of, tested
from maml_lightning.analysis.runs import read_run

RECORDS = Path(__file__).parents[1] / "docs" / "results"


def accuracy(
    experiment: Path,
    root: str | None = None,
    seed: int = 0,
    flags: list[str] | None = None,
    tests: list[str] | None = None,
) -> None:
    """Train with a config, test the checkpoint with the best validation score, and record both in docs/results.

    An interrupted run resumes from its last checkpoint; a finished one is only tested and recorded.

    Args:
        experiment: a config, such as configs/omniglot_5way_1shot_best.yaml.
        root: the folder of the data, for data on disk.
        seed: the seed of the network and of the episodes.
        flags: flags that override the config, such as ``["--trainer.max_epochs=4"]``; an ``--initial_checkpoint`` that
            is a record stands for the best checkpoint of its run, which is trained first if need be.
        tests: flags of each additional test, such as ``["--data.query_shots=1 --data.within_alphabet=true"]``.
    """
    _keep(run(experiment, root, seed, flags or [], tests or [], Path("lightning_logs")))


def ensemble(
    experiment: Path,
    root: str | None = None,
    seeds: list[int] | None = None,
    flags: list[str] | None = None,
    tests: list[str] | None = None,
) -> None:
    """Train with a config once for each seed, test the checkpoints as one, and record it in docs/results.

    Runs that `accuracy` has finished are not trained again.

    Args:
        experiment: a config, such as configs/omniglot_20way_1shot_best.yaml.
        root: the folder of the data, for data on disk.
        seeds: of the networks and of their training episodes; 0, 1 and 2 by default. Test episodes are the first's.
        flags: flags that override the config; {seed} in them stands for each seed, so that networks trained apart may
            begin with records of their own.
        tests: flags of each additional test.
    """
    _keep(run_ensemble(experiment, root, seeds or [0, 1, 2], flags or [], tests or [], Path("lightning_logs")))


def _keep(record: dict[str, Any]) -> None:
    """Write a record into docs/results, and print its figures."""
    file = RECORDS / f"{named(Path(record['config']), record['seed'], record['flags'])}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(file.name, *described(record), sep="\n")


def again(record: Path, root: str | None = None) -> None:
    """Repeat the run of a record in docs/results and compare; the exit status is 1 if intervals do not overlap.

    It trains in lightning_logs/again, so that it does not resume the record's own run.

    Args:
        record: a record, such as docs/results/omniglot_5way_1shot_0.json.
        root: the folder of the data, for data on disk.
    """
    old = json.loads(record.read_text())
    flags = [test["flags"] for test in old["tests"] if test["flags"]]
    repeat = run_ensemble if isinstance(old["seed"], list) else run
    new = repeat(Path(old["config"]), root, old["seed"], old["flags"], flags, Path("lightning_logs") / "again")
    print("recorded:", *described(old), "now:", *described(new), sep="\n")
    apart = [
        one["flags"] or "the test"
        for one, two in zip(old["tests"], new["tests"], strict=True)
        if abs(score_of(one) - score_of(two)) > one["results"]["ci95"] + two["results"]["ci95"]
    ]
    if apart:
        sys.exit(f"error: {', '.join(apart)} lies outside the recorded interval.")


def results() -> None:
    """Print the records in docs/results as the Markdown table of docs/results.md."""
    records = [json.loads(file.read_text()) for file in RECORDS.glob("*.json")]
    order = sorted(records, key=lambda record: (Path(record["config"]).stem, seeds_of(record), record["flags"]))
    print(*table(order), sep="\n")


def table(records: list[dict[str, Any]], reach: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99)) -> list[str]:
    """Return the lines of a Markdown table with one row for each test of each record.

    Args:
        records: the records that `run` returned.
        reach: validation accuracies; each adds a column with the minutes until the run reached it.
    """
    head = ["config", "seed", "extra flags", "test, % or mse", "episodes", "meta-steps", "minutes"]
    head += [*(f"minutes to {100 * score:.0f} %" for score in reach), "commit"]
    cells = [head, ["---"] * len(head)]
    for record in records:
        curve = record["validation"]
        steps, total, _ = curve[-1]
        known = curve if metric_of(record["tests"][0]["results"]) == "accuracy" else []
        times = [next((f"{spent:.1f}" for _, spent, score in known if score >= wanted), UNKNOWN) for wanted in reach]
        for test in record["tests"]:
            results = test["results"]
            flags = " ".join(filter(None, [*record["flags"], test["flags"]]))
            row = [f"`{Path(record['config']).stem}`", seeds_of(record), flags and f"`{flags}`", tested(results)]
            row += [f"{results['episodes']:,}", f"{steps:,}", f"{total:.0f}", *times, record["commit"]]
            cells.append(row)
    return [f"| {' | '.join(row)} |" for row in cells]


def score_of(test: dict[str, Any]) -> float:
    """Return the accuracy of a record's test, or its mean squared error."""
    score: float = test["results"][metric_of(test["results"])]
    return score


def seeds_of(record: dict[str, Any]) -> str:
    """Return the seed of a record; of an ensemble ``0+1+2, ensemble``."""
    seed = record["seed"]
    return f"{'+'.join(map(str, seed))}, ensemble" if isinstance(seed, list) else str(seed)


def named(config: Path, seed: int | list[int], flags: list[str]) -> str:
    """Return the name of a record and of its run's folder: config, seed and, if there are flags, a short id of them.

    Of an ensemble, ``ensemble`` and its seeds take the place of the seed.
    """
    ids = [hashlib.sha256(" ".join(flags).encode()).hexdigest()[:6]] if flags else []
    seeds = ["ensemble", *map(str, seed)] if isinstance(seed, list) else [str(seed)]
    return "_".join([config.stem, *seeds, *ids])


def run_ensemble(
    config: Path, root: str | None, seeds: list[int], flags: list[str], tests: list[str], logs: Path
) -> dict[str, Any]:
    """Train, or resume training, with each seed, and test the checkpoints as one; return what `ensemble` records.

    Its validation curve is the first network's, with the minutes of all.
    """
    own = [[flag.replace("{seed}", str(seed)) for flag in flags] for seed in seeds]
    records = [run(config, root, seed, each, [], logs) for seed, each in zip(seeds, own, strict=True)]
    checkpoints = [record["tests"][0]["results"]["checkpoint"] for record in records]
    settings = [*_settings(config, root, seeds[0], own[0], logs), _folder(config, seeds, flags, logs)]
    last = (record["validation"][-1][1] for record in records[1:])
    first, others = records[0], sum(last)
    return {
        **first,
        "seed": seeds,
        "flags": flags,
        "validation": [[steps, round(minutes + others, 2), score] for steps, minutes, score in first["validation"]],
        "tests": [_tested([*settings, *test.split(), "--ensemble", *checkpoints], test) for test in ["", *tests]],
    }


def _settings(config: Path, root: str | None, seed: int, flags: list[str], logs: Path) -> list[str]:
    settings = [f"--config={config}", f"--seed_everything={seed}", f"--data.seed={seed}"]
    settings += [_begun(flag, root, logs) for flag in flags]
    return [*settings, _folder(config, seed, flags, logs), *([] if root is None else [f"--data.root={root}"])]


def _folder(config: Path, seed: int | list[int], flags: list[str], logs: Path) -> str:
    return f"--trainer.default_root_dir={logs / named(config, seed, flags)}"


def _begun(flag: str, root: str | None, logs: Path) -> str:
    """The flag; if it begins with a record, with the best checkpoint of its run, trained if it is not in ``logs``."""
    name, _, value = flag.partition("=")
    if name != "--initial_checkpoint" or not value.endswith(".json"):
        return flag
    first = json.loads(Path(value).read_text())
    return f"{name}={_trained(_settings(Path(first['config']), root, first['seed'], first['flags'], logs))[1]}"


def _trained(settings: list[str]) -> tuple[Path, str]:
    """Train, or resume training; return the run's folder and its best checkpoint."""
    trainer = main(["fit", *settings, "--ckpt_path=last"]).trainer
    return Path(trainer.log_dir), trainer.checkpoint_callback.best_model_path


def _tested(words: list[str], flags: str) -> dict[str, Any]:
    tested = main(["test", *words])
    return {"flags": flags, "results": json.loads((Path(tested.trainer.log_dir) / "test_results.json").read_text())}


def run(config: Path, root: str | None, seed: int, flags: list[str], tests: list[str], logs: Path) -> dict[str, Any]:
    """Train, or resume training, and test; return what `accuracy` records."""
    settings = _settings(config, root, seed, flags, logs)
    log, best = _trained(settings)
    results = [_tested([*settings, f"--ckpt_path={best}", *test.split()], test) for test in ["", *tests]]
    history = read_run(log, config.stem)
    return {
        "config": str(config),
        "seed": seed,
        "flags": flags,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "machine": f"{_processor()}, torch {torch.__version__.split('+')[0]}",
        "seconds_per_step": history.seconds_per_step,
        "validation": [[steps, round(history.minutes_at(steps), 2), round(score, 4)] for steps, score in history.curve],
        "tests": results,
    }


def _processor() -> str:
    """What trained: the GPU that Lightning takes where there is one, or the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def described(record: dict[str, Any]) -> list[str]:
    """Return a record's figures, one per line."""
    steps, minutes, _ = record["validation"][-1]
    lines = [f"  {steps:,} meta-steps in {minutes:.0f} minutes ({record['machine']}, {record['commit']})"]
    for test in record["tests"]:
        results = test["results"]
        score, unit = tested(results), " %" if metric_of(results) == "accuracy" else ""
        lines.append(f"  {score}{unit} over {results['episodes']:,} test episodes {test['flags']}".rstrip())
    return lines
