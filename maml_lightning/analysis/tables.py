"""Tables as CSV files: written completely, never over an existing file, and safe to open in a spreadsheet."""

import csv
import io
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from maml_lightning.errors import SettingError
from maml_lightning.files import shown, write_whole

FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001


def text_cell(name: object) -> str:
    """A name as a cell: a single quote goes in front of what a spreadsheet would take for a formula (OWASP's advice).

    Args:
        name: of a file or a class; it is unchanged unless it begins with ``=``, ``+``, ``-``, ``@``, a tab or a line
            break.
    """
    return f"'{name}" if str(name).startswith(FORMULAS) else str(name)


def free(path: Path) -> Path:
    """The path itself, or if it exists, the first of ``NAME-1``, ``NAME-2`` … that does not."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def write_file(path: Path, content: bytes) -> Path:
    """Write a result of a run: completely, not over an existing file, and elsewhere if that is impossible.

    Args:
        path: the file; its folder is created.
        content: of the file.

    Returns:
        where it was written, see `free`.

    Raises:
        SettingError: it was written into a temporary folder instead, or nowhere; the message says which and why.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _written(path, content)
    except OSError as error:
        try:
            where = f"it is in {shown(_written(Path(tempfile.mkdtemp()) / path.name, content))}"
        except OSError:
            where = "nor anywhere else"
        raise SettingError(f"{shown(path)} could not be written ({error.strerror}); {where}.") from error


def _written(path: Path, content: bytes) -> Path:
    path = free(path)
    write_whole(
        path, lambda file: file.write(content), f".{uuid.uuid4().hex}"
    )  # short: names may be as long as allowed
    return path


def csv_bytes(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows as CSV in UTF-8; file names that are not UTF-8 keep their bytes."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")
