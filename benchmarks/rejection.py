"""How well data.reject finds queries of absent classes: on Omniglot's test classes, one at a time."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from maml_lightning import Episode, OmniglotDataModule, load
from maml_lightning.structures import first_task
from maml_lightning.training.confidence import Outputs, TaskNetwork

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
UNKNOWN = -1  # the target of a query whose class is not in the support set


class Rates(NamedTuple):
    """What becomes of queries at a threshold: shares of all queries of known classes, and of all of unknown ones.

    Args:
        accepted_right: of known classes, accepted and predicted right.
        accepted_wrong: of known classes, accepted and predicted wrong.
        rejected_known: of known classes, rejected.
        rejected_unknown: of unknown classes, rejected, as they should be.
    """

    accepted_right: float
    accepted_wrong: float
    rejected_known: float
    rejected_unknown: float


def rates(probabilities: Tensor, targets: Tensor, threshold: float, confidences: Tensor | None = None) -> Rates:
    """The rates of rejection.

    Args:
        probabilities: ``[n, N]``.
        targets: ``[n]``, in ``[0, N)`` or `UNKNOWN`.
        threshold: a query is rejected where its confidence is below.
        confidences: ``[n]``; None takes the highest probabilities.
    """
    highest, predicted = probabilities.max(-1)
    accepted = (highest if confidences is None else confidences) >= threshold
    known, right = targets != UNKNOWN, predicted == targets

    def share(found: Tensor, among: Tensor) -> float:
        return found[among].double().mean().item()

    of_known = [share(found, known) for found in (accepted & right, accepted & ~right, ~accepted)]
    return Rates(of_known[0], of_known[1], of_known[2], share(~accepted, ~known))


def rejection(
    checkpoint: str = "omniglot_20way_1shot",
    root: str = "data",
    ways: int = 5,
    shots: int = 1,
    episodes: int = 100,
    unknown: int = 5,
    split: Literal["val", "test"] = "test",
    together: bool = False,
) -> None:
    """Print the rates of rejection by the highest probability and by the confidence, and how well each separates.

    Args:
        checkpoint: a path, or the name of a network of the package.
        root: the folder of Omniglot.
        ways: classes of a support set.
        shots: support examples of each.
        episodes: how many; each has two queries of each class.
        unknown: classes in each episode that are not in its support set.
        split: whose classes they are.
        together: whether the queries of an episode are in one batch, beside the support set, instead of alone.
    """
    maml = load(checkpoint)
    sizes = {"ways": ways + unknown, "shots": shots, "query_shots": 2}
    data = OmniglotDataModule(root=root, **sizes, val_episodes=episodes, test_episodes=episodes)
    data.setup("test" if split == "test" else "validate")
    found, targets = [], []
    for number in range(episodes):
        episode = Episode(*map(first_task, Episode.of(data.datasets[split][number])))
        known = episode.support_targets < ways
        support = episode.support_inputs[known]
        network = TaskNetwork(maml, support, episode.support_targets[known])
        inputs = torch.cat([support, episode.query_inputs]) if together else episode.query_inputs
        outputs = network.together(inputs) if together else network.alone(inputs)
        found.append(Outputs(*(part[-len(episode.query_inputs) :] for part in outputs)))
        targets.append(torch.where(episode.query_targets < ways, episode.query_targets, UNKNOWN))
    probabilities, confidences = (torch.cat(parts) for parts in zip(*found, strict=True))
    true = torch.cat(targets)
    print(f"{checkpoint}, {ways}-way {shots}-shot, {episodes} {split} episodes, queries of {unknown} further classes")
    for name, sure in (("probability", probabilities.amax(-1)), ("confidence", confidences)):
        print(f"by {name}: AUROC {_separation(sure, true != UNKNOWN):.3f}")
        print("threshold  accepted right  accepted wrong  rejected known  rejected unknown")
        for threshold in (0.0, *THRESHOLDS):
            shares = rates(probabilities, true, threshold, sure)
            print(f"{threshold:9.2f}", *(f"{100 * share:13.1f} %" for share in shares))


def _separation(confidences: Tensor, known: Tensor) -> float:
    """How often a query of a known class has a higher confidence than one of an unknown class."""
    return binary_auroc(confidences.double(), known.long()).item()
