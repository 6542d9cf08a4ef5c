"""Tasks that a function gives: batched, deterministic, shared among processes; from Python and the command line."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cli import main
from maml_lightning import FunctionDataModule, SettingError
from maml_lightning.data.functions import FunctionDataset
from maml_lightning.data.loading import EpisodeSampler
from maml_lightning.structures import by_place
from maml_lightning.training.reports import protocol_text
from tests.data.numbers import equal, joined
from tests.own_tasks import Centers, Classes, line
from tests.runs import TINY, words

FEW = {"meta_batch_size": 4, "train_episodes": 12, "val_episodes": 6, "test_episodes": 5}
FLAGS = {
    key: value
    for key, value in TINY.items()
    if not key.endswith("classes") and not key.startswith("model.net") and key not in ("data.ways", "data")
}


def dataset(function: Any, split: str = "train", seed: int = 0) -> FunctionDataset:
    return FunctionDataset(function, split, 10, seed=seed, setting="data.function")


def test_episodes_are_the_functions_stacked():
    batch = dataset(line).__getitems__([3, 8]).check()
    seed = dataset(line).split_seed
    for place, index in enumerate((3, 8)):
        for ours, theirs in zip(batch, line(seed, index), strict=True):
            assert torch.equal(ours[place], torch.from_numpy(theirs))
    assert [part.dtype for part in batch] == [torch.float32] * 4


def test_an_episode_depends_on_seed_split_and_index_alone():
    for function in (line, Centers()):
        batch = dataset(function).__getitems__([7, 3, 10**12])
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        alone = dataset(function)[3]
        for ours, theirs in zip(batch, alone, strict=True):
            assert all(
                torch.equal(a[1], b[0]) for a, b in zip(by_place(ours).values(), by_place(theirs).values(), strict=True)
            )
        others = [dataset(function, "val")[3], dataset(function, seed=1)[3], dataset(function)[4]]
        assert not any(torch.equal(other.support_inputs, alone.support_inputs) for other in others)
    assert dataset(Centers())[6].query_inputs["index"].tolist() == [[6] * 4]


def test_drawing_leaves_the_global_generators_as_they_are():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    dataset(Centers()).__getitems__(range(3))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_loaders_share_episodes_among_processes_and_workers():
    data = FunctionDataModule(Classes(), num_workers=2, **FEW)
    whole = joined(data.train_dataloader())
    assert equal(whole, data.datasets["train"].__getitems__(range(12)))
    shares = [
        list(EpisodeSampler(data.datasets["train"], 4, fixed=False, num_replicas=2, rank=rank)) for rank in range(2)
    ]
    assert sorted(shares[0] + shares[1]) == list(range(12))
    assert [batch.tasks for batch in data.val_dataloader()] == [4, 2]


def test_a_seed_is_one_that_numpy_takes():
    def task(seed: int, index: int):
        np.random.seed(seed)
        return line(seed, index)

    for split in ("train", "val", "test"):
        assert len(FunctionDataModule(task, **FEW).make_dataset(split)[0]) == 4


def test_each_split_may_have_a_function_of_its_own():
    data = FunctionDataModule(line, test_function=lambda seed, index: line(seed, index)[::-1], **FEW)
    assert data.make_dataset("val")[0].query_inputs.shape == (1, 6, 1)
    assert data.make_dataset("test")[0].query_inputs.shape == (1, 4, 1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda seed, index: torch.rand(3),
            r"data.function gives Tensor; give an Episode: support_inputs, support_targets",
        ),
        (lambda seed, index: line(seed, index)[:3], r"data.function gives 3 parts; give an Episode"),
        (
            lambda seed, index: (*line(seed, index)[:3], np.zeros(5)),
            r"query set of shapes \[6, 1\], \[5\] in episode 0",
        ),
        (lambda seed, index: (*line(seed, index)[:3], "abc"), r"gives query_targets of str; give tensors or arrays"),
        (
            lambda seed, index: (
                [part[index:] for part in line(seed, index)] and tuple(p[index:] for p in line(seed, index))
            ),
            r"gives support_inputs float32 \[4, 1\] in episode 0 and float32 \[3, 1\] in episode 1; give all episodes",
        ),
        (
            lambda seed, index: (*line(seed, index)[:3], np.where(index, np.nan, line(seed, index)[3])),
            r"data.function gives query_targets with a value that is NaN or infinite in episode 1; replace it",
        ),
        ("my_module.task", r"data.function is 'my_module.task', not a function"),
    ],
)
def test_what_gives_no_episodes_is_named(function: Any, message: str):
    with pytest.raises(SettingError, match=message):
        FunctionDataModule(function, **FEW).make_dataset("train").__getitems__([0, 1])


def test_from_the_command_line_by_import_path_and_its_config_runs_again(folder: Path):
    flags = {"data": "FunctionDataModule", **FLAGS, "model.net": "maml_lightning.MLP"}
    flags |= {"data.function": "tests.own_tasks.line", "model.loss": "torch.nn.functional.mse_loss"}
    fit = main(words("fit", **flags))
    run = Path(fit.trainer.log_dir)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["function"] == "tests.own_tasks.line"
    assert fit.trainer.checkpoint_callback.monitor == "val/loss"
    again = main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs=2"])
    assert again.trainer.current_epoch == 2
    with pytest.raises(SystemExit):
        main(words("fit", **flags, **{"data.shots": 3}))  # which the function alone decides


def test_from_the_command_line_by_class_path(folder: Path):
    flags = {"data": "FunctionDataModule", **FLAGS, "model.net": "maml_lightning.MLP", "model.net.out_features": 2}
    flags |= {"data.function": "tests.own_tasks.Classes", "data.function.shots": 3, "model.net.in_features": 3}
    fit = main(words("fit", **flags))
    assert fit.datamodule.datasets["train"][0].support_inputs.shape == (1, 6, 3)
    assert fit.trainer.checkpoint_callback.monitor == "val/accuracy"
    assert fit.trainer.logged_metrics["val/accuracy"] > 0.6
    checkpoint = fit.trainer.checkpoint_callback.best_model_path
    test = main(words("test", **{**flags, "ckpt_path": checkpoint}))
    results = json.loads((Path(test.trainer.log_dir) / "test_results.json").read_text())
    assert results["shots"] is results["query_shots"] is None  # which the function alone knows
    assert "-shot" not in protocol_text(results)
