"""Checks of the settings that data modules share."""

from maml_lightning.errors import SettingError


def at_least(setting: str, value: int, least: int) -> None:
    """Check that a setting of the data is large enough.

    Raises:
        SettingError: it is no integer, or less than ``least``.
    """
    if not isinstance(value, int):
        raise SettingError(f"data.{setting} must be an integer (got {value!r}); give one of at least {least}.")
    if value < least:
        raise SettingError(f"data.{setting} must be at least {least} (got {value}); raise it.")


def whole_meta_batches(train_episodes: int, meta_batch_size: int) -> None:
    """Check that an epoch divides into meta-batches.

    Raises:
        SettingError: ``train_episodes`` is not a multiple of ``meta_batch_size``.
    """
    if train_episodes % meta_batch_size:
        raise SettingError(
            f"data.train_episodes ({train_episodes}) must be a multiple of data.meta_batch_size ({meta_batch_size}); "
            f"use {train_episodes // meta_batch_size * meta_batch_size + meta_batch_size}."
        )


def whole_shares(split: str, episodes: int, meta_batch_size: int, processes: int, fixed: bool) -> None:
    """Check that each process can have its share of every meta-batch.

    Args:
        split: name of the split.
        episodes: how many it has per epoch.
        meta_batch_size: episodes per outer step over all processes.
        processes: how many there are.
        fixed: whether every epoch has the same episodes, so that its last meta-batch may be smaller.

    Raises:
        SettingError: the meta-batch does not divide by the processes, or (not ``fixed``) the epoch by the meta-batch,
            or there are fewer episodes than processes.
    """
    if meta_batch_size % processes:
        raise SettingError(
            f"data.meta_batch_size ({meta_batch_size}) must be a multiple of the number of processes ({processes}); "
            f"use {meta_batch_size // processes * processes + processes}."
        )
    if not fixed:
        whole_meta_batches(episodes, meta_batch_size)
    elif episodes < processes:
        raise SettingError(
            f"data.{split}_episodes ({episodes}) must be at least the number of processes ({processes}); "
            f"use {processes}."
        )
