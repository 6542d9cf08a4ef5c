"""Reptile: move the initialization towards the adapted parameters (Nichol, Achiam and Schulman 2018, algorithm 2).

The meta-gradient is ``theta_0 - theta_S``, mean over tasks, with no derivative of the steps. There is no query set in
it: the steps descend on support and query examples together. The loss reported is that of the query set afterwards.
"""

from torch import Tensor

from maml_lightning.algorithms.algorithm import OF_UNROLLED_STEPS, Algorithm, Settings
from maml_lightning.algorithms.steps import Setup, adapt, evaluate
from maml_lightning.engine.chunks import MetaGradient, add_sum
from maml_lightning.episodes import Episode
from maml_lightning.structures import joined


def meta_gradient(setup: Setup, chunk: Episode, total: MetaGradient, settings: Settings) -> tuple[Tensor, Tensor]:
    """Add the moves of a chunk's tasks to ``total``; see :class:`Algorithm`."""
    inputs = joined([chunk.support_inputs, chunk.query_inputs], 1)
    targets = joined([chunk.support_targets, chunk.query_targets], 1)
    fast = adapt(setup, inputs, targets)
    add_sum(total.gradient, {name: value - fast[name] for name, value in setup.initial.items()}, setup.steps)
    return evaluate(setup, fast, setup.steps, chunk)


ALGORITHM = Algorithm(
    meta_gradient,
    unsupported={
        **OF_UNROLLED_STEPS,
        "head": "learns a shared initialization alone",
        "adapted_parameters": "moves only adapted parameters, so that the others would not be learned",
    },
    min_inner_steps=1,
    capturable=True,
    measured_as="reptile",
)
