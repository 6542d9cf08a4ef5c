"""How likely a prediction is right, where a query may be of a class that the support set does not have.

Class probabilities are among the classes of the support set: they can be high for a query of none of them, and they
depend on how many classes there are. A calibration is a logistic regression on validation classes. The log-odds that a
query is of one of the classes, and predicted right, are linear in four numbers:

- its evidence, the log of the sum of the exponentiated logits (energy, Liu et al. 2020). Of prototypes the squared norm
  of the query's features is subtracted from the logits, which makes them ``-|f - c_k|^2``: the evidence is then the
  log-density of Gaussians around the prototypes, in practice minus the squared distance to the nearest;
- the log-odds of its highest probability: how sure the choice among the classes is;
- ``log N``: among more classes, one is closer to a query of none of them;
- ``1/K``: the mean of fewer examples is farther from a query of its class.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maml_lightning.errors import SettingError

UNCALIBRATED = (
    "compares the highest probability, which can be high for a query of none of the classes: the checkpoint has no "
    "calibration for its settings; maml-lightning calibrate adds one."
)
NUMBERS = 4
_SMALLEST = 1e-6  # from 0 and 1, of probabilities in float32
_RIDGE = 1e-4  # a number that is the same for all queries gets the weight 0


def check_threshold(setting: str, reject: float | None) -> None:
    """Check a threshold below which queries are rejected.

    Raises:
        SettingError: it is not above 0 and at most 1; None rejects none.
    """
    if reject is not None and not 0 < reject <= 1:
        raise SettingError(f"{setting} must be a probability above 0, at most 1 (got {reject}); null rejects none.")


def numbers_of(logits: Tensor, norms: Tensor | None, shots: Tensor) -> Tensor:
    """What the confidence in predictions depends on: ``[n, 4]``, in float64, in the order above.

    Args:
        logits: of the task's classes, ``[n, N]``.
        norms: squared norms of the features ``[n]`` that a head of prototypes got; None of a learned head.
        shots: support examples of each class, ``[N]``.
    """
    logits = logits.double()
    highest, predicted = logits.softmax(-1).max(-1)
    evidence = logits.logsumexp(-1) - (0 if norms is None else norms.double())
    classes = torch.full_like(evidence, len(shots)).log()
    return torch.stack([evidence, highest.logit(_SMALLEST), classes, 1 / shots[predicted].clamp(min=1)], -1)


def confidences(weights: Sequence[float], numbers: Tensor) -> Tensor:
    """The probability ``[n]`` that a query is of one of the classes, and predicted right.

    Args:
        weights: of a calibration: the intercept, then one for each number.
        numbers: see `numbers_of`.
    """
    of_numbers = numbers.new_tensor(weights)
    return (of_numbers[0] + numbers @ of_numbers[1:]).sigmoid()


def kept(saved: Any) -> dict[str, Any] | None:
    """The calibration that a checkpoint holds: its ``weights`` and the ``settings`` it was measured with; or None."""
    if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
        return None
    weights = saved.get("weights")
    whole = isinstance(weights, list) and len(weights) == 1 + NUMBERS and all(isinstance(w, float) for w in weights)
    return saved if whole else None


def fitted(numbers: Tensor, right: Tensor, importance: Tensor) -> list[float]:
    """The weights of a calibration, by logistic regression.

    Args:
        numbers: see `numbers_of`, ``[n, 4]``.
        right: whether a query is of one of the classes and predicted right, ``[n]``.
        importance: of each query, ``[n]``; 0 or more.
    """
    mean, std = numbers.mean(0), numbers.std(0).clamp(min=_SMALLEST)
    scaled = torch.cat([torch.ones_like(numbers[:, :1]), (numbers - mean) / std], 1)
    weights = torch.zeros(1 + NUMBERS, dtype=numbers.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    shares = importance / importance.sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.binary_cross_entropy_with_logits(scaled @ weights, right.to(scaled), shares, reduction="sum")
        found = found + _RIDGE * weights[1:].square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    of_numbers = weights.detach()[1:] / std
    return [(weights.detach()[0] - of_numbers @ mean).item(), *of_numbers.tolist()]
