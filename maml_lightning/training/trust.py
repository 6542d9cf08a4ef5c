"""What a checkpoint may name: plain values in it can still name code, and a name is code once it is imported or called.

Nothing that a checkpoint names is imported or called unless it is a subclass of the type it stands for (a loss: a
function of the loss family) and is defined in this package or in PyTorch, or the user named it as well, or trusts the
checkpoint explicitly.
"""

import inspect
import re
import sys
from collections.abc import Collection
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from maml_lightning.errors import SettingError

# Those that compute; others of torchmetrics load networks.
_METRICS = tuple(f"torchmetrics.{kind}" for kind in ("classification", "regression", "segmentation", "nominal"))
# What a setting of a checkpoint stands for, and where such classes may be defined.
_TYPES: dict[str, tuple[type | tuple[type, ...], tuple[str, ...]]] = {
    "net": (nn.Module, ("maml_lightning", "torch.nn.modules")),
    "loss": (nn.Module, ("torch.nn.modules.loss",)),
    "metric": (Metric, _METRICS),
    "optimizer": (Optimizer, ("torch.optim",)),
    "lr_scheduler": ((LRScheduler, ReduceLROnPlateau), ("torch.optim", "lightning.pytorch.cli")),
}


def check_settings(settings: dict[str, Any], source: str, named: Collection[str] = (), remedy: str = "") -> None:
    """Check that a checkpoint names no code of others; nothing is imported and nothing is called.

    Args:
        settings: ``net``, ``loss``, ``metric``, ``optimizer`` and ``lr_scheduler`` may name code, others are plain.
        source: the checkpoint, for errors.
        named: import paths that the user named as well, already imported.
        remedy: what the user can do who trusts it, for errors.

    Raises:
        SettingError: one of them does, or is no plain value.
    """
    for setting, value in settings.items():
        if value is None:
            continue
        if setting == "metric" and isinstance(value, str):
            if not (value in named or _is_function(value, ("torchmetrics.functional",))):
                raise _not_trusted("metric", value, "a metric of torchmetrics", source, remedy)
        elif setting == "loss" and isinstance(value, str):
            if not (value in named or _is_loss(value)):
                raise _not_trusted("loss", value, "a loss of torch.nn.functional", source, remedy)
        elif setting in _TYPES:
            _check_class(setting, value, source, named, remedy)
        elif not _is_plain(value):
            raise SettingError(f"{source} holds no usable {setting} ({value!r:.80}); give a checkpoint that fit wrote.")


def find(path: str) -> Any:
    """What an import path names, if it has been imported already; else None. Runs no code."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        if found is None:
            continue
        for name in parts[end:]:
            found = vars(found).get(name) if isinstance(found, ModuleType | type) else None
        return found
    return None


def named(given: Any) -> set[str]:
    """The import paths of all classes and functions in settings that the user gave."""
    if isinstance(given, Namespace | dict):
        items = given.items() if isinstance(given, dict) else vars(given).items()
        paths = {value for key, value in items if key == "class_path" and isinstance(value, str)}
        return paths.union(*(named(value) for _, value in items))
    if isinstance(given, list | tuple):
        return set().union(*map(named, given))
    return {f"{given.__module__}.{given.__qualname__}"} if isinstance(given, FunctionType) else set()


def without(saved: dict[str, Any], given: Any) -> dict[str, Any]:
    """A class of a checkpoint and its arguments, without what the user gave; ``{}`` where that is another class."""
    path, ours = saved.get("class_path"), given.get("class_path")
    if ours and ours != path and not (isinstance(path, str) and find(path) is find(ours)):
        return {}
    arguments, by_hand = saved.get("init_args"), given.get("init_args") or {}
    if not isinstance(arguments, dict):
        return saved
    return {
        **saved,
        "class_path": ours or path,
        "init_args": {key: value for key, value in arguments.items() if key not in by_hand},
    }


def build(setting: str, value: dict[str, Any], source: str) -> Any:
    """The network, loss or metric of a checkpoint, built as the command line builds it.

    Args:
        setting: ``net``, ``loss`` or ``metric``.
        value: its class path and arguments, that `check_settings` passed or the user trusts.
        source: the checkpoint, for errors.

    Raises:
        SettingError: it cannot be built.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, setting, fail_untyped=False)
    try:
        return parser.instantiate_classes(parser.parse_object({setting: value}))[setting]
    except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"{source} names a {setting} that cannot be built ({reason:.200}); give {setting} by hand."
        ) from error


def _check_class(setting: str, value: Any, source: str, named: Collection[str], remedy: str) -> None:
    base, homes = _TYPES[setting]
    what = f"{getattr(base, '__name__', 'LRScheduler')} of PyTorch or of this package"
    if not isinstance(value, dict) or not set(value) <= {"class_path", "init_args", "dict_kwargs"}:
        raise _not_trusted(setting, value, f"a {what}", source, remedy)
    path = value.get("class_path")
    found = find(path) if isinstance(path, str) else None
    known = isinstance(found, type) and issubclass(found, base)
    if not known or not (path in named or _defined_in(found, homes)):
        raise _not_trusted(setting, path, f"a {what}", source, remedy)
    for arguments in (value.get("init_args"), value.get("dict_kwargs")):
        if arguments is not None:
            _check_arguments(f"{setting}.init_args", arguments, source, named, remedy)


def _check_arguments(setting: str, value: Any, source: str, named: Collection[str], remedy: str) -> None:
    """Check for what the command line could take for a class, a function or a file among a class's arguments."""
    if isinstance(value, dict):
        if "class_path" in value:
            _check_class("net", value, source, named, remedy)
            return
        for key, item in value.items():
            _check_arguments(f"{setting}.{key}", item, source, named, remedy)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_arguments(setting, item, source, named, remedy)
    elif isinstance(value, str):
        names_something = re.search(r"[./\\:{}\[\]]", value) or Path(value).exists()
        if names_something and value not in named and not _is_loss(value):
            raise _not_trusted(setting, value, "a plain value", source, remedy)
    elif not _is_plain(value):
        raise _not_trusted(setting, value, "a plain value", source, remedy)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_loss(path: str) -> bool:
    return _is_function(path, ("torch.nn.functional",))


def _is_function(path: str, homes: tuple[str, ...]) -> bool:
    """Whether a path names a public function of a target, defined in one of some packages."""
    found = find(path)
    return (
        isinstance(found, FunctionType)
        and not found.__name__.startswith("_")
        and _defined_in(found, homes)
        and "target" in inspect.signature(found).parameters
    )


def _defined_in(found: Any, homes: tuple[str, ...]) -> bool:
    home = getattr(found, "__module__", None)
    return isinstance(home, str) and any(home == package or home.startswith(f"{package}.") for package in homes)


def _not_trusted(setting: str, value: Any, expected: str, source: str, remedy: str) -> SettingError:
    return SettingError(f"{source} names {setting} {value!r:.80}, which is not {expected}, so nothing runs; {remedy}.")
