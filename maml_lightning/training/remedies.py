"""What makes a network or a loss take the data, found by trying: the advice of errors."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maml_lightning.structures import leaves, mapped


def remedy_of_inputs(net: nn.Module, inputs: Any, takes: Callable[[Any], Any], error: Exception) -> str:
    """What makes a network take inputs that it does not take.

    Args:
        net: the network.
        inputs: of one task.
        takes: calls the network; raises where it does not take them.
        error: that it raised.
    """
    kind = next((value.dtype for value in net.parameters() if value.is_floating_point()), torch.get_default_dtype())
    if cast := _cast(inputs, kind, takes):
        return f"the network takes them as {cast}"
    if re.search("dtype|scalar type", str(error)):
        return f"the network takes {_advice(kind)}, in the shape that it takes"
    if isinstance(error, TypeError) and (isinstance(inputs, Mapping) or "positional argument" in str(error)):
        arguments = ", ".join(inspect.signature(net.forward).parameters)
        if isinstance(inputs, Mapping):
            return f"name the inputs as the arguments of its forward, {arguments}"
        return f"give a tuple of the arguments of its forward in their order, or a dict of them by name: {arguments}"
    numbers = [leaf for leaf in leaves(inputs) if not leaf.is_floating_point() and leaf.dtype != torch.bool]
    if isinstance(error, IndexError) and numbers:
        least, greatest = (min(int(leaf.min()) for leaf in numbers), max(int(leaf.max()) for leaf in numbers))
        return (
            f"they are integers from {least} to {greatest}: correct them, or give a network with an embedding for each "
            f"(num_embeddings {greatest + 1} or more)"
        )
    return "give a network for them, such as maml_lightning.ConvNet for images, maml_lightning.MLP for vectors"


def remedy_of_targets(outputs: Tensor, targets: Any, takes: Callable[[Any], Any]) -> str:
    """What makes a loss take targets that it does not take; empty where no other type does.

    Args:
        outputs: of one task.
        targets: of one task.
        takes: computes the loss; raises where it does not take them.
    """
    cast = _cast(targets, outputs.dtype, takes)
    return f"it takes the targets as {cast}" if cast else ""


def _cast(part: Any, floats: torch.dtype, takes: Callable[[Any], Any]) -> str:
    """The type that makes a structure of tensors fit, and how to get it; empty where none does."""
    for kind, other in _casts(part, floats):
        try:
            takes(other)
        except Exception:  # whatever a user's network or loss raises
            continue
        return _advice(kind)
    return ""


def _advice(kind: torch.dtype) -> str:
    name = str(kind).removeprefix("torch.")
    code = f'.astype("{name}")' if kind != torch.bfloat16 else f".to({kind})"
    return f"{name}: give them so, with {code}"


def _casts(part: Any, floats: torch.dtype) -> Iterator[tuple[torch.dtype, Any]]:
    """A structure with its numbers of another type, the fewest of them first."""
    whole = all(bool((leaf == leaf.round()).all()) for leaf in leaves(part) if leaf.is_floating_point())
    for kind, is_changed in (
        (floats, Tensor.is_floating_point),
        (torch.int64, lambda leaf: not leaf.is_floating_point() and leaf.dtype != torch.bool),
        (floats, lambda leaf: True),
        (torch.int64, lambda leaf: whole),
    ):
        other = mapped(lambda leaf: leaf.to(kind) if is_changed(leaf) else leaf, part)  # noqa: B023
        if any(ours.dtype != theirs.dtype for ours, theirs in zip(leaves(other), leaves(part), strict=True)):
            yield kind, other
