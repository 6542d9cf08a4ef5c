"""Records of accuracies: what is written is what `test` wrote, and running it again gives it again."""

import json

import pytest

from benchmarks import accuracy as module
from benchmarks.accuracy import RECORDS, accuracy, again, table

UNKNOWN = "\N{EN DASH}"


def test_a_record_is_what_the_runs_wrote_and_comes_again(folder, trained, monkeypatch, capsys):
    monkeypatch.setattr(module, "RECORDS", folder / "records")
    accuracy(trained / "config.yaml", seed=1, flags=["--trainer.max_epochs=2"], tests=["--data.shots=2"])
    file = folder / "records" / "config_1_trainer.max_epochs=2.json"
    record = json.loads(file.read_text())
    runs = folder / "lightning_logs" / "config_1_trainer.max_epochs=2" / "lightning_logs"
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
    again(file)  # trained anew, although the record's run is there
    assert len(list(folder.glob("lightning_logs/again/*/lightning_logs/*/checkpoints/last.ckpt"))) == 1
    recorded, now = capsys.readouterr().out.split("now:")
    lines = [[line for line in part.splitlines() if "test episodes" in line] for part in (recorded, now)]
    assert lines[0] == lines[1] != []
    record["tests"][1]["results"].update(accuracy=1.0, ci95=0.0)
    record["tests"][0]["results"].update(accuracy=0.0, ci95=1.0)
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"error: --data\.shots=2 lies outside the recorded interval"):
        again(file)


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


def test_the_page_of_results_holds_the_records():
    page = (RECORDS.parent / "results.md").read_text().splitlines()
    rows = table([json.loads(file.read_text()) for file in sorted(RECORDS.glob("*.json"))])
    assert len(rows) > 2
    assert [row for row in rows if row not in page] == []
