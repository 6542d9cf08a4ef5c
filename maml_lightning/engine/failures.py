"""What went wrong where a network was run, in a few words."""

import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from maml_lightning.engine.memory import out_of_memory
from maml_lightning.errors import SettingError

# Files whose lines are not a user's.
_LIBRARIES = (
    sysconfig.get_path("purelib"),
    sysconfig.get_path("stdlib"),
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    "<",
)
# What PyTorch says where code depends on values, which are not known when it is recorded or vectorized.
_OF_VALUES = {
    r"calling \.item\(\)|data pointer|data-dependent|_local_scalar|over torch\.allclose": (
        "it reads values, as a branch or .item() does"
    ),
    r"dynamic shape|^aten\.[\w.]+$|masked_select": "a size depends on values, as in x[mask] or a packed sequence",
}


def reason_of(error: Exception) -> str:
    """Why a network did not run, in one line; memory that ran out is no reason to run in another way.

    Raises:
        Exception: the error, if memory ran out.
    """
    if isinstance(error, RuntimeError) and out_of_memory(error):
        raise error
    text = str(error).strip()
    if meaning := _meaning(error):
        return meaning + _place(error)
    line = text.split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
    return line if len(line) <= 120 else f"{line[:117]}..."


class _Reads(TorchFunctionMode):
    """While active, keeps the first error that a function of tensors raises where it needs their values."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            if self.error is None and _meaning(error):
                self.error = error
            raise


@contextmanager
def raising_what_is_caught() -> Iterator[None]:
    """Raise errors of reading values although code has caught them: in a loop it reads them, and may go another way.

    Raises:
        Exception: the first of them.
    """
    with _Reads() as reads:
        yield
    if reads.error is not None:
        raise reads.error


def _meaning(error: Exception) -> str:
    """What code does that depends on values, from the error that it meets where there are none; else empty."""
    return next((meaning for pattern, meaning in _OF_VALUES.items() if re.search(pattern, str(error).strip())), "")


def _place(error: Exception) -> str:
    """The last line of a user's code that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


_NOT_DIFFERENTIABLE = {
    "derivative .*not implemented|not (implemented|support) .*derivative|double backwards? .*not supported": (
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
