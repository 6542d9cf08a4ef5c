"""Which process trains on which episodes of a meta-batch, and loading that resumes in the middle of an epoch."""

from collections.abc import Iterator
from typing import cast

import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from maml_lightning.data.checks import whole_shares
from maml_lightning.data.datasets import TaskDataset
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError


# Under several processes Lightning wraps any other sampler in a DistributedSampler of its own, which pads the
# validation and test episodes with repeats; under overfit_batches it replaces any but a SequentialSampler.
class EpisodeSampler(DistributedSampler[int], SequentialSampler):
    """A rank's contiguous share of every meta-batch, nothing padded and nothing dropped.

    Args:
        dataset: its length is the number of episodes per epoch.
        meta_batch_size: episodes per outer step over all ranks, a multiple of the number of ranks.
        fixed: whether every epoch has episodes ``0 … n-1`` (validation, test); otherwise epoch ``e`` begins at
            ``e * n``.
        num_replicas: number of ranks; by default that of ``torch.distributed``, or 1.
        rank: this rank; by default that of ``torch.distributed``, or 0.

    Attributes:
        skip: meta-batches to leave out at the start of the next pass, to resume in the middle of an epoch.

    Raises:
        SettingError: the meta-batch does not divide by the ranks, or (not ``fixed``) the epoch by the meta-batch, or
            there are fewer episodes than ranks.
    """

    def __init__(
        self,
        dataset: TaskDataset,
        meta_batch_size: int,
        *,
        fixed: bool,
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        distributed = dist.is_available() and dist.is_initialized()
        ranks = num_replicas or (dist.get_world_size() if distributed else 1)
        super().__init__(dataset, ranks, (dist.get_rank() if distributed else 0) if rank is None else rank)
        episodes = len(dataset)
        whole_shares(dataset.split, episodes, meta_batch_size, ranks, fixed)
        self.episodes, self.meta_batch_size, self.fixed, self.skip = episodes, meta_batch_size, fixed, 0

    def _share(self, start: int) -> range:
        size = min(self.meta_batch_size, self.episodes - start)
        first, last = (size * rank // self.num_replicas for rank in (self.rank, self.rank + 1))
        return range(start + first, start + last)

    def indices(self, batch: int) -> range:
        """The episodes of this rank in a meta-batch of the current epoch."""
        offset = 0 if self.fixed else self.epoch * self.episodes
        share = self._share(batch * self.meta_batch_size)
        return range(offset + share.start, offset + share.stop)

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        for batch in range(skip, -(-self.episodes // self.meta_batch_size)):
            yield from self.indices(batch)

    def __len__(self) -> int:
        return sum(len(self._share(start)) for start in range(0, self.episodes, self.meta_batch_size))


class TaskLoader(DataLoader[Episode]):
    """A data loader whose workers' errors of the package are what they are without workers: one line."""

    def __iter__(self) -> Iterator[Episode]:  # type: ignore[override]
        # A generator, so that workers begin to draw at the first next(), when Lightning has set the sampler's epoch.
        try:
            yield from super().__iter__()
        except SettingError as error:
            _, of_worker, line = str(error).rpartition(f"\n{SettingError.__module__}.{SettingError.__name__}: ")
            if not of_worker:
                raise
            raise SettingError(line.strip()) from error


class EpisodeLoader(TaskLoader):
    """A data loader that resumes in the middle of an epoch: Lightning saves its state in each checkpoint.

    The state counts the meta-batches that training received, not those that workers have drawn ahead.
    """

    received = 0  # meta-batches in this pass
    trainer: Trainer | None = None  # its limit_train_batches may end an epoch early

    def __iter__(self) -> Iterator[Episode]:  # type: ignore[override]
        self.received = cast(EpisodeSampler, self.sampler).skip
        for batch in super().__iter__():
            self.received += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many meta-batches of the epoch training received; 0 after the last."""
        limit = len(self) if self.trainer is None else min(len(self), int(self.trainer.num_training_batches))
        return {"meta_batches": self.received % limit}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leave those out in the next pass."""
        cast(EpisodeSampler, self.sampler).skip = state_dict["meta_batches"]
