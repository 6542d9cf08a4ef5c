"""Packs: the content of many files in one, used again only while the files are unchanged.

A pack records each source file's size, times, inode and a digest of its bytes. A start compares the former, which
takes microseconds; only files in which one differs are read again and their digests compared. A rewrite that
restores size and modification time still changes ``ctime``, so a pack never passes for changed files.
"""

import contextlib
import hashlib
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil

from maml_lightning.errors import SettingError
from maml_lightning.files import shown, write_whole

VERSION = 2  # of format and decoding; a pack of another version is made again
GRAIN = 2_000_000_000  # ns; a file written less than this ago may be rewritten without a change of its times
ABANDONED = 3600  # seconds without a write
DIGEST = 16  # bytes

NODE = platform.node().replace("/", "")

State = tuple[int, int, int, int]


def new_digest() -> hashlib.blake2b:
    """An empty hash of ``DIGEST`` bytes."""
    return hashlib.blake2b(digest_size=DIGEST)


def state(file: os.stat_result) -> State:
    """What changes with a file: size, modification time, change time and inode."""
    return file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino


class Sources(NamedTuple):
    """The files that a pack was made from.

    Args:
        names: the files' paths relative to their folder.
        states: ``[files, 4]``, the `state` of each; a change time of 0 matches none, so that the digest decides.
        digests: ``[files, DIGEST]`` uint8.
    """

    names: Sequence[str]
    states: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Convert to arrays for `numpy.savez`."""
        names = np.frombuffer("\0".join(self.names).encode(errors="surrogateescape"), np.uint8)
        return {"names": names, "states": self.states, "digests": self.digests}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Sources":
        """Convert back from `arrays`.

        Raises:
            ValueError, KeyError: these are not such arrays.
        """
        names = arrays["names"].tobytes().decode(errors="surrogateescape").split("\0")
        states, digests = arrays["states"], arrays["digests"]
        for array, dtype, width in ((states, np.int64, 4), (digests, np.uint8, DIGEST)):
            if array.dtype != dtype or array.shape != (len(names), width):
                raise ValueError("these are not the sources of a pack")
        return cls(names, states, digests)


def read_sources(folder: Path, names: Sequence[str], use: Callable[[str, bytes], object]) -> Sources:
    """Read files one after another, and record their states and digests.

    Args:
        folder: holds the files.
        names: their paths relative to it.
        use: receives each file's path and its bytes.

    Raises:
        SettingError: a file cannot be read.
    """
    states, digests = np.empty((len(names), 4), np.int64), np.empty((len(names), DIGEST), np.uint8)
    for index, name in enumerate(names):
        states[index], content = _read(file := os.path.join(folder, name))
        digests[index] = _digest(content)
        use(file, content)
    return Sources(names, states, digests)


def _digest(content: bytes) -> npt.NDArray[np.uint8]:
    whole = new_digest()
    whole.update(content)
    return np.frombuffer(whole.digest(), np.uint8)


def _read(file: str) -> tuple[State, bytes]:
    now = time.time_ns()
    with _readable(file), open(file, "rb") as opened:
        size, modified, changed, inode = state(os.fstat(opened.fileno()))
        return (size, modified, changed if changed + GRAIN < now else 0, inode), opened.read()


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingError(f"{shown(file)} cannot be read ({error.strerror}); replace or remove it.") from error


def _state(file: str) -> State:
    with _readable(file):
        return state(os.stat(file))


def compare(packed: Sources, folder: Path, names: Sequence[str]) -> tuple[str | None, Sources]:
    """Whether files are unchanged since they were packed.

    Args:
        packed: the pack's sources.
        folder: holds the files.
        names: their paths relative to it.

    Returns:
        what has changed, None if nothing has; and the sources with their current states.

    Raises:
        SettingError: a file cannot be read.
    """
    if list(packed.names) != list(names):
        new, gone = sorted(set(names) - set(packed.names)), sorted(set(packed.names) - set(names))
        return (f"{new[0]} is new" if new else f"{gone[0]} is gone" if gone else "their order differs"), packed
    start = os.path.join(folder, "")
    states = np.array([_state(start + name) for name in names], np.int64)
    differ = np.flatnonzero((states != packed.states).any(1))
    known = packed.states.copy()
    for index in differ.tolist():
        if states[index, 0] != packed.states[index, 0]:
            return f"{names[index]} has changed", packed
        known[index], content = _read(start + names[index])
        if not np.array_equal(_digest(content), packed.digests[index]):
            return f"{names[index]} has changed", packed
    return None, packed._replace(states=known)


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """The arrays of an ``.npz``, their checksums verified; None if it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:  # zipfile and NumPy raise anything on a damaged file
        return None


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an ``.npz``, completely or not at all.

    Raises:
        OSError: it could not be written.
    """
    write_whole(path, lambda file: np.savez(file, **arrays), temporary(path))  # type: ignore[arg-type]


def temporary(path: Path) -> str:
    """A name for ``path`` while this process writes it, in the same folder."""
    return f".{path.name}.{NODE}.{os.getpid()}.{uuid.uuid4().hex}"


def sweep(path: Path) -> None:
    """Remove temporary files that killed writers of ``path`` left: their process has ended, or an hour passed."""
    prefix = f".{path.name}."
    for file in path.parent.glob("*") if path.parent.is_dir() else ():
        if file.name.startswith(prefix):
            writer = file.name.removeprefix(prefix).rsplit(".", 2)
            local = len(writer) == 3 and writer[0] == NODE and writer[1].isdecimal()
            with contextlib.suppress(OSError):  # another process removed it, or the folder is read-only
                if (local and not psutil.pid_exists(int(writer[1]))) or abandoned(file):
                    file.unlink()


def abandoned(file: Path) -> bool:
    """Whether nothing was written to the file for an hour."""
    return file.stat().st_mtime < time.time() - ABANDONED
