"""Which statistics a normalization layer uses: its running ones, or those of the batch that it sees.

Tasks are vectorized, so that no layer can update running statistics as it runs. A layer in evaluation mode, or a frozen
one, does not update them anyway: it keeps and uses them, as a pretrained backbone does. All others use the batch's own
statistics and leave their running ones alone. This is decided whenever the network is called, and the network is put
back afterwards.

With ``query_statistics`` running, layers whose input depends on no adapted parameter see the same features whatever the
task. Their running statistics are collected as in any training, and used in evaluation.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from maml_lightning.algorithms.calling import call_with, watched
from maml_lightning.devices import HALF
from maml_lightning.engine.chunks import detached
from maml_lightning.engine.trials import copy_of, same_random_numbers
from maml_lightning.errors import SettingError
from maml_lightning.structures import call, leaves, mapped
from maml_lightning.task_statistics import TaskNorm

_TRACK = "track_running_stats"
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


def track(net: nn.Module) -> None:
    """Give batch normalization layers without running statistics initial ones, as torch's own have."""
    for layer in net.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            made = nn.BatchNorm1d(layer.num_features).to(layer.weight)
            setattr(layer, _TRACK, True)
            for name, value in made.named_buffers():
                setattr(layer, name, value)


def unreached(net: nn.Module, adapted: Collection[str], inputs: Any) -> frozenset[str]:
    """The names of the batch normalization layers whose input depends on no adapted parameter.

    Args:
        net: the network; it runs once, in evaluation mode.
        adapted: names of the adapted parameters.
        inputs: of one task.
    """
    reached: set[str] = set()
    called: set[str] = set()

    def note(name: str, args: tuple) -> None:
        called.add(name)
        if any(isinstance(value, Tensor) and value.requires_grad for value in args):
            reached.add(name)

    with torch.inference_mode(False):
        values = {name: value.detach().requires_grad_(name in adapted) for name, value in net.named_parameters()}
        if not watched(net, detached(inputs), note, values):
            return frozenset()
    layers = tracking_layers(net).items()
    kept = {name for name, layer in layers if type(layer).forward is _BatchNorm.forward}
    return frozenset(kept & called - reached)


def collect(
    net: nn.Module, values: Mapping[str, Tensor], inputs: Any, running: Collection[str], collected: Collection[str]
) -> None:
    """Update the running statistics of layers by those of a batch, as training without tasks does.

    Args:
        net: the network.
        values: in place of its parameters, by name.
        inputs: of the network.
        running: the names of the layers that use running statistics.
        collected: the names of the layers whose running statistics are updated.
    """
    device = leaves(inputs)[0].device
    with torch.no_grad(), same_random_numbers(device), deciding(net, running, collected):
        call_with(net, values, mapped(torch.clone, inputs))


def _changes(layer: nn.Module, running: bool) -> dict[str, Any]:
    """The attributes with which a layer uses its running statistics, or the batch's without an update."""
    if running:
        return {"training": False}
    if type(layer).forward in _OF_TORCH:  # in evaluation mode SyncBatchNorm does not ask other processes either
        nothing = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
        return {**nothing, _TRACK: False, "training": False}
    copies = {name: value.clone() for name, value in layer.named_buffers(recurse=False)}  # what it writes is forgotten
    return {**copies, "training": True, **({_TRACK: False} if hasattr(layer, _TRACK) else {})}


@contextmanager
def deciding(net: nn.Module, running: Collection[str] | None = None, collected: Collection[str] = ()) -> Iterator[None]:
    """While active, each normalization layer uses the statistics that are decided for it; then ``net`` is as before.

    Args:
        net: the network.
        running: the names of the layers that use running statistics; None goes by what the network is now.
        collected: the names of those that use the batch's, and update their running ones.
    """
    layers, before = tracking_layers(net), []
    if running is None:
        running = uses_running_statistics(net) if layers else ()
    try:
        for name, layer in layers.items():
            changes = {"training": True} if name in collected else _changes(layer, name in running)
            for key, value in changes.items():
                before.append((layer, key, getattr(layer, key)))
                setattr(layer, key, value)
        yield
    finally:
        for layer, key, value in reversed(before):
            setattr(layer, key, value)


def called(net: nn.Module, values: Mapping[str, Tensor], inputs: Any, running: Collection[str]) -> Any:
    """All that a network returns, which stays as it is, with the decided statistics.

    Args:
        net: the network.
        values: in place of its parameters, by name.
        inputs: of the network.
        running: the names of the layers that use running statistics.
    """
    with deciding(net, running):
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}  # a layer may write to them
        return call_with(net, {**buffers, **values}, inputs)


def adapted_copy(
    net: nn.Module, parameters: Mapping[str, Tensor], running: Collection[str], support: Any = None
) -> nn.Module:
    """A copy of the network, whose normalization layers use the decided statistics whatever its mode becomes.

    Args:
        net: the network.
        parameters: of the copy, by name.
        running: the names of the layers that use running statistics; in the copy the others have none.
        support: inputs ``[N*K, ...]`` whose statistics the copy keeps as running statistics, in evaluation mode; None
            lets it use those of the batch.
    """
    with torch.inference_mode(False):
        copied = copy_of(net)
        for name, value in parameters.items():
            path, _, own = name.rpartition(".")
            layer = copied.get_submodule(path)
            if getattr(layer, own).shape != value.shape:  # a last layer of as many classes as the task has
                setattr(layer, own, nn.Parameter(value.clone()))
                setattr(layer, "out_features", len(value))  # noqa: B010
            else:
                with torch.no_grad():
                    getattr(layer, own).copy_(value)
    for name, layer in tracking_layers(copied).items():
        training = layer.training
        for key, value in _changes(layer, name in running).items():
            setattr(layer, key, value)
        if name not in running and type(layer).forward in _OF_TORCH:
            layer.training = training  # without running statistics it makes no difference
        else:
            layer.train = partial(_stay, layer)  # type: ignore[method-assign]
    if support is not None:
        _keep_statistics(copied, support)
    return copied


def _keep_statistics(adapted: nn.Module, inputs: Any) -> None:
    """The variances kept are those that a batch is normalized with, without Bessel's correction."""
    recorded, entered = _Recorded(), adapted.eval().modules()
    hooks = [layer.register_forward_pre_hook(recorded.enter) for layer in entered]
    try:
        with torch.inference_mode(False), torch.no_grad(), recorded, same_random_numbers(leaves(inputs)[0].device):
            call(adapted, mapped(torch.clone, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    for layer, (mean, var) in recorded.statistics.items():
        kept: dict[str, Any] = {} if isinstance(layer, TaskNorm) else {"running_mean": mean, "running_var": var}
        if type(layer).forward in _OF_TORCH:
            kept |= {_TRACK: True, "num_batches_tracked": torch.ones_like(mean[0], dtype=torch.int64)}
        for key, value in {**kept, "training": False, "train": partial(_stay, layer)}.items():
            setattr(layer, key, value)


class _Recorded(TorchFunctionMode):
    """While active, batch normalization with statistics of its batch notes them and the layer that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self._layer = nn.Module()  # entered last
        self.statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (self._normalize if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def enter(self, layer: nn.Module, args: tuple) -> None:
        """Hook before a layer runs."""
        self._layer = layer
        if isinstance(layer, TaskNorm):
            self._note(layer, args[0])
            layer.keep_statistics(args[0])

    def _note(self, layer: nn.Module, input: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.statistics or "running_mean" not in layer._buffers:
            raise SettingError(
                f"model.query_statistics support: {type(layer).__name__} normalizes several times or has no "
                "running_mean, so that no copy can keep its statistics; use MAML.trajectory, or "
                "model.query_statistics batch."
            )
        wide = input.detach().float() if input.dtype in HALF else input.detach()
        var, mean = torch.var_mean(wide, (0, *range(2, input.dim())), correction=0)
        dtype = next((value.dtype for value in layer.parameters()), wide.dtype)
        self.statistics[layer] = (mean.to(dtype), var.to(dtype))
        return self.statistics[layer]

    def _normalize(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training:
            running_mean, running_var = self._note(self._layer, input)
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """What ``layer.train`` does where the mode decides on the statistics: nothing."""
    return layer
