"""Checkpoints from which a run resumes exactly: written whole, found again, and read without running code in them."""

import inspect
import io
import pickle
import signal
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from maml_lightning.devices import random_states, set_random_states
from maml_lightning.errors import SettingError
from maml_lightning.files import write_whole
from maml_lightning.processes import every_process, reduce_logged

LAST = "last.ckpt"
_DAMAGED = (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then renames it.

    Lightning's own writes it to the system's temporary folder and moves it from there: a copy, and so a half of one if
    the process dies, where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            SettingError: it could not be written, as on a full disk; the one before it is untouched.
        """
        if "://" in str(path):  # not of this machine's file systems
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: file.write(content.getbuffer()), f".{path.name}.part")
        except OSError as error:
            before = "the one before it is whole" if path.exists() else "there is none before it"
            raise SettingError(
                f"The checkpoint {path} was not written ({error.strerror}), {before}; make room, or give another "
                "place with --trainer.default_root_dir."
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Load a checkpoint's weights and plain values, unless code in it was asked for."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location or (lambda storage, _: storage))
        # Not Lightning's: before 2.6 it runs the code of whatever it loads.
        return torch.load(path, map_location or "cpu", weights_only=weights_only is not False)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a run resumes exactly: after each epoch, at a period, and when a signal ends it.

    On SIGTERM or Ctrl-C the current meta-step is finished and saved, and the process ends with status 128 + the
    signal's number; a second Ctrl-C ends it at once. Of several processes one that gets the signal is enough.
    SLURM's signal to requeue waits for the end of the meta-step as well. A signal during validation waits for its end.

    Args:
        every_n_train_steps: meta-steps between two checkpoints; null leaves it to the ends of epochs.

    Raises:
        SettingError: ``every_n_train_steps`` is below 1.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise SettingError(
                f"last_checkpoint.every_n_train_steps must be at least 1 or null (got {every_n_train_steps})."
            )
        self.every_n_train_steps = every_n_train_steps
        self._received: list[int] = []  # signals that wait for the end of the meta-step
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}
        self._step, self._whole = 0, False
        self._random: dict[str, Any] | None = None
        self._device = torch.device("cpu")  # that this process trains on
        self.path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write all checkpoints whole."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to handle signals, and continue with the random numbers of the run that is resumed."""
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        folder = folders[0] if folders else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        self.path = None if trainer.fast_dev_run else Path(str(folder)) / LAST  # type: ignore[attr-defined]
        self._step, self._received, self._device = trainer.global_step, [], trainer.strategy.root_device
        if self._random is not None:
            set_random_states(self._device, [self._random["cpu"], *self._random["cuda"][:1]])
            self._random = None
        if threading.current_thread() is threading.main_thread():  # Lightning puts all handlers back in the end
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)
            for number in (signal.SIGUSR1, signal.SIGUSR2):  # Lightning's handler of SLURM saves at once, mid-step
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if signal.SIGINT in self._received:
                raise KeyboardInterrupt
            rank_zero_info("Ctrl-C: the run is saved and ends after this meta-step; again, it ends at once.")
        self._received.append(number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Let the module send the signal to all processes together with its loss."""
        pl_module.signal = max(self._received, default=0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Save where it is due, where the run ends within an epoch, or where a signal asks for it."""
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            # Saved after the epoch: from a checkpoint of this moment Lightning (2.6) resumes with wrong counts of
            # epochs, which a second interruption turns into an epoch too many.
            self._whole = True
            return
        self._whole = False
        received = pl_module.agreed_signal if trainer.world_size > 1 else max(self._received, default=0)
        ends = trainer.should_stop or self._step == trainer.max_steps
        if received or ends or (self.every_n_train_steps and self._step % self.every_n_train_steps == 0):
            self._save(trainer)
        self._act_on(trainer, received)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and leave if a signal came during the last meta-step or validation."""
        if self._whole:
            self._save(trainer)
        received = torch.tensor([max(self._received, default=0)], device=trainer.strategy.root_device)
        reduce_logged(trainer)
        self._act_on(trainer, int(every_process(received).max()))

    def _save(self, trainer: Trainer) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path, weights_only=False)

    def _act_on(self, trainer: Trainer, received: int) -> None:
        if received in self._handlers:
            self._received.clear()
            self._handlers[received](received, None)
        elif received:
            rank_zero_info(
                f"{signal.Signals(received).name}: saved {self.path} after meta-step {trainer.global_step}; "
                "resume with --ckpt_path last."
            )
            # Lightning's observer kills all processes where a launched one ends with another status than 0.
            raise SystemExit(128 + received if trainer.local_rank == 0 else 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the random number generators are (dropout), of the CPU and of the device that this process trains on.

        All processes draw alike, each on its own device, and continue from the state of the one that saves.
        """
        cpu, *device = random_states(self._device)
        return {"cpu": cpu, "cuda": device}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them for the start of training: what Lightning does before draws as well."""
        self._random = state_dict


def read_checkpoint(path: Path, setting: str = "ckpt_path") -> dict[str, Any]:
    """Load a checkpoint's weights and plain values; code in it does not run.

    Args:
        path: the file.
        setting: the setting that named it, for errors.

    Raises:
        SettingError: there is no file, or it is no checkpoint, or it holds more than weights and plain values.
    """
    if not path.is_file():
        raise SettingError(f"{setting} {path} is not a file; give a checkpoint that fit wrote, such as .../{LAST}.")
    try:
        if not _is_whole(path):  # torch.load checks no checksums
            raise EOFError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (*_DAMAGED, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as error:
        if "GLOBAL" in str(error):
            reason = "it holds more than weights and plain values"
        else:
            reason = "it is damaged or no checkpoint"
        others = [file for file in _newest_first(path.parent) if file != path and _is_whole(file)]
        remedy = f"give {others[0]}, which is whole" if others else "give a checkpoint that fit wrote"
        raise SettingError(f"{setting} {path} was not loaded: {reason}; {remedy}.") from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(map(_is_dense, weights.values())):
        raise SettingError(f"{setting} {path} holds no state_dict of dense tensors; give a checkpoint that fit wrote.")
    return checkpoint


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type != "meta"


def settings_of(checkpoint: dict[str, Any], module: type[LightningModule]) -> dict[str, Any]:
    """Those of a checkpoint's settings that a module takes."""
    settings = checkpoint.get("hyper_parameters", {})
    known = inspect.signature(module).parameters
    return {key: value for key, value in settings.items() if key in known} if isinstance(settings, dict) else {}


def place_of_checkpoints(trainer: Any, dirpath: str | None) -> tuple[Path, str]:
    """Where a run of the command line will write its checkpoints.

    Args:
        trainer: the settings of the Trainer.
        dirpath: of the checkpoints, where it was given.

    Returns:
        a folder, and the pattern of all runs' checkpoint folders in it, such as ``version_*/checkpoints/``; ``""``
        where that is fixed and every run writes into the folder itself.
    """
    root = Path(trainer.default_root_dir or ".")
    logger = trainer.logger[0] if isinstance(trainer.logger, list) and trainer.logger else trainer.logger
    if dirpath:
        return Path(dirpath), ""
    if logger is None or logger is True:
        job = SLURMEnvironment.job_id()
        runs = root / "lightning_logs"
        return (runs, "version_*/checkpoints/") if job is None else (runs / f"version_{job}" / "checkpoints", "")
    if not logger:
        return root / "checkpoints", ""
    settings = logger.get("init_args") or {}
    save_dir = Path(settings.get("save_dir") or root)
    if logger.class_path.rpartition(".")[2] not in ("TensorBoardLogger", "CSVLogger"):
        return save_dir, "*/*/checkpoints/"
    runs, version = save_dir / (settings.get("name") or ""), settings.get("version")
    if version is None:
        return runs, "version_*/checkpoints/"
    return runs / (version if isinstance(version, str) else f"version_{version}") / "checkpoints", ""


def last_checkpoint(folder: Path, runs: str = "version_*/checkpoints/") -> Path | None:
    """The newest whole checkpoint of the newest run, ``last.ckpt`` if there is one; damaged ones are named.

    Args:
        folder: holds the runs, or is such a folder of checkpoints itself.
        runs: pattern of the runs' folders of checkpoints; ``""`` where it is one itself.

    Returns:
        its path; None where there is none at all.

    Raises:
        SettingError: there are some, and all are damaged.
    """
    folders = {file.parent for file in folder.glob(f"{runs}*.ckpt") if file.is_file()}
    damaged: list[Path] = []
    for run in sorted(folders, key=lambda run: _newest_first(run)[0].stat().st_mtime_ns, reverse=True):
        for file in sorted(_newest_first(run), key=lambda file: file.name != LAST):
            if _is_whole(file):
                if damaged:
                    rank_zero_warn(f"Damaged, and not used: {', '.join(map(str, damaged))}; resuming from {file}.")
                return file
            damaged.append(file)
    if damaged:
        raise SettingError(
            f"ckpt_path last: every checkpoint in {folder} is damaged ({', '.join(map(str, damaged))}); "
            "start without ckpt_path."
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    files = [file for file in folder.glob("*.ckpt") if file.is_file()]
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def _is_whole(file: Path) -> bool:
    """Whether all of the archive is there as it was written and its checksums agree; much faster than to load it."""
    try:
        with zipfile.ZipFile(file) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())  # no bombs
            return stored and archive.testzip() is None
    except _DAMAGED:
        return False
