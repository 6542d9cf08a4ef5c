"""Glyphs: the same for ever, apart between splits, and of Omniglot's kind."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maml_lightning.data import EpisodeDataset, GlyphsDataModule
from maml_lightning.data.glyphs import _lanczos, glyphs


@pytest.fixture(scope="module")
def characters() -> Tensor:
    return glyphs(0, 200)


def test_a_drawing_depends_on_its_class_and_number_alone(characters: Tensor):
    torch.manual_seed(1)
    assert torch.equal(glyphs(150, 3), characters[150:153])
    assert torch.equal(glyphs(40, 70, drawings=5), characters[40:110, :5])
    assert torch.equal(glyphs(7, 1, drawings=1)[0, 0], characters[7, 0])


def test_lanczos_is_that_of_pil():
    """On 105 to 28 pixels, with PIL's own filter as the reference; both round their weights."""
    canvas = np.random.RandomState(0).rand(105, 105).astype(np.float32)
    weights = _lanczos(105, 28)
    reference = np.asarray(Image.fromarray(canvas).resize((28, 28), Image.Resampling.LANCZOS))
    assert np.abs(weights @ canvas @ weights.T - reference).max() < 0.005


def test_glyphs_are_of_omniglots_kind(characters: Tensor):
    """Omniglot at 28x28: mean ink 0.084, above one half 0.083, height and width 16.1 and 15.2 +- 4.5 pixels."""
    ink = characters.float() / 255
    assert 0.065 < ink.mean() < 0.095
    assert 0.065 < (ink > 0.5).float().mean() < 0.095
    for side in (2, 3):
        extent = (characters > 60).any(side).sum(-1).float()
        assert 14 < extent.mean() < 18
    assert ink.amax((2, 3)).min() > 0.9  # none is blank
    border = torch.cat([ink[..., 0, :], ink[..., -1, :], ink[..., 0], ink[..., -1]], -1)
    assert (border > 0.5).float().mean() < 0.005


def test_nearest_neighbours_find_them_as_hard_as_omniglot(characters: Tensor):
    """5-way 1-shot by the nearest pixels: 0.44 on Omniglot, 0.2 by chance."""
    data = EpisodeDataset(characters, "test", 1, ways=5, shots=1, query_shots=3)
    batch = data.__getitems__(range(500))
    nearest = torch.cdist(batch.query_inputs.flatten(2), batch.support_inputs.flatten(2)).argmin(-1)
    assert 0.38 < (nearest == batch.query_targets).float().mean() < 0.50


def test_splits_are_different_characters_and_keep_them():
    settings = {"train_classes": 30, "val_classes": 20, "test_classes": 10, "meta_batch_size": 2, "train_episodes": 4}
    module = GlyphsDataModule(**settings)
    module.setup()
    images = {split: data.images[data.starts, 0] for split, data in module.datasets.items()}
    assert {split: len(classes) for split, classes in images.items()} == {"train": 30, "val": 20, "test": 10}
    assert len(torch.unique(torch.cat(list(images.values())).flatten(1), dim=0)) == 60
    other = GlyphsDataModule(train_classes=5, val_classes=7, test_classes=6, seed=3)
    other.setup()
    for split, data in other.datasets.items():  # neither the seed nor the number of classes changes a character
        assert torch.equal(data.images[data.starts[:5], 0], images[split][:5])
    assert (module.ways, module.shots, module.query_shots) == (5, 1, 1)
    assert [batch.tasks for batch in module.train_dataloader()] == [2, 2]


def test_rotations_multiply_the_training_classes():
    module = GlyphsDataModule(train_classes=3, val_classes=5, test_classes=5, rotations=True)
    module.setup("fit")
    assert {split: data.classes for split, data in module.datasets.items()} == {"train": 12, "val": 5}


@pytest.mark.parametrize("setting", ["train_classes", "val_classes", "test_classes", "drawings"])
def test_small_numbers_are_refused(setting: str):
    with pytest.raises(ValueError, match=rf"data.{setting} must be at least 2 \(got 1\)"):
        GlyphsDataModule(**{setting: 1})
