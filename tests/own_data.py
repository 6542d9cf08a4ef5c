"""Data modules as a user would write them."""

import torch

from maml_lightning import Episode, GlyphsDataModule
from maml_lightning.data import EpisodeDataset


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
