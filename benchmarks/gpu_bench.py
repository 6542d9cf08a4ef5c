"""What each part of ``python -m benchmarks gpu`` is run with, and how it writes its figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Bench(NamedTuple):
    """What a part is run with: the file of its figures, the device, the packed data or None, and whether in small."""

    file: Path
    device: torch.device
    pack: Path | None
    quick: bool

    def add(self, what: str, value: float | str, unit: str = "") -> None:
        """Write a figure."""
        figures = json.loads(self.file.read_text()) if self.file.exists() else []
        self.file.write_text(json.dumps([*figures, [what, value, unit]]))

    def attempt(self, what: str, unit: str, measure: Callable[[], float]) -> float | None:
        """Write a figure, or why it could not be measured."""
        try:
            value = measure()
        except Exception as error:  # whatever a contender raises: the others go on
            self.add(what, f"failed: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}")
            return None
        self.add(what, value, unit)
        return value
