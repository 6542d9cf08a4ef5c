"""How much memory is free, and how the C library hands it out."""

import ctypes
import functools
import re
from pathlib import Path
from typing import Literal

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
_LARGE = 2**25  # its largest threshold


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far, in bytes.

    CUDA: by tensors, since ``torch.cuda.reset_peak_memory_stats``. CPU: resident, by the whole process since it
    began; where the system keeps no peak (macOS), what is resident now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not resource.getrusage: on Linux its peak begins with that of the process which launched this one.
    status = Path("/proc/self/status")
    peak = status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    if peak:
        return int(peak[1]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class FlatMemory:
    """Whether inner steps are recomputed in the backward pass, so that memory does not grow with their number.

    Args:
        setting: true or false; "auto" recomputes from the first time that a meta-batch would keep more than a quarter
            of the free memory.
    """

    def __init__(self, setting: bool | Literal["auto"]) -> None:
        self.setting, self.active = setting, setting is True

    def decide(self, bytes_per_step: int, steps: int, device: torch.device) -> None:
        """Decide, after the first of ``steps`` inner steps, for it and those after it."""
        if self.setting == "auto" and not self.active:
            self.active = steps > 1 and bytes_per_step * steps > free_bytes(device) / 4


@functools.cache
def keep_freed_memory() -> None:
    """Let the process reuse freed memory instead of returning it to the system after every tensor.

    Each return costs page faults when the next tensor is filled: a third of the time of a meta-batch of small images
    on a CPU (benchmarks). Tensors of 32 MB and more, which are slow to compute anyway, go back at once: kept, they
    leave gaps that others do not fit into. Only the GNU C library has the switches; elsewhere nothing happens.
    """
    library = _c_library()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Return all freed memory to the system, after something that is not done again."""
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None
