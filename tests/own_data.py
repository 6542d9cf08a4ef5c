"""Data modules as a user would write them."""

import torch

from maml_lightning import Episode, GlyphsDataModule
from maml_lightning.data import EpisodeDataset, TaskDataModule, TaskDataset
from tests.structures import CASES, stacked


class BrokenDataset(EpisodeDataset):
    """Episodes of which one is not a number."""

    broken = 3

    def __getitems__(self, indices) -> Episode:
        batch = super().__getitems__(indices)
        if self.broken in indices:
            batch.support_inputs[list(indices).index(self.broken), 0] = torch.nan
        return batch


class BrokenValidation(GlyphsDataModule):
    """Its validation episode 3 is not a number: with two processes and meta-batches of 4, the second process has it."""

    def make_dataset(self, split):
        dataset = super().make_dataset(split)
        if split == "val":
            dataset.__class__ = BrokenDataset
        return dataset


class CaseDataset(TaskDataset):
    """Episodes of a case of tests/structures.py."""

    name = ""

    def __getitems__(self, indices) -> Episode:
        with torch.random.fork_rng():
            return Episode(*stacked([self._episode(index) for index in indices]))

    def _episode(self, index: int) -> tuple:
        torch.manual_seed(index)
        case = CASES[self.name]
        return tuple(part(n) for n in (self.shots, self.query_shots) for part in (case.inputs, case.targets))


class CaseData(TaskDataModule):
    """Data of a case of tests/structures.py, by its name."""

    def __init__(self, name: str = "dict", **settings: int) -> None:
        super().__init__(**settings)
        self.name = name

    def make_dataset(self, split):
        settings = {"shots": self.shots, "query_shots": self.query_shots, "seed": self.seed}
        dataset = CaseDataset(split, self.episodes[split], **settings)
        dataset.name = self.name
        return dataset
