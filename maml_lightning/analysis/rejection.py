"""Predictions below a probability are rejected as "none of these": how often that is right."""

from typing import NamedTuple

from torch import Tensor

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
