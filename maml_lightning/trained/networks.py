"""Networks of checkpoints, those of the package among them."""

from pathlib import Path
from typing import Any

from maml_lightning.training.checkpoints import WholeCheckpointIO, read_checkpoint
from maml_lightning.training.module import MAML

FOLDER = Path(__file__).parent


def packaged(name: str) -> Path | None:
    """The checkpoint of that name in the package, such as ``omniglot_5way_1shot``; None where there is none."""
    path = FOLDER / f"{name}.ckpt"
    return path if path.parent == FOLDER and path.is_file() else None


def load(checkpoint: str | Path, trust: bool = False, **settings: Any) -> MAML:
    """The module of a checkpoint that the command line wrote, its network built as it was trained.

    Args:
        checkpoint: its path, or the name of one in the package.
        trust: also import and call what it names outside this package and PyTorch, such as your own network.
            Code of a checkpoint from others could then do anything.
        settings: of the module, in place of the checkpoint's.

    Raises:
        SettingError: it cannot be read, or does not name its network, or names code that is not trusted.

    Example:
        >>> import torch
        >>> maml = load("omniglot_5way_1shot")
        >>> classifier = maml.adapt(torch.rand(5, 1, 28, 28), torch.arange(5))
        >>> classifier(torch.rand(9, 1, 28, 28)).shape
        torch.Size([9, 5])
    """
    return MAML.load_from_checkpoint(packaged(str(checkpoint)) or checkpoint, trust=trust, **settings).eval()


def strip(source: Path, target: Path) -> None:
    """Write a checkpoint without what only training needs.

    Args:
        source: a checkpoint that fit wrote.
        target: the file to write, to test, predict or start from.

    Raises:
        SettingError: the source cannot be read, or the target not be written.
    """
    checkpoint = read_checkpoint(source)
    kept = (
        "state_dict",
        "hyper_parameters",
        "inputs",
        "calibration",
        "epoch",
        "global_step",
        "pytorch-lightning_version",
    )
    WholeCheckpointIO().save_checkpoint({key: checkpoint[key] for key in kept if key in checkpoint}, target)
