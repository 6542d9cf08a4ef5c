import inspect
import json
import os
import subprocess
import sys

import matplotlib.image
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from cli import main as command_line
from maml_lightning import MAML, SettingError
from maml_lightning.analysis.comparison import compare, draw, main, table
from maml_lightning.analysis.runs import PLAIN_MAML, Run, joined, labelled, read_run
from tests.runs import DATA, ROOT, TINY, words

UNKNOWN = "\N{EN DASH}"


def write_run(folder, scalars, settings=None, **more):
    """A run's folder as fit leaves it, of known numbers: ``scalars`` maps a tag to ``{step: value}``."""
    with SummaryWriter(folder) as writer:
        for tag, curve in scalars.items():
            for step, value in curve.items():
                writer.add_scalar(tag, value, step)
    if settings is not None:
        data = {"class_path": "GlyphsDataModule", "init_args": {"ways": 5, "shots": 1}}
        config = {"model": settings, "data": data, **more}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_test(folder, run, ways=5, age=0, **results):
    """The folder of a test of a run's checkpoint, some seconds old."""
    folder.mkdir(parents=True)
    data = {"class_path": "GlyphsDataModule", "init_args": {"ways": ways, "shots": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    file = folder / "test_results.json"
    file.write_text(json.dumps({**results, "checkpoint": str(run / "checkpoints" / "best.ckpt")}))
    os.utime(file, (1e9 - age, 1e9 - age))


ACCURACY = {
    "val/accuracy": {99: 0.5, 199: 0.8125, 299: 0.75},
    "train/seconds_per_step": {99: 0.5, 199: 0.125, 299: 0.25},
    "train/peak_memory_mb": {99: 1200, 199: 1300, 299: 1300},
    "train/minutes": {99: 1.25, 199: 2.25, 299: 3.25},
}
MSE = {"val/mse": {9: 2.0, 19: 0.03125, 29: 0.0625}, "train/loss": {9: 1.0}}


@pytest.fixture
def logs(tmp_path):
    return tmp_path / "lightning_logs"


@pytest.fixture
def maml(logs):
    return write_run(logs / "version_0", ACCURACY, {"inner_steps": 1, "first_order": False})


def test_curve_and_costs_of_a_run(maml):
    run = read_run(maml, "a")
    assert run.curve == [(100, 0.5), (200, 0.8125), (300, 0.75)]
    assert (run.metric, run.best, run.ways, run.test) == ("accuracy", 0.8125, 5, None)
    assert (run.seconds_per_step, run.peak_memory_mb) == (0.25, 1300)


def test_table(maml, logs):
    write_test(logs / "version_1", maml, accuracy=0.7, ci95=0.01234)
    other = write_run(logs / "version_2", {**MSE, "val/accuracy": {49: 0.25}})
    assert table([read_run(maml, "with"), read_run(other, "without")]).splitlines() == [
        "| run | meta-steps | test accuracy, % | best validation accuracy, % "
        "| seconds per step | peak memory, MB | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| with | 300 | 70.00 ± 1.23 | 81.25 | 0.25 | 1,300 | 3.2 |",
        f"| without | 50 | {UNKNOWN} | 25.00 | {UNKNOWN} | {UNKNOWN} | {UNKNOWN} |",
    ]


def test_minutes_to_a_score(maml, logs):
    run, other = read_run(maml, "a"), read_run(write_run(logs / "version_1", MSE), "b")
    assert [run.minutes_to(score) for score in (0.5, 0.6, 0.8125, 0.9)] == [1.25, 2.25, 2.25, None]
    assert other.minutes_to(0.05) is None  # an older run, that does not tell
    timed = read_run(write_run(logs / "version_2", {**MSE, "train/minutes": {14: 1.0, 29: 2.0}}), "c")
    assert [timed.minutes_to(score) for score in (2.0, 0.05, 0.001)] == [1.0, 2.0, None]  # at the end of the epoch
    lines = table([run], [0.8, 0.9]).splitlines()
    assert lines[0].endswith("| minutes | minutes to 80.00 | minutes to 90.00 |")
    assert lines[2].endswith(f"| 3.2 | 2.2 | {UNKNOWN} |")


def test_table_of_regressions_takes_the_lowest_as_best(logs):
    run = write_run(logs / "version_0", MSE, {"inner_steps": 5})
    write_test(logs / "version_0" / "checkpoints", run, mse=9.0, ci95=1.0)  # not beside the run
    (run / "test_results.json").write_text(json.dumps({"mse": 0.04567, "ci95": 0.001, "checkpoint": None}))
    lines = table([read_run(run, "sine")]).splitlines()
    assert "test mse | best validation mse" in lines[0]
    assert lines[2] == f"| sine | 30 | 0.0457 ± 0.001 | 0.0312 | {UNKNOWN} | {UNKNOWN} | {UNKNOWN} |"


def test_a_single_test_episode_has_no_interval(maml):
    (maml / "test_results.json").write_text(json.dumps({"accuracy": 1.0, "ci95": None, "checkpoint": None}))
    assert "| 100.00 |" in table([read_run(maml, "a")])


def test_of_several_tests_the_latest_of_this_run_on_its_tasks(maml, logs):
    write_test(logs / "version_1", maml, age=20, accuracy=0.1)
    write_test(logs / "version_2", maml, age=10, accuracy=0.2)
    write_test(logs / "version_3", maml, ways=20, accuracy=0.3)
    other = write_run(logs / "version_4", ACCURACY)
    write_test(logs / "version_5", other, accuracy=0.4)
    assert read_run(maml, "a").test["accuracy"] == 0.2


@pytest.mark.parametrize("here", [True, False])
def test_a_test_with_a_relative_checkpoint(maml, logs, here, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(logs.parent if here else tmp_path_factory.mktemp("elsewhere"))
    write_test(logs / "version_1", maml.relative_to(logs.parent), accuracy=0.5)
    assert read_run(maml, "a").test["accuracy"] == 0.5


def test_all_event_files_of_a_folder(maml):
    next(maml.glob("events.*")).rename(maml / "events.out.tfevents.1000000000.older")
    with SummaryWriter(maml) as writer:  # a resumption after 100 meta-steps
        for step, score in {199: 0.6, 399: 0.9}.items():
            writer.add_scalar("val/accuracy", score, step)
    assert read_run(maml, "a").curve == [(100, 0.5), (200, pytest.approx(0.6)), (400, pytest.approx(0.9))]


def test_a_run_resumed_in_a_folder_of_its_own(maml, logs):
    checkpoint = str(maml / "checkpoints" / "last.ckpt")
    later = {"val/accuracy": {299: 0.875, 399: 0.9375}, "train/peak_memory_mb": {299: 7}}
    run = write_run(logs / "version_1", later, {"inner_steps": 1}, ckpt_path=checkpoint)
    assert read_run(run, "a").curve == [(100, 0.5), (200, 0.8125), (300, 0.875), (400, 0.9375)]
    assert read_run(run, "a").seconds_per_step == 0.25
    itself = write_run(logs / "version_2", later, {"inner_steps": 1}, ckpt_path=str(logs / "version_2/checkpoints/a"))
    assert read_run(itself, "a").curve == [(300, 0.875), (400, 0.9375)]


def test_joined():
    assert joined([[(1, 0.1), (2, 0.2), (3, 0.3)], [], [(2, 0.5)], [(4, 0.6)]]) == [(1, 0.1), (2, 0.5), (4, 0.6)]


def test_labels(maml, logs):
    second = write_run(logs / "second", ACCURACY, {"inner_steps": 5, "first_order": True})
    third = write_run(logs / "third", ACCURACY, {"inner_steps": 0})
    fourth = write_run(logs / "a=b", ACCURACY, {"inner_steps": 5, "first_order": True})
    plain = write_run(logs / "plain", ACCURACY)
    given = [str(maml), str(second), str(third), f"my=own={fourth.parent / 'third'}", str(fourth), str(plain)]
    assert labelled(given) == [
        ("MAML, 1 inner step", maml),
        (f"FOMAML, 5 inner steps ({second})", second),
        ("without MAML", third),
        ("my=own", third),
        (f"FOMAML, 5 inner steps ({fourth})", fourth),
        (str(plain), plain),
    ]


def test_figure_shows_the_numbers(maml, logs):
    other = write_run(logs / "version_1", {**ACCURACY, "val/accuracy": {49: 0.25}})
    (axes,) = draw([read_run(maml, "one"), read_run(other, "two")]).axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    assert list(drawn) == ["one", "two", "chance, 5 classes"]
    assert drawn["one"].get_xydata().tolist() == [[100, 0.5], [200, 0.8125], [300, 0.75]]
    assert set(drawn["chance, 5 classes"].get_ydata()) == {0.2}
    assert drawn["one"].get_color() != drawn["two"].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(drawn)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("meta-steps", "validation accuracy", "linear")


def test_the_figure_shows_intervals_the_task_and_where_scores_differ(logs):
    high = {"val/accuracy": {99: 0.95, 199: 0.97}, "val/accuracy_ci95": {99: 0.02, 199: 0.01}, "train/loss": {9: 1.0}}
    runs = [read_run(write_run(logs / f"version_{i}", high, {"inner_steps": 1}), f"{i}") for i in (0, 1)]
    assert runs[0].metric == "accuracy"
    (axes,) = draw(runs).axes
    band = axes.collections[0].get_paths()[0].vertices
    found = {(round(x), round(y, 6)) for x, y in band}
    assert found == {(100, 0.93), (100, 0.97), (200, 0.96), (200, 0.98)}
    assert axes.get_title() == "5-way 1-shot of GlyphsDataModule"
    assert axes.get_ylim()[0] > 0.9  # without the line of chance, at 0.2
    assert [line.get_label() for line in axes.get_lines()] == ["0", "1"]
    assert draw([*runs, runs[0]._replace(task="other")]).axes[0].get_title() == ""


def test_figure_of_regressions_is_logarithmic_and_without_chance(logs):
    (axes,) = draw([read_run(write_run(logs / "version_0", MSE, {"inner_steps": 1}), "sine")]).axes
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.get_lines()] == ["sine"]


def test_png(maml, tmp_path, capsys):
    output = tmp_path / "pictures" / "a.png"
    main([f"with MAML={maml}", "--output", str(output)])
    assert capsys.readouterr().out.splitlines()[2].startswith("| with MAML | 300 |")
    picture = matplotlib.image.imread(output)
    assert picture.shape == (675, 1200, 4)
    assert 0.005 < (picture[..., :3] < 0.9).any(-1).mean() < 0.2  # ink on paper
    blue = abs(picture[..., :3] - (0, 0x72 / 255, 0xB2 / 255)).max(-1) < 0.01
    assert blue.sum() > 1000  # the line


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("missing", "run missing is not a folder; give a run folder such as lightning_logs/version_0."),
        ("a=missing", "run missing is not a folder"),
        ("empty", "run empty holds no event files of a training with validation; give a run folder that fit wrote"),
        ("validated", "run validated holds no event files of a training"),
        ("broken", "broken/config.yaml is damaged; remove it"),
        ("sine", "run sine has mse, run MAML, 1 inner step accuracy; compare them in separate calls."),
    ],
)
def test_what_is_no_run_is_named(word, message, maml, folder):
    (folder / "empty").mkdir()
    write_run(folder / "validated", {"val/accuracy": {0: 0.5}}, {})
    write_run(folder / "broken", ACCURACY)
    (folder / "broken" / "config.yaml").write_text("a: [")
    write_run(folder / "sine", MSE)
    with pytest.raises(SettingError, match=message) as error:
        compare([str(maml), word], folder / "a.png")
    assert "\n" not in str(error.value)
    assert not (folder / "a.png").exists()


def test_other_formats_are_refused(maml):
    with pytest.raises(SettingError, match=r"--output must end in .png \(got a.svg\)"):
        main([str(maml), "--output", "a.svg"])


def test_real_runs_through_the_command(folder):
    flags = {**TINY, "data.train_episodes": 32}
    command_line(words("fit", **flags))
    command_line(words("fit", **{**flags, "model.inner_steps": 0}))
    command_line(words("test", **DATA, ckpt_path="lightning_logs/version_0/checkpoints/last.ckpt"))
    results = json.loads((folder / "lightning_logs" / "version_2" / "test_results.json").read_text())
    command = [sys.executable, "-m", "maml_lightning.comparison"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = ["lightning_logs/version_0", "plain=lightning_logs/version_1"]
    ended = subprocess.run([*command, *runs], capture_output=True, text=True, env=environment, timeout=300, check=True)
    _, _, *rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in ended.stdout.splitlines()]
    assert [row[:2] for row in rows] == [["MAML, 1 inner step", "8"], ["plain", "8"]]
    assert rows[0][2] == f"{100 * results['accuracy']:.2f} ± {100 * results['ci95']:.2f}"
    assert rows[1][2] == UNKNOWN
    for *_, seconds, memory, minutes in rows:
        assert 0 <= float(minutes) < 5
        assert 1e-4 < float(seconds) < 5
        assert 100 < float(memory.replace(",", "")) < 20_000
    assert (folder / "comparison.png").stat().st_size > 10_000
    failed = subprocess.run([*command, "no"], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert failed.returncode == 1
    assert failed.stderr == "error: run no is not a folder; give a run folder such as lightning_logs/version_0.\n"


def test_labels_tell_the_variants_apart(logs):
    variants = {
        "MAML, 3 inner steps, adapted_parameters head, learn_inner_lr weight": {
            "inner_steps": 3,
            "adapted_parameters": "head",
            "learn_inner_lr": "weight",
            "inner_optimizer": "sgd",
        },
        "iMAML, 2 inner steps": {"inner_steps": 2, "algorithm": "imaml"},
        "Reptile, 1 inner step, inner_optimizer adam": {
            "inner_steps": 1,
            "algorithm": "reptile",
            "inner_optimizer": "adam",
        },
    }
    folders = [str(write_run(logs / f"v{i}", ACCURACY, settings)) for i, settings in enumerate(variants.values())]
    pooled = {"data": {"class_path": "GlyphsDataModule", "init_args": {"ways": 5, "pretraining": True}}}
    folders.append(str(write_run(logs / "pooled", ACCURACY, {"inner_steps": 0}, **pooled)))
    assert [name for name, _ in labelled(folders)] == [*variants, "pre-training"]


def test_names_are_shown_as_they_are(tmp_path):
    names = ["$x_{$", "_hidden", "a|b\nc"]
    runs = [Run(name, "accuracy", [(1, 0.5), (2, 0.6)]) for name in names]
    figure = draw(runs)
    figure.savefig(tmp_path / "a.png")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["$x_{$", " _hidden", r"a|b\nc"]
    assert table(runs).splitlines()[-1].startswith(r"| a\|b\nc | 2 |")


def test_plain_maml_is_what_maml_is_by_default():
    defaults = inspect.signature(MAML).parameters
    assert {name: defaults[name].default for name in PLAIN_MAML} == PLAIN_MAML


@pytest.mark.parametrize(("metric", "best"), [("loss", "0.25"), ("multilabel_auroc", "0.75")])
def test_runs_of_another_metric_are_compared_by_it(metric, best, logs, tmp_path):
    """Such as several labels for each example, which have neither accuracy nor mean squared error."""
    scores = {f"val/{metric}": {9: 0.75, 19: 0.25}, f"val/{metric}_step_0": {9: 9.0, 19: 9.0}}
    run = write_run(logs / "version_0", {**scores, "val/loss": scores[f"val/{metric}"], "train/loss": {9: 1.0}})
    (run / "test_results.json").write_text(json.dumps({metric: 0.5, "ci95": 0.125, "checkpoint": None}))
    lines = compare([f"several={run}"], tmp_path / "several.png").splitlines()
    assert f"test {metric} | best validation {metric}" in lines[0]
    assert f"| 0.5 ± 0.125 | {best} |" in lines[2]
    assert (tmp_path / "several.png").read_bytes().startswith(b"\x89PNG")
