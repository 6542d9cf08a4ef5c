"""The network and the loss of one task, as pure functions of its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.calling import call_with
from maml_lightning.algorithms.losses import takes_all
from maml_lightning.algorithms.optimizers import InnerOptimizer, Parameters
from maml_lightning.engine.differentiation import is_by_autograd
from maml_lightning.engine.kernels.mode import task_operators
from maml_lightning.engine.kernels.normalization import OfSupport
from maml_lightning.errors import SettingError
from maml_lightning.structures import describe, logits_of, tensor_of
from maml_lightning.task_statistics import statistics_of_first

Loss = Callable[[Any, Any], Tensor]


class Model(NamedTuple):
    """The Python objects that the functions of one task depend on; their first argument.

    Args:
        net: the network, whose own parameters are never written.
        loss: ``loss(outputs, targets)``, a scalar.
        optimizer: of the inner loop.
        proximal: strength ``mu`` of the proximal term, 0 for none.
        of_support: whether queries are normalized with the statistics of the support set.
        takes_all: whether the loss takes all that the network returns, and not the logits alone; None where the
            network returned one tensor when it was tried.
    """

    net: nn.Module
    loss: Loss
    optimizer: InnerOptimizer
    proximal: float
    of_support: bool = False
    takes_all: bool | None = False

    def loss_of(self, returned: Any, y: Any) -> Tensor:
        """The loss of what the network returns.

        Raises:
            SettingError: that was one tensor at first, and now is several, which the loss takes.
        """
        if self.takes_all is None and not isinstance(returned, Tensor) and takes_all(self.loss, returned, y):
            raise SettingError(
                f"model.net returned one tensor at first and now returns {describe(returned)}, of which model.loss "
                "would get the logits alone; let it return as much from the first meta-step on, for support and query "
                "examples alike."
            )
        return self.loss(returned if self.takes_all else logits_of(returned), y)

    def outputs_of(self, returned: Any) -> Tensor:
        """The tensor of it that scores and predictions are of."""
        return (tensor_of if self.takes_all else logits_of)(returned)


def returned(model: Model, fast: Parameters, shared: Parameters, constants: Parameters, x: Any) -> Any:
    """All that the network returns with adapted parameters ``fast`` and those that all tasks share."""
    alone = is_by_autograd()  # in a loop over tasks the network keeps its own buffers, and may write to them
    tensors = {**fast, **shared} if alone else {**fast, **shared, **constants}
    tensors = {name: value.contiguous() for name, value in tensors.items()}  # torch's own layout, see kernel_layout
    # By itself it may take a gradient as it runs.
    with torch.enable_grad() if alone else task_operators():
        return call_with(model.net, tensors, x)


def _recorded(value: Tensor) -> Tensor:
    """A tensor that was computed from what the network returns, without its graph where autograd records none."""
    return value if torch.is_grad_enabled() or not is_by_autograd() else value.detach()


def outputs(model: Model, fast: Parameters, shared: Parameters, constants: Parameters, x: Any) -> Tensor:
    """The tensor of what the network returns that scores and predictions are of."""
    return _recorded(model.outputs_of(returned(model, fast, shared, constants, x)))


def _of_queries(model: Model, fast: Parameters, shared: Parameters, constants: Parameters, x: Any, support: Any) -> Any:
    """What the network returns on queries ``x``, which run with the ``support`` inputs where their statistics count."""
    if not model.of_support:
        return returned(model, fast, shared, constants, x)
    both = pytree.tree_map(lambda *parts: torch.cat(parts), support, x)
    first, examples = (len(pytree.tree_leaves(part)[0]) for part in (support, both))
    with statistics_of_first(first, examples), OfSupport():
        found = returned(model, fast, shared, constants, both)
    if not model.takes_all:
        return logits_of(found)[first:]
    parts = pytree.tree_leaves(found)
    if not all(isinstance(part, Tensor) and part.dim() and len(part) == examples for part in parts):
        raise SettingError(
            "model.query_statistics support runs queries together with the support set, from which what model.net "
            f"returns, {describe(found)}, cannot be separated; return tensors [examples, ...] in a tuple or dict, or "
            "set it to batch."
        )
    return pytree.tree_map(lambda part: part[first:], found)


def query_outputs(model: Model, *args: Any) -> Tensor:
    """The outputs on queries, see :func:`query_loss`."""
    return _recorded(model.outputs_of(_of_queries(model, *args)))


def query_loss(
    model: Model, fast: Parameters, shared: Parameters, constants: Parameters, x: Any, y: Any, support: Any
) -> tuple[Tensor, Tensor]:
    """The loss and the outputs on queries ``x``, which run with the ``support`` inputs where their statistics count."""
    found = _of_queries(model, fast, shared, constants, x, support)
    predictions = model.outputs_of(found)  # before the loss may take them out of a dict
    return _recorded(model.loss_of(found, y)), _recorded(predictions)
