"""Which normalization layers use their running statistics, kept through evaluation and the freezing of the whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.nn.modules.batchnorm import _NormBase

from maml_lightning.algorithms import statistics
from maml_lightning.algorithms.inner_loop import InnerLoop


class RunningStatistics:
    """Remembers which layers use their running statistics while the network does not tell.

    Lightning puts the whole network into evaluation mode to validate and to test it, and `freeze` and averaged copies
    freeze it as a whole. Neither says anything about its layers: the last time that it did counts.
    """

    def __init__(self) -> None:
        self._in_evaluation: frozenset[str] = frozenset()
        self._frozen: frozenset[str] = frozenset()

    def _evaluated(self, maml: Any) -> frozenset[str]:
        """The layers in evaluation mode, but for those that are so because the whole is."""
        now = statistics.in_evaluation(maml.net)
        self._in_evaluation = now if maml.training else now & self._in_evaluation
        return self._in_evaluation

    @contextmanager
    def keeping_modes(self, maml: Any) -> Iterator[None]:
        """While active, the module changes its mode as a whole; layers in evaluation mode stay in it."""
        kept = self._evaluated(maml)
        yield
        for name in kept:
            maml.net.get_submodule(name).training = False

    def layers(self, maml: Any) -> frozenset[str]:
        """The names of the layers that use their running statistics.

        Args:
            maml: a module with a network ``net`` and its ``adaptation``.
        """
        frozen = statistics.frozen(maml.net, maml.adaptation.first_of_steps())
        self._frozen = self._frozen if frozen is None else frozen
        return self._evaluated(maml) | self._frozen


def current_loop(maml: Any, loop: InnerLoop) -> InnerLoop:
    """The inner loop of a module, as its network, loss and settings are now."""
    if loop.net is not maml.net:
        report_unused(maml)
    loop.net, loop.loss, loop.query_statistics = maml.net, maml.loss, maml.query_statistics
    loop.running, loop.head = maml._statistics.layers(maml), maml.head
    return loop


def report_unused(maml: Any) -> None:
    """Say how many layers have running statistics and do not use them."""
    layers, running = statistics.tracking_layers(maml.net), maml._statistics.layers(maml)
    unused = [name for name, layer in layers.items() if isinstance(layer, _NormBase) and name not in running]
    if unused:
        used = "support set" if maml.query_statistics == "support" else "current batch"
        rank_zero_info(
            f"{len(unused)} normalization layer(s), such as {unused[0] or type(maml.net).__name__}, use the statistics "
            f"of the {used}; their running statistics are neither used nor updated. Layers that are frozen or in "
            "evaluation mode use their running statistics."
        )
