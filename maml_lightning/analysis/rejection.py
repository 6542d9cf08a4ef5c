"""Predictions below a probability are rejected as "none of these", and how well that works.

Probabilities mean what they say where a network is calibrated. One number calibrates it: the temperature ``t`` that the
outputs are divided by (Guo et al. 2017). It changes no prediction. Of probabilities ``p`` the calibrated ones are
``p^(1/t)``, normalized.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN = -1  # the target of a query whose class is not in the support set
TEMPERATURES = torch.logspace(-2, 2, 81, base=2.0, dtype=torch.float64)  # 0.25 to 4, in steps of 3.5 %


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


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """The probabilities ``[n, N]`` of outputs divided by a temperature."""
    return F.softmax(probabilities.log() / temperature, -1)


def fitted_temperature(probabilities: Tensor, targets: Tensor) -> float:
    """The temperature, 0.25 to 4, under which queries' own classes are most likely.

    Args:
        probabilities: ``[n, N]``.
        targets: ``[n]``, in ``[0, N)``.
    """
    logits = probabilities.double().clamp(min=1e-30).log()
    losses = [F.cross_entropy(logits / temperature, targets).item() for temperature in TEMPERATURES]
    return TEMPERATURES[losses.index(min(losses))].item()


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
    of_known = [accepted & right, accepted & ~right, ~accepted]
    shares = [found[known].double().mean().item() for found in of_known]
    return Rates(shares[0], shares[1], shares[2], (~accepted)[~known].double().mean().item())
