"""Generated tasks: deterministic, of the shapes that their configs say, and what they claim of their classes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from maml_lightning import FunctionDataModule
from maml_lightning.data import generated
from maml_lightning.episodes import Episode
from maml_lightning.structures import by_place

SHAPES = {
    "series": {"": ([64, 1], torch.float32)},
    "texts": {"": ([24], torch.int64)},
    "table": {"": ([20], torch.float32)},
    "measurements": {"['input1']": ([6], torch.float32), "['input2']": ([3], torch.float32)},
    "several_labels": {"": ([6], torch.float32)},
    "segments": {"": ([3, 16, 16], torch.float32)},
}


def episodes(name: str, count: int = 20) -> Episode:
    data = FunctionDataModule(getattr(generated, name))
    return data.make_dataset("test").__getitems__(range(count))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_types(name: str):
    batch = episodes(name)
    for inputs, targets in (batch[:2], batch[2:]):
        found = {place: (list(leaf.shape[2:]), leaf.dtype) for place, leaf in by_place(inputs).items()}
        assert found == SHAPES[name]
        assert {leaf.shape[:2] for leaf in by_place(inputs).values()} == {targets.shape[:2]}
    assert not torch.equal(batch.query_targets[:1], batch.query_targets[1:2]) or name not in (
        "several_labels",
        "segments",
    )


def nearest(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """The class whose mean is nearest to each query ``[T, n, d]``."""
    means = torch.stack([support[:, labels[0] == label].mean(1) for label in range(5)], 1)
    return torch.cdist(query, means).argmin(-1)


def accuracy(name: str, features=lambda inputs: inputs.flatten(2)) -> float:
    batch = episodes(name, 50)
    found = nearest(features(batch.support_inputs), batch.support_targets, features(batch.query_inputs))
    return (found == batch.query_targets).float().mean().item()


def test_classes_can_be_told_from_their_support_sets():
    assert accuracy("series") > 0.6
    assert accuracy("table", lambda rows: rows[..., :5]) > accuracy("table") > 0.5
    assert accuracy("table", lambda rows: rows[..., 5:]) < 0.25  # noise
    assert accuracy("texts", lambda tokens: torch.nn.functional.one_hot(tokens, 200)[..., 1:].float().mean(2)) > 0.8
    assert accuracy("measurements", lambda inputs: torch.cat([*inputs.values()], -1)) > 0.9


def test_labels_are_sides_of_planes_and_segments_are_of_one_color():
    batch = episodes("several_labels")
    planes = torch.linalg.lstsq(batch.query_inputs, 2 * batch.query_targets - 1).solution
    agree = ((batch.query_inputs @ planes > 0).float() == batch.query_targets).float().mean()
    assert agree > 0.85
    pictures = episodes("segments")
    inside = pictures.query_targets[:, :, None].bool().expand_as(pictures.query_inputs)
    for task in range(20):
        colors = pictures.query_inputs[task].transpose(0, 1)[:, inside[task, :, 0]]
        assert colors.std(1).max() < 0.12


def test_no_two_episodes_have_the_same_task():
    data = FunctionDataModule(generated.table)
    rows = torch.cat(
        [data.make_dataset(split).__getitems__(range(50)).query_inputs[:, 0] for split in ("train", "val")]
    )
    assert len(rows.unique(dim=0)) == 100
    assert np.isfinite(rows.numpy()).all()
