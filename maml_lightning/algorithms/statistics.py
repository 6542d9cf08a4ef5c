"""Which statistics a normalization layer uses: its running ones, or those of the batch that it sees.

Tasks are vectorized, so that no layer can update running statistics as it runs. A layer in evaluation mode, or a frozen
one, does not update them anyway: it keeps and uses them, as a pretrained backbone does. All others use the batch's own
statistics and leave their running ones alone. This is decided whenever the network is called, and the network is put
back afterwards.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from maml_lightning.algorithms.calling import call_with
from maml_lightning.engine.state import copies_of_stored

_OF_TORCH: set[Callable[..., Tensor]] = {_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward}


def tracking_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers with running statistics, by name: those with a tensor ``running_mean``."""
    layers = net.named_modules()
    return {name: layer for name, layer in layers if isinstance(getattr(layer, "running_mean", None), Tensor)}


def in_evaluation(net: nn.Module) -> frozenset[str]:
    """The names of the layers with running statistics that are in evaluation mode."""
    return frozenset(name for name, layer in tracking_layers(net).items() if not layer.training)


def frozen(net: nn.Module, learned: Collection[str] = ()) -> frozenset[str] | None:
    """The names of the layers with running statistics that are frozen.

    A layer is frozen if none of its parameters is trained; one without parameters, if none is of the smallest module
    around it that has some.

    Args:
        net: the network.
        learned: names of parameters that are trained although they require no gradient.

    Returns:
        None where the whole network is frozen, which tells nothing of its layers.
    """

    def trained(name: str, module: nn.Module) -> bool:
        prefix = f"{name}." if name else ""
        return any(value.requires_grad or prefix + own in learned for own, value in module.named_parameters())

    if not trained("", net):
        return None
    names = set()
    for layer in tracking_layers(net):
        owner = layer
        while owner and next(net.get_submodule(owner).parameters(), None) is None:
            owner = owner.rpartition(".")[0]
        if not trained(owner, net.get_submodule(owner)):
            names.add(layer)
    return frozenset(names)


def uses_running_statistics(net: nn.Module) -> frozenset[str]:
    """The names of the layers that use running statistics by what the network is now."""
    return in_evaluation(net) | (frozen(net) or frozenset())


def _changes(layer: nn.Module, running: bool) -> dict[str, Any]:
    """The attributes with which a layer uses its running statistics, or the batch's without an update."""
    if running:
        return {"training": False}
    if type(layer).forward in _OF_TORCH:  # in evaluation mode SyncBatchNorm does not ask other processes either
        nothing = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
        return {**nothing, "track_running_stats": False, "training": False}
    return {"training": True, **({"track_running_stats": False} if hasattr(layer, "track_running_stats") else {})}


@contextmanager
def deciding(net: nn.Module, running: Collection[str] | None = None) -> Iterator[None]:
    """While active, each normalization layer uses the statistics that are decided for it; then ``net`` is as before.

    Args:
        net: the network.
        running: the names of the layers that use running statistics; None goes by what the network is now.
    """
    running, before = uses_running_statistics(net) if running is None else running, []
    try:
        for name, layer in tracking_layers(net).items():
            for key, value in _changes(layer, name in running).items():
                before.append((layer, key, getattr(layer, key)))
                setattr(layer, key, value)
        yield
    finally:
        for layer, key, value in reversed(before):
            setattr(layer, key, value)


def called(net: nn.Module, values: Mapping[str, Tensor], inputs: Any, running: Collection[str]) -> Any:
    """The outputs of a network, which stays as it is, with the decided statistics.

    Args:
        net: the network.
        values: in place of its parameters, by name.
        inputs: of the network.
        running: the names of the layers that use running statistics.
    """
    with deciding(net, running):
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}  # a layer may write to them
        return call_with(net, {**buffers, **values}, inputs)


def adapted_copy(net: nn.Module, parameters: Mapping[str, Tensor], running: Collection[str]) -> nn.Module:
    """A copy of the network, whose normalization layers use the decided statistics whatever its mode becomes.

    Args:
        net: the network.
        parameters: of the copy, by name.
        running: the names of the layers that use running statistics; in the copy the others have none.
    """
    with torch.inference_mode(False):
        copied = copy.deepcopy(net, copies_of_stored(net))
        copied.load_state_dict(parameters, strict=False)
    for name, layer in tracking_layers(copied).items():
        training = layer.training
        for key, value in _changes(layer, name in running).items():
            setattr(layer, key, value)
        if name not in running and type(layer).forward in _OF_TORCH:
            layer.training = training  # without running statistics it makes no difference
        else:
            layer.train = partial(_stay, layer)  # type: ignore[method-assign]
    return copied


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """What ``layer.train`` does where the mode decides on the statistics: nothing."""
    return layer
