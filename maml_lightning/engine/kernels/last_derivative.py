"""The end of a kernel's derivatives: its second one, which has no derivative of its own and says so."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from maml_lightning.engine.kernels.layout import all_tasks_first


def of_one_task(op: Any, *tensors: Tensor) -> list[Tensor]:
    """An operator of tensors with a dimension over tasks, of those of one task."""
    return [result[0].clone() for result in op(*(tensor.contiguous()[None] for tensor in tensors))]


class LastDerivative(Function):
    """``(operator, *tensors)``: the second derivative of a kernel, which has no derivative of its own."""

    @staticmethod
    def forward(operator: Any, *inputs: Tensor) -> tuple:
        return tuple(of_one_task(operator, *inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        # What torch.func would otherwise take for zero; torch's own layer then runs.
        raise NotImplementedError("the derivative for the second derivative of a layer is not implemented")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, operator: Any, *inputs: Tensor) -> tuple:
        results = operator(*all_tasks_first(info, in_dims[1:], *inputs))
        return results, (0,) * len(results)
