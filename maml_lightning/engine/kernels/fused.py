"""Whether one kernel in Triton runs in the place of several of torch's: on GPUs, where it can be compiled."""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
FUSED = {"cuda"}  # kinds of devices
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # sums are in float32
_MOST = 2**31  # elements, which the kernels count in 32 bits
_failed: set[str] = set()


def is_fused(x: Tensor, elements: int = 0) -> bool:
    """Whether tensors like this have fused kernels.

    Args:
        x: the first argument.
        elements: of the largest result, where that is larger than ``x``.
    """
    return x.device.type in FUSED and x.dtype in _DTYPES and 0 < max(x.numel(), elements) < _MOST


def fused(module: str, name: str, own: Callable[..., Any], *args: Any) -> Any:
    """What a kernel gives of the arguments; where it cannot be compiled, what ``own`` gives.

    Args:
        module: with the kernel, ``triton_normalization`` or ``triton_patches``.
        name: of the kernel.
        own: the same by torch's own operators.
        args: of both.
    """
    if name not in _failed:
        try:
            kernels = importlib.import_module(f"maml_lightning.engine.kernels.{module}")  # needs Triton
            return getattr(kernels, name)(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler says
            _failed.add(name)
            log.debug("The kernel %s cannot be compiled, torch's own are used: %s", name, error)
    return own(*args)
