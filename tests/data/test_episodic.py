"""Sampling: exact values of the streams, uniformity, and that nothing but (seed, split, index) matters."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from maml_lightning import SettingError
from maml_lightning.data import episodic
from maml_lightning.data.episodic import EpisodeDataset, EpisodeSampler, EpisodicDataModule, choose, random_bits
from maml_lightning.episodes import Episode
from tests.runs import LEAST

CLASSES, DRAWINGS = 7, 6
# a pixel's value tells class and drawing
IMAGES = torch.arange(CLASSES * DRAWINGS, dtype=torch.uint8).view(CLASSES, DRAWINGS, 1, 1).repeat(1, 1, 2, 2)


def dataset(**settings: Any) -> EpisodeDataset:
    return EpisodeDataset(IMAGES, "train", 100, **{"ways": 3, "shots": 2, "query_shots": 3, **settings})


def codes(inputs: Tensor) -> Tensor:
    return (inputs[:, :, 0, 0, 0] * 255).round().long()


def equal(left: Episode, right: Episode) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Numbers(EpisodicDataModule):
    """The data module of `IMAGES`."""

    def __init__(self, **settings: Any):
        defaults = {"ways": 3, "shots": 2, "query_shots": 1, "meta_batch_size": 4, "train_episodes": 12}
        more = {"val_episodes": 10, "test_episodes": 5, "seed": 0, "num_workers": 0, "rotations": False}
        super().__init__(**{**defaults, **more, **settings})

    def load_split(self, split: episodic.Split) -> Tensor:
        return IMAGES


def test_the_hash_is_splitmix64():
    """The reference outputs of SplitMix64 for the seed 1234567, as published with other implementations."""
    counter = np.array([1234567], np.uint64) + np.arange(1, 4, dtype=np.uint64) * episodic._GAMMA
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert episodic._mix(counter).tolist() == expected


def test_streams_differ_by_seed_name_and_index():
    draws = [
        random_bits(seed, name, [index], 4).tobytes()
        for seed in (-1, 0, 1, 2**63)
        for name in ("train", "val")
        for index in (0, 1, 2**40)
    ]
    assert len(set(draws)) == 4 * 2 * 3


def test_choose_is_uniform_over_ordered_pairs():
    pairs = choose(random_bits(0, "pairs", range(12000), 4), 4)
    counts = Counter(map(tuple, pairs.tolist()))
    assert len(counts) == 12  # 4 * 3, none with a repeat
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi_square < 31.3  # 99.9 % quantile for 11 degrees of freedom


def test_choose_can_take_all():
    assert (np.sort(choose(random_bits(0, "all", range(50), 12), 6)) == np.arange(6)).all()


def test_an_episode_is_ordered_by_label_and_support_and_query_are_disjoint():
    batch = dataset().__getitems__(range(200)).check()
    assert batch.support_inputs.shape == (200, 6, 1, 2, 2)
    assert batch.query_inputs.shape == (200, 9, 1, 2, 2)
    assert batch.support_inputs.dtype == torch.float32
    assert batch.support_targets[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.query_targets[-1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for support, query in zip(codes(batch.support_inputs).tolist(), codes(batch.query_inputs).tolist(), strict=True):
        assert len({*support, *query}) == 15
        classes = [code // DRAWINGS for code in support[::2]]
        assert len(set(classes)) == 3
        assert [code // DRAWINGS for code in support] == np.repeat(classes, 2).tolist()
        assert [code // DRAWINGS for code in query] == np.repeat(classes, 3).tolist()


def test_ink_is_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 1, 1)
    batch = EpisodeDataset(images, "val", 1, ways=3).__getitems__([0])
    assert sorted(batch.query_inputs.flatten().tolist()) == pytest.approx([0.0, 0.2, 1.0])


def test_colour_images_keep_their_channels():
    images = torch.zeros(3, 2, 3, 4, 5, dtype=torch.uint8)
    assert EpisodeDataset(images, "val", 1, ways=2).__getitems__([0, 1]).query_inputs.shape == (2, 2, 3, 4, 5)


def test_every_label_sees_every_class_and_drawing_equally_often():
    episodes = 7000
    batch = dataset().__getitems__(range(episodes))
    labels_classes = torch.zeros(3, CLASSES)
    classes = codes(batch.support_inputs)[:, ::2] // DRAWINGS
    for label in range(3):
        labels_classes[label] = torch.bincount(classes[:, label], minlength=CLASSES)
    # binomial, p = 1/7: a deviation of 4.5 sigma among 21 counts has a chance of 1 in 7000
    assert (labels_classes - 1000).abs().max() < 4.5 * (episodes * 1 / 7 * 6 / 7) ** 0.5
    drawings = torch.bincount(codes(batch.query_inputs).flatten(), minlength=CLASSES * DRAWINGS).float()
    assert len(drawings) == 42
    assert (drawings - 1500).abs().max() < 4.5 * 1500**0.5


def test_an_episode_depends_on_seed_split_and_index_alone():
    indices = [7, 3, 10**12, 0]
    batch = dataset().__getitems__(indices)
    torch.manual_seed(1)
    torch.rand(10)
    other = dataset()
    for place, index in reversed(list(enumerate(indices))):
        assert equal(Episode(*(tensor[place : place + 1] for tensor in batch)), other[index])
    assert not equal(batch, dataset(seed=1).__getitems__(indices))
    assert not equal(batch, EpisodeDataset(IMAGES, "val", 1, ways=3, shots=2, query_shots=3).__getitems__(indices))


def test_rotations_are_classes_of_their_own():
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(1, 2, 2, 2)
    quarter_turns = {(1, 2, 3, 4): 0, (2, 4, 1, 3): 1, (4, 3, 2, 1): 2, (3, 1, 4, 2): 3}  # counter-clockwise
    turned = EpisodeDataset(image, "train", 1, ways=4, rotations=True)
    classes, _ = turned.draw(range(50))
    batch = turned.__getitems__(range(50))
    for inputs in (batch.support_inputs, batch.query_inputs):
        pixels = (inputs * 255).round().long().flatten(2)
        assert [[quarter_turns[tuple(p)] for p in episode] for episode in pixels.tolist()] == classes.tolist()
    assert len({tuple(episode) for episode in classes.tolist()}) > 15  # of 24 orders of the labels


def test_an_episode_can_keep_to_one_group():
    grouped = dataset(groups=[0, 1, 0, 1, 0, 1, 2])  # group 2 is too small for 3 ways
    classes = [frozenset(episode) for episode in grouped.draw(range(1000))[0].tolist()]
    assert set(classes) == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}
    # equally likely: binomial, sigma is sqrt(1000) / 2
    assert abs(classes.count(frozenset({0, 2, 4})) - 500) < 4.5 * 1000**0.5 / 2


def test_a_turned_group_is_one_of_its_own():
    turned = dataset(groups=[0, 0, 0, 1, 1, 1, 1], rotations=True)
    classes, _ = turned.draw(range(2000))
    assert {frozenset((classes // CLASSES)[episode].tolist()) for episode in range(2000)} == {
        frozenset({turn}) for turn in range(4)
    }
    assert {frozenset((classes % CLASSES >= 3)[episode].tolist()) for episode in range(2000)} == {
        frozenset({False}),
        frozenset({True}),
    }
    assert torch.bincount(classes.flatten(), minlength=28).min() > 100


def test_without_groups_the_draws_are_those_of_one_group():
    classes, drawings = dataset().draw(range(50))
    grouped_classes, grouped_drawings = dataset(groups=[5] * CLASSES).draw(range(50))
    assert torch.equal(classes, grouped_classes)
    assert torch.equal(drawings, grouped_drawings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"groups": [0, 0, 1, 1, 2, 2, 2], "ways": 4},
            r"data.ways is 4, but the largest group of the train split has 3 classes; lower data.ways",
        ),
        ({"ways": 8}, r"data.ways is 8, but the train split has 7 classes; lower data.ways"),
        ({"shots": 5, "query_shots": 2}, r"data.shots \+ data.query_shots is 5 \+ 2, .* 6 drawings; lower"),
    ],
)
def test_a_split_that_is_too_small_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataset(**settings)


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


@pytest.mark.parametrize(("setting", "least"), [("ways", 2), *LEAST.items()])
def test_small_numbers_are_refused(setting: str, least: int):
    with pytest.raises(ValueError, match=rf"data.{setting} must be at least {least} \(got {least - 1}\)"):
        Numbers(**{setting: least - 1})


def whole(**settings: Any) -> Episode:
    module = Numbers(**settings)
    module.setup("fit")
    return Episode(*(torch.cat(tensors) for tensors in zip(*module.train_dataloader(), strict=True)))


@pytest.mark.filterwarnings("ignore:.*will create 4 worker processes")
def test_workers_and_batch_size_do_not_matter():
    expected = whole()
    assert expected.tasks == 12
    assert equal(expected, whole(num_workers=1))
    assert equal(expected, whole(num_workers=4))
    assert equal(expected, whole(meta_batch_size=6))


def test_loaders_need_no_setup():
    assert [batch.tasks for batch in Numbers().test_dataloader()] == [4, 1]


def test_setup_loads_only_what_the_stage_needs():
    module = Numbers(rotations=True)
    module.setup("test")
    assert list(module.datasets) == ["test"]
    module.setup("fit")
    assert {split: data.classes for split, data in module.datasets.items()} == {"test": 7, "train": 28, "val": 7}


class Recorder(LightningModule):
    """Keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[Episode] = []
        self.val_batches: list[Episode] = []

    def training_step(self, batch: Episode) -> Tensor:
        self.train_batches.append(batch)
        return self.weight * 0

    def validation_step(self, batch: Episode) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")  # the latter: Lightning's own
def test_lightning_passes_the_epochs_on():
    recorder, module = Recorder(), Numbers()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(recorder, datamodule=module)
    expected = module.datasets["train"].__getitems__(range(24))
    assert equal(expected, Episode(*(torch.cat(tensors) for tensors in zip(*recorder.train_batches, strict=True))))
    assert [batch.tasks for batch in recorder.val_batches] == [4, 4, 2] * 2
    assert equal(recorder.val_batches[0], recorder.val_batches[3])
