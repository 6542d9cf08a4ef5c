"""The signature that all meta-learning algorithms have."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from maml_lightning.algorithms.steps import Setup
from maml_lightning.engine.chunks import MetaGradient
from maml_lightning.episodes import Episode


class Settings(NamedTuple):
    """The settings of the outer loop; an algorithm reads those that concern it.

    Args:
        first_order: drop the second derivatives.
        weights: ``w_0 … w_S`` of the query losses after each step; empty for that of ``theta_S`` alone.
        implicit_iterations: of conjugate gradients, at least 1.
    """

    first_order: bool = False
    weights: Sequence[float] = ()
    implicit_iterations: int = 5


DEFAULTS = Settings()


class Algorithm(NamedTuple):
    """A meta-learning algorithm: how to get the meta-gradient of a chunk of tasks, and which settings it supports.

    Args:
        meta_gradient: ``meta_gradient(setup, chunk, total, settings) -> (losses, predictions)``. It adds the sum over
            the chunk's tasks of its gradients to ``total.gradient`` and ``total.rates``
            (:func:`~maml_lightning.engine.chunks.add_sum`), and returns the outer losses ``[T]`` and the predictions
            on the query inputs ``[T, N*Q, ...]``.
        unsupported: settings of ``MAML`` that have to stay at their default, each with the reason, which completes
            the sentence "model.algorithm NAME …".
        min_inner_steps: fewest inner steps in training.
        proximal: whether the inner loop has the proximal term, of strength ``model.proximal``.
        capturable: whether ``meta_gradient`` has no effects and depends on its arguments alone, so that a GPU may
            replay what it launched (:mod:`~maml_lightning.engine.captures`).
        loops: whether ``meta_gradient`` runs the tasks of a chunk one after another where they run in a loop, and keeps
            nothing of a task that is done: then all of them are one chunk.
        measured_as: name of the chosen chunk size in checkpoints; the algorithm's own where it is empty.
    """

    meta_gradient: Callable[[Setup, Episode, MetaGradient, Settings], tuple[Tensor, Tensor]]
    unsupported: Mapping[str, str] = {}
    min_inner_steps: int = 0
    proximal: bool = False
    capturable: bool = False
    loops: bool = False
    measured_as: str = ""


# Settings that mean something only where the inner steps are differentiated.
OF_UNROLLED_STEPS = dict.fromkeys(
    (
        "first_order",
        "learn_inner_lr",
        "multi_step_epochs",
        "first_order_epochs",
        "per_step_normalization",
        "meta_curvature",
    ),
    "does not differentiate through the inner steps",
)
