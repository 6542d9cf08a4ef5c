"""The first batch of each split of a trainer's data, drawn without a trace: training then draws it as if never seen."""

import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from maml_lightning.engine.trials import same_random_numbers


def first_batches(trainer: Trainer) -> dict[str, Callable[[], Any]]:
    """What draws the first batch of each split: of a data module's ``datasets``, or of loaders given to the trainer.

    The loaders of other data modules are unknown until Lightning has opened the log folder and called their ``setup``.

    Returns:
        by split. A call gives None where a loader cannot be read without a trace, see `first_of`.
    """
    datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
    if datasets:
        return {split: partial(dataset.__getitem__, 0) for split, dataset in datasets.items()}
    loops: dict[Any, dict[str, Any]] = {
        TrainerFn.FITTING: {"train": trainer.fit_loop, "val": trainer.fit_loop.epoch_loop.val_loop},
        TrainerFn.VALIDATING: {"val": trainer.validate_loop},
        TrainerFn.TESTING: {"test": trainer.test_loop},
        TrainerFn.PREDICTING: {"predict": trainer.predict_loop},
    }
    found: dict[str, Callable[[], Any]] = {}
    for split, loop in loops.get(trainer.state.fn, {}).items():
        given = loop._data_source.instance  # what was given to fit, of which Lightning has no public name yet
        for loader in given if isinstance(given, list | tuple) else [given]:
            if isinstance(loader, DataLoader):
                found.setdefault(split, partial(first_of, loader))
    return found


def first_of(loader: DataLoader) -> Any:
    """A first batch of a loader; None if drawing it would change what the loader draws later.

    Nothing but a map-style dataset without a sampler of its own can be read: a copy of the dataset, which shares its
    tensors and arrays, with random numbers put back afterwards. An iterable cannot be read twice.
    """
    dataset, sampler = loader.dataset, loader.sampler
    if isinstance(dataset, IterableDataset) or type(sampler) not in (SequentialSampler, RandomSampler):
        return None
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return None
    try:
        with same_random_numbers(torch.device("cpu")):
            copied = _copy(dataset)
            if loader.batch_size is None:
                return loader.collate_fn(copied[0])
            indices = list(range(min(loader.batch_size, len(copied))))
            read = getattr(copied, "__getitems__", None)
            return loader.collate_fn([copied[index] for index in indices] if read is None else read(indices))
    except Exception:  # of the user's code, on a copy: it comes again from the loader itself
        return None


class _Pickler(pickle.Pickler):
    """Pickles tensors and arrays by reference."""

    def __init__(self, file: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, Tensor | np.ndarray):
            self.shared.append(obj)
            return len(self.shared) - 1
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_load(self, pid: int) -> Any:
        return self.shared[pid]


def _copy(dataset: Any) -> Any:
    content, shared = io.BytesIO(), list[Any]()
    _Pickler(content, shared).dump(dataset)
    content.seek(0)
    return _Unpickler(content, shared).load()
