"""Functions that are replaced where PyTorch looks them up, for a while."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any


def swapping(places: list[tuple[Any, str, Callable[..., Any]]]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager, while which attributes of objects are others; in all threads, and within itself, too.

    Args:
        places: the object, the name of its attribute, and what takes its place.
    """
    own: list[Any] = []
    lock, active = Lock(), 0

    def enter(change: int) -> None:
        nonlocal active
        with lock:
            before, active = active, active + change
            if not before:
                own[:] = [getattr(owner, name) for owner, name, _ in places]
            if not (before and active):
                for (owner, name, other), original in zip(places, own, strict=True):
                    setattr(owner, name, other if active else original)

    @contextmanager
    def swapped() -> Iterator[None]:
        enter(1)
        try:
            yield
        finally:
            enter(-1)

    return swapped
