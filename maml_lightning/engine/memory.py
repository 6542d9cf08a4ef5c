"""How much memory is free, and how the C library hands it out."""

import ctypes
import functools
import re
from pathlib import Path
from typing import Literal

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of the GNU C library


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
    """Let the process reuse freed memory instead of returning it to the system after every large tensor.

    Each return costs page faults when the next tensor is filled: a third of the time of a meta-batch on a CPU
    (benchmarks). Like the caching allocator of CUDA tensors, the process stays as large as its peak. Only the GNU C
    library has the switch; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
