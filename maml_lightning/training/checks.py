"""Checks that the data, the trainer and a checkpoint fit the network, before anything is written."""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import is_not
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.algorithms.losses import takes_all
from maml_lightning.algorithms.prototypes import labels_of
from maml_lightning.algorithms.statistics import called
from maml_lightning.devices import has_values
from maml_lightning.engine.trials import same_random_numbers, trying
from maml_lightning.episodes import Episode, InputSpec
from maml_lightning.errors import SettingError
from maml_lightning.structures import first_task, leaves, logits_of, mapped, tensor_of, tensors_of
from maml_lightning.training import earlier_releases
from maml_lightning.training.chunks import naming_what_helps
from maml_lightning.training.first_batches import first_batches
from maml_lightning.training.loss_checks import (
    check_classes,
    check_labels,
    check_loss,
    is_computed,
    without_broadcasting,
)
from maml_lightning.training.metrics import metric_scores
from maml_lightning.training.network_checks import check_differentiable, check_gradients, returned_by
from maml_lightning.training.scores import Scoring, is_of_classes, is_of_labels, score_of


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
    loss = loop.loss
    for all_inputs, all_targets in (episode[2:],) if pretraining else (episode[:2], episode[2:]):
        inputs, targets = map(first_task, (all_inputs, all_targets))
        with trying(loop.net, loss, device=episode.device) as copies:
            net, tried, taken, of_all = _taken(loop, copies, inputs, targets, pretraining)
            outputs = tensor_of(taken).detach()
            if loop.head == "prototypes":
                outputs = outputs.new_zeros(*outputs.shape[:-1], len(labels_of(episode.support_targets, all_targets)))
            elif is_of_classes(loss) and isinstance(targets, Tensor) and has_values(targets):
                check_classes(loss, outputs, targets, all_targets, pretraining, trainer)
            elif is_of_labels(loss) and isinstance(targets, Tensor) and has_values(targets):
                check_labels(loss, all_targets)
            if not of_all or loop.head == "learned":
                check_loss(tried, taken if of_all else outputs, targets)
            fitting = trainer is None or trainer.state.fn == TrainerFn.FITTING
            if fitting and loop.head == "learned" and net is not loop.net:
                check_gradients(net, tried, partial(_loss_with, loop, net, tried, of_all, inputs, targets))
    if metric is not None:
        with without_broadcasting(), same_random_numbers(episode.device):
            metric_scores(metric, [outputs[None].clone()], mapped(lambda tensor: tensor[None].clone(), targets))
    scoring = Scoring(loss, score_of(loss, outputs, targets, all_targets, of_all), metric, of_all)
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
        _check_monitored(trainer, scoring.names)
    return scoring


def _taken(
    loop: InnerLoop, copies: tuple[nn.Module, Any], inputs: Any, targets: Any, training: bool
) -> tuple[nn.Module, Any, Any, bool]:
    """The network and the loss that were tried; of what that returns, what this takes, and whether it is all."""
    for net, loss in (copies, (loop.net, loop.loss)):
        returned = returned_by(net, loop.running or (), inputs, training)
        of_all = takes_all(loss, returned, targets)
        taken = returned if of_all else logits_of(returned)
        if is_computed(loss, taken, targets):
            break  # else the loss may read what the network itself keeps as it runs
    tensor_of(taken)  # else scores have no tensor
    check_differentiable(net, tensors_of(taken), training)
    return net, loss, taken, of_all


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
    """The first episode of the trainer's data as the module will get it; None of data that cannot be read yet."""
    for draw in first_batches(trainer).values():
        if (batch := draw()) is not None:
            trainer.precision_plugin.convert_module(module)  # as Lightning does later
            return _converted(Episode.of(batch).check(), trainer)
    return None


def _converted(episode: Episode, trainer: Trainer) -> Episode:
    device = trainer.lightning_module.device
    return mapped(lambda tensor: tensor.to(device), trainer.precision_plugin.convert_input(episode))


def check_rest(loop: InnerLoop, metric: Any, inner_steps: int, trainer: Trainer) -> None:
    """Check the first episodes of the other splits, and the least and the greatest numbers of all.

    Args:
        loop, metric, inner_steps, trainer: see `check_fit`.

    Raises:
        SettingError: network, loss or metric do not take one.
    """
    data = getattr(trainer, "datamodule", None)
    if getattr(data, "pretraining", False):
        return  # whose network has other outputs in validation
    rest = [*first_batches(trainer).items()][1:]
    others = ((f"The first episode of {split}", draw()) for split, draw in rest)
    for what, episode in itertools.chain(getattr(data, "extremes", tuple)(), others):
        if episode is None:
            continue
        try:
            check_fit(loop, metric, _converted(Episode.of(episode).check(), trainer), inner_steps, trainer)
        except SettingError as error:
            raise SettingError(f"{what}: {error}") from error


@contextmanager
def naming_misfits(module: Any, episode: Episode) -> Iterator[InnerLoop]:
    """Where memory runs out, or network or loss do not take a task of a batch, raise an error that names what to do.

    Args:
        module: whose inner loop it gives.
        episode: the batch that is computed meanwhile; of it, the first of its kind was checked beforehand.

    Raises:
        SettingError: see above. Any other error stays as it is.
    """
    loop = module._inner_loop
    try:
        with naming_what_helps(loop):
            yield loop
    except SettingError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        for task in range(episode.tasks):
            one = mapped(lambda tensor: tensor[task : task + 1], episode)  # noqa: B023
            try:
                check_fit(loop, module.metric, one, module.inner_steps, None)
            except SettingError as reason:
                raise SettingError(f"{_stage(module)}, task {task} of a batch: {reason}") from error
            except RuntimeError:  # the device itself is in disorder
                break
        raise


@contextmanager
def naming_misfits_of_support(module: Any, inputs: Any, targets: Any) -> Iterator[None]:
    """Where network or loss do not take the support set of one task, raise an error that names what to do.

    Args:
        module: whose network adapts meanwhile.
        inputs, targets: the support set.

    Raises:
        SettingError: see above. Any other error stays as it is.
    """
    try:
        yield
    except SettingError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        batch = mapped(lambda part: part[None] if isinstance(part, Tensor) else part, (inputs, targets))
        try:
            check_fit(module._inner_loop, None, Episode(*batch, *batch).check(), module.inner_steps, None)
        except SettingError as reason:
            raise SettingError(
                "MAML.adapt takes the support set of one task, inputs [examples, ...] and targets [examples, ...]: "
                f"{reason}"
            ) from error
        raise


def _stage(module: Any) -> str:
    stage = None if module._trainer is None else module._trainer.state.stage
    return "training" if stage is None else stage.dataloader_prefix or "training"


def input_spec(episode: Episode, trainer: Trainer | None) -> InputSpec | None:
    """The specification of the pictures that a network is trained on; None of anything else."""
    data = getattr(trainer, "datamodule", None)
    return InputSpec.of_episode(episode, getattr(data, "ways", None), *getattr(data, "normalization", ()))


def kind_of(episode: Episode) -> list[tuple[torch.dtype, int]]:
    """Types and numbers of dimensions of an episode's tensors."""
    return [(tensor.dtype, tensor.dim()) for tensor in leaves(episode)]


def is_checked(checked: tuple, parts: tuple, episode: Episode) -> bool:
    """Whether network, loss and metric are those that were checked, with episodes of this kind."""
    return bool(checked) and checked[3] == kind_of(episode) and not any(map(is_not, checked, parts))


def _loss_with(
    loop: InnerLoop, net: nn.Module, loss: Any, of_all: bool, inputs: Any, targets: Any, params: Mapping[str, Tensor]
) -> Tensor:
    """The loss of a network with other parameters."""
    returned = called(net, params, mapped(torch.clone, inputs), loop.running or ())
    return loss(returned if of_all else logits_of(returned), mapped(torch.clone, targets))


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


def check_same_network(module: nn.Module, checkpoint: dict[str, Any], start: bool = False) -> None:
    """Check that a checkpoint has the tensors of a module.

    Running statistics may be missing, as in those of earlier releases: the module keeps its own. So it does with a last
    layer of another number of classes, which has no say where it starts from prototypes.

    Args:
        module: with an ``adaptation``.
        checkpoint: what of the module's it lacks is added to it.
        start: a new run starts from it, which may learn curvature matrices that it lacks: from the identity.

    Raises:
        SettingError: it has not; names a tensor that differs.
    """
    earlier_releases.match_running_statistics(module, checkpoint)
    if getattr(module, "head", None) == "prototypes":
        _keep_last_layer(module, checkpoint["state_dict"])
    matrices = {n: v for n, v in module.state_dict().items() if n.startswith("adaptation.curvature.")}
    if start and not matrices.keys() & checkpoint["state_dict"].keys():
        checkpoint["state_dict"].update(matrices)
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if ours != theirs:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise SettingError(
            "The checkpoint is of another network, or of other learned inner learning rates or curvature matrices: "
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
