"""What plain values, arrays, tensors and generators count as in a fingerprint: their bits, or their identity."""

import itertools
import random
import weakref
import zlib
from array import array
from collections.abc import Hashable, Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from maml_lightning.engine.variables import PLAIN

_SMALL = 64  # numbers of a tensor that are compared one by one; more are compared with a copy
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Identity:
    """The identity of an object, which this does not keep alive."""

    def __init__(self, value: Any) -> None:
        self.of, self.hash = weakref.ref(value), id(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.of() is not None and self.of() is other.of()


def identity(value: Any) -> Hashable:
    """Equal for the same object alone."""
    try:
        return _Identity(value)
    except TypeError:  # no weak reference to it: a number of numpy's, an enumeration's member, a slice
        if isinstance(value, Number):
            return (type(value), repr(value))
        return (type(value), value if isinstance(value, Hashable) else id(value))


def plain(value: Any) -> Hashable:
    """A value of one of the types :data:`PLAIN`: 1, 1.0 and True differ, 0.0 and -0.0 as well; NaN is like NaN."""
    kind = type(value)
    if (kind is float or kind is complex) and (not value or value != value or kind is complex):
        return (kind, repr(value))
    return (kind, value)


def all_plain(value: Any) -> list[Hashable] | None:
    """What a container holds, compared as a whole, which takes a tenth of the time; None unless all is plain."""
    parts: list[Hashable] = []
    for values in (value, value.values()) if isinstance(value, Mapping) else (value,):
        kinds = set(map(type, values))
        if not kinds <= PLAIN:
            return None
        if kinds == {float}:
            parts += (float, array("d", values).tobytes())
        elif kinds & {float, complex}:
            parts.append(tuple(map(plain, values)))
        else:
            parts += (tuple(values), kinds.pop() if len(kinds) == 1 else tuple(map(type, values)))
    return parts


def checksum(value: Any) -> Hashable | None:
    """Of the bytes of an array of whatever kind, with its shape and type if it has them; None for what is none."""
    try:
        bits = zlib.crc32(value.tobytes() if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, BufferError):
        return None
    return (bits, *(str(getattr(value, name, "")) for name in ("shape", "dtype", "typecode")))


def of_tensor(value: Tensor) -> Hashable:
    """Identity, version, place, and on a CPU the values: `.data` and NumPy change them without a new version."""
    version = None if value.is_inference() else value._version
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)  # by a transform that is over
    if value.device.type != "cpu" or value.layout is not torch.strided or type(value) not in _TENSORS or wrapped:
        return (identity(value), version)
    content = value.tolist().__repr__() if value.numel() <= _SMALL else _number(value)
    return (identity(value), version, value.dtype, value.shape, content)


_COPIES: Any = WeakTensorKeyDictionary()  # of large tensors: the bits when they were last seen, and their number
_NUMBERS = itertools.count()


def _number(value: Tensor) -> int:
    """Another number whenever the values of a tensor are others than they were when this was last asked."""
    bits = _bits(value)
    kept, number = _COPIES.get(value, (None, 0))
    if kept is None or kept.shape != bits.shape or kept.dtype != bits.dtype or not torch.equal(kept, bits):
        kept, number = _COPIES[value] = bits.clone(), next(_NUMBERS)
    return number


def _bits(value: Tensor) -> Tensor:
    value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return value.resolve_neg().view(_BITS[value.element_size()])


def generator_state(value: Any) -> Hashable | None:
    """The state of a generator of random numbers; None for what is none."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    return bytes(value.get_state().numpy()) if isinstance(value, torch.Generator) else None
