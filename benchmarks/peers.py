"""The same meta-gradient with other packages: each peer maps (net, episode, lr, steps) to a function without arguments.

The function returns the gradient of the mean query loss as a dict by parameter name. ``PEERS`` contains only the
packages that are installed.
"""

import copy
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from maml_lightning import ConvNet, Episode

Run = Callable[[], dict[str, Tensor]]


def _leaves(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    net.zero_grad()
    return net


def _gradient(net: nn.Module, tasks: int) -> dict[str, Tensor]:
    gradient = {name: value.grad / tasks for name, value in net.named_parameters()}
    net.zero_grad()
    return gradient


def plain_loop(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """Autograd with ``create_graph=True``, task by task, as in textbooks."""
    net = _leaves(net)
    start = dict(net.named_parameters())

    def run() -> dict[str, Tensor]:
        for x, y, query_x, query_y in zip(*episode, strict=True):
            fast = start
            for _ in range(steps):
                loss = F.cross_entropy(functional_call(net, fast, (x,)), y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {name: value - lr * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
            F.cross_entropy(functional_call(net, fast, (query_x,)), query_y).backward()
        return _gradient(net, episode.tasks)

    return run


def higher(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """``higher.innerloop_ctx``, task by task, as in its MAML example."""
    import higher

    net = _leaves(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)

    def run() -> dict[str, Tensor]:
        for x, y, query_x, query_y in zip(*episode, strict=True):
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(steps):
                    inner.step(F.cross_entropy(fast(x), y))
                F.cross_entropy(fast(query_x), query_y).backward()
        return _gradient(net, episode.tasks)

    return run


def torchopt(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """``torchopt.MetaSGD`` with the network's state extracted and recovered around each task, as in its tutorial."""
    import torchopt

    net = _leaves(net)
    names = [name for name, _ in net.named_parameters()]
    inner = torchopt.MetaSGD(net, lr=lr)

    def run() -> dict[str, Tensor]:
        start = [value for _, value in net.named_parameters()]
        before, before_inner = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
        for x, y, query_x, query_y in zip(*episode, strict=True):
            for _ in range(steps):
                inner.step(F.cross_entropy(net(x), y))
            F.cross_entropy(net(query_x), query_y).backward()
            torchopt.recover_state_dict(net, before)
            torchopt.recover_state_dict(inner, before_inner)
        gradient = {name: value.grad / episode.tasks for name, value in zip(names, start, strict=True)}
        for value in start:
            value.grad = None
        return gradient

    return run


def learn2learn(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """``learn2learn.algorithms.MAML``, a clone for each task, as in its examples."""
    from learn2learn.algorithms import MAML

    net = _leaves(net)
    maml = MAML(net, lr=lr, first_order=False)

    def run() -> dict[str, Tensor]:
        for x, y, query_x, query_y in zip(*episode, strict=True):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            F.cross_entropy(learner(query_x), query_y).backward()
        return _gradient(net, episode.tasks)

    return run


def jax(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """``jax.jit`` of the gradient vectorized over tasks; convolutions as patches, which is faster in JAX on a CPU."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    layers = list(net.body.named_children())

    def forward(params: dict, x: jax.Array) -> jax.Array:
        for number, layer in layers:
            weight, bias = (params.get(f"body.{number}.{name}") for name in ("weight", "bias"))
            if isinstance(layer, nn.Conv2d):
                padding = [(p, p) for p in layer.padding]
                patches = jax.lax.conv_general_dilated_patches(x, layer.kernel_size, layer.stride, padding)
                x = jnp.einsum("bkhw,ok->bohw", patches, weight.reshape(weight.shape[0], -1))
            elif isinstance(layer, nn.BatchNorm2d):
                mean, var = (f(x, (0, 2, 3), keepdims=True) for f in (jnp.mean, jnp.var))
                x = (x - mean) * jax.lax.rsqrt(var + layer.eps) * weight[:, None, None] + bias[:, None, None]
            elif isinstance(layer, nn.MaxPool2d):
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
            else:
                x = jax.nn.relu(x)
        return x.mean((2, 3)) @ params["head.weight"].T + params["head.bias"]

    def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(forward(params, x)), y[:, None], 1).mean()

    def outer(params: dict, x: jax.Array, y: jax.Array, query_x: jax.Array, query_y: jax.Array) -> jax.Array:
        for _ in range(steps):
            params = jax.tree.map(lambda value, grad: value - lr * grad, params, jax.grad(loss)(params, x, y))
        return loss(params, query_x, query_y)

    @jax.jit
    def gradient(params: dict, *episode: jax.Array) -> dict:
        each = jax.vmap(jax.grad(outer), (None, 0, 0, 0, 0))(params, *episode)
        return jax.tree.map(lambda value: value.mean(0), each)

    arrays = [jnp.asarray(tensor.cpu().numpy()) for tensor in episode]

    def run() -> dict[str, Tensor]:
        params = {name: jnp.asarray(value.detach().cpu().numpy()) for name, value in net.named_parameters()}
        return {name: torch.from_dlpack(value) for name, value in gradient(params, *arrays).items()}

    return run


_NEEDS = {
    "plain loop": (plain_loop, "torch"),
    "higher": (higher, "higher"),
    "TorchOpt": (torchopt, "torchopt"),
    "learn2learn": (learn2learn, "learn2learn"),
    "JAX": (jax, "jax"),
}
PEERS = {name: peer for name, (peer, module) in _NEEDS.items() if importlib.util.find_spec(module)}


def peers_of(net: nn.Module) -> dict[str, Callable[[nn.Module, Episode, float, int], Run]]:
    """The installed peers that can run a network: that of JAX is written for ``ConvNet`` alone."""
    return {name: peer for name, peer in PEERS.items() if name != "JAX" or isinstance(net, ConvNet)}
