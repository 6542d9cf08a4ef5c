"""Which normalization layers use their running statistics, kept through evaluation and the freezing of the whole."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from maml_lightning.algorithms import statistics
from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.episodes import Episode
from maml_lightning.processes import every_process
from maml_lightning.structures import first_task


class RunningStatistics:
    """Remembers which layers use their running statistics while the network does not tell.

    Lightning puts the whole network into evaluation mode to validate and to test it, and `freeze` and averaged copies
    freeze it as a whole. Neither says anything about its layers: the last time that it did counts.
    """

    def __init__(self, net: nn.Module, query_statistics: str) -> None:
        if query_statistics == "running":
            statistics.track(net)
        self._in_evaluation: frozenset[str] = frozenset()
        self._frozen: frozenset[str] = frozenset()
        self.collected: frozenset[str] = frozenset()  # the layers that no adapted parameter reaches
        self._found_for: tuple = ()

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

    def find_collected(self, maml: Any, adapted: Collection[str], inputs: Any) -> None:
        """Find the layers whose running statistics are collected, with ``query_statistics`` running.

        Args:
            maml: the module.
            adapted: names of the adapted parameters.
            inputs: of one task.
        """
        if maml.query_statistics != "running":
            self.collected, self._found_for = frozenset(), ()
        elif self._found_for != (key := (list(maml.net.modules()), frozenset(adapted))):
            self.collected, self._found_for = statistics.unreached(maml.net, adapted, inputs), key
            others = len(statistics.tracking_layers(maml.net)) - len(self.collected)
            rank_zero_info(
                f"model.query_statistics running: {len(self.collected)} normalization layer(s), which no adapted "
                f"parameter reaches, collect running statistics; {others} use those of the support set."
            )

    def collect(self, maml: Any, episode: Episode) -> None:
        """Update the running statistics by the first task's inputs, in all processes by the mean of theirs."""
        if not self.collected:
            return
        support, queries = (first_task(part) for part in (episode.support_inputs, episode.query_inputs))
        inputs = pytree.tree_map(lambda *parts: torch.cat(parts), support, queries)
        net, values = maml.net, maml.adaptation.first_of_steps()
        statistics.collect(net, values, inputs, self.layers(maml), self.collected)
        layers: list[Any] = [net.get_submodule(name) for name in sorted(self.collected)]
        buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
        means = every_process(torch.cat(buffers)).mean(0).split([len(buffer) for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean)

    def in_use(self, maml: Any) -> frozenset[str]:
        """The names of the layers that use their running statistics in the module's present mode."""
        return self.layers(maml) | (frozenset() if maml.training else self.collected)


def current_loop(maml: Any, loop: InnerLoop) -> InnerLoop:
    """The inner loop of a module, as its network, loss and settings are now."""
    if loop.net is not maml.net:
        report_unused(maml)
    loop.net, loop.loss, loop.head = maml.net, maml.loss, maml.head
    loop.query_statistics = "batch" if maml.query_statistics == "batch" else "support"
    loop.running, loop.collected = maml._statistics.layers(maml), maml._statistics.collected
    return loop


def report_unused(maml: Any) -> None:
    """Say how many layers have running statistics and do not use them."""
    if maml.query_statistics == "running":  # known once it runs
        return
    layers, running = statistics.tracking_layers(maml.net), maml._statistics.layers(maml)
    unused = [name for name, layer in layers.items() if isinstance(layer, _NormBase) and name not in running]
    if unused:
        used = "support set" if maml.query_statistics == "support" else "current batch"
        rank_zero_info(
            f"{len(unused)} normalization layer(s), such as {unused[0] or type(maml.net).__name__}, use the statistics "
            f"of the {used}; their running statistics are neither used nor updated. Layers that are frozen or in "
            "evaluation mode use their running statistics."
        )
