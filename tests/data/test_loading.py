"""Shares of the processes, and loading that resumes in the middle of an epoch."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from maml_lightning import Episode, FunctionDataModule, SettingError
from maml_lightning.data import EpisodeDataset
from maml_lightning.data.loading import EpisodeSampler
from tests.data.numbers import IMAGES, Numbers


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("fixed", [True, False])
def test_shares_of_the_ranks_are_the_whole_without_repeats(world: int, fixed: bool):
    data = EpisodeDataset(IMAGES, "val", 10 if fixed else 12, ways=3)
    samplers = [EpisodeSampler(data, 4, fixed=fixed, num_replicas=world, rank=rank) for rank in range(world)]
    shares = [list(sampler) for sampler in samplers]
    assert sorted(index for share in shares for index in share) == list(range(len(data)))
    assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
    for rank, share in enumerate(shares):  # contiguous in the first meta-batch
        assert share[: 4 // world] == list(range(rank * 4 // world, (rank + 1) * 4 // world))


def test_the_last_meta_batch_is_shared_out_evenly():
    data = EpisodeDataset(IMAGES, "val", 10, ways=3)
    shares = [list(EpisodeSampler(data, 4, fixed=True, num_replicas=4, rank=rank)) for rank in range(4)]
    assert shares == [[0, 4], [1, 5, 8], [2, 6], [3, 7, 9]]


def test_epochs_never_repeat_and_validation_always_does():
    data = EpisodeDataset(IMAGES, "train", 8, ways=3)
    train, val = EpisodeSampler(data, 4, fixed=False), EpisodeSampler(data, 4, fixed=True)
    for epoch in range(3):
        train.set_epoch(epoch)
        val.set_epoch(epoch)
        assert list(train) == list(range(8 * epoch, 8 * epoch + 8))
        assert list(val) == list(range(8))


def test_a_pass_can_begin_in_the_middle_of_an_epoch():
    sampler = EpisodeSampler(EpisodeDataset(IMAGES, "train", 12, ways=3), 4, fixed=False, num_replicas=2, rank=1)
    sampler.set_epoch(1)
    sampler.skip = 2
    assert list(sampler) == [22, 23]
    assert list(sampler) == [14, 15, 18, 19, 22, 23]


@pytest.mark.parametrize(
    ("episodes", "fixed", "message"),
    [
        (9, False, r"data.meta_batch_size \(9\) must be a multiple of the number of processes \(2\); use 10\."),
        (1, True, r"data.val_episodes \(1\) must be at least the number of processes \(2\); use 2\."),
    ],
)
def test_what_does_not_divide_is_named(episodes: int, fixed: bool, message: str):
    data = EpisodeDataset(IMAGES, "val", episodes, ways=3)
    with pytest.raises(SettingError, match=message):
        EpisodeSampler(data, 2 if fixed else episodes, fixed=fixed, num_replicas=2, rank=0)


def test_a_loader_tells_where_it_is():
    module = Numbers()
    module.setup("fit")
    loader = module.train_dataloader()
    assert loader.state_dict() == {"meta_batches": 0}
    batches = iter(loader)
    whole = [next(batches)]
    assert loader.state_dict() == {"meta_batches": 1}
    whole += list(batches)
    assert loader.state_dict() == {"meta_batches": 0}
    loader.load_state_dict({"meta_batches": 1})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, whole[1:], strict=True))


def test_the_sampler_follows_torch_distributed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    module = Numbers()
    module.setup("fit")
    loader = module.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)  # so Lightning leaves it alone
    assert list(loader.sampler) == [2, 3, 6, 7, 10, 11]
    assert [batch.tasks for batch in loader] == [2, 2, 2]
    assert [batch.tasks for batch in module.val_dataloader()] == [2, 2, 1]


def test_uneven_meta_batches_are_refused():
    data = EpisodeDataset(IMAGES, "train", 10, ways=3)
    with pytest.raises(ValueError, match=r"data.meta_batch_size \(4\) .* number of processes \(3\); use 6"):
        EpisodeSampler(data, 4, fixed=True, num_replicas=3, rank=0)
    with pytest.raises(ValueError, match=r"data.train_episodes \(10\) .* data.meta_batch_size \(4\); use 12"):
        EpisodeSampler(data, 4, fixed=False)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_one_line(split: str, workers: int):
    data = FunctionDataModule(broken, meta_batch_size=2, train_episodes=4, val_episodes=4, num_workers=workers)
    with pytest.raises(SettingError) as error:
        list(getattr(data, f"{split}_dataloader")())
    assert str(error.value) == "data.function gives 3 parts; give an Episode: " + ", ".join(Episode._fields) + "."


def broken(seed: int, index: int):
    return (torch.zeros(2, 1),) * (3 if index == 3 else 4)
