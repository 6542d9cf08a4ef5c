"""Ensembles: the predictions of networks that are adapted apart, averaged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.training import checks, non_finite
from maml_lightning.training.module import MAML
from maml_lightning.training.scores import Score


class Ensemble(LightningModule):
    """Networks that are adapted apart, each by its own settings, and tested as one.

    Their class probabilities are averaged, or their outputs where these are numbers to predict. A network that takes
    fewer inner steps than another counts as it is after its last.

    Args:
        networks: by what names them in ``test_results.json``.
    """

    def __init__(self, networks: Mapping[str, MAML]) -> None:
        super().__init__()
        self.names, self.networks = list(networks), nn.ModuleList(networks.values())
        first = self._first
        self.non_finite, self.inner_lr, self.scoring = first.non_finite, first.inner_lr, first.scoring
        self._rows: list[Tensor] = []
        self.test_scores: dict[str, Tensor] = {}
        self.skipped_episodes = 0

    @property
    def _first(self) -> MAML:
        return self.networks[0]  # type: ignore[return-value]

    def prepare_data(self) -> None:
        """Check that each network goes with trainer and data, before Lightning writes anything.

        Raises:
            SettingError: one does not, or its predictions cannot be averaged with those of the others.
        """
        checks.check_trainer(self.trainer)
        if (episode := checks.first_episode(self.trainer, self)) is not None:
            self._check(episode)

    def _check(self, episode: Episode) -> None:
        for name, network in zip(self.names, self.networks, strict=True):
            try:
                loop: Any = network._inner_loop
                scoring = checks.check_fit(loop, network.metric, episode, network.inner_steps, self.trainer)  # type: ignore[arg-type]
            except SettingError as error:
                raise SettingError(f"ensemble {name}: {error}") from error
            if network is self._first:
                self.scoring = scoring
            if scoring.of_all:
                raise SettingError(
                    f"ensemble {name}: its loss takes several tensors of the network, of which only one is averaged; "
                    "leave it out."
                )
            if scoring.score is None or scoring.score != self.scoring.score:
                raise SettingError(
                    f"ensemble {name}: its predictions are no class probabilities or numbers that can be averaged with "
                    f"those of {self.names[0]} ({scoring.names[0]}, {self.scoring.names[0]}); leave it out."
                )

    def trajectory(self, episode: Episode) -> list[Tensor]:
        """The mean predictions on the query inputs before adaptation and after each inner step.

        Args:
            episode: ``T`` tasks.

        Returns:
            as many tensors ``[T, N*Q, ...]`` as the longest trajectory has: logarithms of mean probabilities, or means.
        """
        paths = [network.trajectory(episode) for network in self.networks]  # type: ignore[operator]
        for name, path in zip(self.names, paths, strict=True):
            if path[0].shape != paths[0][0].shape:
                shapes = f"{list(path[0].shape[1:])}, {list(paths[0][0].shape[1:])}"
                raise SettingError(f"ensemble {name}: its outputs are unlike those of {self.names[0]} ({shapes}).")
        assert self.scoring.score is not None
        steps = range(max(map(len, paths)))
        return [mean_outputs([path[min(k, len(path) - 1)] for path in paths], self.scoring.score) for k in steps]

    def on_test_epoch_start(self) -> None:
        """Forget the episodes of a test before this one."""
        self._rows = []

    def test_step(self, batch: Episode, batch_idx: int) -> None:
        """Adapt each network to each task, and evaluate the mean predictions after each inner step."""
        episode = Episode.of(batch).check()
        if self.scoring.score is None:  # of data that has no first episode beforehand
            self._check(episode)
        numbers = non_finite.episode_numbers(self, "test", batch_idx, episode)
        self._rows.append(self.scoring.rows(self.trajectory(episode), episode.query_targets, numbers))

    def on_test_epoch_end(self) -> None:
        """Log the means over all episodes; ``test_scores`` has each episode's by name, ``[episodes, steps + 1]``."""
        self.test_scores = non_finite.report_scores(self, "test", self._rows)


def mean_outputs(outputs: Sequence[Tensor], score: Score) -> Tensor:
    """Outputs as of one network: with the mean of the networks' class probabilities, or the mean of numbers.

    Args:
        outputs: of each network, ``[T, N*Q, ...]``.
        score: how they are scored.

    Returns:
        ``[T, N*Q, ...]``; of classes the logarithms of their probabilities, of one logit again a logit.

    Example:
        >>> logits = [torch.tensor([[[0.9, 0.1]]]).log(), torch.tensor([[[0.3, 0.7]]]).log()]
        >>> mean_outputs(logits, Score("accuracy", 1)).exp()
        tensor([[[0.6000, 0.4000]]])
    """
    wide = [output.to(torch.promote_types(output.dtype, torch.float)) for output in outputs]
    if score.name == "mse":
        return torch.stack(wide).mean(0)
    tiny = torch.finfo(wide[0].dtype)
    if score.classes is None:
        return torch.stack([output.sigmoid() for output in wide]).mean(0).logit(tiny.eps)
    probabilities = [output.softmax(score.classes + 1) for output in wide]
    return torch.stack(probabilities).mean(0).clamp_min(tiny.tiny).log()
