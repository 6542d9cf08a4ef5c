"""Map-style datasets as a user would have them."""

import torch
from torch.utils.data import Dataset


class Vectors(Dataset):
    """Tuples (input, label): 12 classes of 6 vectors around a center of their own."""

    def __init__(self, size: int = 4, dictionary: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(72) % 12
        self.values = 4 * torch.randn(12, size, generator=generator)[self.labels]
        self.values += torch.randn(72, size, generator=generator)
        self.dictionary = dictionary

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.dictionary:
            return {"ids": self.values[index], "mask": self.values[index] > 0, "label": self.labels[index]}
        return self.values[index], int(self.labels[index])
