"""Inputs, outputs and targets of any structure: a tensor, or tuples, lists and dicts of tensors (pytrees)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maml_lightning.errors import SettingError

Part = TypeVar("Part")


def leaves(part: Any) -> list[Tensor]:
    """The tensors of a structure, in their order."""
    return [part] if isinstance(part, Tensor) else pytree.tree_leaves(part)


def by_place(part: Any, whole: type | tuple[()] = ()) -> dict[str, Any]:
    """The tensors of a structure by their place in it, such as ``['input_ids']``; ``whole`` as in `mapped`."""
    found, _ = pytree.tree_flatten_with_path(part, is_leaf=lambda node: isinstance(node, whole))
    return {pytree.keystr(path): leaf for path, leaf in found}


def mapped(function: Callable[..., Any], part: Part, *others: Any, whole: type | tuple[()] = ()) -> Part:
    """The structure with ``function`` of each of its tensors in their places.

    Args:
        function: of a tensor, and of those at the same place of the other structures.
        part, others: alike in structure.
        whole: a type that is not taken apart, such as list where lists are of numbers.
    """
    if isinstance(part, Tensor):
        return function(part, *others)
    return pytree.tree_map(function, part, *others, is_leaf=lambda node: isinstance(node, whole))


def first_task(part: Part) -> Part:
    """The first task's part of a structure of tensors ``[T, ...]``."""
    return mapped(lambda tensor: tensor[0], part)


def tasks_of(part: Part) -> list[Part]:
    """Each task's part of a structure of tensors ``[T, ...]``."""
    tensors, spec = pytree.tree_flatten(part)
    return [pytree.tree_unflatten(own, spec) for own in zip(*(tensor.unbind() for tensor in tensors), strict=True)]


def joined(parts: Sequence[Part], dim: int) -> Part:
    """Structures of the same kind as one, their tensors concatenated along a dimension."""
    return pytree.tree_map(lambda *tensors: torch.cat(tensors, dim), *parts)


def plain(part: Any) -> Any:
    """The structure with a dict in place of any other mapping, such as the output of a tokenizer."""
    if isinstance(part, Mapping):
        return {name: plain(value) for name, value in part.items()}
    return type(part)(map(plain, part)) if type(part) in (list, tuple) else part


def describe(part: Any) -> str:
    """Shapes of a structure's tensors, and their types where they are not float32: ``{ids: [5, 12] int64}``."""
    if isinstance(part, Tensor):
        kind = "" if part.dtype == torch.float32 else f" {str(part.dtype).removeprefix('torch.')}"
        return f"{list(part.shape)}{kind}"
    if isinstance(part, Mapping):
        return "{" + ", ".join(f"{name}: {describe(value)}" for name, value in part.items()) + "}"
    if isinstance(part, tuple | list):
        return "(" + ", ".join(map(describe, part)) + ")"
    return type(part).__name__


def call_arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of a call: ``net(**x)`` of a dict, ``net(*x)`` of a tuple or list."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def call(net: nn.Module, inputs: Any) -> Any:
    """All that the network returns, see `call_arguments`."""
    positional, named = call_arguments(inputs)
    return net(*positional, **named)


def tensor_of(outputs: Any) -> Tensor:
    """The tensor among a network's outputs that scores and predictions are of: see `logits_of`, else the first.

    Raises:
        SettingError: there is no tensor.
    """
    try:
        return logits_of(outputs)
    except SettingError:
        if tensors := tensors_of(outputs):
            return tensors[0]
        raise


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors among a network's outputs, in order; of an object, its attributes."""
    parts = outputs if isinstance(outputs, Tensor) else _named(outputs) or getattr(outputs, "__dict__", outputs)
    return [leaf for leaf in leaves(parts) if isinstance(leaf, Tensor)]


def logits_of(outputs: Any) -> Tensor:
    """The tensor among a network's outputs that a loss of one tensor takes.

    That is the tensor itself; ``logits`` of a dict, a dataclass or a named tuple; else the first of a tuple or list,
    or the only one of a dict or dataclass.

    Raises:
        SettingError: there is no such tensor.
    """
    found, named = outputs, _named(outputs)
    if "logits" in named:
        found = named["logits"]
    elif isinstance(outputs, tuple | list):
        found = outputs[0] if outputs else None
    elif len(tensors := [value for value in named.values() if isinstance(value, Tensor)]) == 1:
        found = tensors[0]
    if isinstance(found, Tensor):
        return found
    inside = f" of {', '.join(map(str, named)) or 'nothing'}" if isinstance(outputs, Mapping) or named else ""
    raise SettingError(
        f"model.net returns {type(outputs).__name__}{inside}, with no tensor to take as its outputs; return a tensor, "
        "a tuple that begins with it, or a dict or dataclass that has it as logits."
    )


def _named(outputs: Any) -> dict[str, Any]:
    """What a dict, dataclass or named tuple holds, by name."""
    if isinstance(outputs, Mapping):
        return {name: value for name, value in outputs.items() if value is not None}
    if is_dataclass(outputs):
        names = [field.name for field in fields(outputs)]
    else:
        names = [*getattr(outputs, "_fields", ())] or (["logits"] if hasattr(outputs, "logits") else [])
    return {name: value for name in names if (value := getattr(outputs, name, None)) is not None}


def examples_of(part: Part) -> int:
    """How many examples each task has in a part of an episode."""
    return leaves(part)[0].shape[1]
