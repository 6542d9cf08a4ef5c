"""Parts of a network that run anew in the backward pass: with the tensors of their call, not those there by then.

``torch.utils.checkpoint`` does so, and functions of one's own whose ``backward`` calls layers: reversible networks, the
adjoint method for differential equations. Both note the call that they are made in; outside of calls nothing changes.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch.utils.checkpoint as checkpoint
from torch.autograd.function import BackwardCFunction

Run = Callable[..., Any]  # calls a function while the tensors of a call are in place
_RUN: ContextVar[Run | None] = ContextVar("run", default=None)
_checkpoint: Any = checkpoint
_node: Any = BackwardCFunction
_FRAME, _REENTRANT, _BACKWARD = _checkpoint._CheckpointFrame, _checkpoint.CheckpointFunction, _node.apply


def recomputing(run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(function, ...)``; what ``function`` has run anew in the backward pass is run by ``run`` then, too."""
    token = _RUN.set(run)
    try:
        return run(function, *args, **kwargs)
    finally:
        _RUN.reset(token)


def _frame(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = _RUN.get()
    return _FRAME(function if run is None else partial(recomputing, run, function), *args, **kwargs)


class _Reentrant(_REENTRANT):  # type: ignore[misc, valid-type]
    """In a call, the other kind of checkpoint: no ``torch.autograd.grad`` differentiates this one."""

    @classmethod
    def apply(cls, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if cls is not _Reentrant or _RUN.get() is None:
            return super().apply(function, preserve, *args)
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


def _note(node: Any) -> None:
    if (run := _RUN.get()) is not None:
        node.run_of_call = run


def _backward(node: Any, *args: Any) -> Any:
    run = getattr(node, "run_of_call", None)
    return _BACKWARD(node, *args) if run is None else recomputing(run, _BACKWARD, node, *args)


_checkpoint._CheckpointFrame, _checkpoint.CheckpointFunction = _frame, _Reentrant
_node.__init__, _node.apply = _note, _backward
