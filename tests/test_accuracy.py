"""Records of accuracies: what is written is what `test` wrote, and running it again gives it again."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy as module
from benchmarks.accuracy import RECORDS, accuracy, again, ensemble, named, score_of, table
from tests.runs import ROOT

UNKNOWN = "\N{EN DASH}"
FIGURE = re.compile(r"(\d+\.(\d+)) ± (\d+\.\d+)( %)?")


def test_a_record_is_what_the_runs_wrote_and_comes_again(folder, trained, monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORDS", folder / "records")
    accuracy(trained / "config.yaml", seed=1, flags=["--trainer.max_epochs=2"], tests=["--data.shots=2"])
    name = named(trained / "config.yaml", 1, ["--trainer.max_epochs=2"])
    assert re.fullmatch("config_1_[0-9a-f]{6}", name)
    file = folder / "records" / f"{name}.json"
    record = json.loads(file.read_text())
    runs = folder / "lightning_logs" / name / "lightning_logs"
    assert [test["results"] for test in record["tests"]] == [
        json.loads((runs / f"version_{run}" / "test_results.json").read_text()) for run in (1, 2)
    ]
    assert [test["results"]["shots"] for test in record["tests"]] == [1, 2]
    assert record["tests"][0]["results"]["checkpoint"].endswith("version_0/checkpoints/best.ckpt")
    assert [steps for steps, _, _ in record["validation"]] == [2, 4]  # of meta-batches of 4 of 8 episodes

    accuracy(trained / "config.yaml", seed=1, flags=["--trainer.max_epochs=2"], tests=["--data.shots=2"])
    same = json.loads(file.read_text())  # the run had ended: tested again, in runs 3 and 4
    assert same["validation"] == record["validation"]
    assert same["tests"] == record["tests"]

    capsys.readouterr()
    again(file)  # trained again, although the record's run is there
    assert len(list(folder.glob("lightning_logs/again/*/lightning_logs/*/checkpoints/last.ckpt"))) == 1
    recorded, now = capsys.readouterr().out.split("now:")
    lines = [[line for line in part.splitlines() if "test episodes" in line] for part in (recorded, now)]
    assert lines[0] == lines[1] != []
    record["tests"][1]["results"].update(accuracy=1.0, ci95=0.0)
    record["tests"][0]["results"].update(accuracy=0.0, ci95=1.0)
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"error: --data\.shots=2 lies outside the recorded interval"):
        again(file)


def test_a_record_that_begins_with_another_comes_again_from_the_start(folder, trained, monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORDS", folder / "records")
    first = f"records/{named(trained / 'config.yaml', 1, [])}.json"
    accuracy(trained / "config.yaml", seed=1)
    flags = [f"--initial_checkpoint={first}", "--model.outer_lr=1e-30"]
    accuracy(trained / "config.yaml", seed=1, flags=flags)
    file = folder / "records" / f"{named(trained / 'config.yaml', 1, flags)}.json"
    began, ended = (json.loads((folder / name).read_text()) for name in (first, file))
    assert ended["flags"] == flags
    runs = [Path(record["tests"][0]["results"]["checkpoint"]).parts[-5] for record in (began, ended)]
    assert runs == ["config_1", file.stem]
    assert ended["tests"][0]["results"]["accuracy"] == began["tests"][0]["results"]["accuracy"]  # it learns nothing
    again(file)  # trains both
    assert sorted(path.parts[-4] for path in folder.glob("lightning_logs/again/*/*/*/checkpoints")) == runs
    recorded, now = capsys.readouterr().out.split("now:")[-2:]
    found = [re.findall(r".*test episodes", part)[-1] for part in (recorded, now)]
    assert found[0] == found[1]


def test_an_ensembles_record_comes_again(folder, trained, monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORDS", folder / "records")
    ensemble(trained / "config.yaml", seeds=[1, 2], tests=["--data.shots=2"])
    file = folder / "records" / "config_ensemble_1_2.json"
    record = json.loads(file.read_text())
    assert record["seed"] == [1, 2]
    assert [test["results"]["shots"] for test in record["tests"]] == [1, 2]
    for test in record["tests"]:
        folders = [Path(path).parts[-5] for path in test["results"]["ensemble"]]
        assert folders == ["config_1", "config_2"]
    assert [row.split("|")[2] for row in table([record])[2:]] == [" 1+2, ensemble ", " 1+2, ensemble "]
    capsys.readouterr()
    again(file)
    recorded, now = capsys.readouterr().out.split("now:")
    lines = [[line for line in part.splitlines() if "test episodes" in line] for part in (recorded, now)]
    assert lines[0] == lines[1] != []


def test_networks_of_an_ensemble_may_begin_with_records_of_their_own(folder, trained, monkeypatch):
    monkeypatch.setattr(module, "RECORDS", folder / "records")
    for seed in (1, 2):
        accuracy(trained / "config.yaml", seed=seed)
    flags = ["--initial_checkpoint=records/config_{seed}.json", "--model.outer_lr=1e-30"]
    ensemble(trained / "config.yaml", seeds=[1, 2], flags=flags)
    begun = [[flags[0].replace("{seed}", str(seed)), flags[1]] for seed in (1, 2)]
    record = json.loads((folder / "records" / f"{named(trained / 'config.yaml', [1, 2], flags)}.json").read_text())
    assert record["flags"] == flags
    checkpoints = record["tests"][0]["results"]["ensemble"]
    folders = [named(trained / "config.yaml", seed, own) for seed, own in zip((1, 2), begun, strict=True)]
    assert [Path(path).parts[-5] for path in checkpoints] == folders
    for seed, path in zip((1, 2), checkpoints, strict=True):
        first = json.loads((folder / f"records/config_{seed}.json").read_text())["tests"][0]["results"]["checkpoint"]
        files = (folder / first, folder / path)
        started, ended = (torch.load(file, weights_only=False)["state_dict"] for file in files)
        for name, value in started.items():  # it learns nothing
            torch.testing.assert_close(ended[name], value)


def test_a_table_has_a_row_for_each_test():
    results = {"accuracy": 0.98765, "ci95": 0.00234, "episodes": 1000}
    record = {
        "config": "configs/a.yaml",
        "seed": 3,
        "flags": ["--b=1"],
        "commit": "abc",
        "validation": [[100, 1.5, 0.9], [200, 3.0, 0.98], [300, 4.44, 0.97]],
        "tests": [{"flags": "", "results": results}, {"flags": "--c=2", "results": {**results, "accuracy": 0.5}}],
    }
    lines = table([record], (0.9, 0.95, 0.99))
    assert lines[2:] == [
        f"| `a` | 3 | `--b=1` | 98.77 ± 0.23 | 1,000 | 300 | 4 | 1.5 | 3.0 | {UNKNOWN} | abc |",
        f"| `a` | 3 | `--b=1 --c=2` | 50.00 ± 0.23 | 1,000 | 300 | 4 | 1.5 | 3.0 | {UNKNOWN} | abc |",
    ]
    regression = {**record, "tests": [{"flags": "", "results": {"mse": 0.1364, "ci95": 0.0215, "episodes": 600}}]}
    assert table([regression], (0.9,))[2:] == [
        f"| `a` | 3 | `--b=1` | 0.136 ± 0.0215 | 600 | 300 | 4 | {UNKNOWN} | abc |"
    ]


def records():
    return [json.loads(file.read_text()) for file in sorted(RECORDS.glob("*.json"))]


def test_records_are_named_by_config_seed_and_a_short_id_of_their_flags():
    for file in RECORDS.glob("*.json"):
        record = json.loads(file.read_text())
        assert file.stem == named(Path(record["config"]), record["seed"], record["flags"])
    assert named(Path("a.yaml"), 0, []) == "a_0"
    assert named(Path("a.yaml"), 0, ["--b=1"]) != named(Path("a.yaml"), 0, ["--b=2"])


def test_the_page_of_results_holds_the_records():
    page = (RECORDS.parent / "results.md").read_text().splitlines()
    rows = table(records())
    assert len(rows) > 2
    assert [row for row in rows if row not in page] == []


def figures(text):
    """What a text says was reached: each ``a ± b``, but for lines about what others published."""
    return [match for line in text.splitlines() if "Published" not in line for match in FIGURE.finditer(line)]


def is_recorded(figure, records):
    """Whether a record's test, rounded as the figure is, is the figure."""
    digits = len(figure[2])
    return any(
        [f"{scale * score_of(test):.{digits}f}", f"{scale * test['results']['ci95']:.{digits}f}"]
        == [figure[1], figure[3]]
        for record in records
        for test in record["tests"]
        for scale in [100 if "accuracy" in test["results"] else 1]
    )


def test_figures_are_compared_with_records_at_their_precision():
    record = {
        "tests": [{"results": {"accuracy": 0.98765, "ci95": 0.00234}}, {"results": {"mse": 0.1364, "ci95": 0.02}}]
    }
    text = "98.8 ± 0.2 %, 98.77 ± 0.23, 98.7 ± 0.2, 98.8 ± 0.3, 0.14 ± 0.02\nPublished: 99.0 ± 0.1"
    assert [is_recorded(figure, [record]) for figure in figures(text)] == [True, True, False, False, True]


MEASURED = ["README.md", *(f"docs/{name}.md" for name in ("algorithms", "faq", "usage", "your-images"))]


def test_every_figure_of_the_readme_and_of_its_pages_is_a_record():
    found = [figure for name in MEASURED for figure in figures((ROOT / name).read_text())]
    assert len(found) > 40
    assert [figure[0] for figure in found if not is_recorded(figure, records())] == []


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_figure_of_a_config_is_a_record_of_it(config):
    own = [record for record in records() if config.name in f"{record['config']} {record['flags']}"]
    base = [record for record in records() if config.parent.name == "variants" and not record["flags"]]
    assert [figure[0] for figure in figures(config.read_text()) if not is_recorded(figure, own + base)] == []
