"""``test --ensemble``: the networks of several checkpoints, each with the settings that it was trained with."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from maml_lightning.errors import SettingError
from maml_lightning.trained import load, packaged
from maml_lightning.training.checkpoints import read_checkpoint, settings_of
from maml_lightning.training.ensembles import Ensemble
from maml_lightning.training.module import MAML
from maml_lightning.training.trust import check_settings

# Settings that say how a network is run, not which one it is: those given by hand apply to each.
_OF_EACH = ("eval_inner_steps", "tasks_per_chunk", "flat_memory", "compile", "execution", "non_finite")


def ensemble_of(config: dict[str, Any], given: Namespace) -> Ensemble:
    """The ensemble that a test is of.

    Args:
        config: the settings of the test, as the command line dumps them.
        given: those given by hand.

    Raises:
        SettingError: a checkpoint cannot be read, or has other settings than those given by hand.
    """
    if config["ckpt_path"]:
        raise SettingError(f"ckpt_path {config['ckpt_path']} is not supported with ensemble; name it there instead.")
    names = [str(name) for name in config["ensemble"]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingError(f"ensemble names {twice[0]} more than once; leave it out.")
    by_hand = {key: value for key, value in config["model"].items() if key in vars(given.model)}
    net = vars(given.model.net.get("init_args") or Namespace())
    by_hand["net"] = {key: value for key, value in _arguments(by_hand["net"]).items() if key in net}
    applied = {key: value for key, value in by_hand.items() if key in _OF_EACH}
    networks = {}
    for name in names:
        path = packaged(name) or Path(name)
        own = settings_of(read_checkpoint(path, "ensemble"), MAML)
        if not config["trust_checkpoint"]:
            check_settings(own, f"ensemble {name}", remedy="if you trust the file, give --trust_checkpoint true")
        _check_given(by_hand, own, name)
        networks[name] = load(path, config["trust_checkpoint"], **applied)
    return Ensemble(networks)


def _check_given(given: dict[str, Any], own: dict[str, Any], name: str) -> None:
    """Check that the settings given by hand are a network's own.

    Raises:
        SettingError: one is not.
    """
    theirs = {**own, **{f"net.{key}": value for key, value in _arguments(own.get("net") or {}).items()}}
    ours = {key: value for key, value in given.items() if key not in ("net", *_OF_EACH)}
    ours |= {f"net.{key}": value for key, value in given["net"].items()}
    for key, value in ours.items():
        if key in theirs and value != theirs[key]:
            raise SettingError(
                f"model.{key} is {value}, but ensemble {name} was trained with {theirs[key]}: each network has its own "
                "settings; leave it out."
            )


def _arguments(net: dict[str, Any]) -> dict[str, Any]:
    return net.get("init_args") or {}
