"""What of the network follows the data, and what of it is given by hand."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from cli import main
from maml_lightning import SettingError
from maml_lightning.training.checkpoints import read_checkpoint
from tests.runs import DATA, TINY, words

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def three_numbers(folder):
    """Flags of a regression of three numbers from five, from files."""
    numbers = np.random.default_rng(0)
    for index, split in enumerate(("train", "val", "test")):
        inputs, targets = (numbers.normal(size=(24, size)).astype("float32") for size in (5, 3))
        np.savez(folder / f"{split}.npz", inputs=inputs, labels=np.arange(24) % 4 + 10 * index, targets=targets)
    data = {f"data.{split}": f"{split}.npz" for split in ("train", "val", "test")}
    sizes = {"meta_batch_size": 2, "train_episodes": 4, "val_episodes": 2, "test_episodes": 2, "ways": 1, "shots": 2}
    return {"data": "ArraysDataModule", **data, **{f"data.{key}": value for key, value in sizes.items()}}


NETWORK = {
    "model.net": "maml_lightning.MLP",
    "model.net.in_features": 5,
    "model.net.out_features": 3,
    "model.loss": "torch.nn.functional.mse_loss",
    "model.inner_lr": 0.1,
    "trainer.max_epochs": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.accelerator": "cpu",
}


def outputs(cli):
    return len([*cli.model.net.parameters()][-1])


def test_outputs_given_by_hand_win_and_come_again_from_config_and_checkpoint(three_numbers):
    fit = main(words("fit", **three_numbers, **NETWORK))
    assert outputs(fit) == 3
    assert fit.trainer.logged_metrics["val/mse"] > 0
    run = Path(fit.trainer.log_dir)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["net"]["init_args"]["out_features"] == 3
    best = run / "checkpoints" / "best.ckpt"
    assert outputs(main(words("test", **three_numbers, ckpt_path=best))) == 3  # the checkpoint's, not data.ways
    again = main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs=2"])
    assert (outputs(again), again.trainer.current_epoch) == (3, 2)
    begun = main(words("fit", **three_numbers, **NETWORK, initial_checkpoint=best))
    assert outputs(begun) == 3


def test_a_network_of_which_nothing_follows_the_data_is_tested_and_predicts(folder):
    numbers = np.random.default_rng(0)
    for index, split in enumerate(("train", "val", "test")):
        pictures, labels = numbers.integers(0, 256, (16, 3, 8, 8), np.uint8), np.arange(16) % 4 + 10 * index
        np.savez(split, inputs=pictures, labels=labels, targets=numbers.integers(0, 2, (16, 2)).astype("float32"))
    sizes = {"meta_batch_size": 2, "train_episodes": 4, "val_episodes": 2, "test_episodes": 2, "ways": 1}
    flags = {
        "data": "ArraysDataModule",
        **{f"data.{split}": f"{split}.npz" for split in ("train", "val", "test")},
        **{f"data.{key}": value for key, value in sizes.items()},
        **{f"model.net.{key}": value for key, value in {"in_channels": 3, "out_features": 2}.items()},
        **{key: value for key, value in TINY.items() if key.startswith(("model", "trainer"))},
        "model.loss": "torch.nn.functional.binary_cross_entropy_with_logits",
    }
    flags = {"model.net": flags.pop("model.net"), **flags}
    run = Path(main(words("fit", **flags)).trainer.log_dir)
    for command in ("test", "predict"):
        cli = main([command, "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/best.ckpt"])
        assert outputs(cli) == 2


def test_a_resumed_runs_config_has_what_was_given_by_hand_in_the_first(three_numbers):
    first = main(words("fit", **three_numbers, **NETWORK))
    last = Path(first.trainer.log_dir) / "checkpoints" / "last.ckpt"
    resumed = main(
        words(
            "fit",
            **three_numbers,
            ckpt_path=last,
            **{"trainer.max_epochs": 2, "trainer.log_every_n_steps": 1, "trainer.accelerator": "cpu"},
        )
    )
    saved = yaml.safe_load((Path(resumed.trainer.log_dir) / "config.yaml").read_text())
    assert saved["model"]["net"]["init_args"]["out_features"] == 3
    assert read_checkpoint(Path(resumed.trainer.log_dir) / "checkpoints" / "last.ckpt", "")["settings"]["linked"] == [
        "in_channels"
    ]


def test_what_is_not_given_follows_the_data_and_is_not_written(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--data", "GlyphsDataModule", "--data.ways", "7", "--print_config"])
    printed = capsys.readouterr().out
    assert "out_features" not in printed
    Path("own.yaml").write_text(printed)
    cli = main(words("fit", config="own.yaml", **{**TINY, "data.ways": 4}))
    assert cli.model.net.head.out_features == 4


def test_a_config_printed_with_outputs_given_by_hand_has_them(three_numbers, capsys):
    with pytest.raises(SystemExit):
        main([*words("fit", **three_numbers, **NETWORK), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["net"]["init_args"]["out_features"] == 3


@pytest.mark.parametrize("from_config", [False, True])
def test_outputs_by_hand_that_contradict_the_classes_raise(folder, from_config):
    extra = {"model.net.out_features": 7}
    if from_config:
        net = {"class_path": "maml_lightning.ConvNet", "init_args": {"out_features": 7}}
        (folder / "own.yaml").write_text(yaml.dump({"model": {"net": net}}))
        extra = {"config": "own.yaml"}
    with pytest.raises(
        SettingError, match=r"model.net has 7 outputs, but the episodes have 3 classes; give it 3 outputs"
    ):
        main(words("fit", **extra, **TINY))
    assert not (folder / "lightning_logs").exists()


def test_channels_by_hand_that_contradict_the_data_raise(folder):
    with pytest.raises(SettingError, match=r"model.net.in_channels is 3, but the images have 1 "):
        main(words("fit", **{**TINY, "data.channels": None, "model.net.in_channels": 3}))
    assert not (folder / "lightning_logs").exists()


def test_a_checkpoint_of_outputs_that_followed_the_data_still_follows_them(checkpoint):
    with pytest.raises(SettingError, match=r"net.head.weight is \(3, 4\) in it and \(4, 4\) here; give the data.ways"):
        main(words("validate", **{**DATA, "data.ways": 4}, ckpt_path=checkpoint))
