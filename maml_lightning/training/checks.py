"""Checks that the data, the trainer and a checkpoint fit the network, before anything is written."""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.algorithms.prototypes import labels_of
from maml_lightning.algorithms.statistics import called
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.training import earlier_releases


def check_fit(loop: InnerLoop, episode: Episode, inner_steps: int, trainer: Trainer | None) -> None:
    """Check that the network and the loss take the episodes.

    Args:
        loop: the inner loop of the network and the loss.
        episode: ``T`` tasks, of which the first is tried. Pretraining data have an empty support set.
        inner_steps: adaptation steps in training.
        trainer: whose data the episodes are of, if there is one. In predict the network may have more outputs than the
            episodes have classes.

    Raises:
        SettingError: they do not.
    """
    pretraining = episode.support_targets.numel() == 0
    if pretraining and inner_steps:
        raise SettingError(
            f"model.inner_steps is {inner_steps}, but the training episodes have no support set to adapt to "
            "(data.pretraining); set it to 0."
        )
    inputs, targets = (part[0] for part in (episode[2:] if pretraining else episode[:2]))
    outputs = _outputs(loop.net, loop.running or (), inputs, pretraining)
    if loop.head == "prototypes":
        outputs = outputs.new_zeros(*outputs.shape[:-1], len(labels_of(episode.support_targets)))
    else:
        _check_outputs(outputs, targets, pretraining, trainer)
    _check_loss(loop.loss, outputs, targets)


def _check_outputs(outputs: Tensor, targets: Tensor, pretraining: bool, trainer: Trainer | None) -> None:
    """Check that there is an output for each class, or of regression for each target."""
    if targets.is_floating_point():
        if outputs.shape != targets.shape:
            raise SettingError(
                f"model.net gives outputs {list(outputs.shape)}, but the episodes' targets are "
                f"{list(targets.shape)}; give it {targets.shape[-1]} outputs."
            )
        return
    data = getattr(trainer, "datamodule", None)
    classes = getattr(data, "pretraining_classes" if pretraining else "ways", None) or int(targets.max()) + 1
    size = outputs.shape[-1]
    if size != classes and not (trainer is not None and trainer.predicting and size > classes):
        where = " in training (ConvNet: pretraining_classes)" if pretraining else ""
        raise SettingError(
            f"model.net has {size} outputs, but the episodes have {classes} classes; give it {classes} outputs{where}."
        )


def _check_loss(loss: Callable[..., Any], outputs: Tensor, targets: Tensor) -> None:
    """Check that the loss of outputs and targets is one number."""
    if loss is F.cross_entropy and targets.is_floating_point():
        raise SettingError(
            "model.loss is cross_entropy, but the episodes' targets are floats; "
            "give a loss for regression, such as torch.nn.functional.mse_loss."
        )
    name, suggested = getattr(loss, "__name__", type(loss).__name__), "cross_entropy for classes, mse_loss for numbers"
    try:
        with torch.no_grad():
            value = loss(outputs, targets)
    except Exception as error:
        raise SettingError(
            f"model.loss {name} cannot be computed from outputs {list(outputs.shape)} and targets "
            f"{list(targets.shape)} ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            f"give another, such as {suggested}."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SettingError(f"model.loss {name} gives {shape}, not one number; give another, such as {suggested}.")


def _outputs(net: nn.Module, running: Collection[str], inputs: Tensor, training: bool) -> Tensor:
    """The network's outputs in training or evaluation mode; its own mode is restored."""
    modes = {layer: layer.training for layer in net.modules()}
    try:
        with torch.no_grad():
            return called(net.train(training), {}, inputs, running)
    except RuntimeError as error:
        raise SettingError(
            f"model.net does not take the episodes' inputs, {list(inputs.shape)} ({str(error).splitlines()[0]}); "
            "give a network for them, such as maml_lightning.ConvNet for images, maml_lightning.MLP for vectors."
        ) from error
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def check_trainer(trainer: Trainer) -> None:
    """Check that the trainer does nothing that MAML does not support.

    Raises:
        SettingError: it does.
    """
    check_strategy(type(trainer.strategy).__name__)
    for setting in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
        if getattr(trainer, setting) == 0:
            raise SettingError(f"trainer.{setting} must be above 0 (got 0); leave it out for its default.")
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise SettingError(
            "trainer.sync_batchnorm true is not supported: normalization uses the statistics of one task, which one "
            "process has; leave it out."
        )
    averaging = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if averaging and any(isinstance(layer, _BatchNorm) for layer in trainer.lightning_module.modules()):
        raise SettingError(
            "trainer.callbacks StochasticWeightAveraging is not supported with batch normalization, whose running "
            "statistics it collects; use EMAWeightAveraging or WeightAveraging."
        )


def check_strategy(strategy: str) -> None:
    """Check that a strategy leaves all parameters in each process.

    Args:
        strategy: its name or its class's.

    Raises:
        SettingError: it spreads them over processes.
    """
    name = strategy.lower().replace("_", "")
    if any(word in name for word in ("fsdp", "deepspeed", "modelparallel")):
        reason = "spreads parameters over processes, but each task's inner loop needs all of them"
        raise SettingError(f"trainer.strategy {strategy} {reason}; use ddp.")


def check_same_network(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint has the tensors of a module.

    Running statistics may be missing, as in those of earlier releases: the module keeps its own. So it does with a last
    layer of another number of classes, which has no say where it starts from prototypes.

    Raises:
        SettingError: it has not; names a tensor that differs.
    """
    earlier_releases.add_running_statistics(module, checkpoint)
    if getattr(module, "head", None) == "prototypes":
        _keep_last_layer(module, checkpoint["state_dict"])
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if ours != theirs:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise SettingError(
            "The checkpoint is of another network, or of other learned inner learning rates: "
            f"{name} is {theirs.get(name, 'missing')} in it and {ours.get(name, 'missing')} here; "
            "give the data.ways and the model settings that it was trained with."
        )


def _keep_last_layer(module: nn.Module, state: dict[str, Any]) -> None:
    """Take a module's own values for the one linear layer that has another number of outputs in a checkpoint."""
    ours = module.state_dict()
    others = [n for n, v in ours.items() if n in state and v.shape != state[n].shape]
    layers = {name.rpartition(".")[0] for name in others}
    linear = [layer for layer in layers if isinstance(module.get_submodule(layer), nn.Linear)]
    if len(layers) == len(linear) == 1 and all(ours[n].shape[1:] == state[n].shape[1:] for n in others):
        state.update({name: ours[name] for name in others})
