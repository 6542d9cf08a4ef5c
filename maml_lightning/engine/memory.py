"""How much memory is free, and how the C library hands it out."""

import ctypes
import functools
import re
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
_LARGE = 2**25  # its largest threshold


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes; on CUDA what torch keeps for new tensors is free, too.

    Apple's ``mps`` shares the memory of the CPU.
    """
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def shared_bytes(device: torch.device) -> int:
    """What a meta-batch may take of a GPU's memory: a fifth of it, the same in every run, unless others hold most."""
    if device.type != "cuda":
        return free_bytes(device) // 4
    return min(torch.cuda.mem_get_info(device)[1] // 5, free_bytes(device) // 4)


def memory_of(tensor: Tensor) -> int:
    """The same for tensors that share memory; different of those on the ``meta`` device, whose addresses are all 0."""
    return tensor.untyped_storage()._cdata


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
    """Whether inner steps are recomputed in the backward pass, so that a step keeps only its fast weights.

    Args:
        setting: true or false; "auto" recomputes from the first time that a meta-batch would keep more than a quarter
            of the free memory.
    """

    def __init__(self, setting: bool | Literal["auto"]) -> None:
        self.setting, self.active = setting, setting is True
        self._fits = 0  # bytes that a GPU had room for: asking it again takes time

    def decide(self, bytes_per_step: int, steps: int, device: torch.device) -> None:
        """Decide, after the first of ``steps`` inner steps, for it and those after it."""
        needed = bytes_per_step * steps
        fitted = needed <= self._fits and device.type == "cuda"
        if self.setting == "auto" and not self.active and steps > 1 and not fitted:
            self.active, self._fits = needed > free_bytes(device) / 4, needed


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


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt else None
    except (AttributeError, OSError, TypeError):
        return None
