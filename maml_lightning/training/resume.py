"""What of a run's settings holds when it is resumed: each is applied or raises an error, none is ignored.

Lightning restores the state of optimizers, schedulers and callbacks over the settings they were just made with. Here
the checkpoint's state is edited before it is restored, so that progress comes from the checkpoint and settings from the
user. ``docs/resuming.md`` has the table.
"""

import ast
import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from maml_lightning.errors import SettingError
from maml_lightning.training.earlier_releases import configured as configured_earlier
from maml_lightning.training.earlier_releases import fits, param_groups

NEW_RUN = "start a new run from its weights with --initial_checkpoint in place of --ckpt_path"
# Do not matter to the episodes that are still to come in an epoch.
_ANY_TIME = {"num_workers", "val_episodes", "test_episodes", "root", "download"}
_WITHIN_EPOCH = ("accumulate_grad_batches", "limit_train_batches", "overfit_batches")


def fresh(optimizers: Iterable[Optimizer], schedulers: Iterable[LRScheduler]) -> dict[str, Any]:
    """What optimizers and schedulers are configured with, before training or a checkpoint changes them."""
    return {
        "optimizers": [{"class": _name(optimizer), "groups": param_groups(optimizer)} for optimizer in optimizers],
        "schedulers": [{"class": _name(scheduler), "state": dict(scheduler.state_dict())} for scheduler in schedulers],
    }


def check_training_state(checkpoint: dict[str, Any], source: str) -> None:
    """Check that a checkpoint holds more than weights.

    Raises:
        SettingError: it does not; names the setting that takes it.
    """
    if any(not isinstance(checkpoint.get(key), list) for key in ("optimizer_states", "lr_schedulers")) or not (
        isinstance(checkpoint.get("loops"), dict)
    ):
        raise SettingError(
            f"ckpt_path {source} holds a network without the state of its training, so that it cannot be resumed; "
            f"start a new run from it with --initial_checkpoint {source} in place of --ckpt_path."
        )


def check_readable(checkpoint: dict[str, Any], source: str) -> None:
    """Check that a checkpoint holds all that resuming reads.

    Raises:
        SettingError: something is missing or of another type.
    """
    try:
        _read_training_state(checkpoint)
    except (ArithmeticError, AttributeError, IndexError, KeyError, SyntaxError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise SettingError(
            f"ckpt_path {source} was not loaded: its training state is damaged ({type(error).__name__}: {message}); "
            f"give another checkpoint, or {NEW_RUN}."
        ) from error


def _read_training_state(checkpoint: dict[str, Any]) -> None:
    """Read all that resuming reads, so that what is missing or of another type raises here."""
    checkpoint["pytorch-lightning_version"].split(".")
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    numbers = [loop["epoch_progress"]["current"]["processed"], batches["current"]["processed"]]
    numbers += [batches["is_last_batch"], checkpoint["epoch"], checkpoint["global_step"]]
    numbers += [scheduler["last_epoch"] for scheduler in checkpoint["lr_schedulers"]]
    for optimizer in (checkpoint["optimizer_states"][0], *checkpoint["optimizer_states"][1:]):
        optimizer["state"].items()
        numbers += [group["lr"] for group in optimizer["param_groups"] if group["params"]]
    sum(map(float, numbers))
    for key, _ in checkpoint["callbacks"].items():
        _watches(key)
    for part in ("settings", "fresh", "hyper_parameters"):
        checkpoint.get(part, {}).items()
    for part in ("data", "trainer") if checkpoint.get("settings") else ():
        checkpoint["settings"][part].items()


def check_optimizers(
    checkpoint: dict[str, Any], optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler]
) -> None:
    """Check that optimizers and schedulers are of the checkpoint's classes, so that they can load its state.

    Raises:
        SettingError: they differ; names both.
    """
    now, before = fresh(optimizers, schedulers), checkpoint.get("fresh") or {}
    for kind, key in (("optimizer", "optimizer_states"), ("lr_scheduler", "lr_schedulers")):
        ours = [item["class"] for item in now[f"{kind.removeprefix('lr_')}s"]]
        theirs = [item["class"] for item in before.get(f"{kind.removeprefix('lr_')}s", [])]
        saved = checkpoint[key]
        if not before:  # of an earlier release: its state shows the class
            made = optimizers if kind == "optimizer" else schedulers
            alike = len(saved) == len(made) and all(map(fits, made, saved))
            theirs = ours if alike else ["another"] * len(saved)
        if ours != theirs:
            given, was = (" and ".join(names) or "none" for names in (ours, theirs))
            raise SettingError(
                f"{kind} {given} cannot continue from the state of the checkpoint's ({was}); give --{kind} as the run "
                f"had it, or {NEW_RUN}."
            )


def keep_optimizer_settings(
    checkpoint: dict[str, Any], optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler]
) -> None:
    """Edit a checkpoint so that its optimizers and schedulers continue with the settings of these.

    Where a learning rate or a scheduler's setting differs, the schedule is where it would be if it had been so from the
    start. `ReduceLROnPlateau` keeps the reductions that it made and what it counted, unless it monitors something else.

    Args:
        checkpoint: that is about to be restored; its ``optimizer_states`` and ``lr_schedulers`` are edited.
        optimizers: as configured, with no state yet.
        schedulers: as configured; they are stepped, and restored from the checkpoint afterwards.

    Raises:
        SettingError: their classes are others.
    """
    check_training_state(checkpoint, "that is resumed")
    check_optimizers(checkpoint, optimizers, schedulers)
    now = fresh(optimizers, schedulers)
    before = checkpoint.get("fresh") or configured_earlier(checkpoint, now, schedulers)
    for optimizer, state, ours, theirs in zip(
        optimizers, checkpoint["optimizer_states"], now["optimizers"], before["optimizers"], strict=True
    ):
        owned = [index for index, scheduler in enumerate(schedulers) if scheduler.optimizer is optimizer]
        changed = ours != theirs or any(now["schedulers"][i] != before["schedulers"][i] for i in owned)
        if not changed:
            continue
        for saved, new, old in zip(state["param_groups"], ours["groups"], theirs["groups"], strict=True):
            saved.update({key: value for key, value in new.items() if key != "lr" and value != old.get(key)})
            # reductions of a plateau, the only schedule that cannot be computed, are kept
            saved["lr"] = saved["lr"] * (new["lr"] / old["lr"]) if new["lr"] != old["lr"] else saved["lr"]
        for index in owned:
            _keep_schedule(
                schedulers[index], checkpoint["lr_schedulers"][index], before["schedulers"][index]["state"], state
            )


def _keep_schedule(scheduler: LRScheduler, saved: dict[str, Any], before: dict[str, Any], state: dict) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        ours = scheduler.state_dict()
        counted = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr"}
        another = any(ours.get(key) != before.get(key) for key in ("monitor", "mode"))
        saved.update({key: value for key, value in ours.items() if key not in counted or another})
        saved["_last_lr"] = [group["lr"] for group in state["param_groups"]]
        return
    scheduled = [{**group} for group in param_groups(scheduler.optimizer)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer step was taken
        for _ in range(saved["last_epoch"]):
            scheduler.step()
    saved.update(scheduler.state_dict())
    for group, start, end in zip(state["param_groups"], scheduled, param_groups(scheduler.optimizer), strict=True):
        group.update({key: value for key, value in end.items() if key in ("lr", "initial_lr") or value != start[key]})


def prepares(module: LightningModule, trainer: Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether training resumes from a checkpoint that is being loaded; if so, its callbacks keep their settings.

    Raises:
        SettingError: it holds weights of another type than they are trained in.
    """
    # Lightning (2.6) converts the module after it has loaded the weights: to float64 from rounded ones.
    trainer.precision_plugin.convert_module(module)
    if trainer.state.fn != TrainerFn.FITTING:
        return False
    check_precision(module, checkpoint)
    keep_callback_settings(checkpoint, trainer.callbacks)  # type: ignore[attr-defined]
    return True


def keep_callback_settings(checkpoint: dict[str, Any], callbacks: Iterable[Callback]) -> None:
    """Edit a checkpoint so that callbacks continue with their own settings, such as the patience of `EarlyStopping`.

    A `ModelCheckpoint` also finds its best score again where only its period differs.

    Args:
        checkpoint: that is about to be restored; its ``callbacks`` are edited.
        callbacks: as configured.
    """
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.state_key not in states:
            alike = [key for key in states if _watches(key) == _watches(callback.state_key)]
            if len(alike) == 1:
                states[callback.state_key] = states.pop(alike[0])
        state = states.get(callback.state_key)
        if isinstance(state, dict) and not isinstance(callback, Checkpoint):
            settings = inspect.signature(type(callback)).parameters
            state.update({key: getattr(callback, key) for key in state if key in settings and hasattr(callback, key)})


def check_precision(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Check that the weights are of the type that they were trained in.

    Raises:
        SettingError: they differ; names both.
    """
    for name, value in module.state_dict().items():
        theirs = checkpoint["state_dict"][name].dtype
        if value.dtype != theirs:
            raise SettingError(
                f"trainer.precision keeps weights as {_type(value.dtype)}, but the checkpoint holds {_type(theirs)}; "
                f"give --trainer.precision as the run had it, or {NEW_RUN}."
            )


def check_settings_of_run(checkpoint: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Check that all settings can be applied to a run that is resumed.

    Args:
        checkpoint: with the ``settings`` that the command line kept in it, where it is of this release.
        config: the settings now in force, as the command line dumps them; no ``optimizer`` where it follows from
            ``model.outer_lr``.

    Returns:
        what is applied, ``model.outer_lr 0.01 (was 0.001)``.

    Raises:
        SettingError: one differs that cannot be applied.
    """
    loop = checkpoint["loops"]["fit_loop"]
    trainer, before = config["trainer"], checkpoint.get("settings") or {}
    epochs, steps = loop["epoch_progress"]["current"]["processed"], checkpoint["global_step"]
    for limit, reached in (("max_epochs", epochs), ("max_steps", steps)):
        value = trainer.get(limit)
        if value is not None and 0 <= value < reached:
            raise SettingError(
                f"trainer.{limit} is {value}, but the checkpoint has {reached} {limit.removeprefix('max_')} behind it; "
                f"raise it, or {NEW_RUN}."
            )
    batches = loop["epoch_loop.batch_progress"]
    taken = batches["current"]["processed"] > 0 and not batches["is_last_batch"]
    return [
        *_model_changes(checkpoint.get("hyper_parameters", {}), config),
        *_other_changes(before, config, epochs, taken),
    ]


def _model_changes(before: dict[str, Any], config: dict[str, Any]) -> list[str]:
    model = config["model"]
    changes = _differences(before, model)
    net = changes.pop("net", None)
    if net is not None and (names := _differences(_flat(before["net"]), _flat(model["net"]))):
        setting, (old, new) = next(iter(names.items()))
        raise SettingError(
            f"model.net.{setting} is {new}, but the checkpoint's is {old}: another network cannot be resumed; give it "
            f"as the run had it, or {NEW_RUN}."
        )
    if "inner_lr" in changes and model["learn_inner_lr"]:
        raise SettingError(
            f"model.inner_lr {changes['inner_lr'][1]} would be ignored: the inner learning rates are learned "
            f"(model.learn_inner_lr {model['learn_inner_lr']}) and come from the checkpoint; leave it out."
        )
    if "outer_lr" in changes and config.get("optimizer"):
        raise SettingError(
            f"model.outer_lr {changes['outer_lr'][1]} would be ignored: the run has an optimizer of its own; give "
            "--optimizer.lr."
        )
    return [f"model.{name} {new} (was {old})" for name, (old, new) in changes.items()]


def _other_changes(before: dict[str, Any], config: dict[str, Any], epochs: int, taken: bool) -> list[str]:
    if not before:
        return []
    seed, now = before.get("seed_everything"), config["seed_everything"]
    if seed != now and now is not True:
        raise SettingError(
            f"seed_everything {now} would be ignored: the random numbers continue from the checkpoint, whose run began "
            f"with {seed}; leave it out, or {NEW_RUN}."
        )
    data = _differences(_flat(before["data"]), _flat(config["data"]))
    trainer = _differences(before["trainer"], {key: config["trainer"].get(key) for key in _WITHIN_EPOCH})
    changes = {
        **{f"data.{key}": values for key, values in data.items()},
        **{f"trainer.{key}": values for key, values in trainer.items()},
    }
    for name, (old, new) in changes.items():
        any_time = name.removeprefix("data.") in _ANY_TIME
        if name == "data.train_episodes" and (epochs or taken):
            why = "episodes would be skipped or drawn again, whose numbers count the epochs' episodes"
        elif taken and not any_time:
            why = "the checkpoint is in the middle of an epoch, where episodes would be skipped or drawn again"
        else:
            continue
        raise SettingError(f"{name} is {new}, but the run's is {old}: {why}; give {old}, or {NEW_RUN}.")
    for kind in ("optimizer", "lr_scheduler"):
        old, new = (_flat(settings.get(kind) or {}) for settings in (before, config))
        changes.update({f"{kind}.{key}": values for key, values in _differences(old, new).items()})
    return [f"{name} {new} (was {old})" for name, (old, new) in changes.items()]


def run_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Those settings of the command line that its checkpoints keep, to compare them on resume."""
    return {
        "seed_everything": config["seed_everything"],
        "data": config["data"],
        "optimizer": config.get("optimizer"),
        "lr_scheduler": config.get("lr_scheduler"),
        "trainer": {key: config["trainer"].get(key) for key in _WITHIN_EPOCH},
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the settings that both have."""
    return {key: (value, now[key]) for key, value in before.items() if key in now and now[key] != value}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """A class and its arguments in one."""
    rest = {key: settings[key] for key in ("class_path",) if key in settings}
    return {**rest, **(settings.get("init_args") or {}), **(settings.get("dict_kwargs") or {})}


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _watches(state_key: str) -> tuple[Any, Any] | None:
    """Score and direction of a `ModelCheckpoint`, from the key of its state."""
    kind, _, rest = state_key.partition("{")
    if kind != ModelCheckpoint.__qualname__:
        return None
    settings = ast.literal_eval("{" + rest)
    return settings["monitor"], settings["mode"]


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
