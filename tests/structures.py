"""Tasks of every structure: inputs, outputs and targets, with a network and a loss for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning import Episode

T, K, Q = 3, 4, 5


class Case(NamedTuple):
    net: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    inputs: Callable[[int], Any]  # of so many examples of one task
    targets: Callable[[int], Any]
    score: str | None  # what is logged beside the loss
    takes_all: bool = False  # whether the loss takes all that the network returns


class Words(nn.Module):
    """Token ids and their mask to classes, called by keyword."""

    def __init__(self, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded, mask = self.embedding(input_ids), attention_mask.unsqueeze(-1)
        return self.head((embedded * mask).sum(-2) / mask.sum(-2))


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


class WithDataclass(Words):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:  # type: ignore[override]
        logits = super().forward(input_ids, attention_mask)
        return Output(logits.tanh(), logits)


class WithTuple(Words):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple:  # type: ignore[override]
        logits = super().forward(input_ids, attention_mask)
        return logits, {"attentions": logits.tanh()}


class WithDict(Words):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict:  # type: ignore[override]
        logits = super().forward(input_ids, attention_mask)
        return {"hidden": logits.tanh(), "logits": logits}


class Two(nn.Module):
    """A vector and a number to classes, called with two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, vector: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.body(vector).tanh() * scale.unsqueeze(-1))


class Pixels(nn.Module):
    """Pictures to classes of their pixels, ``[K, N, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class Heads(nn.Module):
    """Vectors to classes and to a number, as a dict, in which nothing is named logits, or as a tuple."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.body, self.classes, self.size, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1), kind

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).tanh()
        both = self.classes(h), self.size(h)
        return both if self.kind is tuple else dict(zip(("classes", "size"), both, strict=True))


def mlp(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


def one_logit_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), targets.to(outputs.dtype))


def gaussian_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    mean, log_variance = outputs[..., :1], outputs[..., 1:]
    return (log_variance + (targets - mean) ** 2 / log_variance.exp()).mean() / 2


def many_tasks_loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs[:, :3], targets["class"]) + F.mse_loss(outputs[:, 3], targets["size"])


def heads_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["classes"], targets) + 0.1 * outputs["size"].square().mean()


def heads_of_tasks_loss(outputs: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs[0], targets["class"]) + F.mse_loss(outputs[1].squeeze(1), targets["size"])


def ids(count: int) -> dict[str, Tensor]:
    mask = torch.ones(count, 7, dtype=torch.int64)
    mask[::2, 5:] = 0
    return {"input_ids": torch.randint(11, (count, 7)), "attention_mask": mask}


def vectors(count: int) -> Tensor:
    return torch.rand(count, 4)


def pictures(count: int) -> Tensor:
    return torch.rand(count, 1, 6, 6)


def classes(count: int) -> Tensor:
    return torch.arange(count) % 3


def classes_and_sizes(count: int) -> dict[str, Tensor]:
    return {"class": classes(count), "size": torch.rand(count)}


def pixels(count: int) -> Tensor:
    return torch.randint(3, (count, 6, 6))


def some_pixels(count: int) -> Tensor:
    return torch.where(torch.rand(count, 6, 6) < 0.3, 255, pixels(count))


CASES = {
    "dict": Case(Words, F.cross_entropy, ids, classes, "accuracy"),
    "list": Case(Two, F.cross_entropy, lambda n: [vectors(n), torch.rand(n)], classes, "accuracy"),
    "tuple": Case(Two, F.cross_entropy, lambda n: (vectors(n), torch.rand(n)), classes, "accuracy"),
    "integers": Case(
        lambda: nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(42, 3)),
        F.cross_entropy,
        lambda n: torch.randint(11, (n, 7)),
        classes,
        "accuracy",
    ),
    "dataclass output": Case(WithDataclass, F.cross_entropy, ids, classes, "accuracy"),
    "tuple output": Case(WithTuple, F.cross_entropy, ids, classes, "accuracy"),
    "dict output": Case(WithDict, F.cross_entropy, ids, classes, "accuracy"),
    "labels": Case(
        mlp(4, 3),
        nn.BCEWithLogitsLoss(),
        vectors,
        lambda n: torch.randint(2, (n, 3)).to(torch.get_default_dtype()),
        None,
    ),
    "soft labels": Case(mlp(4, 3), F.cross_entropy, vectors, lambda n: torch.rand(n, 3).softmax(1), None),
    "pixels": Case(Pixels, F.cross_entropy, pictures, pixels, "accuracy"),
    "some pixels": Case(Pixels, nn.CrossEntropyLoss(ignore_index=255), pictures, some_pixels, "accuracy"),
    "some classes": Case(
        mlp(4, 3), F.cross_entropy, vectors, lambda n: torch.cat([torch.tensor([-100]), classes(n - 1)]), "accuracy"
    ),
    "pictures": Case(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)),
        F.cross_entropy,
        pictures,
        classes,
        "accuracy",
    ),
    "two numbers": Case(mlp(1, 2), F.mse_loss, lambda n: torch.rand(n, 1), lambda n: torch.rand(n, 2), "mse"),
    "one number": Case(mlp(1, 1), F.mse_loss, lambda n: torch.rand(n, 1), lambda n: torch.rand(n, 1), "mse"),
    "one logit": Case(mlp(4, 1), one_logit_loss, vectors, lambda n: torch.arange(n) % 2, "accuracy"),
    "gaussian": Case(mlp(4, 2), gaussian_nll, vectors, lambda n: torch.rand(n, 1), None),
    "many outputs": Case(mlp(4, 5), F.cross_entropy, vectors, classes, "accuracy"),
    "dict targets": Case(mlp(4, 4), many_tasks_loss, vectors, classes_and_sizes, None),
    "heads": Case(lambda: Heads(dict), heads_loss, vectors, classes, "accuracy", takes_all=True),
    "heads of tasks": Case(lambda: Heads(tuple), heads_of_tasks_loss, vectors, classes_and_sizes, None, takes_all=True),
}


def stacked(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: stacked([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple | list):
        return type(parts[0])(stacked(list(each)) for each in zip(*parts, strict=True))
    return torch.stack(parts)


def episode_of(case: Case, tasks: int = T) -> Episode:
    return Episode(*(stacked([part(n) for _ in range(tasks)]) for n in (K, Q) for part in (case.inputs, case.targets)))
