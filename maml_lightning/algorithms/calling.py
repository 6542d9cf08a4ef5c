"""A network called with other tensors in place of its own, which then has its own again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_lightning.structures import call_arguments, logits_of


def call_with(net: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """The outputs of a network.

    Args:
        net: the network.
        tensors: in place of its parameters and buffers, by name; those without a name here stay.
        inputs: of the network, see :func:`~maml_lightning.structures.call_arguments`.
    """
    own = {path: tensors[name] for path, name in tensor_paths(net).items() if name in tensors}
    with _uncompiled(net):
        return logits_of(functional_call(net, own, *call_arguments(inputs), tie_weights=False))


def tensor_paths(net: nn.Module) -> dict[str, str]:
    """Where each parameter and buffer is kept, and the name by which it is given.

    A tensor that several layers share has one name, the first, and several paths. A layer that is registered twice
    has one path: ``functional_call`` would swap its tensors twice, and not back (``tie_weights`` does).
    """
    paths: dict[str, str] = {}
    names: dict[int, str] = {}
    for prefix, layer in net.named_modules():
        for local, value in (*layer._parameters.items(), *layer._buffers.items()):
            if value is not None:
                path = f"{prefix}.{local}".lstrip(".")
                paths[path] = names.setdefault(id(value), path)
    return paths


@contextmanager
def _uncompiled(net: nn.Module) -> Iterator[None]:
    """Run what ``torch.compile`` made of a network, which has no second derivatives, as it was."""
    if not any(hasattr(layer, "_orig_mod") or layer._compiled_call_impl for layer in net.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield
