"""Checks that a loss takes the network's outputs and the episodes' targets, each output with its own target."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_lightning.devices import has_values, widest
from maml_lightning.errors import SettingError
from maml_lightning.structures import describe, mapped, tensors_of
from maml_lightning.training.remedies import remedy_of_targets
from maml_lightning.training.scores import class_dimensions, ignored_target


def check_classes(
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
            whole = bool(((all_targets >= 0) & (all_targets == all_targets.round())).all())
            advice = 'give classes as integers, with .astype("int64"), or ' if whole else "give "
            raise SettingError(
                f"model.loss is {_name(loss)}, but the episodes' targets are floats, and no probabilities of classes; "
                f"{advice}a loss for regression, such as torch.nn.functional.mse_loss."
            )
        return
    if 1 not in class_dimensions(outputs, targets):
        return
    data = getattr(trainer, "datamodule", None)
    plain = getattr(data, "pretraining_classes" if pretraining else "ways", None) if targets.dim() == 1 else None
    counted = all_targets[all_targets != ignored_target(loss)]
    least = int(counted.min()) if counted.numel() else 0
    if least < 0:
        raise SettingError(
            f"model.loss is {_name(loss)}, but the episodes have class {least}; correct it to one from 0, or give a "
            f"loss that leaves it out, such as torch.nn.CrossEntropyLoss with ignore_index {least}."
        )
    classes = plain or (int(counted.max()) + 1 if counted.numel() else 1)
    fewer_classes = size > classes and (plain is None or (trainer is not None and bool(trainer.predicting)))
    if size != classes and not fewer_classes:
        last = classes - 1
        from_1 = plain is None and size == last and least == 1
        shifting = f", or subtract 1 from the targets, which are 1 to {last}" if from_1 else ""
        where = " in training (ConvNet: pretraining_classes)" if pretraining else ""
        ignoring = f", or leave class {last} out, as torch.nn.CrossEntropyLoss with ignore_index {last} does"
        raise SettingError(
            f"model.net has {size} outputs, but the episodes have {classes} classes; give it {classes} outputs{where}"
            f"{shifting}{ignoring if targets.dim() > 1 and plain is None else ''}."
        )


def check_labels(loss: Callable[..., Tensor], all_targets: Tensor) -> None:
    """Check that labels are yes, no or a probability: some of these losses take any number."""
    outside = all_targets[(all_targets < 0) | (all_targets > 1)]
    if outside.numel():
        raise SettingError(
            f"model.loss is {_name(loss)}, but the episodes have the target {outside.flatten()[0].item():g}; it takes "
            "0.0 to 1.0: correct it, or give another loss."
        )


def check_loss(loss: Callable[..., Any], outputs: Any, targets: Any) -> None:
    """Check that the loss of outputs and targets is one number; of a tensor, of each output and its own target."""
    name, suggested = _name(loss), "cross_entropy for classes, mse_loss for numbers"
    floats = isinstance(targets, Tensor) and targets.is_floating_point()
    try:
        value = _loss_with_gradient(loss, outputs, targets)
        with torch.no_grad(), without_broadcasting():
            paired = _is_paired(loss, outputs, targets)
    except Exception as error:
        remedy = ""
        if isinstance(outputs, Tensor):
            remedy = remedy_of_targets(outputs, targets, lambda other: _loss_with_gradient(loss, outputs, other))
            remedy = remedy or _remedy_of_outputs(loss, outputs, targets)
            if floats and outputs.shape != targets.shape and not remedy:
                raise _other_shape(outputs, targets) from error
        raise SettingError(
            f"model.loss {name} cannot be computed from outputs {describe(outputs)} and targets {describe(targets)} "
            f"({first_line(error)}); {remedy or f'give another, such as {suggested}'}."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise SettingError(f"model.loss {name} gives {shape}, not one number; give another, such as {suggested}.")
    if not paired:
        raise _other_shape(outputs, targets)


def _remedy_of_outputs(loss: Callable[..., Any], outputs: Tensor, targets: Any) -> str:
    """What to say where a loss of targets ``[K, H, W]`` takes outputs ``[K, classes, H, W]``, which these are not."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() < 2:
        return ""
    if targets.shape[1:] == (1,) and is_computed(loss, outputs, targets[:, 0]):
        return f"it takes the targets as {[len(targets)]}: give them so, with [..., 0]"
    examples, *shape = targets.shape
    classes = max(2, int(targets.max()) + 1)
    if outputs.shape[2:] == targets.shape[1:] or not is_computed(
        loss, outputs.new_zeros(examples, classes, *shape), targets
    ):
        return ""
    return f"it takes outputs {[examples, classes, *shape]} for these targets: give a network with such outputs"


def is_computed(loss: Callable[..., Any], outputs: Any, targets: Any) -> bool:
    """Whether a loss takes outputs and targets."""
    try:
        with torch.no_grad():
            loss(pytree.tree_map_only(Tensor, torch.clone, outputs), mapped(torch.clone, targets))
    except Exception:  # said by the check that follows
        return False
    return True


def _loss_with_gradient(loss: Callable[..., Any], outputs: Any, targets: Any) -> Any:
    """The loss of outputs and targets, once its gradient is known to exist: some types allow the loss alone."""
    with torch.inference_mode(False), torch.enable_grad(), without_broadcasting():
        own = pytree.tree_map_only(Tensor, _leaf, outputs)
        value = loss(pytree.tree_map_only(Tensor, torch.clone, own), mapped(torch.clone, targets))
        leaves = [leaf for leaf in tensors_of(own) if leaf.requires_grad]
        if isinstance(value, Tensor) and value.requires_grad and leaves:
            torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return value


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().clone()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


@contextmanager
def without_broadcasting() -> Iterator[None]:
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


def _is_paired(loss: Callable[..., Any], outputs: Any, targets: Any) -> bool:
    """Whether a loss compares each output with its own target: one that broadcasts compares it with all of them.

    Then the loss stays the same where targets change places. Outputs and targets of the same shape are compared in
    pairs.
    """
    if not isinstance(targets, Tensor) or not isinstance(outputs, Tensor) or not has_values(targets):
        return True
    if outputs.shape == targets.shape:
        return True
    if not targets.is_floating_point() and outputs.numel() != targets.numel():
        return True  # classes
    moved = targets.roll(1, 0)
    if torch.equal(moved, targets):
        return True
    try:
        wide = widest(outputs.device)
        spread = torch.arange(outputs.numel(), device=outputs.device).to(wide).mul(0.7548776662466927).frac()
        changed = outputs.to(wide) + spread.view(outputs.shape)
        first, second = (
            loss(changed.clone(), each.to(wide, copy=True) if each.is_floating_point() else each.clone())
            for each in (targets, moved)
        )
    except Exception:  # outputs that the loss does not take
        return True
    return not torch.allclose(first, second, rtol=1e-9 if wide == torch.float64 else 1e-4, atol=0)


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def first_line(error: Exception) -> str:
    """The first line of an error, or its type where that says too little."""
    if not str(error) or isinstance(error, KeyError):  # whose text is the key alone
        return f"{type(error).__name__} {error}".strip()
    return str(error).splitlines()[0]
