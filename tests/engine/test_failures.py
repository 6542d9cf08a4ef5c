"""What users learn of the reason why their network runs task by task."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision.ops import roi_align

from maml_lightning import MAML, Episode, SettingError

READS = "it reads values, as a branch or .item() does"
SIZES = "a size depends on values, as in x[mask] or a packed sequence"


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.head, self.function = nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x))


def packed(x: Tensor) -> Tensor:
    return x + pack_padded_sequence(x, torch.full((5,), 6), batch_first=True).data.sum()


FUNCTIONS = [
    (READS, lambda x: x if x.sum() > 0 else -x),
    (READS, lambda x: x * x.sum().item()),
    (READS, lambda x: x * x.detach().numpy().sum()),
    (SIZES, lambda x: x + x[x > 0].sum()),
    (SIZES, lambda x: x * len(x.nonzero())),
    (SIZES, lambda x: x + x.masked_select(x > 0).sum()),
    (SIZES, lambda x: x + torch.unique(x).sum()),
    (SIZES, packed),
]


@pytest.mark.parametrize(("reason", "function"), FUNCTIONS)
def test_the_reason_is_told_in_words_with_the_line(reason, function, caplog):
    maml = MAML(Net(function), inner_lr=0.1)
    x, y = torch.rand(2, 5, 6), torch.arange(5).remainder(3).expand(2, 5)
    with caplog.at_level(logging.INFO):
        maml.training_step(Episode(x, y, x, y), 0).backward()
    line = function.__code__.co_firstlineno + (function is packed)
    place = f" ({Path(__file__).name}, line {line})"
    assert caplog.messages == [f"The network runs task by task, which is slower: {reason}{place}"]  # nor of chunks


class Aligned(nn.Module):
    """torchvision says in words of its own that its operators have no second derivative."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        boxes = [torch.tensor([[0.0, 0.0, 3.0, 3.0]])] * len(x)
        return self.head(roi_align(self.convolution(x), boxes, 2).flatten(1))


def test_an_operator_of_torchvision_without_a_second_derivative_is_refused_with_the_remedy():
    x, y = torch.rand(2, 3, 1, 6, 6), torch.arange(3).expand(2, 3)
    with pytest.raises(SettingError, match=r"^[^\n]*no second derivative[^\n]*roi_align[^\n]*model.first_order[^\n]*$"):
        MAML(Aligned(), inner_lr=0.1).training_step(Episode(x, y, x, y), 0)
    MAML(Aligned(), inner_lr=0.1, first_order=True).training_step(Episode(x, y, x, y), 0).backward()


def test_of_a_network_that_is_vectorized_the_chunks_are_told(caplog):
    maml = MAML(Net(torch.tanh), inner_lr=0.1)
    x, y = torch.rand(2, 5, 6), torch.arange(5).remainder(3).expand(2, 5)
    with caplog.at_level(logging.INFO):
        maml.training_step(Episode(x, y, x, y), 0).backward()
    assert caplog.messages == ["model.tasks_per_chunk: 2 of the 2 tasks are vectorized together."]
