"""Settings of the abstract types of `numbers`, as transforms of torchvision have: jsonargparse cannot save them."""

import numbers

from jsonargparse.typing import register_type


def _as_it_is(value: numbers.Number) -> numbers.Number:
    return value


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def register() -> None:
    """Read and save such settings as the plain numbers that they are."""
    for kind in (numbers.Number, numbers.Real, numbers.Integral):
        register_type(kind, _as_it_is, int if kind is numbers.Integral else _number, type_check=isinstance)
