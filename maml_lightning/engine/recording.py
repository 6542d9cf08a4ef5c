"""A function's operators as they run on fake tensors, in a flat graph; a third of what ``make_fx`` takes.

Shapes and types are those of the example arguments. What depends on values raises, as fake tensors have none.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

from maml_lightning.engine.graphs import called

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_METADATA = {_aten.size.default, _aten.stride.default, _aten.storage_offset.default}


# Frequent operators whose results' sizes and strides follow from their arguments' alone: they are asked directly, which
# takes a third of the time that fake tensors take, who look for constants, devices and what they have computed before.
# Others are asked once for arguments of the same sizes and strides, too.
_DIRECT = {
    *(op.default for op in (_aten.view, _aten._unsafe_view, _aten.permute, _aten.t, _aten.expand, _aten.unsqueeze)),
    *(op.default for op in (_aten.alias, _aten.detach, _aten.clone, _aten.neg, _aten.addcmul, _aten.bmm, _aten.mm)),
    *(op.default for op in (_aten.baddbmm, _aten.sigmoid, _aten.tanh, _aten.relu, _aten.threshold_backward)),
    *(op.Tensor for op in (_aten.slice, _aten.mul, _aten.add, _aten.sub, _aten.div)),
    *(op.default for op in (_aten.leaky_relu, _aten.leaky_relu_backward, _aten.hardtanh, _aten.hardtanh_backward)),
    *(op.default for op in (_aten.hardswish, _aten.hardswish_backward, _aten.hardsigmoid, _aten.hardsigmoid_backward)),
    *(op.default for op in (_aten.silu, _aten.silu_backward, _aten.gelu, _aten.gelu_backward, _aten.rsqrt, _aten.exp)),
    *(op.Scalar for op in (_aten.mul, _aten.div, _aten.lt, _aten.gt, _aten.ne)),
    *(_aten.where.self, _aten.logical_and.default, _aten.native_layer_norm.default),
    *(_aten.transpose.int, _aten.select.int, _aten.squeeze.dim, _aten.sum.dim_IntList, _aten.mean.dim),
}


@cache
def _is_composite(func: OpOverload) -> bool:
    return func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


@cache
def _is_new(func: OpOverload) -> bool:
    """Whether an operator gives new tensors alone, whose sizes and strides follow from those of its arguments."""
    of_values = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    returns = [(str(value.type), value.alias_info) for value in func._schema.returns]
    pure = not func._schema.is_mutable and all(pair == ("Tensor", None) for pair in returns)
    return pure and bool(returns) and of_values.isdisjoint(func.tags)


def _like(value: Any) -> tuple | None:
    """The same for arguments of which an operator gives results of the same sizes and strides; None: of no others."""
    if type(value) is FakeTensor:
        plain = value.layout is torch.strided and value.constant is None and not value.dtype.is_complex
        return (value.shape, value.stride(), value.dtype, value.fake_device) if plain else None
    if isinstance(value, tuple | list):
        parts = tuple(map(_like, value))
        return None if None in parts else (type(value), *parts)
    if isinstance(value, dict):
        return _like([*value.items()])
    return (type(value), value) if isinstance(value, _PLAIN) else None


class _Recorder(TorchDispatchMode):
    """While active, operators are written to ``graph``.

    Args:
        mode: of the fake tensors that they run on.
        replacements: functions that run in the place of operators.
        results: sizes and strides of operators' results by those of their arguments, which it adds to.
    """

    def __init__(self, mode: FakeTensorMode, replacements: dict[OpOverload, Callable[..., Any]], results: dict) -> None:
        super().__init__()
        self.mode, self.replacements, self.results = mode, replacements, results
        self.graph, self.root = fx.Graph(), nn.Module()
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Tensor] = []  # so that no other tensor gets their identity

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no compiler is at work, and to hold it off takes longer than to record

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:  # autograd asks of each tensor, and vmap
            return args[0].fake_device
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            raise NotImplementedError(f"{func} cannot be recorded")
        if others := [kind.__name__ for kind in types if not issubclass(kind, FakeTensor)]:  # may call it for ever
            raise NotImplementedError(f"{func} of a {others[0]} cannot be recorded")
        if func is _DEVICE:
            return func(*args, **kwargs)
        if func is _aten._efficientzerotensor.default:  # zeros without memory, which fake tensors take for meta ones
            with self:
                return torch.zeros(*args, **kwargs)
        if func in self.replacements:
            with self:
                return self.replacements[func](*args, **kwargs)
        if func not in _METADATA and _is_composite(func):  # autograd would have taken it apart
            with self:
                return func.decompose(*args, **kwargs)
        if func is _aten.lift_fresh.default:  # of a new tensor, which the graph has to make anew
            func = _aten.lift_fresh_copy.default
        node = called(self.graph, func, self.argument(args), self.argument(kwargs))
        result = self.run(func, args, kwargs)
        self.name(result, node)
        return result

    def run(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        """The operator's result on fake tensors; of arguments like earlier ones, a new one like the earlier one."""
        key = (func, _like(args), _like(kwargs)) if _is_new(func) else None
        if key is None or None in key:
            return self._run(func, args, kwargs)
        if (known := self.results.get(key)) is None:
            result = self._run(func, args, kwargs)
            known = self.results[key] = _like(result) or ()
            return result
        if not known:  # unlike the others
            return self._run(func, args, kwargs)
        with torch._C._DisableTorchDispatch():
            return self._made(known)

    def _made(self, like: Any) -> Any:
        """A new tensor, or new ones."""
        if like[0] is tuple or like[0] is list:
            return like[0](self._made(part) for part in like[1:])
        if like[0] is type(None):  # a gradient that was not asked for
            return None
        size, stride, dtype, device = like
        return FakeTensor(self.mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)

    def _run(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        devices = {t.fake_device if type(t) is FakeTensor and t.constant is None else None for t in tensors}
        if (func not in _DIRECT and func.namespace != "maml_lightning") or len(devices) != 1 or None in devices:
            return func(*args, **kwargs)
        (device,) = devices
        with in_kernel_invocation_manager(self.mode):
            result = func(*args, **kwargs)
        if isinstance(result, tuple | list):
            return type(result)(FakeTensor(self.mode, part, device) for part in result)
        return FakeTensor(self.mode, result, device)

    def name(self, result: Any, node: fx.Node) -> None:
        """Note which node gives a result: a tensor, or some."""
        if isinstance(result, Tensor):
            node.meta["val"] = result
            self.nodes[id(result)] = node
            self.kept.append(result)
        elif isinstance(result, tuple | list):
            for i, part in enumerate(result):
                if part is not None:
                    self.name(part, called(self.graph, operator.getitem, (node, i), {}))
        elif result is not None:
            self.graph.erase_node(node)  # a number, known without values

    def argument(self, value: Any) -> Any:
        """A value as the argument of a node."""
        if isinstance(value, Tensor):
            return self.nodes[id(value)] if id(value) in self.nodes else self._constant(value)
        if isinstance(value, tuple | list):
            return type(value)([self.argument(part) for part in value])
        if isinstance(value, dict):
            return {name: self.argument(part) for name, part in value.items()}
        if isinstance(value, _PLAIN):
            return value
        raise NotImplementedError(f"an operator of a {type(value).__name__} cannot be recorded")

    def _constant(self, value: Tensor) -> fx.Node:
        if isinstance(value, FakeTensor):
            raise NotImplementedError("a tensor of unknown origin cannot be recorded")
        name = f"constant_{len(self.kept)}"
        setattr(self.root, name, value)
        node = self.graph.get_attr(name)
        self.nodes[id(value)] = node
        self.kept.append(value)
        return node


def record(
    function: Callable[..., list],
    leaves: list[Tensor],
    replacements: dict[OpOverload, Callable[..., Any]],
    results: dict[tuple, tuple],
) -> tuple[fx.Graph, nn.Module]:
    """The graph of a function of tensors, and a module of its constants.

    Args:
        function: returns a list of tensors.
        leaves: example arguments.
        replacements: functions that run in the place of operators.
        results: empty, or those of an earlier recording of much the same operators, which then need not be asked.

    Raises:
        NotImplementedError: an operator cannot be recorded.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(mode, replacements, results)
    own = [leaf.detach() for leaf in leaves]  # objects of their own, where one tensor is used twice
    inputs = [mode.from_tensor(leaf) for leaf in own]
    for number, value in enumerate(inputs):
        value.item_memo = None  # from torch 2.14 on, `.item()` of an argument would give its value now, for ever
        recorder.name(value, recorder.graph.placeholder(f"input_{number}"))
    with torch.no_grad(), without_autocast_cache(), mode, recorder:
        outputs = function(*inputs)
    recorder.graph.output(recorder.argument(outputs))
    return recorder.graph, recorder.root


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """While active, autocast keeps no tensor that it has made."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
