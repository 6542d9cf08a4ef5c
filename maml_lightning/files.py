"""Files that are whole or not there at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], temporary: str) -> None:
    """Write a file so that whatever happens, a crash or a full disk, it is the new one or the old one, never a part.

    Args:
        path: of the file; what is there is replaced.
        write: writes the content into the open file that it is given.
        temporary: name beside ``path`` while it grows; one for each of those who may write at once.

    Raises:
        OSError: it could not be written; nothing is left behind and ``path`` is as it was.
    """
    growing = path.with_name(temporary)
    try:
        growing.unlink(missing_ok=True)  # what was left there may be a link to another file
        with growing.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(growing, path)
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written holds no temporary file either
            growing.unlink(missing_ok=True)


def shown(name: object) -> str:
    """A name as it can be printed in one line anywhere: what is not printable is escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(name))
