"""Trained networks that come with the package, and the way from any checkpoint to its network."""

import inspect
from pathlib import Path
from pydoc import locate
from typing import Any

from maml_lightning.checkpoints import WholeCheckpointIO, read_checkpoint
from maml_lightning.errors import SettingError
from maml_lightning.module import MAML

FOLDER = Path(__file__).parent


def trained(name: str) -> Path | None:
    """The checkpoint of that name in the package, such as ``omniglot_5way_1shot``; None where there is none."""
    path = FOLDER / f"{name}.ckpt"
    return path if path.parent == FOLDER and path.is_file() else None


def settings_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint's settings that `MAML` takes."""
    settings = checkpoint.get("hyper_parameters", {})
    return {key: value for key, value in settings.items() if key in inspect.signature(MAML).parameters}


def load(checkpoint: str | Path) -> MAML:
    """The module of a checkpoint that the command line wrote, its network built as it was trained.

    Args:
        checkpoint: its path, or the name of one in the package.

    Raises:
        SettingError: it cannot be read, or does not name its network.

    Example:
        >>> import torch
        >>> maml = load("omniglot_5way_1shot")
        >>> classifier = maml.adapt(torch.rand(5, 1, 28, 28), torch.arange(5))
        >>> classifier(torch.rand(9, 1, 28, 28)).shape
        torch.Size([9, 5])
    """
    content = read_checkpoint(trained(str(checkpoint)) or Path(checkpoint))
    settings = settings_of(content)
    net, loss = settings.get("net"), settings.get("loss")
    made = locate(net["class_path"]) if isinstance(net, dict) and "class_path" in net else None
    if not callable(made) or not isinstance(net, dict):
        raise SettingError(
            f"The checkpoint {checkpoint} does not name its network; use MAML.load_from_checkpoint(path, net=...)."
        )
    settings["net"] = made(**net.get("init_args", {}))
    if loss is None:
        settings.pop("loss", None)
    elif isinstance(loss, str):
        settings["loss"] = locate(loss)
    maml = MAML(**settings)
    maml.on_load_checkpoint(content)
    maml.load_state_dict(content["state_dict"])
    return maml.eval()


def strip(source: Path, target: Path) -> None:
    """Write a checkpoint without what only training needs.

    Args:
        source: a checkpoint that fit wrote.
        target: the file to write, to test, predict or start from.

    Raises:
        SettingError: the source cannot be read, or the target not be written.
    """
    checkpoint = read_checkpoint(source)
    kept = ("state_dict", "hyper_parameters", "inputs", "epoch", "global_step", "pytorch-lightning_version")
    WholeCheckpointIO().save_checkpoint({key: checkpoint[key] for key in kept if key in checkpoint}, target)
