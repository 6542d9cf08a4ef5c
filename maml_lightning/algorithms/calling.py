"""A network called with other tensors in place of its own, which then has its own again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_lightning.engine.trials import same_random_numbers, trying
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


def watched(
    net: nn.Module, inputs: Any, note: Callable[[str, tuple], Any], tensors: Mapping[str, Tensor] | None = None
) -> bool:
    """Run a copy of a network once, in evaluation mode, to see which layers it calls with what.

    Args:
        net: the network.
        inputs: of the network.
        note: called with the name and the arguments of each layer before it runs.
        tensors: in place of its parameters, by name, for a graph of autograd; without them none is recorded.

    Returns:
        whether it takes the inputs.
    """

    def hook(name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        note(name, (*args, *kwargs.values()))

    with trying(net) as (copied,), same_random_numbers():
        layers = [(name, layer) for name, layer in copied.named_modules() if name]
        hooks = [layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name, layer in layers]
        modes = {layer: layer.training for layer in copied.modules()}  # it is the network itself where it has no copy
        try:
            with torch.set_grad_enabled(tensors is not None):
                call_with(copied.eval(), tensors or {}, inputs)
        except Exception:  # whatever a user's network raises; it will again where it matters
            return False
        finally:
            for handle in hooks:
                handle.remove()
            for layer, mode in modes.items():
                layer.training = mode
    return True


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
    if not any("_orig_mod" in layer._modules or layer._compiled_call_impl for layer in net.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield
