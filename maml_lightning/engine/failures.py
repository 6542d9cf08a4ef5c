"""What went wrong where a network was run, in a few words."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from maml_lightning.engine.memory import out_of_memory
from maml_lightning.errors import SettingError


def reason_of(error: Exception) -> str:
    """The first line of an error; memory that ran out is no reason to run in another way.

    Raises:
        Exception: the error, if memory ran out.
    """
    if isinstance(error, RuntimeError) and out_of_memory(error):
        raise error
    line = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
    return line if len(line) <= 120 else f"{line[:117]}..."


_NOT_DIFFERENTIABLE = {
    "derivative .*not implemented|not (implemented|support) .*derivative": (
        "PyTorch has no second derivative of a part of model.net or model.loss, or no third one of a part that takes a "
        "gradient itself ({reason}), in no training loop; replace that part, or set model.first_order to true."
    ),
    "in-?place": (
        "model.net or model.loss writes in place to what a gradient needs, such as its inputs ({reason}), which no "
        "training loop differentiates; let it write to a copy (x = x.clone()), or leave out inplace=True."
    ),
}


@contextmanager
def naming_what_has_no_derivative() -> Iterator[None]:
    """Raise an error of one line where autograd cannot differentiate what runs.

    Raises:
        SettingError: PyTorch has no derivative of an operator, or what a gradient needs is written over.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        for pattern, message in _NOT_DIFFERENTIABLE.items():
            if re.search(pattern, str(error)):
                raise SettingError(message.format(reason=reason_of(error))) from error
        raise


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """What the function gives; None where it cannot run: other ways may run what a loop cannot."""
    try:
        return function(*args)
    except Exception as error:  # whatever a user's network raises
        reason_of(error)
        return None
