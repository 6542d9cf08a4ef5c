"""Sinusoids: the paper's ranges, values that lie on one sinusoid, and nothing but (seed, split, index) in a draw."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from cli import main
from maml_lightning import SettingError
from maml_lightning.data import SinusoidsDataModule
from maml_lightning.data.sinusoids import SinusoidDataset
from maml_lightning.episodes import Episode
from tests.data.numbers import equal, joined
from tests.runs import LEAST, SINUSOIDS, words


def dataset(split: str = "train", **settings: Any) -> SinusoidDataset:
    return SinusoidDataset(split, 100, **{"shots": 10, "query_shots": 6, "seed": 0, **settings})


def module(**settings: Any) -> SinusoidsDataModule:
    return SinusoidsDataModule(**{"meta_batch_size": 4, "train_episodes": 12, "val_episodes": 10, **settings})


def recovered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Amplitude and phase by least squares on sin and cos, ``[T]`` each, and the largest residual."""
    basis = torch.cat([x.sin(), x.cos()], -1).double()
    solution = torch.linalg.lstsq(basis, y.double()).solution
    sine, cosine = solution[:, 0, 0], solution[:, 1, 0]  # A cos(phase), A sin(phase)
    return sine.hypot(cosine), torch.atan2(cosine, sine), (basis @ solution - y).abs().max()


@pytest.fixture(scope="module")
def drawn() -> Episode:
    return dataset().__getitems__(range(20000)).check()


def test_shapes_and_types():
    batch = dataset(shots=3).__getitems__(range(5))
    assert [tuple(tensor.shape) for tensor in batch] == [(5, 3, 1), (5, 3, 1), (5, 6, 1), (5, 6, 1)]
    assert {tensor.dtype for tensor in batch} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in batch)


def test_support_and_query_lie_on_one_sinusoid(drawn: Episode):
    amplitude, phase, residual = recovered(drawn.support_inputs, drawn.support_targets)
    assert residual < 1e-5
    query = amplitude[:, None, None] * torch.sin(drawn.query_inputs + phase[:, None, None])
    torch.testing.assert_close(query.float(), drawn.query_targets, atol=1e-3, rtol=0)


def test_a_draw_is_uniform_in_the_papers_ranges(drawn: Episode):
    """Range, mean and deviation of each; 20,000 draws put the mean of a uniform within 4.5 sigma."""
    amplitude, phase, _ = recovered(drawn.support_inputs, drawn.support_targets)
    x = torch.cat([drawn.support_inputs, drawn.query_inputs], 1)
    for values, lowest, highest in ((amplitude, 0.1, 5), (phase, 0, math.pi), (x[:, 0], -5, 5), (x[:, -1], -5, 5)):
        width, near = highest - lowest, 1e-3
        sigma = width / 12**0.5
        assert lowest - near <= values.min() < lowest + width / 1000
        assert highest - width / 1000 < values.max() <= highest + near
        assert abs(values.mean() - (lowest + highest) / 2) < 4.5 * sigma / 20000**0.5
        assert values.std().item() == pytest.approx(sigma, rel=0.02)
    several = torch.stack([amplitude, phase, x[:, 0, 0].double(), x[:, -1, 0].double()])
    correlations = torch.corrcoef(several) - torch.eye(4)
    assert correlations.abs().max() < 4.5 / 20000**0.5


def test_an_episode_depends_on_seed_split_and_index_alone():
    indices = [7, 3, 10**12, 0]
    batch = dataset().__getitems__(indices)
    torch.manual_seed(1)
    other = dataset()
    for place, index in reversed(list(enumerate(indices))):
        assert equal(Episode(*(tensor[place : place + 1] for tensor in batch)), other[index])
    assert not equal(batch, dataset(seed=1).__getitems__(indices))
    assert not equal(batch, dataset("val").__getitems__(indices))


def whole(split: str = "train", **settings: Any) -> Episode:
    return joined(getattr(module(**settings), f"{split}_dataloader")())


@pytest.mark.filterwarnings("ignore:.*will create 4 worker processes")
def test_workers_and_batch_size_do_not_matter():
    expected = whole()
    assert expected.tasks == 12
    assert equal(expected, whole(num_workers=1))
    assert equal(expected, whole(num_workers=4))
    assert equal(expected, whole(meta_batch_size=6))


def test_ranks_share_each_meta_batch(monkeypatch: pytest.MonkeyPatch):
    expected = whole()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        mine = [index for index in range(12) if index % 4 // 2 == rank]
        assert equal(whole(), Episode(*(tensor[mine] for tensor in expected)))


def test_training_never_repeats_and_splits_differ():
    data = module()
    loader = data.train_dataloader()
    batches = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        batches += [batch.support_inputs for batch in loader]
    splits = [*batches, *(whole(split, test_episodes=10).support_inputs for split in ("val", "test"))]
    assert len(torch.cat(splits).unique(dim=0)) == 36 + 10 + 10
    assert equal(whole("val"), whole("val"))


def test_defaults_are_the_papers():
    data = SinusoidsDataModule()
    assert (data.shots, data.query_shots, data.meta_batch_size, data.score) == (10, 10, 25, "mse")
    assert not hasattr(data, "ways")


@pytest.mark.parametrize(("setting", "least"), LEAST.items())
def test_small_numbers_are_refused(setting: str, least: int):
    with pytest.raises(ValueError, match=rf"data.{setting} must be at least {least} \(got {least - 1}\)"):
        module(**{setting: least - 1})


def test_uneven_meta_batches_are_refused():
    with pytest.raises(ValueError, match=r"data.train_episodes \(10\) .* data.meta_batch_size \(4\); use 12"):
        module(train_episodes=10)


def test_fit_keeps_the_lowest_error_and_test_reports_it(folder: Path):
    fit = main(words("fit", **{**SINUSOIDS, "trainer.max_epochs": 3}))
    checkpoints = Path(fit.trainer.log_dir) / "checkpoints"
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)
    (kept,) = [state for name, state in best["callbacks"].items() if name.startswith("ModelCheckpoint")]
    assert kept["monitor"] == "val/mse"
    assert best["state_dict"]["net.head.weight"].shape == (1, 40)
    settings = yaml.safe_load((Path(fit.trainer.log_dir) / "config.yaml").read_text())["checkpoint"]
    assert (settings["monitor"], settings["mode"]) == ("val/mse", "min")

    test = main(words("test", **SINUSOIDS, ckpt_path=checkpoints / "best.ckpt"))
    results = json.loads((Path(test.trainer.log_dir) / "test_results.json").read_text())
    contract = "mse ci95 episodes ways shots query_shots inner_steps mse_per_step checkpoint"
    contract += " query_layout query_statistics head transductive"
    assert set(results) == set(contract.split())
    assert results["transductive"] is False
    assert results["mse"] == pytest.approx(test.trainer.logged_metrics["test/mse"].item(), rel=1e-5)
    assert [results[key] for key in ("episodes", "ways", "shots", "inner_steps")] == [12, None, 10, 2]
    assert len(results["mse_per_step"]) == 3
    assert results["mse_per_step"][-1] == results["mse"] < results["mse_per_step"][0]
    assert results["ci95"] > 0


def test_a_monitor_by_hand_stays(folder: Path):
    flags = {**SINUSOIDS, "checkpoint.monitor": "val/mse_step_0", "checkpoint.mode": "max"}
    callback = main(words("fit", **flags)).trainer.checkpoint_callback
    assert (callback.monitor, callback.mode) == ("val/mse_step_0", "max")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"model.net": None},
            r"model.net does not take the episodes' inputs, \[10, 1\] .*maml_lightning.MLP for vectors",
        ),
        ({"model.loss": None}, r"model.loss is cross_entropy, .* such as torch.nn.functional.mse_loss"),
        (
            {"model.net.out_features": 2},
            r"model.net gives outputs \[10, 2\], .* targets are \[10, 1\]; give it 1 outputs",
        ),
        ({"data.shots": 0}, r"data.shots must be at least 1 \(got 0\)"),
        ({"data.train_episodes": 6}, r"data.train_episodes \(6\) must be a multiple"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(bad: dict[str, Any], message: str, folder: Path):
    with pytest.raises(SettingError, match=message):
        main(words("fit", **{**SINUSOIDS, **bad}))
    assert list(folder.iterdir()) == []
