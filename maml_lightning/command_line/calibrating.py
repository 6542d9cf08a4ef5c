"""``maml-lightning calibrate``: a checkpoint whose confidence, for ``data.reject``, is calibrated on validation."""

from functools import partial
from pathlib import Path

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from maml_lightning.command_line.functions import run
from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.trained import load, packaged
from maml_lightning.training.checkpoints import WholeCheckpointIO, read_checkpoint
from maml_lightning.training.confidence import calibrate


def calibrate_checkpoint(
    ckpt_path: str, data: LightningDataModule, output: str, episodes: int = 100, trust_checkpoint: bool = False
) -> None:
    """Measure on validation classes how likely predictions are right, and write the checkpoint with it.

    Half of an episode's classes or fewer are a support set, others those of unknown queries. So give data.ways as many
    classes as validation has, and data.shots as many as will be used: all numbers up to these are measured.

    Args:
        ckpt_path: A checkpoint, or the name of a network of the package.
        data: The data it was trained on, whose validation classes are used.
        output: The checkpoint to write; it must not exist.
        episodes: Validation episodes to measure on, at most data.val_episodes.
        trust_checkpoint: Import and call whatever network or loss the checkpoint names, such as your own.
    """
    file, source = Path(output), packaged(ckpt_path) or Path(ckpt_path)
    if file.exists() or file.is_symlink():
        raise SettingError(f"output: {shown(file)} exists already; remove it or give another name.")
    if episodes < 1:
        raise SettingError(f"episodes must be at least 1 (got {episodes}).")
    maml, content = load(source, trust_checkpoint), read_checkpoint(source)
    data.prepare_data()
    data.setup("validate")
    queries = calibrate(maml, data.val_dataloader(), episodes)
    WholeCheckpointIO().save_checkpoint({**content, "calibration": maml.calibration}, file)
    rank_zero_info(f"Calibrated on {queries} queries. Written: {shown(file)}")


main = partial(run, calibrate_checkpoint, "calibrate")  # takes the words after ``maml-lightning calibrate``
