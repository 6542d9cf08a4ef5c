"""Which parameters adapt at which learning rate: the settings in which the members of the MAML family differ."""

import itertools
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.calling import watched
from maml_lightning.algorithms.curvature import identities, matrices_of
from maml_lightning.algorithms.optimizers import Parameters, rates_of
from maml_lightning.errors import SettingError
from maml_lightning.task_statistics import TaskNorm

_NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, TaskNorm)
MAX_NAMES = 20  # of parameters, in an error


def adapted_names(
    net: nn.Module, which: str | Sequence[str] = "all", head: str | None = None, names: Sequence[str] | None = None
) -> list[str]:
    """Names of the parameters that the inner loop changes; frozen ones (``requires_grad=False``) never are.

    One that several layers share belongs to each of them, whatever layer it is named after.

    Args:
        net: the network.
        which: all; head, the last layer with parameters; body, all but the head; or name patterns such as
            ``"body.3.*"``.
        head: the name of the last layer, see :func:`last_layer`; None takes the last registered one with a parameter
            to choose from.
        names: of the parameters to choose from; None takes those that are not frozen.

    Raises:
        SettingError: a pattern, or the whole selection, matches no parameter.

    Example:
        >>> adapted_names(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), "head")
        ['2.weight', '2.bias']
    """
    if names is None:
        names = [name for name, value in net.named_parameters() if value.requires_grad]
    if which == "all" and names:
        return list(names)
    every = _every_name(net)
    of_head = _of_layer(_last_registered(net, names) if head is None else head, names, every)
    groups = {"all": list(names), "head": of_head, "body": [name for name in names if name not in of_head]}
    if isinstance(which, str) and which in groups:
        chosen, missed = groups[which], [] if groups[which] else [which]
    else:
        patterns = [which] if isinstance(which, str) else list(which)
        _check_strings(patterns)
        found = {p: {name for name in names if any(fnmatchcase(own, p) for own in every[name])} for p in patterns}
        chosen = [name for name in names if any(name in of_pattern for of_pattern in found.values())]
        missed = [pattern for pattern, of_pattern in found.items() if not of_pattern]
    if not names:
        raise SettingError(
            "model.net has no trainable parameter: it has none, or all are frozen (requires_grad_(False))."
        )
    if missed or not chosen:
        raise SettingError(
            f"model.adapted_parameters {missed or which} matches no trainable parameter of model.net; "
            f"{_remedy(missed, names)}."
        )
    return chosen


def _check_strings(patterns: list[Any]) -> None:
    if others := {type(pattern).__name__ for pattern in patterns if not isinstance(pattern, str)}:
        raise SettingError(
            f"model.adapted_parameters takes names (got {', '.join(others)}); give those of "
            "net.named_parameters(), or patterns such as fc.*."
        )


def _remedy(missed: list[str], names: Sequence[str]) -> str:
    """What to give in place of a pattern that matches none of the names: a layer's name needs ``.*``."""
    shown = ", ".join(names if len(names) <= MAX_NAMES else [*names[:MAX_NAMES], f"... ({len(names)} in all)"])
    parts = ["head", "body", "all", *dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in names), *names]
    for pattern in missed:
        if any(name.startswith(f"{pattern}.") for name in names):
            return f"for all of the layer's, give {pattern}.*"
        if near := get_close_matches(pattern, parts, 1):
            return f"did you mean {near[0]}? They are {shown}"
    return f"they are {shown}"


def last_layer(net: nn.Module, inputs: Any) -> str | None:
    """The name of the network's last layer: of those with parameters of their own, the one that runs last.

    A layer whose parameters another one reads without calling it, as ``nn.MultiheadAttention`` those of its
    ``out_proj``, runs with that one; if the network itself reads them, it runs then. Where nothing tells two layers
    apart, the one registered later counts.

    Args:
        net: the network; it runs once, in evaluation mode.
        inputs: of one task.

    Returns:
        None where the network has no such layer or does not take the inputs.

    Example:
        >>> class HeadFirst(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head, self.body = nn.Linear(3, 2), nn.Linear(4, 3)
        ...
        ...     def forward(self, x):
        ...         return self.head(self.body(x))
        >>> last_layer(HeadFirst(), torch.rand(5, 4))
        'head'
    """
    layers, clock, called = _layers(net), itertools.count(), dict[str, int]()
    values = {name: value.detach() for name, value in net.named_parameters()}

    def note(name: str, _: tuple) -> None:
        called[name] = next(clock)

    with _Reads({id(value): name.rpartition(".")[0] for name, value in values.items()}, clock) as read:
        if not layers or not watched(net, inputs, note, values):
            return None

    def when(layer: str) -> int:
        name = layer
        while name and name not in called:  # the layer that it is part of
            name = name.rpartition(".")[0]
        return called[name] if name else read.last.get(layer, -1) if layer else -1

    return layers[max(range(len(layers)), key=lambda index: (when(layers[index]), index))]


class _Reads(TorchFunctionMode):
    """While active, notes when tensors of a layer were last given to a function.

    Args:
        layers: by the identity of the tensor.
        clock: counts calls and reads.
    """

    def __init__(self, layers: dict[int, str], clock: Iterator[int]) -> None:
        super().__init__()
        self.layers, self.clock, self.last = layers, clock, dict[str, int]()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if (layer := self.layers.get(id(value))) is not None:
                self.last[layer] = next(self.clock)
        return func(*args, **(kwargs or {}))


def _every_name(net: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by the first: several layers may share it."""
    first, found = {id(value): name for name, value in net.named_parameters()}, dict[str, list[str]]()
    for name, value in net.named_parameters(remove_duplicate=False):
        found.setdefault(first[id(value)], []).append(name)
    return found


def _of_layer(layer: str, names: Sequence[str], every: dict[str, list[str]]) -> list[str]:
    return [name for name in names if any(own.startswith(f"{layer}." if layer else "") for own in every[name])]


def _last_registered(net: nn.Module, names: Sequence[str]) -> str:
    """The last layer that is registered of those with any of these parameters."""
    every = _every_name(net)
    return next((layer for layer in reversed(_layers(net)) if _of_layer(layer, names, every)), "")


def _layers(net: nn.Module) -> list[str]:
    """The names of the layers that have parameters of their own, as they are registered."""
    return [name for name, layer in net.named_modules() if any(True for _ in layer.parameters(recurse=False))]


class Adaptation(nn.Module):
    """The parameters and inner learning rates that the inner loop takes, learned ones included.

    Args:
        net: the network; not kept. With ``per_step_normalization`` its normalization weights are frozen.
        inner_lr: the inner learning rate, or its initial value if it is learned.
        steps: inner steps ``S`` of training.
        adapted: see :func:`adapted_names`.
        learn: learn one rate for the ``network``, for each ``tensor``, for each tensor and ``step`` (LSLR, Antoniou
            et al. 2019, section 4) or for each ``weight`` (Meta-SGD, Li et al. 2017, equation 2); None learns none.
        per_step_normalization: give weights and biases of normalization layers a value for each ``theta_0 … theta_S``,
            learned and not adapted (Antoniou et al. 2019, section 4). Their statistics are those of the current batch,
            so there are none to keep for each step. Frozen layers beside trained ones stay frozen.
        curvature: learn matrices that transform the inner gradient, see :mod:`~maml_lightning.algorithms.curvature`.
        any_classes: the number of rows of the last layer follows the episode: it has no output matrix.

    Freezing or unfreezing parameters later takes effect at once: a frozen parameter is not adapted. A network that is
    frozen as a whole, as ``LightningModule.freeze`` and averaged copies are, adapts what it adapted when this was
    created.

    Raises:
        SettingError: nothing to adapt, or no normalization layer with weights.
    """

    def __init__(
        self,
        net: nn.Module,
        inner_lr: float,
        steps: int,
        adapted: str | Sequence[str] = "all",
        learn: Literal["network", "tensor", "step", "weight"] | None = None,
        per_step_normalization: bool = False,
        curvature: bool = False,
        any_classes: bool = False,
    ) -> None:
        super().__init__()
        self.learn, self.adapted = learn, adapted
        self.by_step = nn.ParameterDict()
        if per_step_normalization:
            names = {id(value): name for name, value in net.named_parameters()}  # layers may share one
            values = {
                names[id(value)]: value
                for module in net.modules()
                if isinstance(module, _NORMALIZATIONS)
                for value in module.parameters(recurse=False)
            }
            if not values:
                raise SettingError(
                    "model.per_step_normalization is true, but model.net has no normalization layer with weights; "
                    "set it to false."
                )
            free = {name: value for name, value in values.items() if value.requires_grad}
            for name, value in (free or values).items():  # all are frozen where another MAML learns them already
                self.by_step[_key(name)] = nn.Parameter(value.detach().repeat(steps + 1, *[1] * value.dim()))
                value.requires_grad_(False)
        self.trainable = [name for name, value in net.named_parameters() if value.requires_grad]
        self.names = adapted_names(net, adapted)
        self.head: str | None = None  # the last layer, once it is known
        self._head_of: list[str] = []  # the layers of the network that it is of
        shapes = {
            None: {},
            "network": {"all": (1,)},
            "tensor": dict.fromkeys(self.names, (1,)),
            "step": dict.fromkeys(self.names, (steps,)),
            "weight": {name: (1, *net.get_parameter(name).shape) for name in self.names},
        }[learn]
        # `learnt`, like `by_step`, is part of the names in checkpoints.
        self.learnt = nn.ParameterDict({_key(n): nn.Parameter(torch.full(s, inner_lr)) for n, s in shapes.items()})
        self.any_classes = any_classes
        last = _last_registered(net, self.trainable)
        self._any_rows = _of_layer(last, self.names, _every_name(net)) if any_classes else []
        matrices = identities({n: net.get_parameter(n) for n in self.names}, self._any_rows) if curvature else {}
        self.curvature = nn.ParameterDict({_key(name): nn.Parameter(value) for name, value in matrices.items()})

    def first_of_steps(self) -> Parameters:
        """The parameters with one value for each ``theta_0 … theta_S``, as they are at ``theta_0``."""
        return {key.replace("/", "."): value[0] for key, value in self.by_step.items()}

    def find_head(self, net: nn.Module, inputs: Any) -> None:
        """Find the last layer of a network that has not run yet, see :func:`last_layer`.

        Raises:
            SettingError: it is not the last that is registered, and each of its tensors has a learned rate or matrices:
                those were made before it was known.
        """
        needed = self.adapted in ("head", "body") or (self.any_classes and len(self.curvature))
        if not needed or self._head_of == (layers := _layers(net)):
            return
        head = last_layer(net, inputs)
        if head is None:
            return
        own = {name for name, _ in net.named_parameters()}
        trainable = [name for name in self.trainable if name in own] or None
        names = adapted_names(net, self.adapted, head, trainable)
        guess = _last_registered(net, trainable or list(own))
        if head != guess and (len(self.curvature) or self.learn not in (None, "network")):
            setting = "model.meta_curvature true" if len(self.curvature) else f"model.learn_inner_lr {self.learn}"
            chosen = [head] if self.adapted == "head" else [layer for layer in layers if layer != head]
            patterns = ", ".join(f"{layer}.*" for layer in chosen)
            by = "model.head prototypes" if self.any_classes else f"model.adapted_parameters {self.adapted}"
            remedy = "register it last" if self.any_classes else f"give model.adapted_parameters [{patterns}]"
            raise SettingError(
                f"{by} with {setting} needs a network whose last layer to run ({head}) is also the last that is "
                f"registered ({guess}); {remedy}."
            )
        self.head, self._head_of, self.names = head, layers, names

    def params(self, net: nn.Module) -> Parameters:
        """The network's parameters by name, those per step with a leading dimension ``[S+1, ...]``."""
        own = dict(net.named_parameters())
        for key, value in self.by_step.items():
            name = key.replace("/", ".")
            if name not in own or own[name].shape != value.shape[1:]:
                raise SettingError(
                    f"model.per_step_normalization learns {name} {list(value.shape[1:])}, which model.net lacks: it is "
                    "not the network that MAML was created with; create another MAML with it."
                )
        return {n: self.by_step.get(_key(n), value) for n, value in own.items()}

    def rates(self, net: nn.Module, inner_lr: float) -> Parameters:
        """The inner learning rates of what adapts, ``[1 or S, ...]`` by name: ``inner_lr`` where none is learned.

        With them the curvature matrices of what adapts, ``[1, ...]``.
        """
        own = dict(net.named_parameters())
        if any(value.requires_grad for value in own.values()):
            chosen = adapted_names(net, self.adapted, self.head)
        else:
            chosen = adapted_names(net, self.adapted, self.head, [name for name in self.trainable if name in own])
        names = [name for name in chosen if _key(name) not in self.by_step]
        kept = {key.replace("/", "."): value for key, value in self.curvature.items()}
        matrices = matrices_of({name: own[name] for name in names}, kept, self._any_rows) if kept else {}
        if not self.learn:
            return rates_of({name: own[name] for name in names}, inner_lr) | matrices
        rates = {n: self.learnt.get("all" if self.learn == "network" else _key(n)) for n in names}
        for name, rate in rates.items():
            if rate is None or (self.learn == "weight" and rate.shape[1:] != own[name].shape):
                raise SettingError(
                    f"model.learn_inner_lr {self.learn} has no rate for {name}: it was frozen, or of another network, "
                    "when MAML was created; unfreeze it before, or create another MAML with this network."
                )
        return rates | matrices


def _key(name: str) -> str:
    """A parameter's name as the key of a ParameterDict, where dots are not allowed."""
    return name.replace(".", "/")
