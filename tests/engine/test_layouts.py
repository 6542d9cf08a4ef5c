"""What the network's own code sees has torch's strides, whatever the kernels keep in memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vjp, vmap

from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.engine.kernels.layout import kernel_layout
from maml_lightning.engine.kernels.mode import task_operators
from tests.reference import images, perturbed, reference, relative_error


def strides(x):
    assert x.is_contiguous()
    assert x.stride() == torch.empty(x.shape).stride()
    return x.flatten(1)


def in_place(x):
    x = x * 1
    x.view(x.shape[0], -1).mul_(2)  # reaches x itself
    return x.flatten(1)


FLATTENINGS = {
    "view": lambda x: x.view(x.size(0), -1),
    "view_as": lambda x: x.view_as(x.new_empty(x.shape[0], x[0].numel())),
    "as_strided": lambda x: x.as_strided((x.shape[0], x[0].numel()), (x[0].numel(), 1)),
    "strides": strides,
    "in place": in_place,
}
LAYERS = {
    "convolution": list,
    "batch norm": lambda: [nn.BatchNorm2d(4, track_running_stats=False)],
    "ELU": lambda: [nn.ELU()],
    "pooling": lambda: [nn.Hardswish(), nn.MaxPool2d(2)],
}


class Flattened(nn.Module):
    def __init__(self, layers, flatten):
        super().__init__()
        self.body, self.flatten = nn.Sequential(nn.Conv2d(1, 4, 3), *layers()), FLATTENINGS[flatten]
        self.head = nn.Linear(self.body(torch.zeros(2, 1, 8, 8))[0].numel(), 3)

    def forward(self, x):
        return self.head(self.flatten(self.body(x)))


class Standardized(nn.Module):
    """Weight standardization, and an embedding of positions with four dimensions."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 1, 8, 8))
        self.convolution, self.head = nn.Conv2d(1, 4, 3, bias=False), nn.Linear(144, 3)

    def forward(self, x):
        weight = self.convolution.weight
        flat = weight.view(weight.shape[0], -1)
        weight = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(weight)
        x = x.view(x.shape[0], -1) + self.positions.view(1, -1)
        return self.head(F.conv2d(x.view(-1, 1, 8, 8), weight).view(x.shape[0], -1))


NETWORKS = {
    **{layer: partial(Flattened, LAYERS[layer], "view") for layer in LAYERS},
    **{f"batch norm, {how}": partial(Flattened, LAYERS["batch norm"], how) for how in FLATTENINGS if how != "view"},
    "parameters": Standardized,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_traced(name):
    torch.manual_seed(0)
    net, episode = perturbed(NETWORKS[name]()), images(tasks=2, shots=1, size=8)
    _, expected = reference(net, episode, 0.1, 2, F.cross_entropy)
    ours = InnerLoop(net, F.cross_entropy, tasks_per_chunk=None).meta_gradient(
        dict(net.named_parameters()), episode, 0.1, 2
    )
    assert relative_error(ours.gradient, expected) < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_untraced_under_each_transform(name):
    torch.manual_seed(0)
    net, episode = perturbed(NETWORKS[name]()), images(tasks=2, shots=1, size=8)
    params = {n: kernel_layout(v.detach()) for n, v in net.named_parameters()}

    def output(params, x):
        with task_operators():
            return functional_call(net, {n: v.contiguous() for n, v in params.items()}, (x,)).sin().sum()

    def curvature(params, x):
        gradient, pullback = vjp(lambda p: grad(output)(p, x), params)
        return pullback(gradient)[0]

    x = episode.support_inputs
    expected = torch.stack([functional_call(net, params, (one,)).sin().sum() for one in x])
    assert torch.allclose(vmap(output, (None, 0))(params, x), expected, rtol=1e-12)
    second = vmap(curvature, (None, 0))(params, x)
    leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
    gradients = torch.autograd.grad(
        functional_call(net, leaves, (x[1],)).sin().sum(), list(leaves.values()), create_graph=True
    )
    theirs = torch.autograd.grad(gradients, list(leaves.values()), [g.detach() for g in gradients])
    assert relative_error({n: v[1] for n, v in second.items()}, dict(zip(leaves, theirs, strict=True))) < 1e-9
