"""Weight normalization, Salimans and Kingma 2016, eq. 2, in terms of operators with a second derivative.

The second derivative of ``torch._weight_norm`` is wrong in PyTorch (2.6 to 2.14): it takes the norm for a constant.
"""

import torch
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g * v / |v|``, ``torch._weight_norm``: the norm is over all dimensions but ``dim``, or over all if it is -1."""
    others = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    norm = torch.linalg.vector_norm(v, 2, others, keepdim=dim != -1) if others else v.abs()
    return v * (g / norm)
