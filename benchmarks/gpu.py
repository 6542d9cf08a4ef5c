"""``python -m benchmarks gpu``: what this package does on a GPU, in one table and one JSON, in under eight minutes.

Each part of ``gpu_parts.py`` runs in a process of its own with a time limit. One that fails or takes too long reports
why, beside what it had measured until then, and the others go on.
"""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# Seconds that each part may take, 475 in all; a process needs about ten to begin.
LIMITS = {
    "correctness": 50,
    "speed": 85,
    "memory": 30,
    "kernels": 30,
    "throughput": 50,
    "accuracy_5way": 60,
    "accuracy_20way": 60,
    "collectives": 25,
    "captured": 40,
    "compiled": 45,
}


def gpu(
    pack: Path | None = None,
    device: str = "cuda",
    quick: bool = False,
    out: Path = Path("gpu.json"),
    parts: list[str] | None = None,
    minutes: float = 7.9,
) -> None:
    """Measure correctness, speed, memory, accuracy and communication on a GPU; print a table and write a JSON file.

    Args:
        pack: the packed Omniglot file, ``omniglot-py/packed_28.npz``; without one, training is on generated glyphs.
        device: cuda, or cpu with ``quick``.
        quick: all parts in small, to see that they run.
        out: the JSON file.
        parts: those to run; by default all: correctness, speed, memory, kernels, throughput, accuracy_5way,
            accuracy_20way, collectives, captured and compiled.
        minutes: after which no part runs any more.
    """
    unknown = sorted({*(parts or [])} - LIMITS.keys())
    if unknown:
        sys.exit(f"error: parts {', '.join(unknown)} are not among {', '.join(LIMITS)}.")
    if pack is not None and not pack.is_file():
        sys.exit(f"error: pack {pack} is no file; give the packed_28.npz that OmniglotDataModule has written.")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here; --device cpu --quick true tries the benchmark in small.")
    start, report = time.monotonic(), _about(device, pack, quick)
    report["parts"] = {}
    for part in parts or LIMITS:
        left = min(LIMITS[part], minutes * 60 - (time.monotonic() - start))
        if quick:
            left = 300.0
        report["parts"][part] = found = _run(part, pack, device, quick, left)
        print(f"{part}: {found['error'] or 'done'}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def _about(device: str, pack: Path | None, quick: bool) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": card,
        "cards": torch.cuda.device_count() if device == "cuda" else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "data": "glyphs" if pack is None else "omniglot",
        "quick": quick,
    }


def _run(part: str, pack: Path | None, device: str, quick: bool, limit: float) -> dict[str, Any]:
    """The figures of a part, the seconds that it took, and the reason why it ended early, or None."""
    if limit < 5:
        return {"seconds": 0.0, "error": "not run: no time was left", "figures": []}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, log = Path(folder) / "figures.json", Path(folder) / "log.txt"
        settings = {"device": device, "quick": quick, "pack": None if pack is None else str(pack.resolve())}
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part, str(figures), json.dumps(settings)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                error = None if process.wait(limit) == 0 else _last_line(log)
            except subprocess.TimeoutExpired:
                error = f"stopped after its {limit:.0f} seconds"
            finally:
                _end(process)
        known = json.loads(figures.read_text()) if figures.exists() else []
    return {"seconds": time.monotonic() - start, "error": error, "figures": known}


def _end(process: subprocess.Popen) -> None:
    """End a part and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "failed without a word"


def table(report: dict[str, Any]) -> str:
    """The figures of a report as a table in Markdown."""
    lines = [
        f"{report['device']} ({report['cards']} cards), torch {report['torch']}, CUDA {report['cuda']}, "
        f"{report['date']}, {report['data']}{', in small' if report['quick'] else ''}",
        "",
        "| part | what | figure |",
        "|---|---|---|",
    ]
    for part, found in report["parts"].items():
        lines += [f"| {part} | {name} | {_shown(value)} {unit} |" for name, value, unit in found["figures"]]
        if found["error"]:
            lines.append(f"| {part} | **not finished** | {found['error'].replace('|', '/')} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value}"
