"""``python -m benchmarks gpu`` in small on the CPU, without the packages that a machine with a GPU may lack."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu
from maml_lightning.data.omniglot import DRAWINGS, SHAPE, Pack, write_cache
from maml_lightning.data.packs import DIGEST, Sources
from tests.runs import ROOT

ABSENT = (
    "import sys\nfor name in ('psutil', 'matplotlib', 'rich', 'pytest', 'hypothesis'):\n    sys.modules[name] = None\n"
)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A packed Omniglot file of random pictures."""
    count = SHAPE[0] * DRAWINGS
    names = [f"{number}.png" for number in range(count)]
    sources = Sources(names, np.zeros((count, 4), np.int64), np.zeros((count, DIGEST), np.uint8))
    images = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    write_cache(tmp_path / "packed_28.npz", Pack(images, sources))
    return tmp_path / "packed_28.npz"


def report_of(folder: Path, *flags: str) -> tuple[dict, str]:
    """The JSON and the table of a run in a bare environment."""
    (folder / "bare").mkdir()
    (folder / "bare" / "sitecustomize.py").write_text(ABSENT)
    path = f"{folder / 'bare'}:{ROOT}"
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "gpu",
        "--device=cpu",
        "--quick=true",
        f"--out={folder / 'gpu.json'}",
    ]
    ended = subprocess.run(
        [*command, *flags],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "gpu.json").read_text()), ended.stdout


@pytest.mark.long
def test_every_part_runs_in_small(tmp_path, pack):
    report, table = report_of(tmp_path, f"--pack={pack}")
    assert {part: found["error"] for part, found in report["parts"].items()} == dict.fromkeys(gpu.LIMITS)
    assert report["data"] == "omniglot"
    figures = {part: {name: value for name, value, _ in found["figures"]} for part, found in report["parts"].items()}
    errors = {name: value for name, value in figures["correctness"].items() if name.endswith("float64")}
    assert len(errors) == 4
    assert all(value < 1e-9 for value in errors.values()), errors
    assert all(value < 1e-3 for name, value in figures["correctness"].items() if name.endswith("float32"))
    assert figures["memory"]["flat memory, 10 steps against 1"] < figures["memory"]["plain, 10 steps against 1"]
    assert figures["throughput"]["meta-steps per second, 0 workers"] > 0
    assert 0 < figures["accuracy_5way"]["best validation accuracy, 16 meta-steps"] <= 1
    assert figures["collectives"].keys() == {"all-reduce of the gradient (448 kB)", "all-reduce of one number"}
    same = [value for name, value in figures["captured"].items() if "auto against traced" in name]
    assert same == [0, 0, 0, 0]
    assert len([name for name in figures["speed"] if name.endswith("as the fastest other")]) == 5
    assert "| correctness | 5-way 1-shot, 1 step, float64 |" in table


def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path):
    (tmp_path / "empty.npz").write_bytes(b"no pack")
    flags = (f"--pack={tmp_path / 'empty.npz'}", "--parts=[throughput,collectives]")
    report, table = report_of(tmp_path, *flags)
    assert "Omniglot is not at" in report["parts"]["throughput"]["error"]
    assert report["parts"]["collectives"]["error"] is None
    assert len(report["parts"]["collectives"]["figures"]) == 2
    assert "| throughput | **not finished** | maml_lightning.errors.SettingError: Omniglot" in table


def test_a_part_that_takes_too_long_ends_with_what_it_had(monkeypatch, tmp_path):
    slow = "import json, sys, time\nopen(sys.argv[2], 'w').write(json.dumps([['a', 1.5, 'ms']]))\ntime.sleep(600)\n"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_parts.py").write_text(slow)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = gpu._run("speed", None, "cpu", True, limit=5.0)
    assert found["error"] == "stopped after its 5 seconds"
    assert found["figures"] == [["a", 1.5, "ms"]]
    assert gpu._run("speed", None, "cpu", True, limit=1.0)["error"] == "not run: no time was left"


def test_the_parts_fit_into_eight_minutes():
    assert sum(gpu.LIMITS.values()) < 8 * 60


def test_what_cannot_run_is_said_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: parts sped are not among correctness, speed"):
        gpu.gpu(device="cpu", parts=["sped"])
    with pytest.raises(SystemExit, match=r"error: pack .*none\.npz is no file"):
        gpu.gpu(tmp_path / "none.npz", device="cpu")
