"""Checks of the network alone, when it is given."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from maml_lightning.errors import SettingError


def check_network(net: nn.Module, second_order: bool) -> None:
    """Check that a network has values to begin with, and derivatives.

    Args:
        net: the network.
        second_order: whether second derivatives are needed.

    Raises:
        SettingError: it is no network, is wrapped for several devices or in MAML, has lazy layers that have not seen
            an input, or TorchScript, whose second derivatives are wrong in PyTorch itself.
    """
    if not isinstance(net, nn.Module):
        what = f"the class {net.__name__}" if isinstance(net, type) else f"of type {type(net).__name__}"
        remedy = f"an instance, {net.__name__}(...)" if isinstance(net, type) else "an instance of a torch.nn.Module"
        raise SettingError(f"model.net is {what}; give {remedy}.")
    if isinstance(getattr(net, "adaptation", None), nn.Module) and callable(getattr(net, "adapt", None)):
        raise SettingError(f"model.net is a {type(net).__name__} already; give the network inside (maml.net).")
    if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise SettingError(
            f"model.net is wrapped in {type(net).__name__}; give the network inside (net.module): several devices are "
            "the Trainer's to use (trainer.devices)."
        )
    lazy = [name for name, value in (*net.named_parameters(), *net.named_buffers()) if is_lazy(value)]
    if lazy:
        raise SettingError(
            f"model.net has lazy layers without values yet ({lazy[0]}); call it once on an example before it is given."
        )
    scripts = [
        n or type(layer).__name__ for n, layer in net.named_modules() if isinstance(layer, torch.jit.ScriptModule)
    ]
    if scripts and second_order:
        raise SettingError(
            f"model.net has TorchScript in it ({scripts[0]}), whose second derivatives are wrong in PyTorch; give the "
            "module that it was made of, or set model.first_order to true."
        )
