"""Errors of the command line in one line, also those of a data loader's workers."""

from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, Dataset

from maml_lightning.command_line.errors import explain


class Broken(Dataset):
    def __init__(self, message: str) -> None:
        self.message = message

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise ValueError(self.message) if self.message else KeyError


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("no such\ncolumn: ValueError: seven", "no such column: ValueError: seven"),
        ("no picture", "no picture"),
        ("", "KeyError"),
    ],
)
def test_an_error_of_a_worker_reads_as_without_workers(message: str, words: str):
    def explained(workers: int) -> Iterator[str]:
        try:
            next(iter(DataLoader(Broken(message), num_workers=workers)))
        except (ValueError, KeyError) as error:
            yield explain(error)

    alone, of_worker = (next(explained(workers)) for workers in (0, 1))
    assert of_worker == alone
    assert alone.startswith(f"{words} (")
    assert f"{__file__}, line " in alone
