"""A network called with other tensors in place of its own, which then has its own again."""

import sys
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maml_lightning.engine.recomputation import recomputing
from maml_lightning.engine.trials import trying
from maml_lightning.structures import call, leaves, mapped


class _Places:
    """Where a network keeps its parameters and buffers, and the name by which each is given.

    A tensor that several layers share has one name, the first, and several places. A layer that is registered twice
    has one place.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.tensors: list[tuple[dict[str, Any], str, str, Tensor]] = []  # owner, name in it, name of the tensor
        self.layers: list[tuple[dict[str, Any], list[Any]]] = []
        self.compiled = _compiles()
        # Parameters first: another layer may have one as a buffer, and that layer may come earlier.
        names = {id(value): name for name, value in net.named_parameters()}
        for prefix, layer in net.named_modules():
            self.layers.append((layer._modules, list(layer._modules.values())))
            self.compiled |= "_orig_mod" in layer._modules or layer._compiled_call_impl is not None
            for owner in (layer._parameters, layer._buffers):
                for local, value in owner.items():
                    if value is not None:
                        name = names.setdefault(id(value), f"{prefix}.{local}".lstrip("."))
                        self.tensors.append((owner, local, name, value))

    def of(self, names: Container[str]) -> list[tuple[dict[str, Any], str, str, Tensor]]:
        """The places of tensors with these names; empty where the network has other layers or tensors by now."""
        found = [place for place in self.tensors if place[2] in names]
        tensors = all(local in owner and owner[local] is value for owner, local, _, value in found)
        layers = all([*children.values()] == before for children, before in self.layers)
        return found if tensors and layers else []


_KNOWN: ContextVar[list[_Places]] = ContextVar("places", default=[])  # noqa: B039  # nobody writes to the default


@contextmanager
def calling(net: nn.Module) -> Iterator[None]:
    """While active, where the network keeps its tensors is found once, and anew after it was changed."""
    token = _KNOWN.set([_Places(net)])
    try:
        yield
    finally:
        _KNOWN.reset(token)


def call_with(net: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    """All that a network returns.

    Args:
        net: the network.
        tensors: in place of its parameters and buffers, by name; those without a name here stay.
        inputs: of the network, see :func:`~maml_lightning.structures.call_arguments`.
    """
    known = _KNOWN.get()
    places = known[0] if known and known[0].net is net else _Places(net)
    swapped = places.of(tensors)
    if not swapped and tensors:
        places = _Places(net)
        swapped, known[:] = places.of(tensors), [places] if known else []

    def run() -> Any:
        with _eager() if places.compiled else nullcontext():
            return call(net, inputs)

    def with_tensors(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = [owner[local] for owner, local, *_ in swapped]  # in a call that takes a gradient: that call's
        try:
            for owner, local, name, _ in swapped:
                owner[local] = tensors[name]
            return function(*args, **kwargs)
        finally:
            for (owner, local, *_), value in zip(swapped, before, strict=True):
                if local in owner:
                    owner[local] = value

    return recomputing(with_tensors, run)


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

    with trying(net, device=leaves(inputs)[0].device) as (copied,):
        layers = [(name, layer) for name, layer in copied.named_modules() if name]
        hooks = [layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name, layer in layers]
        modes = {layer: layer.training for layer in copied.modules()}  # it is the network itself where it has no copy
        try:
            with torch.set_grad_enabled(tensors is not None):
                call_with(copied.eval(), tensors or {}, mapped(torch.clone, inputs))
        except Exception:  # whatever a user's network raises; it will again where it matters
            return False
        finally:
            for handle in hooks:
                handle.remove()
            for layer, mode in modes.items():
                layer.training = mode
    return True


def _compiles() -> bool:
    """Whether anything was given to ``torch.compile`` in this process, such as a function that the network calls."""
    backends = getattr(sys.modules.get("torch._dynamo.eval_frame"), "cached_backends", {})
    # The backend "eager" has the derivatives of what it runs, and is that of `torch.cond` and the like.
    return any(getattr(backend, "compiler_name", "eager") != "eager" for backend in backends.values())


@contextmanager
def _eager() -> Iterator[None]:
    """Run what ``torch.compile`` made of a network, which has no second derivatives, as it was."""
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield
