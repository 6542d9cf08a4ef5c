"""What a loss takes of a network that returns several tensors: all of them, as in a plain loop, or the logits alone.

A plain loop calls ``loss(net(x), targets)``. So does this package where the loss takes that. A loss of one tensor, such
as `torch.nn.functional.cross_entropy`, raises there; it gets the logits. Which of both is found by trying, on copies.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.calling import call_with
from maml_lightning.engine.trials import trying
from maml_lightning.errors import SettingError
from maml_lightning.structures import describe, leaves, logits_of, mapped, tensors_of

log = logging.getLogger(__name__)

# What Python and PyTorch raise where a tuple or an object is used as a tensor, and where it is used as what it is, but
# lacks an element, or a tensor in it has another shape. For the first, TorchScript has a text alone.
_REFUSALS, _MISTAKES = (TypeError, AttributeError, NotImplementedError), (IndexError, ValueError, RuntimeError)
_OF_SCRIPT = "Expected a value of type 'Tensor'"


def takes_all(loss: Callable[..., Any], returned: Any, targets: Any) -> bool:
    """Whether a loss takes all that a network returns, several tensors; else it is of the logits.

    Args:
        loss: of outputs and targets.
        returned: by the network, of one task; of a single tensor nothing is to be decided.
        targets: of one task.

    Raises:
        SettingError: it fails on all of them as it would if it were meant for them, but takes the logits.
    """
    if isinstance(returned, Tensor):
        return False
    error = _error(loss, returned, targets)
    if error is None or isinstance(error, _REFUSALS) or _OF_SCRIPT in str(error):
        return error is None
    try:
        of_logits = _error(loss, logits_of(returned), targets)
    except SettingError:  # nothing says which tensor they are
        return True
    if of_logits is None and isinstance(error, _MISTAKES):
        raise SettingError(
            f"model.loss cannot be computed from all that model.net returns, {describe(returned)} "
            f"({_named(error)}), but from its logits alone, which may not be what is meant; correct it, or let the "
            "network return one tensor."
        )
    return of_logits is not None


class Found:
    """Remembers of a network and a loss, in training and in evaluation mode, whether the loss takes all."""

    def __init__(self) -> None:
        self._known: dict[bool, tuple[nn.Module, Any, bool | None]] = {}
        self._said: set[str] = set()

    def takes_all(self, net: nn.Module, loss: Callable[..., Any]) -> bool | None:
        """What was found of them in the network's mode: None where it returned one tensor; else that it does not."""
        return self._known[net.training][2] if self.knows(net, loss) else False

    def knows(self, net: nn.Module, loss: Callable[..., Any]) -> bool:
        """Whether it was found of them in the network's mode."""
        known = self._known.get(net.training)
        return known is not None and known[0] is net and known[1] is loss

    def find(self, net: nn.Module, loss: Callable[..., Any], inputs: Any, targets: Any) -> None:
        """Run copies of both once; nothing is found where the network does not run.

        Args:
            net: the network.
            loss: of outputs and targets.
            inputs: of one task.
            targets: of one task.
        """
        with trying(net, loss, device=leaves(inputs)[0].device) as copies:
            for tried, own_loss in (copies, (net, loss)):  # a copy may lack what the network itself keeps
                try:
                    with torch.enable_grad():  # it may take a gradient as it runs
                        returned = call_with(tried, {}, mapped(torch.clone, inputs))
                except Exception:  # whatever a user's network raises; it will again where it matters
                    continue
                found = None if isinstance(returned, Tensor) else takes_all(own_loss, returned, targets)
                self._known[net.training] = (net, loss, found)
                if found:
                    self._say(_of_scores(returned))
                elif found is False and not _is_of_torch(loss) and (error := _error(own_loss, returned, targets)):
                    # It may be a mistake in a loss of all.
                    what = f"of all that model.net returns, {describe(returned)}, it raises {_named(error)}"
                    self._say(f"model.loss gets the logits alone: {what}")
                break

    def _say(self, line: str) -> None:
        if line and line not in self._said:
            log.warning("%s", line)
            self._said.add(line)


def _of_scores(returned: Any) -> str:
    """What scores and predictions are of, where nothing in what the network returns is their place; else nothing."""
    try:
        logits_of(returned)
    except SettingError:
        if len(tensors_of(returned)) > 1:
            return (
                f"Scores and predictions are of the first tensor that the network returns, {describe(returned)}; name "
                "another one logits to have them of it."
            )
    return ""


def _named(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_of_torch(loss: Any) -> bool:
    """Whether a loss is PyTorch's own, or one with some of its arguments, all of which are of one tensor."""
    loss = getattr(loss, "func", loss)
    return str(getattr(loss, "__module__", None) or type(loss).__module__).split(".")[0] == "torch"


def _error(loss: Callable[..., Any], outputs: Any, targets: Any) -> Exception | None:
    """What keeps a loss from being one number of the outputs."""
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss(pytree.tree_map_only(Tensor, torch.clone, outputs), mapped(torch.clone, targets))
    except Exception as error:  # whatever a user's loss raises
        return error
    one = isinstance(value, Tensor) and value.numel() == 1
    return None if one else TypeError(f"gives {describe(value)}")
