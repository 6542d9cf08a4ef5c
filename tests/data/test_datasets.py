"""Drawing of episodes: uniform, and dependent on (seed, split, index) alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maml_lightning.data import EpisodeDataset
from maml_lightning.episodes import Episode
from tests.data.numbers import CLASSES, EXAMPLES, IMAGES, equal


def dataset(**settings: Any) -> EpisodeDataset:
    return EpisodeDataset(IMAGES, "train", 100, **{"ways": 3, "shots": 2, "query_shots": 3, **settings})


def codes(inputs: Tensor) -> Tensor:
    return (inputs[:, :, 0, 0, 0] * 255).round().long()


def test_an_episode_is_ordered_by_label_and_support_and_query_are_disjoint():
    batch = dataset().__getitems__(range(200)).check()
    assert batch.support_inputs.shape == (200, 6, 1, 2, 2)
    assert batch.query_inputs.shape == (200, 9, 1, 2, 2)
    assert batch.support_inputs.dtype == torch.float32
    assert batch.support_targets[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.query_targets[-1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for support, query in zip(codes(batch.support_inputs).tolist(), codes(batch.query_inputs).tolist(), strict=True):
        assert len({*support, *query}) == 15
        classes = [code // EXAMPLES for code in support[::2]]
        assert len(set(classes)) == 3
        assert [code // EXAMPLES for code in support] == np.repeat(classes, 2).tolist()
        assert [code // EXAMPLES for code in query] == np.repeat(classes, 3).tolist()


def test_ink_is_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 1, 1)
    batch = EpisodeDataset(images, "val", 1, ways=3).__getitems__([0])
    assert sorted(batch.query_inputs.flatten().tolist()) == pytest.approx([0.0, 0.2, 1.0])


def test_color_images_keep_their_channels():
    images = torch.zeros(3, 2, 3, 4, 5, dtype=torch.uint8)
    assert EpisodeDataset(images, "val", 1, ways=2).__getitems__([0, 1]).query_inputs.shape == (2, 2, 3, 4, 5)


def test_every_label_sees_every_class_and_example_equally_often():
    episodes = 7000
    batch = dataset().__getitems__(range(episodes))
    labels_classes = torch.zeros(3, CLASSES)
    classes = codes(batch.support_inputs)[:, ::2] // EXAMPLES
    for label in range(3):
        labels_classes[label] = torch.bincount(classes[:, label], minlength=CLASSES)
    # binomial, p = 1/7: a deviation of 4.5 sigma among 21 counts has a chance of 1 in 7000
    assert (labels_classes - 1000).abs().max() < 4.5 * (episodes * 1 / 7 * 6 / 7) ** 0.5
    examples = torch.bincount(codes(batch.query_inputs).flatten(), minlength=CLASSES * EXAMPLES).float()
    assert len(examples) == 42
    assert (examples - 1500).abs().max() < 4.5 * 1500**0.5


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


def test_rotations_can_be_drawn_for_each_class_of_an_episode():
    plain, turned = dataset(), dataset(rotations="drawn")
    (classes, examples), (drawn, others) = plain.draw(range(2000)), turned.draw(range(2000))
    assert torch.equal(drawn % CLASSES, classes)  # the same episodes beside the rotations
    assert torch.equal(others, examples)
    turns = torch.bincount((drawn // CLASSES).flatten(), minlength=4)
    assert len(turns) == 4
    assert (turns - 1500).abs().max() < 4.5 * (6000 * 3 / 16) ** 0.5  # of 6,000, binomial
    assert turned.classes == CLASSES
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(4, 2, 2, 2)
    turned = EpisodeDataset(image, "test", 1, ways=4, rotations="drawn")
    quarter_turns = {(1, 2, 3, 4): 0, (2, 4, 1, 3): 1, (4, 3, 2, 1): 2, (3, 1, 4, 2): 3}  # counter-clockwise
    batch, (classes, _) = turned.__getitems__(range(9)), turned.draw(range(9))
    for inputs in (batch.support_inputs, batch.query_inputs):
        pixels = (inputs * 255).round().long().flatten(2)
        assert [[quarter_turns[tuple(p)] for p in episode] for episode in pixels.tolist()] == (classes // 4).tolist()


def test_an_episode_can_keep_to_one_group():
    grouped = dataset(groups=[0, 1, 0, 1, 0, 1, 2])  # group 2 is too small for 3 ways
    classes = [frozenset(episode) for episode in grouped.draw(range(1000))[0].tolist()]
    assert set(classes) == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}
    # equally likely: binomial, sigma is sqrt(1000) / 2
    assert abs(classes.count(frozenset({0, 2, 4})) - 500) < 4.5 * 1000**0.5 / 2


def test_drawn_rotations_keep_to_a_group():
    turned = dataset(groups=[0, 0, 0, 1, 1, 1, 1], rotations="drawn")
    first = turned.draw(range(200))[0] % CLASSES < 3
    assert (first.all(1) | ~first.any(1)).all()


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
        ({"shots": 5, "query_shots": 2}, r"data.shots \+ data.query_shots is 5 \+ 2, .* 6 examples; lower"),
    ],
)
def test_a_split_that_is_too_small_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataset(**settings)
