"""Episodes whose queries are of classes at random."""

import hashlib

import numpy as np
import pytest
import torch

from maml_lightning import GlyphsDataModule, SettingError
from maml_lightning.data import ArraysDataModule, EpisodeDataset, Examples
from maml_lightning.data.random_numbers import random_bits, spread

WAYS, SHOTS, QUERY_SHOTS = 5, 2, 4


def numbered(counts=(60,) * 9, **settings):
    """Episodes whose inputs are the numbers of their examples."""
    examples = Examples(torch.arange(sum(counts)), counts)
    sizes = {"ways": WAYS, "shots": SHOTS, "query_shots": QUERY_SHOTS, "query_layout": "random"}
    return EpisodeDataset(examples, "train", 10, **{**sizes, **settings})


def classes_of(inputs, counts):
    return torch.searchsorted(torch.tensor(counts).cumsum(0), inputs, right=True)


def test_shapes_are_fixed_and_no_example_comes_twice():
    dataset = numbered()
    support, labels, query, targets = dataset.__getitems__(range(200))
    assert (support.shape, query.shape, targets.shape) == ((200, 10), (200, 20), (200, 20))
    assert torch.equal(labels[0], torch.arange(WAYS).repeat_interleave(SHOTS))
    for episode in torch.cat([support, query], 1):
        assert len(episode.unique()) == len(episode)


def test_a_querys_target_is_its_class():
    support, _, query, targets = numbered().__getitems__(range(50))
    by_label = classes_of(support, (60,) * 9)[:, ::SHOTS]
    assert torch.equal(classes_of(query, (60,) * 9), by_label.gather(1, targets))


def test_the_class_of_each_query_is_uniform():
    targets = numbered().__getitems__(range(4000)).query_targets
    counts = torch.stack([(targets == label).sum(1) for label in range(WAYS)], 1).double()
    assert torch.allclose(counts.mean(0), torch.full((WAYS,), 4.0, dtype=torch.float64), atol=0.12)
    binomial = WAYS * QUERY_SHOTS * 0.2 * 0.8
    assert torch.allclose(counts.var(0), torch.full((WAYS,), binomial, dtype=torch.float64), rtol=0.1)


def test_every_example_of_a_class_is_as_likely():
    counts = (11,) * 5
    query = numbered(counts, query_shots=2).__getitems__(range(3000)).query_inputs
    assert torch.bincount(query.flatten(), minlength=55).double().std() / (3000 * 10 / 55) < 0.06


def test_an_episode_depends_on_seed_split_and_index_alone():
    dataset = numbered()
    together, alone = dataset.__getitems__([3, 4, 5]), dataset[4]
    for batch, one in zip(together, alone, strict=True):
        assert torch.equal(batch[1:2], one)
    assert not torch.equal(dataset[4].query_inputs, numbered(seed=1)[4].query_inputs)


def test_classes_of_few_examples_give_no_more_than_they_have():
    counts = (6, 6, 6, 6, 40)
    support, _, query, targets = numbered(counts).__getitems__(range(300))
    for episode in torch.cat([support, query], 1):
        assert len(episode.unique()) == len(episode)
    by_label = classes_of(support, counts)[:, ::SHOTS]
    assert torch.equal(classes_of(query, counts), by_label.gather(1, targets))
    small = (by_label != 4).nonzero()
    assert max(int((targets[task] == label).sum()) for task, label in small.tolist()) == 4


def test_balanced_episodes_are_those_of_earlier_releases():
    episode = GlyphsDataModule(ways=3, query_shots=2, train_classes=8, val_classes=8, test_classes=8).make_dataset(
        "train"
    )[7]
    digest = hashlib.blake2b(digest_size=8)
    for part in episode:
        digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == "16d790d6da4a746b"


def test_targets_of_their_own_come_with_their_inputs():
    values = np.arange(120, dtype="float32").reshape(6, 20, 1)
    data = ArraysDataModule(
        train={"inputs": values, "targets": 2 * values}, ways=2, query_layout="random", query_shots=3
    )
    episode = data.make_dataset("train").__getitems__(range(8))
    assert torch.equal(episode.query_targets, 2 * episode.query_inputs)
    assert episode.query_targets.shape == (8, 6, 1)


def test_a_module_hands_its_layout_to_every_split():
    data = GlyphsDataModule(
        ways=3, query_shots=5, query_layout="random", train_classes=8, val_classes=8, test_classes=8
    )
    for split in ("train", "val", "test"):
        targets = data.make_dataset(split).__getitems__(range(4)).query_targets
        assert targets.shape == (4, 15)
        assert not torch.equal(targets[0], torch.arange(3).repeat_interleave(5))


def test_pretraining_stays_balanced():
    whole = numbered(pretraining=True)[0]
    assert torch.equal(whole.query_inputs, numbered(pretraining=True, query_layout="balanced")[0].query_inputs)


def test_another_layout_raises():
    with pytest.raises(SettingError, match=r"data.query_layout must be balanced or random \(got even\)"):
        GlyphsDataModule(query_layout="even")


def test_places_are_drawn_while_they_have_room():
    drawn = spread(random_bits(0, "room", range(500), 6), np.tile([1, 2, 9], (500, 1)))
    assert (np.diff(drawn, axis=1) >= 0).all()
    assert ((drawn == 0).sum(1).max(), (drawn == 1).sum(1).max(), (drawn == 2).sum(1).min()) == (1, 2, 3)
