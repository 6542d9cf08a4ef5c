"""Normalization statistics of a task's support set: which examples of a batch they are of, and TaskNorm.

To evaluate queries with the statistics of the support set, the network runs once over support and query examples
together, and batch normalization takes its statistics from the support part alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_PARTS: list[tuple[int, int]] = []  # support examples and all examples of the batch that runs, innermost last


@contextmanager
def statistics_of_first(support: int, examples: int) -> Iterator[None]:
    """While active, normalization statistics are those of the first ``support`` of a batch of ``examples``."""
    _PARTS.append((support, examples))
    try:
        yield
    finally:
        _PARTS.pop()


def statistics_part(batch: Tensor) -> Tensor:
    """The examples of ``[B, ...]`` whose statistics count: all of them outside of :func:`statistics_of_first`.

    A network may split each example into several, one after the other.

    Raises:
        ValueError: the batch is not of so many parts of each example.
    """
    if not _PARTS:
        return batch
    support, examples = _PARTS[-1]
    if len(batch) % examples:
        raise ValueError(
            f"model.query_statistics support needs normalization layers that keep examples apart, but one got a batch "
            f"of {len(batch)} for {examples} examples; use model.query_statistics batch."
        )
    return batch[: support * (len(batch) // examples)]
