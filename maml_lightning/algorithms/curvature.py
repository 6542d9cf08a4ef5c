"""Meta-Curvature: matrices, learned with the initialization, transform the inner gradient (Park and Oliva 2019).

A full curvature matrix ``M`` in ``theta - alpha M grad L_s(theta)`` has as many entries as the network has pairs of
weights. Section 4 of the paper takes the product of three small ones instead. With the gradient of a convolution as a
tensor ``G`` ``[O, I, F]`` of output channels, input channels and places of the filter, and the n-mode product of a
tensor with a matrix, ``(G x_1 M)[o', i, f] = sum_o M[o', o] G[o, i, f]``::

    MC(G) = G x_1 M_o x_2 M_i x_3 M_f         M_o [O, O], M_i [I, I], M_f [F, F]

A linear layer has ``F = 1`` and no ``M_f``, so that ``MC(G) = M_o G M_i^T``. All begin as the identity, which is MAML,
and all inner steps share them. They are not symmetric, nor are they kept positive definite. A vector, such as a bias,
has one learned factor for each of its elements, as in learn2learn's ``MetaCurvatureTransform``, which follows the
authors' code. Other tensors are treated by their number of dimensions alone.

The transformed gradient takes the gradient's place in the inner optimizer: clipping, weight decay, momentum and
learning rates come after it. The matrices take part in the inner step like inner learning rates, and the pullback of
the step yields their gradients: ``d / d M_o = -sum_k (alpha_k * lambda_{k+1}) (G_k x_2 M_i x_3 M_f)^T``, with the
tensors unfolded to ``[O, I F]``, and alike for the others.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from maml_lightning.algorithms.optimizers import Parameters, rate_of
from maml_lightning.devices import without_autocast
from maml_lightning.errors import SettingError

MODES = ("output", "input", "filter")
LARGEST = 4096  # rows of a matrix


def identities(params: Mapping[str, Tensor], any_rows: Collection[str] = ()) -> Parameters:
    """Curvature matrices with which gradients stay as they are, ``[1, n, n]``, of vectors ``[1, n]``, by ``NAME.MODE``.

    Args:
        params: the adapted parameters by name.
        any_rows: names of those whose number of rows follows the episode: they have no output matrix.

    Raises:
        SettingError: a matrix would have more than 4,096 rows.

    Example:
        >>> {name: value.shape for name, value in identities({"w": torch.rand(4, 3, 5, 5)}).items()}
        {'w.output': torch.Size([1, 4, 4]), 'w.input': torch.Size([1, 3, 3]), 'w.filter': torch.Size([1, 25, 25])}
    """
    matrices = {}
    for name, value in params.items():
        like = rate_of(value, 1.0)
        for key, shape in _shapes(name, value, any_rows).items():
            if len(shape) > 2 and shape[1] > LARGEST:
                raise SettingError(
                    f"model.meta_curvature true would learn a matrix of {shape[1]} x {shape[1]} for {name} "
                    f"{list(value.shape)}, and {LARGEST} is the most; leave {name} out of model.adapted_parameters."
                )
            one = like.new_ones(shape) if len(shape) < 3 else torch.eye(shape[1], dtype=like.dtype, device=like.device)
            matrices[key] = one.expand(shape).clone()
    return matrices


def matrices_of(params: Mapping[str, Tensor], matrices: Mapping[str, Tensor], any_rows: Collection[str]) -> Parameters:
    """The matrices of these parameters.

    Args:
        params: the adapted parameters by name.
        matrices: of these and others, see :func:`identities`.
        any_rows: as there.

    Raises:
        SettingError: a parameter has none.
    """
    found = {}
    for name, value in params.items():
        for key, shape in _shapes(name, value, any_rows).items():
            if key not in matrices or matrices[key].shape != shape:
                raise SettingError(
                    f"model.meta_curvature true has no matrix for {name} {list(value.shape)}: it was frozen, or of "
                    "another network, when MAML was created; unfreeze it before, or create another MAML with this "
                    "network."
                )
            found[key] = matrices[key]
    return found


def _shapes(name: str, value: Tensor, any_rows: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a parameter's matrices."""
    if value.dim() < 2:
        shapes = {"output": (1, *value.shape)}
    else:
        sizes = (*value.shape[:2], *([math.prod(value.shape[2:])] if value.dim() > 2 else []))
        shapes = {mode: (1, size, size) for mode, size in zip(MODES, sizes, strict=False)}
    return {f"{name}.{mode}": shape for mode, shape in shapes.items() if mode != "output" or name not in any_rows}


def transformed(gradient: Parameters, matrices: Parameters) -> Parameters:
    """``MC(G)`` of each gradient that has matrices.

    Args:
        gradient: of one task, by name.
        matrices: ``[n, n]``, of vectors ``[n]``, by ``NAME.MODE``; what else it has is not read.
    """
    if matrices.keys() <= gradient.keys():  # rates alone
        return gradient
    return {name: _transformed(g, [matrices.get(f"{name}.{mode}") for mode in MODES]) for name, g in gradient.items()}


def _transformed(gradient: Tensor, matrices: list[Tensor | None]) -> Tensor:
    given = [matrix for matrix in matrices if matrix is not None]
    if not given:
        return gradient
    wide = gradient.to(torch.promote_types(gradient.dtype, given[0].dtype))
    if gradient.dim() < 2:
        return (wide * given[0]).to(gradient.dtype)
    # Near the identity, bfloat16 has three digits: too few for what training changes in a meta-step.
    with without_autocast(gradient.device.type):
        of_output, of_input, of_filter = (None if matrix is None else matrix.to(wide.dtype) for matrix in matrices)
        # [F, I, O], as a convolution lies in memory. Of a parameter without elements, -1 says no size.
        result = wide.reshape(*wide.shape[:2], math.prod(wide.shape[2:])).permute(2, 1, 0)
        if of_output is not None:
            result = result @ of_output.T
        if of_input is not None:
            result = of_input @ result
        if of_filter is not None:
            result = (of_filter @ result.flatten(1)).view(result.shape)
        return result.permute(2, 1, 0).reshape(gradient.shape).to(gradient.dtype)
