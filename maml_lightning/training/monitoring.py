"""What is better: how the command line reads a score's name, and whether a function can be a loss."""

import inspect
import re
from functools import partial
from pydoc import locate
from typing import Any

from torch import nn

from maml_lightning.errors import SettingError

_MORE = {"accuracy", "acc", "auc", "auroc", "f1", "precision", "recall", "score"}
_LESS = {"loss", "mse", "rmse", "mae", "error", "err", "perplexity", "nll"}


def direction(monitor: str, setting: str) -> str:
    """``max`` or ``min``: the mode in which a monitored score improves.

    Args:
        monitor: the score's name, such as ``val/accuracy`` or ``val/mse_step_1``.
        setting: that gives the mode by hand, for errors.

    Raises:
        SettingError: its name does not show it.
    """
    words = set(re.split(r"[^a-z0-9]+", monitor.lower()))
    more, less = bool(words & _MORE), bool(words & _LESS)
    if more == less:
        raise SettingError(f"The monitored {monitor} may be better high or low; give --{setting} max or min.")
    return "max" if more else "min"


def score_of_loss(loss: Any) -> str:
    """What is logged of tasks of any kind: ``accuracy`` under a loss of classes, else the ``loss`` itself."""
    path = str(getattr(loss, "class_path", None) or getattr(loss, "__qualname__", ""))
    of_classes = path.rpartition(".")[2] in ("cross_entropy", "nll_loss", "CrossEntropyLoss", "NLLLoss")
    return "accuracy" if of_classes else "loss"


def check_loss(loss: Any) -> None:
    """Check that a loss can be called with outputs and targets.

    Args:
        loss: the function; or a class by its import path with its arguments, as the command line keeps it.

    Raises:
        SettingError: it cannot.
    """
    path = getattr(loss, "class_path", None)
    found: Any = locate(path) if path else loss
    name = path or getattr(loss, "__qualname__", loss)
    call: Any = partial(found.forward if issubclass(found, nn.Module) else found.__call__, None) if path else loss
    try:
        inspect.signature(call).bind("outputs", "targets")
    except TypeError as error:
        raise SettingError(
            f"model.loss {name} does not take (outputs, targets) alone ({error}); give a loss such as "
            "torch.nn.functional.cross_entropy."
        ) from error
    except ValueError:  # a function of C has no signature
        return
