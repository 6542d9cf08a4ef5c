"""Files that are written completely or not at all, and names as they can be printed."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], temporary: str) -> None:
    """Write a file atomically: after a crash or on a full disk, it is the new or the old one, never a part.

    Args:
        path: the file; an existing one is replaced.
        write: writes the content into the open file that it receives.
        temporary: name of the file while it is written, in the same folder; different for each writer.

    Raises:
        OSError: it could not be written; no part remains and ``path`` is unchanged.
    """
    partial = path.with_name(temporary)
    try:
        partial.unlink(missing_ok=True)  # it may be a link to another file
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # a read-only folder holds no temporary file either
            partial.unlink(missing_ok=True)


def shown(name: object) -> str:
    """A name that prints in one line anywhere: characters that are not printable are escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(name))


def short(path: str | os.PathLike[str]) -> str:
    """A path as it is shortest: from the current folder or from the root.

    Args:
        path: the path.
    """
    try:
        return min(os.path.relpath(path), str(path), key=len)
    except (OSError, ValueError):  # the current folder is gone, or another drive
        return str(path)
