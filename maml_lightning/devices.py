"""What differs from device to device: values that can be read, random numbers, autocast, types, clocks.

Tensors on torch's ``meta`` device have shapes and no values: everything that is computed of them runs, and whatever
reads a number raises. A GPU gives its numbers, but each reading waits until it has done all that it was given.
"""

import operator
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read."""
    return tensor.device.type != "meta"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type that operators run in under autocast on a kind of device; None where autocast is off or unknown."""
    available = torch.amp.autocast_mode.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """While active, operators run in the types of their arguments on a kind of device."""
    known = torch.amp.autocast_mode.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's ``mps``, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.tensor`` of Python's numbers on a device, without waiting for what the device is doing."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


_NONE_DRAWN = ContextVar("none_drawn", default=False)


@contextmanager
def no_random_numbers() -> Iterator[None]:
    """While active, states of random numbers are neither asked nor set: nothing is drawn, and a capture forbids it."""
    token = _NONE_DRAWN.set(True)
    try:
        yield
    finally:
        _NONE_DRAWN.reset(token)


def random_states(device: torch.device) -> list[Tensor]:
    """The states of torch's random numbers, on the CPU and on the device."""
    if _NONE_DRAWN.get():
        return []
    own = _random_numbers(device)
    return [torch.get_rng_state(), *([own.get_rng_state(*_index(device))] if own else [])]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Draw again from :func:`random_states` on."""
    if _NONE_DRAWN.get():
        return
    torch.set_rng_state(states[0])
    if (own := _random_numbers(device)) and len(states) > 1:  # one device less where they are of a run on a CPU
        own.set_rng_state(states[1], *_index(device))


def _random_numbers(device: torch.device) -> Any:
    module = getattr(torch, device.type, None)
    return module if device.type != "cpu" and hasattr(module, "get_rng_state") else None


def _index(device: torch.device) -> tuple:
    return () if device.type == "mps" else (device,)  # there is one


_SWITCHES = (
    *(("cudnn", name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    *(("cuda.matmul", f"allow_{name}") for name in ("tf32", "fp16_reduced_precision_reduction")),
    *(("cuda.matmul", f"allow_{name}") for name in ("bf16_reduced_precision_reduction", "fp16_accumulation")),
    *((name, "fp32_precision") for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn")),
)


def kernel_settings() -> tuple[Hashable, ...]:
    """The switches of this process by which torch chooses kernels, and what type it makes."""
    switches = (_switch(module, name) for module, name in _SWITCHES)
    return (*switches, torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())


def _switch(module: str, name: str) -> Hashable:
    try:
        return operator.attrgetter(f"{module}.{name}")(torch.backends)
    except (AttributeError, RuntimeError):  # torch has no such switch yet, or raises where old and new ones are mixed
        return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize(*_index(device))  # type: ignore[union-attr]


def of_lost_gpu(error: BaseException) -> str:
    """What to do where a GPU stopped at an index that is out of range; empty of another error."""
    if "device-side assert" not in str(error):
        return ""
    return (
        "The GPU stopped at an index out of range, such as a class that model.net has no output for, or a token "
        "without an embedding; run the same with --trainer.accelerator cpu, which names it."
    )
