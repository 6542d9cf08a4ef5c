"""Checkpoints of releases that kept no running statistics, or not what optimizers were configured with."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maml_lightning.algorithms.statistics import tracking_layers


def match_running_statistics(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Let layers whose running statistics a checkpoint lacks keep their own, and drop those that layers do not keep."""
    ours, tracking = module.state_dict(), tracking_layers(module)
    kept = {
        name: [f"{name}.{own}".lstrip(".") for own in ("running_mean", "running_var", "num_batches_tracked")]
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) or name in tracking
    }
    # The second state is beside averaged weights.
    for state in (checkpoint[name] for name in ("state_dict", "current_model_state") if name in checkpoint):
        for names in kept.values():
            if not state.keys() & names:
                state.update({name: ours[name] for name in names if name in ours})
            elif not ours.keys() & names:
                for name in names:
                    state.pop(name, None)


def param_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer's parameter groups."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def fits(made: Any, saved: dict[str, Any]) -> bool:
    """Whether a state of an earlier release, which names no class, fits."""
    if isinstance(made, Optimizer):
        groups = saved["param_groups"]
        return len(groups) == len(made.param_groups) and all(
            {*ours, "initial_lr"} == {*theirs} - {"params"} | {"initial_lr"}
            for ours, theirs in zip(param_groups(made), groups, strict=True)
        )
    return _parameters(made) <= set(saved)


def configured(checkpoint: dict[str, Any], now: dict[str, Any], schedulers: Sequence[LRScheduler]) -> dict[str, Any]:
    """What its optimizers and schedulers were configured with, as far as their state tells."""
    optimizers = []
    for ours, saved in zip(now["optimizers"], checkpoint["optimizer_states"], strict=True):
        groups = [
            {key: theirs.get(key, value) for key, value in group.items()}
            for group, theirs in zip(ours["groups"], saved["param_groups"], strict=True)
        ]
        for group, theirs in zip(groups, saved["param_groups"], strict=True):
            group["lr"] = group["lr"] if schedulers else theirs["lr"]
            group["lr"] = theirs.get("initial_lr", group["lr"])
        optimizers.append({**ours, "groups": groups})
    states = []
    for scheduler, ours, saved in zip(schedulers, now["schedulers"], checkpoint["lr_schedulers"], strict=True):
        known = {key: saved[key] for key in _parameters(scheduler) if key in saved}
        last = [group["lr"] for optimizer in optimizers for group in optimizer["groups"]]
        states.append({**ours, "state": {**ours["state"], **known, "_last_lr": last}})
    return {"optimizers": optimizers, "schedulers": states}


def _parameters(scheduler: LRScheduler) -> set[str]:
    names = {name for kind in type(scheduler).__mro__[:-1] for name in inspect.signature(kind).parameters}
    return {key for key in scheduler.state_dict() if key in names or key in ("base_lrs", "min_lrs")}
