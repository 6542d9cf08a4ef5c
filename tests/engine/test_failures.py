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


def caught(function):
    """The function; where it raises, the inputs as they are."""

    def run(x: Tensor) -> Tensor:
        try:
            return function(x)
        except Exception:
            return x

    return run


def one_value(read):
    return lambda x: x * (2 if read(x) else 1)


CAUGHT = {
    "branch": (READS, lambda x: 2 * x if x.mean() > 0 else x),
    "item": (READS, one_value(lambda x: x.mean().item() > 0)),
    "float": (READS, one_value(lambda x: float(x.mean()) > 0)),
    "numpy": (READS, one_value(lambda x: x.detach().numpy().mean() > 0)),
    "tolist": (READS, one_value(lambda x: sum(map(sum, x.tolist())) > 0)),
    "allclose": (READS, one_value(lambda x: not torch.allclose(x.mean(), torch.tensor(-1.0), atol=1.0))),
    "size": (SIZES, one_value(lambda x: len(x[x > 0]) > x.numel() / 2)),
}


def gradient(execution: str, function, seeds) -> list[Tensor]:
    """Of one meta-step after another, on tasks of one kind whose inputs have means of other signs."""
    torch.manual_seed(0)
    net = Net(caught(function))
    maml, found = MAML(net, inner_lr=0.5, inner_steps=2, execution=execution), []
    for sign in seeds:
        x, y = torch.rand(2, 5, 6) * sign, torch.arange(5).remainder(3).expand(2, 5)
        maml.zero_grad()
        maml.training_step(Episode(x, y, x, y), 0).backward()
        found.append(torch.cat([value.grad.flatten() for value in net.parameters()]))
    return found


@pytest.mark.parametrize("kind", CAUGHT)
def test_values_read_where_errors_are_caught_lead_to_the_loop(kind, caplog):
    """What the code does in the place of reading may be what a loop does on the first batch alone."""
    reason, function = CAUGHT[kind]
    with caplog.at_level(logging.WARNING):
        found = gradient("auto", function, (-1, 1, -1))
    assert f"task by task, which is slower: {reason}" in caplog.text
    for ours, theirs in zip(found, gradient("loop", function, (-1, 1, -1)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)


def test_so_do_values_that_a_loss_reads(caplog):
    def loss(outputs, targets):
        value = nn.functional.cross_entropy(outputs, targets)
        return caught(lambda value: 3 * value if value > 10 else value)(value)

    maml = MAML(nn.Linear(6, 3), inner_lr=0.5, loss=loss)
    x, y = torch.rand(2, 5, 6), torch.arange(5).remainder(3).expand(2, 5)
    with caplog.at_level(logging.WARNING):
        maml.training_step(Episode(x, y, x, y), 0).backward()
    assert f"task by task, which is slower: {READS}" in caplog.text


def test_other_errors_that_are_caught_change_nothing(caplog):
    maml = MAML(Net(caught(lambda x: x @ torch.zeros(1, 1, 1, 7))), inner_lr=0.5)
    x, y = torch.rand(2, 5, 6), torch.arange(5).remainder(3).expand(2, 5)
    with caplog.at_level(logging.WARNING):
        maml.training_step(Episode(x, y, x, y), 0).backward()
    assert "slower" not in caplog.text


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
