import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cli import main
from maml_lightning import SettingError
from maml_lightning.data import omniglot as characters
from maml_lightning.training.checkpoints import read_checkpoint
from tests.runs import DATA, TINY, omniglot, run, words

pytestmark = pytest.mark.usefixtures("folder")


def test_test_writes_its_results(folder, checkpoint):
    cli = main(words("test", **DATA, ckpt_path=checkpoint))
    results = json.loads((Path(cli.trainer.log_dir) / "test_results.json").read_text())
    contract = "accuracy ci95 episodes ways shots query_shots inner_steps accuracy_per_step checkpoint"
    protocol = {"query_layout": "balanced", "query_statistics": "batch", "head": "learned", "transductive": True}
    assert set(results) == {*contract.split(), *protocol}
    assert {key: results[key] for key in protocol} == protocol
    assert results["accuracy"] == pytest.approx(cli.trainer.logged_metrics["test/accuracy"].item(), abs=1e-6)
    assert [results[key] for key in ("episodes", "ways", "shots", "query_shots", "inner_steps")] == [12, 3, 1, 1, 2]
    assert results["accuracy_per_step"][-1] == results["accuracy"]
    assert results["checkpoint"] == str(checkpoint)


def test_best_and_last_checkpoints_hold_plain_values(checkpoint):
    assert (checkpoint.parent / "best.ckpt").exists()
    settings = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert settings["net"]["init_args"]["hidden_channels"] == 4


def test_ways_are_written_once(trained):
    assert yaml.safe_load((trained / "config.yaml").read_text())["data"]["init_args"]["ways"] == 3
    assert torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"][
        "net.head.bias"
    ].shape == (3,)


def test_a_saved_config_runs_again_as_it_is(trained, folder):
    cli = main(["fit", "--config", str(trained / "config.yaml"), f"--trainer.default_root_dir={folder}"])
    first, second = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (trained, Path(cli.trainer.log_dir))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_flags_by_hand_win_over_the_checkpoint_and_the_rest_is_the_checkpoints(checkpoint):
    cli = main(words("validate", **DATA, ckpt_path=checkpoint, **{"model.eval_inner_steps": 4}))
    assert (cli.model.eval_inner_steps, cli.model.inner_lr) == (4, 0.3)
    assert cli.model.net.head.in_features == 4
    assert "val/accuracy_step_4" in cli.trainer.logged_metrics


def test_predict(checkpoint):
    cli = main(words("predict", **DATA, ckpt_path=checkpoint))
    probabilities = torch.cat(cli.trainer.predict_loop.predictions)
    assert probabilities.shape == (12, 3, 3)
    assert torch.allclose(probabilities.sum(-1), torch.ones(12, 3), atol=1e-5)


@pytest.mark.parametrize(("name", "outputs"), [("OwnNet", 3), ("FixedNet", 3)])
def test_own_network_by_class_path(name, outputs):
    flags = {key: value for key, value in TINY.items() if not key.startswith("model.net")}
    cli = main(words("fit", **flags, **{"model.net": f"tests.own_network.{name}"}))
    assert cli.model.net.head.out_features == outputs
    assert cli.trainer.global_step == 2


def test_another_network_keeps_its_own_settings(capsys):
    flags = {key: value for key, value in TINY.items() if not key.startswith("model.net")}
    cli = main(words("fit", **flags, **{"model.net": "tests.own_network.Wide"}))
    assert cli.model.net.head[1].out_features == 6  # hidden_channels, which is 64 in the default network
    with pytest.raises(SystemExit):
        main(["fit", "--data", "GlyphsDataModule", "--print_config"])
    assert "hidden_channels: 64" in capsys.readouterr().out


def test_best_is_by_accuracy(trained):
    settings = yaml.safe_load((trained / "config.yaml").read_text())["checkpoint"]
    assert (settings["monitor"], settings["mode"]) == ("val/accuracy", "max")


def test_optimizer_and_scheduler_by_flag():
    extra = {"optimizer": "SGD", "optimizer.lr": 0.1, "lr_scheduler": "CosineAnnealingLR", "lr_scheduler.T_max": 2}
    cli = main(words("fit", **TINY, **extra))
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)  # half a cosine after one of two epochs


def test_help_names_every_setting(capsys):
    for command, expected in (
        (
            ["fit", "--help"],
            ["--model.inner_lr", "--model.tasks_per_chunk", "--model.first_order", "--checkpoint.monitor"],
        ),
        (["fit", "--data.help", "GlyphsDataModule"], ["--data.ways", "--data.query_shots", "--data.seed"]),
        (words("fit", **TINY, print_config=""), ["inner_lr: 0.3", "ways: 3"]),
    ):
        with pytest.raises(SystemExit) as end:
            main([word.removesuffix("=") for word in command])
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert [word for word in expected if word not in printed] == []


def test_omniglot_learns(omniglot_root):
    settings = {
        **TINY,
        "data": "OmniglotDataModule",
        "data.root": omniglot_root,
        "data.ways": 5,
        "data.meta_batch_size": 16,
        "data.train_episodes": 960,
        "data.val_episodes": 100,
        "model.net.hidden_channels": 16,
        "model.net.blocks": 4,
        "model.outer_lr": 0.005,
    }
    drop = ("data.train_classes", "data.val_classes", "data.test_classes")
    cli = main(words("fit", **{key: value for key, value in settings.items() if key not in drop}, seed_everything=0))
    assert cli.trainer.logged_metrics["val/accuracy"] > 0.45
    assert cli.trainer.logged_metrics["val/accuracy_step_0"] < 0.35


def test_training_never_reads_test_classes(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, characters.SHAPE, dtype=np.uint8)
    other = images.copy()
    other[characters.split_characters("finn")["test"]] = 0
    ends = []
    for packed in (images, other):
        monkeypatch.setattr(characters, "load_characters", lambda root, download, packed=packed: packed)
        cli = main(omniglot("nowhere", **{"trainer.max_epochs": 2}))
        best = read_checkpoint(Path(cli.trainer.checkpoint_callback.best_model_path))
        ends.append((best["epoch"], best["state_dict"], cli.trainer.logged_metrics, cli.datamodule.datasets))
    (epoch, best, metrics, datasets), (other_epoch, other_best, other_metrics, _) = ends
    assert set(datasets) == {"train", "val"}
    assert epoch == other_epoch
    assert all(torch.equal(best[name], other_best[name]) for name in best)
    scores = [name for name in metrics if name.startswith("val/")]
    assert "val/accuracy" in scores
    assert [metrics[name] for name in scores] == [other_metrics[name] for name in scores]


BAD_SETTINGS = [
    ({"data.ways": 30}, r"data.ways is 30, but the train split has 8 classes; lower"),
    ({"data.ways": 1}, r"data.ways must be at least 2 \(got 1\)"),
    ({"data.shots": 15, "data.query_shots": 15}, r"data.shots \+ data.query_shots is 15 \+ 15.* 20\s+examples; lower"),
    ({"data.shots": 0}, r"data.shots must be at least 1 \(got 0\)"),
    ({"data.query_shots": -1}, r"data.query_shots must be at least 1 \(got -1\)"),
    ({"data.meta_batch_size": 0}, r"data.meta_batch_size must be at least 1 \(got 0\)"),
    ({"data.train_episodes": 7}, r"data.train_episodes \(7\) must be a multiple of data.meta_batch_size \(4\); use 8"),
    ({"model.inner_lr": 0}, r"model.inner_lr must be above 0 \(got 0.0\)"),
    ({"model.inner_steps": -1}, r"model.inner_steps must be at least 0 \(got -1\)"),
    ({"model.tasks_per_chunk": 0}, r"model.tasks_per_chunk must be at least 1, null or auto \(got 0\)"),
    ({"model.net.hidden_channels": 0}, r"model.net.hidden_channels must be at least 1 \(got 0\)"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_SETTINGS)
def test_bad_settings_are_named_and_nothing_is_written(bad, message, folder):
    with pytest.raises(SettingError, match=message):
        main(words("fit", **{**TINY, **bad}))
    assert list(folder.iterdir()) == []


def test_wrong_output_size_is_named(folder):
    flags = {key: value for key, value in TINY.items() if not key.startswith("model.net")}
    with pytest.raises(SettingError, match=r"model.net has 3 outputs, but the episodes have 4 classes; give it 4"):
        main(words("fit", **{**flags, "data.ways": 4, "model.net": "tests.own_network.FixedNet"}))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("kind", ["code", "text", "empty", "missing", "no weights"])
def test_files_that_are_no_checkpoint(kind, folder):
    file = folder / "bad.ckpt"
    if kind == "code":
        torch.save({"state_dict": {}, "attack": Attack()}, file)
    elif kind == "no weights":
        torch.save({"a": 1}, file)
    elif kind != "missing":
        file.write_text("no checkpoint" if kind == "text" else "")
    before = sorted(folder.iterdir())
    message = {"code": "more than weights and plain values", "missing": "is not a file", "no weights": "no state_dict"}
    with pytest.raises(SettingError, match=rf"ckpt_path .*bad.ckpt .*{message.get(kind, 'damaged or no checkpoint')}"):
        main(words("test", **DATA, ckpt_path=file))
    assert sorted(folder.iterdir()) == before
    if kind == "code":  # the attack is a real one
        torch.load(file, weights_only=False)
        assert (folder / "attacked").exists()


OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "HTTP", "HTTPS")}


@pytest.mark.parametrize("download", ["true", "false"])
def test_no_data_and_no_network_names_the_glyphs(folder, download):
    ended = run(*omniglot("nowhere", **{"data.download": download}), **OFFLINE)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "configs/glyphs_5way_1shot.yaml" in ended.stderr.splitlines()[-1]
    assert not (folder / "lightning_logs").exists()


def test_unknown_data_name(folder):
    ended = run(*words("fit", **{**TINY, "data": "Omnigloot"}))
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "Omnigloot" in ended.stderr
    assert list(folder.iterdir()) == []


def test_half_a_tree_and_a_truncated_picture(folder, omniglot_root):
    whole = omniglot_root / "omniglot-py" / "images_background"
    half = folder / "half" / "omniglot-py" / "images_background"
    half.mkdir(parents=True)
    (half / "Greek").symlink_to(whole / "Greek")
    with pytest.raises(SettingError, match=r"images_background|Alphabet_of_the_Magi"):
        main(omniglot(folder / "half"))
    assert not (folder / "lightning_logs").exists()


def test_a_scheduler_anneals_the_outer_rate(folder):
    scheduler = {"lr_scheduler": "CosineAnnealingLR", "lr_scheduler.T_max": 2, "model.outer_lr": 0.01}
    cli = main(words("fit", **TINY, **scheduler))
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)  # half a cosine's way after 1 of 2
