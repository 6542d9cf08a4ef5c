"""Checks that the data, the trainer and a checkpoint fit the network, before anything is written."""

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from operator import is_not
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.algorithms.prototypes import labels_of
from maml_lightning.algorithms.statistics import called
from maml_lightning.engine.trials import copies_to_try, same_random_numbers
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.structures import describe, first_task, leaves, mapped
from maml_lightning.training import earlier_releases
from maml_lightning.training.metrics import metric_scores
from maml_lightning.training.scores import Scoring, class_dimensions, ignored_target, is_of_classes, score_of


def check_fit(loop: InnerLoop, metric: Any, episode: Episode, inner_steps: int, trainer: Trainer | None) -> Scoring:
    """Check that the network, the loss and the metric take the episodes.

    Args:
        loop: the inner loop of the network and the loss.
        metric: of the user's choice, or None.
        episode: ``T`` tasks, of which the first is tried. Pretraining data have an empty support set.
        inner_steps: adaptation steps in training.
        trainer: whose data the episodes are of, if there is one. In predict the network may have more outputs than the
            episodes have classes.

    Returns:
        what of the episodes can be logged.

    Raises:
        SettingError: they do not.
    """
    pretraining = not any(leaf.numel() for leaf in leaves(episode.support_targets))
    if pretraining and inner_steps:
        raise SettingError(
            f"model.inner_steps is {inner_steps}, but the training episodes have no support set to adapt to "
            "(data.pretraining); set it to 0."
        )
    all_inputs, all_targets = episode[2:] if pretraining else episode[:2]
    inputs, targets = map(first_task, (all_inputs, all_targets))
    loss = loop.loss
    for net, tried in (copies_to_try(loop.net, loss), (loop.net, loss)):
        outputs = _outputs(net, loop.running or (), inputs, pretraining)
        if _is_computed(tried, outputs, targets):
            break  # else the loss may read what the network itself keeps as it runs
    if loop.head == "prototypes":
        outputs = outputs.new_zeros(*outputs.shape[:-1], len(labels_of(episode.support_targets)))
    elif is_of_classes(loss) and isinstance(targets, Tensor):
        _check_classes(loss, outputs, targets, all_targets, pretraining, trainer)
    _check_loss(tried, outputs, targets)
    if metric is not None:
        with _without_broadcasting():
            metric_scores(metric, [outputs[None]], mapped(lambda tensor: tensor[None], targets))
    scoring = Scoring(loss, score_of(loss, outputs, targets, all_targets), metric)
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
        _check_monitored(trainer, scoring.names)
    return scoring


def _check_monitored(trainer: Trainer, names: list[str]) -> None:
    """Check that no callback waits for a score that these episodes do not have."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitored = re.fullmatch(r"val/(accuracy|mse)(_step_\d+)?", str(getattr(callback, "monitor", "")))
        if monitored and monitored[1] not in names:
            setting = (
                "checkpoint.monitor" if isinstance(callback, ModelCheckpoint) else f"{type(callback).__name__}.monitor"
            )
            raise SettingError(
                f"{setting} is {monitored[0]}, which is not logged of these episodes; give it one of "
                f"{', '.join(f'val/{name}' for name in dict.fromkeys([*names, 'loss']))}."
            )


def first_episode(trainer: Trainer, module: LightningModule) -> Episode | None:
    """The first episode of the trainer's data as the module will get it; None of data that has no datasets yet."""
    for dataset in getattr(getattr(trainer, "datamodule", None), "datasets", {}).values():
        trainer.precision_plugin.convert_module(module)  # as Lightning does later
        episode = trainer.precision_plugin.convert_input(Episode(*dataset[0]))
        return mapped(lambda tensor: tensor.to(module.device), episode)
    return None


def kind_of(episode: Episode) -> list[tuple[torch.dtype, int]]:
    """Types and numbers of dimensions of an episode's tensors."""
    return [(tensor.dtype, tensor.dim()) for tensor in leaves(episode)]


def is_checked(checked: tuple, parts: tuple, episode: Episode) -> bool:
    """Whether network, loss and metric are those that were checked, with episodes of this kind."""
    return bool(checked) and checked[3] == kind_of(episode) and not any(map(is_not, checked, parts))


def _check_classes(
    loss: Callable[..., Tensor],
    outputs: Tensor,
    targets: Tensor,
    all_targets: Tensor,
    pretraining: bool,
    trainer: Trainer | None,
) -> None:
    """Check that there is an output for each class; those of PyTorch's losses of classes are in dimension 1."""
    size = outputs.shape[min(1, outputs.dim() - 1)]
    if targets.is_floating_point():
        sums = all_targets.sum(min(2, all_targets.dim() - 1))
        if (
            outputs.shape != targets.shape
            or size == 1
            or (all_targets < 0).any()
            or not sums.allclose(sums.new_ones(()))
        ):
            raise SettingError(
                f"model.loss is {_name(loss)}, but the episodes' targets are floats, and no probabilities of classes; "
                "give a loss for regression, such as torch.nn.functional.mse_loss."
            )
        return
    if 1 not in class_dimensions(outputs, targets):
        return
    data = getattr(trainer, "datamodule", None)
    plain = getattr(data, "pretraining_classes" if pretraining else "ways", None) if targets.dim() == 1 else None
    counted = all_targets[all_targets != ignored_target(loss)]
    classes = plain or (int(counted.max()) + 1 if counted.numel() else 1)
    fewer_classes = size > classes and (plain is None or (trainer is not None and bool(trainer.predicting)))
    if size != classes and not fewer_classes:
        where = " in training (ConvNet: pretraining_classes)" if pretraining else ""
        raise SettingError(
            f"model.net has {size} outputs, but the episodes have {classes} classes; give it {classes} outputs{where}."
        )


def _check_loss(loss: Callable[..., Any], outputs: Tensor, targets: Any) -> None:
    """Check that the loss of outputs and targets is one number, of each output and its own target."""
    name, suggested = _name(loss), "cross_entropy for classes, mse_loss for numbers"
    floats = isinstance(targets, Tensor) and targets.is_floating_point()
    try:
        with torch.no_grad(), _without_broadcasting():
            value = loss(outputs, targets)
            paired = _is_paired(loss, outputs, targets)
    except Exception as error:
        if floats and outputs.shape != targets.shape:
            raise _other_shape(outputs, targets) from error
        raise SettingError(
            f"model.loss {name} cannot be computed from outputs {describe(outputs)} and targets {describe(targets)} "
            f"({_first_line(error)}); give another, such as {suggested}."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise SettingError(f"model.loss {name} gives {shape}, not one number; give another, such as {suggested}.")
    if not paired:
        raise _other_shape(outputs, targets)


def _is_computed(loss: Callable[..., Any], outputs: Tensor, targets: Any) -> bool:
    try:
        with torch.no_grad():
            loss(outputs, targets)
    except Exception:  # said by the check that follows
        return False
    return True


@contextmanager
def _without_broadcasting() -> Iterator[None]:
    """Raise where PyTorch warns that a loss broadcasts targets of another shape than the outputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using a (target|input) size")
        yield


def _other_shape(outputs: Tensor, targets: Tensor) -> SettingError:
    wanted = f"{targets.shape[-1]} outputs" if outputs.dim() == targets.dim() else "outputs of that shape"
    return SettingError(
        f"model.net gives outputs {describe(outputs)}, but the episodes' targets are {describe(targets)}; "
        f"give it {wanted}, or a model.loss that takes both."
    )


def _is_paired(loss: Callable[..., Any], outputs: Tensor, targets: Any) -> bool:
    """Whether a loss compares each output with its own target: one that broadcasts compares it with all of them.

    Then the loss stays the same where targets change places. Outputs and targets of the same shape are compared in
    pairs.
    """
    if not isinstance(targets, Tensor) or outputs.shape == targets.shape:
        return True
    if not targets.is_floating_point() and outputs.numel() != targets.numel():
        return True  # classes
    moved = targets.roll(1, 0)
    if torch.equal(moved, targets):
        return True
    try:
        spread = torch.arange(outputs.numel(), device=outputs.device).double().mul(0.7548776662466927).frac()
        changed = outputs.double() + spread.view(outputs.shape)
        first, second = (
            loss(changed, each.double() if each.is_floating_point() else each) for each in (targets, moved)
        )
    except Exception:  # outputs that the loss does not take
        return True
    return not torch.allclose(first, second, rtol=1e-9, atol=0)


def _outputs(net: nn.Module, running: Collection[str], inputs: Any, training: bool) -> Tensor:
    """The network's outputs in training or evaluation mode; its own mode is restored."""
    modes = {layer: layer.training for layer in net.modules()}
    try:
        with torch.enable_grad(), same_random_numbers():  # it may take a gradient as it runs
            return called(net.train(training), {}, inputs, running).detach()
    except SettingError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # others are faults of the network's own code
        raise SettingError(
            f"model.net does not take the episodes' inputs, {describe(inputs)} ({_first_line(error)}); "
            "give a network for them, such as maml_lightning.ConvNet for images, maml_lightning.MLP for vectors."
        ) from error
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
