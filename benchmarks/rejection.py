"""How well a threshold on probabilities tells queries of absent classes: on Omniglot's test classes, one at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from maml_lightning import Episode, OmniglotDataModule, load
from maml_lightning.structures import first_task
from maml_lightning.trained.classifier import adapted_to

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


def rates(probabilities: Tensor, targets: Tensor, threshold: float) -> Rates:
    """The rates of rejection.

    Args:
        probabilities: ``[n, N]``.
        targets: ``[n]``, in ``[0, N)`` or `UNKNOWN`.
        threshold: a query is rejected where its highest probability is below.
    """
    highest, predicted = probabilities.max(-1)
    accepted, known = highest >= threshold, targets != UNKNOWN
    right = predicted == targets

    def share(found: Tensor, among: Tensor) -> float:
        return found[among].double().mean().item()

    of_known = [share(found, known) for found in (accepted & right, accepted & ~right, ~accepted)]
    return Rates(of_known[0], of_known[1], of_known[2], share(~accepted, ~known))


def rejection(
    checkpoint: str = "omniglot_20way_1shot", root: str = "data", ways: int = 5, shots: int = 1, episodes: int = 100
) -> None:
    """Print the rates of rejection, with five classes in each episode that are not in its support set.

    Args:
        checkpoint: a path, or the name of a network of the package.
        root: the folder of Omniglot.
        ways: classes of a support set.
        shots: support examples of each.
        episodes: how many; each has two queries of each class.
    """
    maml = load(checkpoint)
    data = OmniglotDataModule(root=root, ways=ways + 5, shots=shots, query_shots=2, test_episodes=episodes)
    data.setup("test")
    probabilities, targets = [], []
    for number in range(episodes):
        episode = Episode(*map(first_task, Episode.of(data.datasets["test"][number])))
        known = episode.support_targets < ways
        network = adapted_to(maml, episode.support_inputs[known], episode.support_targets[known])
        with torch.inference_mode():
            probabilities.append(network(episode.query_inputs))
        targets.append(torch.where(episode.query_targets < ways, episode.query_targets, UNKNOWN))
    found, true = torch.cat(probabilities), torch.cat(targets)
    print(f"{checkpoint}, {ways}-way {shots}-shot, {episodes} episodes, queries of 5 further classes")
    print("threshold  accepted right  accepted wrong  rejected known  rejected unknown")
    for threshold in (0.0, *THRESHOLDS):
        print(f"{threshold:9.2f}", *(f"{100 * rate:13.1f} %" for rate in rates(found, true, threshold)))
