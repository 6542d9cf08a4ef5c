"""Parts of a network that run anew in the backward pass: with the tensors of their call, not those there by then.

``torch.utils.checkpoint`` does so, and functions of one's own whose ``backward`` calls layers: reversible networks, the
adjoint method for differential equations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint as checkpoint
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

_checkpoint: Any = checkpoint
_function: Any = Function
_backward: Any = BackwardCFunction
_BACKWARD = _backward.apply


@contextmanager
def recomputing(with_tensors: Callable[..., Any]) -> Iterator[None]:
    """For a call of a network: what it has run anew in the backward pass has the tensors of this call then, too.

    Reentrant checkpoints, which no ``torch.autograd.grad`` differentiates, become the other kind.

    Args:
        with_tensors: calls a function while the tensors are in place.
    """

    def noting(cls: type, *args: Any, **kwargs: Any) -> Any:
        outputs = apply.__get__(None, cls)(*args, **kwargs)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, Tensor) and isinstance(node := output.grad_fn, BackwardCFunction):
                node.with_tensors = with_tensors
        return outputs

    frame, reentrant, apply = _checkpoint._CheckpointFrame, _checkpoint.CheckpointFunction, vars(Function)["apply"]
    _checkpoint._CheckpointFrame = lambda function, *args, **kwargs: frame(
        partial(with_tensors, function), *args, **kwargs
    )
    _checkpoint.CheckpointFunction = _NotReentrant
    _function.apply = classmethod(noting)
    try:
        yield
    finally:
        _checkpoint._CheckpointFrame, _checkpoint.CheckpointFunction, _function.apply = frame, reentrant, apply


class _NotReentrant:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


def _with_its_tensors(node: Any, *args: Any) -> Any:
    """The backward pass of a function, see :func:`recomputing`."""
    with_tensors = getattr(node, "with_tensors", None)
    return _BACKWARD(node, *args) if with_tensors is None else with_tensors(_BACKWARD, node, *args)


_backward.apply = _with_its_tensors  # for all time: nodes of other calls have no such attribute
