"""Weight normalization against torch's values, and against differences for its derivatives."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.nn.utils import parametrizations

from maml_lightning.engine.differentiation import by_autograd
from maml_lightning.engine.kernels.weight_normalization import weight_norm


def operands(shape, dim):
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    of_g = [] if dim == -1 else [size if d == dim % len(shape) else 1 for d, size in enumerate(shape)]
    return v, torch.rand(of_g, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
def test_values_are_torchs(dim):
    v, g = operands((3, 4, 2), dim)
    assert torch.allclose(weight_norm(v, g, dim), torch._weight_norm(v, g, dim), rtol=1e-14)
    assert gradcheck(lambda *args: weight_norm(*args, dim), (v, g))
    assert gradgradcheck(lambda *args: weight_norm(*args, dim).sin(), (v, g))


def test_a_vector_is_normalized_element_by_element():
    v, g = operands((4,), 0)
    assert torch.allclose(weight_norm(v, g), torch._weight_norm(v, g))


def both(old):
    layer = nn.Linear(3, 2).double()
    if not old:
        return parametrizations.weight_norm(layer)
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("old", [False, True])
def test_both_layers_of_torch_have_a_right_second_derivative_in_a_loop(old):
    torch.manual_seed(0)
    layer, x = both(old), torch.rand(4, 3, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def outputs(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).tanh()

    with by_autograd():
        assert gradgradcheck(outputs, values)


def test_tasks_do_not_mix_under_vmap():
    v, g = (torch.rand(3, *shape, dtype=torch.float64) for shape in ((4, 2), (4, 1)))
    slope = grad(lambda v, g: weight_norm(v, g).sin().sum(), argnums=(0, 1))
    each = [slope(*task) for task in zip(v, g, strict=True)]
    for found, expected in zip(vmap(slope)(v, g), zip(*each, strict=True), strict=True):
        assert torch.allclose(found, torch.stack(expected), rtol=1e-12)
