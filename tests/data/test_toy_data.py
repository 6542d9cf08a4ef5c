"""Adding a data set takes one file of less than 40 lines; the command line and Python then use it like the others."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from cli import main
from maml_lightning import MAML, ConvNet
from tests.data import toy_data
from tests.data.toy_data import ToyDataModule
from tests.runs import TINY, words

TOY = {
    "data": "tests.data.toy_data.ToyDataModule",
    **{key: value for key, value in TINY.items() if key != "data" and not key.endswith("classes")},
    "data.train_episodes": 80,
    "data.angles": 12,
    "trainer.max_epochs": 3,
}


def test_it_is_short():
    assert len(inspect.getsource(toy_data).splitlines()) < 40


def test_from_the_command_line_it_learns_and_its_config_runs_again(folder: Path):
    fit = main(words("fit", **TOY))
    assert (fit.datamodule.angles, fit.datamodule.query_shots, fit.datamodule.seed) == (12, 2, 0)
    assert fit.model.net.head.out_features == 3
    log = Path(fit.trainer.log_dir)
    again = main(["fit", "--config", str(log / "config.yaml")])
    for name in ("val/accuracy", "val/loss"):
        assert torch.equal(again.trainer.logged_metrics[name], fit.trainer.logged_metrics[name])
    test = main(words("test", **TOY, ckpt_path=log / "checkpoints" / "best.ckpt"))
    assert test.trainer.logged_metrics["test/accuracy"] > 0.6  # 1/3 by chance


def test_from_python():
    data = ToyDataModule(angles=12, ways=3, meta_batch_size=4, train_episodes=8)
    (batch, _) = data.train_dataloader()
    assert batch.support_inputs.shape == (4, 3, 1, 16, 16)
    assert batch.query_targets[0].tolist() == [0, 0, 1, 1, 2, 2]
    splits = [data.load_split(split)[:, 0] for split in ("train", "val", "test")]
    assert len(torch.cat(splits).flatten(1).unique(dim=0)) == 36
    maml = MAML(net=ConvNet(out_features=3, hidden_channels=4, blocks=2))
    assert maml.training_step(batch, 0).isfinite()


def test_help_shows_its_settings_and_the_shared_ones(folder: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["fit", "--data.help", "tests.data.toy_data.ToyDataModule"])
    text = " ".join(capsys.readouterr().out.split())
    for setting, description, default in (
        ("angles", "classes of each split", "40"),
        ("query_shots", "query examples per class ``Q``", "2"),  # the toy's default, the base class's words
        ("num_workers", "worker processes per data loader", "0"),
    ):
        assert re.search(rf"--data.{setting} [A-Z_]+ {description}[^()]*\(type: int, default: {default}\)", text)
