"""The range of each of MAML's settings, and the settings that do not work together."""

from collections.abc import Iterable, Mapping
from typing import Any

from maml_lightning.algorithms.algorithm import OF_UNROLLED_STEPS
from maml_lightning.algorithms.registry import find_algorithm
from maml_lightning.errors import SettingError

_LEAST = {
    "inner_steps": 0,
    "eval_inner_steps": 0,
    "multi_step_epochs": 0,
    "first_order_epochs": 0,
    "inner_weight_decay": 0,
    "implicit_iterations": 1,
}
_POSITIVE = ("inner_lr", "outer_lr", "inner_clip_norm", "proximal")
_CHOICES = {
    "query_statistics": ("batch", "support", "running"),
    "head": ("learned", "prototypes"),
    "inner_optimizer": ("sgd", "momentum", "adam"),
    "learn_inner_lr": (None, "network", "tensor", "step", "weight"),
    "non_finite": ("stop", "skip"),
}
_OFF = (None, False, 0, "all", "learned")  # the defaults of settings that add something to plain MAML


def check_values(settings: Mapping[str, Any]) -> None:
    """Check MAML's settings one by one and together.

    Args:
        settings: the arguments of `MAML`, by name.

    Raises:
        SettingError: a setting is out of range, or incompatible with another.
    """
    for name, least in _LEAST.items():
        _at_least(name, settings[name] or 0, least)
    for name in _POSITIVE:
        value = settings[name]
        if value is not None and not value > 0:
            raise SettingError(f"model.{name} must be above 0 (got {value}).")
    for name, choices in _CHOICES.items():
        value = settings[name]
        if value not in choices:
            got = value if isinstance(value, str) else f"one of type {type(value).__name__}"
            raise SettingError(f"model.{name} must be one of {', '.join(map(str, choices))} (got {got}).")
    _check_loss(settings["loss"])
    name = settings["algorithm"]
    algorithm = find_algorithm(name)
    for setting, reason in algorithm.unsupported.items():
        _raise_for(settings, [setting], f"model.algorithm {name} {reason}")
    _at_least("inner_steps", settings["inner_steps"], algorithm.min_inner_steps)
    if settings["inner_steps"] == 0:
        _raise_for(settings, OF_UNROLLED_STEPS, "model.inner_steps is 0: training has no inner loop")
    if settings["head"] == "prototypes" and settings["learn_inner_lr"] == "weight":
        raise SettingError(
            "model.learn_inner_lr weight is not supported here: with model.head prototypes the number of weights "
            "follows the episode's classes; take tensor or step."
        )
    if settings["query_statistics"] == "running":
        _raise_for(settings, ["per_step_normalization"], "model.query_statistics running has none for each step")
    if settings["first_order"]:
        _raise_for(settings, ["first_order_epochs"], "model.first_order is true in every epoch")


def _check_loss(loss: Any) -> None:
    """Check that a loss can be called with outputs and targets: not a name, nor a class of torch.nn itself."""
    if isinstance(loss, type):
        raise SettingError(f"model.loss is the class {loss.__name__}; give an instance of it, {loss.__name__}().")
    if not callable(loss):
        raise SettingError(
            f"model.loss is {loss!r}, which cannot be called; give a function of (outputs, targets), such as "
            "torch.nn.functional.mse_loss."
        )


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise SettingError(f"model.{name} must be at least {least} (got {value}).")


def _raise_for(settings: Mapping[str, Any], names: Iterable[str], reason: str) -> None:
    """Raise for the first of the names whose setting is on."""
    for name in names:
        if settings[name] not in _OFF:
            raise SettingError(f"model.{name} {settings[name]} is not supported here: {reason}; leave it out.")
