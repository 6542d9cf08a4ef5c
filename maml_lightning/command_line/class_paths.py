"""Networks and data by class path: which come with the package, and why one cannot be used, in one line."""

import importlib
import inspect
import re
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn, optim

import maml_lightning
from maml_lightning import networks

Known = dict[str, type]

BASES: dict[str, tuple[type, str]] = {
    "data": (LightningDataModule, "a LightningDataModule"),
    "model.net": (nn.Module, "a torch.nn.Module"),
    "optimizer": (optim.Optimizer, "a torch.optim.Optimizer"),
    "lr_scheduler": (optim.lr_scheduler.LRScheduler, "a torch.optim.lr_scheduler.LRScheduler"),
}
_FUNCTIONS = {
    "loss": "a function of (outputs, targets) such as torch.nn.functional.mse_loss, or a class such as "
    "torch.nn.CrossEntropyLoss,",
    "metric": "a class of torchmetrics, or a function of (outputs, targets),",
}
_OWN = {"data": "my_module.MyData", "model.net": "my_module.MyNet"}


def known(setting: str) -> Known:
    """The classes that a setting is meant for, by the names that it takes.

    Networks are named with the package: other packages' classes share their bare names.

    Args:
        setting: a key of `BASES`.
    """
    base, _ = BASES[setting]
    rooms = {"optimizer": optim, "lr_scheduler": optim.lr_scheduler}
    room = vars(rooms.get(setting, maml_lightning))
    prefix = f"{maml_lightning.__name__}." if setting == "model.net" else ""
    return {
        prefix + name: found
        for name, found in sorted(room.items())
        if inspect.isclass(found)
        and issubclass(found, base)
        and found is not base
        and not name.startswith("_")
        and (setting != "model.net" or found.__module__.startswith(networks.__name__))
    }


def purpose(described: Any) -> str:
    """The first sentence of a docstring, without markup."""
    text = " ".join((inspect.getdoc(described) or "").split("\n\n")[0].split())
    return re.split(r"\.\s(?=[A-Z])|\.$", text)[0].replace("``", "")


def listing(setting: str) -> str:
    """The classes that a setting takes by name, a line each, and what else it takes."""
    classes = known(setting)
    width = max(map(len, classes))
    lines = [f"--{setting} takes a name or a class path; --{setting}.help NAME describes the settings of one:", ""]
    lines += [f"  {name:{width}}  {purpose(found)}".rstrip() for name, found in classes.items()]
    if setting in _OWN:
        lines += ["", f"or the class path of {BASES[setting][1]} of your own, such as {_OWN[setting]}."]
    return "\n".join(lines)


def explanation(message: str) -> str | None:
    """What is wrong with a class path, in a line, instead of jsonargparse's list of what it tried.

    Args:
        message: jsonargparse's.

    Returns:
        None where the message is about something else.
    """
    if function := re.search(
        r'Parser key "(?:\w+\.)?model\.(loss|metric)":(?:.* callable class:)?\s+([^\n]+)', message, re.DOTALL
    ):
        name, reason = function[1], function[2].partition(". Got value")[0].rstrip(".")
        given = re.search(r"(?:Given|Got) value: (?:\{'class_path': '|Namespace\(class_path=')?([\w.]+)", message)
        value = given[1] if given and not given[1].startswith("Namespace") else ""
        return f"model.{name}{f' {value}' if value else ''}: {reason}; give {_FUNCTIONS[name]} by its import path."
    one_of = re.search(
        r'Parser key "([\w.]+)":\s+Does not .*Subtypes: \[(.*?)\]\n.*Given value: ([^\n]+)', message, re.S
    )
    if one_of and not one_of[1].endswith(tuple(BASES)):
        kinds = re.sub(r"<class '(?:torch\.)?(\w+)'>|typing\.", r"\1", one_of[2]).replace("NoneType", "null")
        return f"{one_of[1]} is {one_of[3]}; it takes {', '.join(re.split(', (?![^[]*])', kinds))}."
    setting = re.search(rf'Parser key "(?:\w+\.)?({"|".join(map(re.escape, BASES))})"', message)
    if setting and re.search(
        "add_function_arguments|no signature found", message
    ):  # what jsonargparse takes for a class
        return f"{setting[1]}: {_function('it', BASES[setting[1]][1])}"
    if setting and "Subclass types expect one of" in message:
        got = re.search(r"Got value: (.+?)\s*Subclass types", message, re.DOTALL)
        example = f"class_path: {_OWN.get(setting[1], f'my_module.My{BASES[setting[1]][0].__name__}')}"
        found = " ".join(got[1].split()) if got else "none"
        return f"{setting[1]} has no class_path (got {found}); give {example}, and its arguments in init_args."
    value = re.search(
        r"""Given\ value:\ \{'class_path':\ '([^']+)'|Given\ value:\ ([\w.]+)$|class_path\ '([^']+)'
        |Expected\ a\ path\ but\ (\S+)\ either|Import\ path\ (\S+)\ does\ not|import\ path\ string:\ (\S+)""",
        message,
        re.VERBOSE | re.MULTILINE,
    )
    if not setting or not value:
        return None
    path = next(group for group in value.groups() if group)
    reason = problem(path, setting[1])
    return reason and f"{setting[1]} {path}: {reason}"


def _function(name: str, what: str) -> str:
    return (
        f"it is a function, and a class is needed, so that its settings can be saved with the run; "
        f"write {what} whose __init__ calls {name}."
    )


def problem(path: str, setting: str) -> str | None:
    """Why a class path cannot be used and what can; None where it can.

    Args:
        path: a class path, or a bare name.
        setting: a key of `BASES`.
    """
    base, what = BASES[setting]
    classes = known(setting)
    own = f", or a class path of your own, such as {_OWN[setting]}" if setting in _OWN else " or a class path"
    remedy = f"give one of {', '.join(classes)}{own}."
    module, _, name = path.rpartition(".")
    if not module:
        bare = {key.rpartition(".")[2]: key for key in classes}
        if path in bare:
            return None
        near = [bare[key] for key in get_close_matches(path, bare, 1, 0.5)]
        near += [key for key in classes if path.lower() in key.lower()]
        return f"there is no such class; {f'did you mean {near[0]}? Or ' if near else ''}{remedy}"
    try:
        holder: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return f"there is no module {error.name} in the current folder or the environment; {remedy}"
        return f"importing {module} fails: {error}."
    except Exception as error:
        return f"importing {module} fails: {type(error).__name__}: {error}."
    found = getattr(holder, name, None)
    if found is None:
        near = get_close_matches(name, [key for key, value in vars(holder).items() if inspect.isclass(value)], 1, 0.4)
        return f"{module} has no {name}; {f'did you mean {module}.{near[0]}? Or ' if near else ''}{remedy}"
    if inspect.isroutine(found):
        return _function(name, what)
    if not inspect.isclass(found):
        return f"it is an object ({type(found).__name__}), and a class is needed; give {what} by its class path."
    return None if issubclass(found, base) else f"it is a class, but not {what}; {remedy}"
