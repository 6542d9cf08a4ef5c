"""Checks of the network alone, when it is given, and of what its gradient reaches."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from maml_lightning.algorithms.statistics import called
from maml_lightning.engine.differentiation import by_autograd
from maml_lightning.errors import SettingError
from maml_lightning.structures import describe, mapped
from maml_lightning.training.loss_checks import first_line
from maml_lightning.training.remedies import remedy_of_inputs


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


def returned_by(net: nn.Module, running: Collection[str], inputs: Any, training: bool) -> Any:
    """All that a network returns in training or evaluation mode; its own mode is restored.

    Args:
        net: the network.
        running: the names of the layers that use running statistics.
        inputs: of one task.
        training: the mode.

    Raises:
        SettingError: it does not take the inputs.
    """
    modes = {layer: layer.training for layer in net.modules()}

    def takes(inputs: Any) -> Any:
        with torch.enable_grad():  # it may take a gradient as it runs
            return called(net.train(training), {}, mapped(torch.clone, inputs), running)

    try:
        return takes(inputs)
    except SettingError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # others are faults of the network's own code
        raise SettingError(
            f"model.net does not take the episodes' inputs, {describe(inputs)} ({first_line(error)}); "
            f"{remedy_of_inputs(net, inputs, takes, error)}."
        ) from error
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def check_differentiable(net: nn.Module, outputs: list[Tensor], training: bool) -> None:
    """Check that one of the outputs comes with a gradient: without one, a network would stay as it is in silence.

    Args:
        net: the network.
        outputs: what the loss takes.
        training: the mode that they were computed in.

    Raises:
        SettingError: none does.
    """
    learns = any(value.requires_grad for value in net.parameters()) and not torch.is_inference_mode_enabled()
    if not learns or any(value.requires_grad for value in outputs):
        return
    when = "" if training else " in evaluation mode, in which it adapts to support sets"
    first = outputs[0]
    classes = not first.is_floating_point() and not first.is_complex()
    what = f"{str(first.dtype).removeprefix('torch.')} outputs" if classes else "outputs without a gradient"
    remedy = "argmax()" if classes else "torch.no_grad(), .detach() or .numpy()"
    raise SettingError(
        f"model.net returns {what}{when}, from which nothing can be learned; take {remedy} out of its forward."
    )


def check_gradients(net: nn.Module, loss: Any, value: Callable[[Mapping[str, Tensor]], Any]) -> None:
    """Check that a loss depends on no trainable parameters but those that the network is called with.

    Args:
        net: the network.
        loss: of the outputs.
        value: the loss of the network with other tensors in place of its parameters, by name.

    Raises:
        SettingError: a loss with parameters of its own, or a parameter that is read elsewhere: in a penalty, say.
    """
    given = {name: v.detach().clone().requires_grad_() for name, v in net.named_parameters() if v.requires_grad}
    try:
        with torch.inference_mode(False), torch.enable_grad(), by_autograd():
            reached = {id(leaf) for leaf in _leaves_of(value(given))}
    except Exception:  # whatever a user's network raises; it will again where it matters
        return
    of_loss = dict(loss.named_parameters()) if isinstance(loss, nn.Module) else {}
    if name := next((name for name, leaf in net.named_parameters() if id(leaf) in reached), None):
        raise SettingError(
            f"{name} of model.net is read where neither its adapted value nor its gradient gets (by model.loss, or "
            "from a list of the network's own); read it as the layer's attribute, add penalties to what training_step "
            "returns, or detach it."
        )
    if name := next((name for name, leaf in of_loss.items() if id(leaf) in reached), None):
        raise SettingError(
            f"model.loss has a parameter ({name}), which would get no gradient; make it one of model.net, or set its "
            "requires_grad to False."
        )


def _leaves_of(value: Tensor) -> Iterator[Tensor]:
    """The tensors that ``value.backward()`` would give gradients to."""
    nodes: list[Any] = [value.grad_fn]
    seen: set[Any] = {None}
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [after for after, _ in node.next_functions]
