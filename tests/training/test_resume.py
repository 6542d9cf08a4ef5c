"""On resume a setting that differs from the checkpoint is applied or raises an error: docs/resuming.md, row by row."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from cli import main
from maml_lightning import SettingError
from maml_lightning.trained import FOLDER
from maml_lightning.training.checkpoints import last_checkpoint, read_checkpoint
from maml_lightning.training.monitoring import direction
from tests.runs import DATA, SINUSOIDS, TINY, words

pytestmark = pytest.mark.usefixtures("folder")

# An epoch is 4 meta-steps; the runs that are resumed end after 2 epochs, or in the middle of the second.
SMALL = {
    **SINUSOIDS,
    "data.train_episodes": 16,
    "trainer.max_epochs": 3,
    "trainer.enable_model_summary": "false",
    "inspection.episodes": 0,
}
COSINE = {"lr_scheduler": "CosineAnnealingLR", "lr_scheduler.T_max": 3}
PLATEAU = {"lr_scheduler": "ReduceLROnPlateau", "lr_scheduler.monitor": "val/mse", "lr_scheduler.patience": 5}
STOPPING = {"trainer.callbacks": "EarlyStopping", "trainer.callbacks.monitor": "val/mse"}
END, MIDDLE = {"trainer.max_epochs": 2}, {"trainer.max_steps": 6}
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"


def fit(folder="run", **flags):
    return main(words("fit", **{**SMALL, "trainer.default_root_dir": folder, **flags}))


def resumed(before, now, stop=END, **more):
    """The command line of a run that is stopped, and resumed with other settings."""
    fit(**{**before, **stop})
    return fit(**{**before, **now, **more}, ckpt_path="last")


def group(cli):
    return cli.trainer.optimizers[0].param_groups[0]


def cosine(lr, epoch, t_max, eta_min=0.0):
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * epoch / t_max)) / 2


SGD = {"optimizer": "SGD", "optimizer.lr": 0.01, "optimizer.momentum": 0.9}
ADAMW = {"optimizer": "AdamW", "optimizer.lr": 0.01}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({}, {"model.outer_lr": 0.02}, {"lr": 0.02}),
        (SGD, {"optimizer.lr": 0.5}, {"lr": 0.5, "momentum": 0.9}),
        (SGD, {"optimizer.momentum": 0.3}, {"lr": 0.01, "momentum": 0.3}),
        (ADAMW, {"optimizer.betas": "[0.8, 0.99]"}, {"betas": (0.8, 0.99), "lr": 0.01}),
        (ADAMW, {"optimizer.weight_decay": 0.3}, {"weight_decay": 0.3}),
        (COSINE, {"lr_scheduler.T_max": 6}, {"lr": cosine(0.001, 3, 6)}),
        (COSINE, {"lr_scheduler.T_max": 6, "lr_scheduler.eta_min": 1e-4}, {"lr": cosine(0.001, 3, 6, 1e-4)}),
        ({**COSINE, "lr_scheduler.T_max": 6}, {"model.outer_lr": 0.02}, {"lr": cosine(0.02, 3, 6), "initial_lr": 0.02}),
        ({**SGD, "lr_scheduler": "StepLR", "lr_scheduler.step_size": 1}, {"lr_scheduler.gamma": 0.5}, {"lr": 0.00125}),
        (PLATEAU, {"model.outer_lr": 0.02}, {"lr": 0.02}),
    ],
)
def test_optimizer_and_schedule_are_applied(before, now, expected):
    got = group(resumed(before, now))
    for key, value in expected.items():
        assert got[key] == pytest.approx(value)


def test_settings_of_a_plateau_are_applied_and_its_reductions_kept():
    before = {**PLATEAU, "lr_scheduler.patience": 0, "lr_scheduler.threshold": 0.99, "lr_scheduler.factor": 0.5}
    fit(**before, **{"trainer.max_epochs": 3})
    reduced = read_checkpoint(Path("run") / LAST)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert reduced < 0.001
    now = {"lr_scheduler.patience": 7, "model.outer_lr": 0.01, "trainer.max_epochs": 4}
    cli = fit(**{**before, **now}, ckpt_path="last")
    assert cli.trainer.lr_scheduler_configs[0].scheduler.patience == 7
    assert group(cli)["lr"] == pytest.approx(10 * reduced)


@pytest.mark.parametrize(("steps", "t_max"), [(END, 3), (MIDDLE, 9)])
def test_the_schedule_is_as_if_it_had_been_so_from_the_start(steps, t_max):
    fit("whole", **{**COSINE, "lr_scheduler.T_max": t_max})
    fit("halted", **{**COSINE, "lr_scheduler.T_max": 5}, **steps)
    cli = fit("halted", **{**COSINE, "lr_scheduler.T_max": t_max}, ckpt_path="last")
    saved = [read_checkpoint(Path(run) / LAST) for run in ("whole", "halted")]
    assert saved[0]["lr_schedulers"] == saved[1]["lr_schedulers"]
    assert cli.trainer.global_step == 12


def test_what_was_applied_is_what_later_checkpoints_hold():
    resumed(COSINE, {"model.outer_lr": 0.02, "lr_scheduler.T_max": 9}, {"trainer.max_epochs": 1})
    saved = read_checkpoint(Path("run") / LAST)
    assert saved["hyper_parameters"]["outer_lr"] == 0.02
    assert saved["lr_schedulers"][0]["T_max"] == 9
    cli = fit(**{"trainer.max_epochs": 4}, ckpt_path="last")  # nothing given: all is as the checkpoint has it
    assert group(cli)["lr"] == pytest.approx(cosine(0.02, 4, 9))


def test_the_optimizer_and_the_seed_are_the_checkpoints_where_none_is_given():
    fit(**SGD, **END, seed_everything=5)
    cli = fit(ckpt_path="last")
    assert isinstance(cli.trainer.optimizers[0], torch.optim.SGD)
    assert group(cli)["momentum"] == 0.9
    assert cli.config.fit.seed_everything == 5


def test_patience_and_min_delta_of_early_stopping_are_applied_and_its_count_is_kept():
    now = {"trainer.callbacks.patience": 9, "trainer.callbacks.min_delta": 0.5}
    cli = resumed(STOPPING, now)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, EarlyStopping)]
    assert (callback.patience, callback.min_delta) == (9, -0.5)
    assert callback.best_score.isfinite()


def test_the_best_score_is_known_where_the_period_of_checkpoints_differs():
    fit(**END)
    before = read_checkpoint(Path("run") / LAST)["callbacks"]
    best = [value["best_model_score"] for key, value in before.items() if key.startswith("ModelCheckpoint")]
    cli = fit(ckpt_path="last", **{"checkpoint.every_n_epochs": 2})
    assert cli.trainer.checkpoint_callback.best_model_score <= best[0]


def test_a_precision_that_keeps_the_type_of_weights_is_applied():
    cli = resumed({}, {"trainer.precision": "bf16-mixed"})
    assert (cli.trainer.precision, cli.trainer.global_step) == ("bf16-mixed", 12)


def test_a_network_of_the_same_shapes_is_another_network():
    shapes = {"data": "GlyphsDataModule", "data.train_classes": 8, "data.val_classes": 8, "data.ways": 3}
    flags = {**shapes, "model.loss": None, "model.net": "maml_lightning.ConvNet", "model.net.blocks": 1}
    with pytest.raises(
        SettingError, match=r"model.net.pooling is True, but the checkpoint's is False: another network"
    ):
        resumed(flags, {"model.net.pooling": "true"})


@pytest.mark.parametrize(
    ("setting", "value", "attribute"),
    [
        ("non_finite", "skip", "non_finite"),
        ("eval_inner_steps", 4, "eval_inner_steps"),
        ("inner_lr", 0.02, "inner_lr"),
        ("first_order", "true", "first_order"),
    ],
)
def test_model_settings_are_applied(setting, value, attribute):
    model = resumed({}, {f"model.{setting}": value}).model
    assert str(getattr(model, attribute)).lower() == str(value)
    assert str(read_checkpoint(Path("run") / LAST)["hyper_parameters"][setting]).lower() == str(value)


LEARNED = {"model.learn_inner_lr": "network"}
REFUSED = [
    ({}, {"optimizer": "SGD", "optimizer.lr": 0.1}, END, r"optimizer torch.optim.sgd.SGD cannot .*\(torch.optim.adam"),
    (ADAMW, {"optimizer": "Adam"}, END, r"optimizer torch.optim.adam.Adam cannot continue .*adamw.AdamW\)"),
    (COSINE, {"lr_scheduler": "StepLR", "lr_scheduler.step_size": 1, "lr_scheduler.T_max": None}, END, "StepLR cannot"),
    ({}, COSINE, END, r"lr_scheduler .*CosineAnnealingLR cannot continue from .*\(none\)"),
    (COSINE, {"lr_scheduler": "null", "lr_scheduler.T_max": None}, END, r"lr_scheduler none cannot continue"),
    ({}, {"model.net.hidden_features": "[8]"}, END, "another network, or of other learned inner learning rates"),
    (LEARNED, {"model.inner_lr": 0.5}, END, r"model.inner_lr 0.5 would be ignored: .*learned.*; leave it out"),
    ({}, {"model.learn_inner_lr": "step"}, END, "another network, or of other learned inner learning rates"),
    ({}, {"model.meta_curvature": "true"}, END, "or of other learned inner learning rates or curvature matrices: adap"),
    (SGD, {"model.outer_lr": 0.5}, END, r"model.outer_lr 0.5 would be ignored: .*; give --optimizer.lr"),
    ({}, {"seed_everything": 3}, END, r"seed_everything 3 would be ignored: .*began with 0; leave it out"),
    (
        {},
        {"trainer.precision": "64-true"},
        END,
        r"weights as float64, but the checkpoint holds float32; give --trainer",
    ),
    ({}, {"trainer.max_epochs": 1}, END, r"trainer.max_epochs is 1, but the checkpoint has 2 epochs behind it; raise"),
    ({}, {"trainer.max_steps": 5}, END, r"trainer.max_steps is 5, but the checkpoint has 8 steps behind it; raise"),
    (
        {},
        {"data.train_episodes": 32},
        END,
        r"data.train_episodes is 32, but the run's is 16: episodes would be skipped",
    ),
    ({}, {"data.train_episodes": 32}, MIDDLE, r"data.train_episodes is 32, but the run's is 16: .*; give 16, or"),
    ({}, {"data.meta_batch_size": 2}, MIDDLE, r"data.meta_batch_size is 2, but the run's is 4: .*middle of an epoch"),
    ({}, {"data.seed": 2}, MIDDLE, r"data.seed is 2, but the run's is 0: .*middle of an epoch"),
    ({}, {"data.shots": 2}, MIDDLE, r"data.shots is 2, but the run's is .*middle of an epoch"),
    ({}, {"trainer.accumulate_grad_batches": 2}, MIDDLE, r"accumulate_grad_batches is 2, but the run's is 1: .*middle"),
    ({}, {"trainer.limit_train_batches": 3}, MIDDLE, r"limit_train_batches is 3, but the run's is None: .*middle"),
]


@pytest.mark.parametrize(("before", "now", "stop", "message"), REFUSED)
def test_what_cannot_be_applied_is_refused_before_anything_is_written(before, now, stop, message):
    fit(**before, **stop)
    files = {file: file.stat().st_mtime_ns for file in Path().rglob("*") if file.is_file()}
    with pytest.raises(SettingError, match=message):
        fit(**{**before, **now}, ckpt_path="last")
    assert {file: file.stat().st_mtime_ns for file in Path().rglob("*") if file.is_file()} == files


APPLIED_AT_EPOCHS = [
    ({"data.meta_batch_size": 2}, 16),  # 8 meta-steps of 4, then 8 of 2
    ({"trainer.accumulate_grad_batches": 2}, 10),
    ({"trainer.limit_train_batches": 3}, 11),
    ({"data.seed": 2}, 12),
    ({"data.val_episodes": 8, "data.num_workers": 0}, 12),
]


@pytest.mark.parametrize(("now", "steps"), APPLIED_AT_EPOCHS)
def test_between_epochs_the_data_may_change(now, steps):
    assert resumed({}, now).trainer.global_step == steps


def test_another_meta_batch_size_between_epochs_draws_the_same_episodes(monkeypatch):
    from maml_lightning.data.sinusoids import SinusoidDataset

    drawn = []
    whole = SinusoidDataset.__getitems__
    fit(**END)

    def record(dataset, indices):
        drawn.extend(indices if dataset.split == "train" else [])
        return whole(dataset, indices)

    monkeypatch.setattr(SinusoidDataset, "__getitems__", record)
    fit(ckpt_path="last", **{"data.meta_batch_size": 2})
    assert drawn[-16:] == list(range(32, 48))


def test_a_checkpoint_of_an_earlier_release_resumes_with_other_settings():
    fit(**COSINE, **END)
    content = read_checkpoint(Path("run") / LAST)
    del content["fresh"], content["settings"]
    torch.save(content, Path("run") / LAST)
    cli = fit(**{**COSINE, "lr_scheduler.T_max": 6, "model.outer_lr": 0.02}, ckpt_path="last")
    assert group(cli)["lr"] == pytest.approx(cosine(0.02, 3, 6))
    torch.save(content, Path("run") / LAST)
    with pytest.raises(SettingError, match="SGD cannot continue"):
        fit(**SGD, **COSINE, ckpt_path="last")


class Doubles(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_of_another_precision_resumes_exactly(precision, averaged):
    flags = {"model.net": "tests.training.test_resume.Doubles", "trainer.precision": precision, **COSINE}
    if averaged:
        flags |= {"trainer.callbacks+": "EMAWeightAveraging", "trainer.callbacks.decay": 0.5}
    fit("whole", **flags)
    fit("halted", **flags, **MIDDLE)
    fit("halted", **flags, ckpt_path="last")
    whole, halted = (read_checkpoint(Path(run) / LAST)["state_dict"] for run in ("whole", "halted"))
    assert whole["net.0.weight"].dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert all(torch.equal(value, halted[name]) for name, value in whole.items())


def test_weights_begin_in_the_precision_that_they_were_trained_in():
    doubles = {"trainer.precision": "64-true"}
    fit(**doubles, **END)
    cli = fit("other", initial_checkpoint=Path("run") / LAST, **doubles, **{"trainer.max_epochs": 0})
    theirs = read_checkpoint(Path("run") / LAST)["state_dict"]
    assert all(torch.equal(value, theirs[name]) for name, value in cli.model.state_dict().items())


@pytest.mark.parametrize("name", ["omniglot_5way_1shot", FOLDER / "omniglot_5way_1shot.ckpt"])
def test_a_network_without_training_state_cannot_be_resumed(name):
    flags = {"data": "GlyphsDataModule", "data.ways": 5}
    with pytest.raises(
        SettingError, match=rf"ckpt_path {name} .*start a new run from it with --initial_checkpoint {name}"
    ):
        main(words("fit", **flags, ckpt_path=name))
    assert not list(Path().iterdir())


def test_best_without_training_state_cannot_be_resumed():
    fit(**END, **{"checkpoint.save_weights_only": "true"})
    best = Path("run/lightning_logs/version_0/checkpoints/best.ckpt")
    with pytest.raises(SettingError, match=rf"--initial_checkpoint {best}"):
        fit(ckpt_path=best)


# ckpt_path last looks where the run would write.
PLACES = [
    ({"trainer.logger": "false"}, "run/checkpoints"),
    ({"checkpoint.dirpath": "kept"}, "kept"),
    (
        {"trainer.logger": "TensorBoardLogger", "trainer.logger.save_dir": "logs"},
        "logs/lightning_logs/version_0/checkpoints",
    ),
    (
        {"trainer.logger": "TensorBoardLogger", "trainer.logger.save_dir": "logs", "trainer.logger.name": "mine"},
        "logs/mine/version_0/checkpoints",
    ),
    (
        {"trainer.logger": "TensorBoardLogger", "trainer.logger.save_dir": "logs", "trainer.logger.version": "one"},
        "logs/lightning_logs/one/checkpoints",
    ),
    ({"trainer.logger": "true"}, "run/lightning_logs/version_0/checkpoints"),
]


@pytest.mark.parametrize(("flags", "place"), PLACES)
def test_last_is_where_the_run_writes(flags, place):
    fit(**flags, **END)
    assert (Path(place) / "last.ckpt").is_file()
    cli = fit(**flags, ckpt_path="last")
    assert cli.trainer.global_step == 12
    assert read_checkpoint(Path(place) / "last.ckpt")["global_step"] == 12
    assert len(list(Path().rglob("last.ckpt"))) == 1


def test_last_of_a_csv_logger_and_of_a_list_of_loggers():
    flags = {"trainer.logger": "CSVLogger", "trainer.logger.save_dir": "logs"}
    fit(**flags, **END)
    assert fit(**flags, ckpt_path="last").trainer.global_step == 12
    loggers = [
        "--trainer.logger+=TensorBoardLogger",
        "--trainer.logger.save_dir=list",
        "--trainer.logger+=CSVLogger",
        "--trainer.logger.save_dir=list",
    ]
    main([*words("fit", **{**SMALL, **END}), *loggers])
    assert main([*words("fit", **SMALL, ckpt_path="last"), *loggers]).trainer.global_step == 12


@pytest.mark.parametrize(("flags", "place"), [PLACES[0], PLACES[1], PLACES[4]])
def test_a_run_does_not_replace_the_checkpoints_of_another(flags, place):
    fit(**flags, **END)
    before = (Path(place) / "last.ckpt").read_bytes()
    with pytest.raises(SettingError, match=rf"fit would replace {place}/last.ckpt.*--ckpt_path last, or give another"):
        fit(**flags)
    other = fit("elsewhere").trainer.checkpoint_callback.dirpath
    with pytest.raises(SettingError, match=r"fit would replace"):
        fit(**flags, ckpt_path=Path(other) / "last.ckpt")
    assert (Path(place) / "last.ckpt").read_bytes() == before
    assert last_checkpoint(Path(place), "") == Path(place) / "last.ckpt"


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val/accuracy", "max"), ("val/loss", "min"), ("val/accuracy_step_1", "max"), ("my_error", "min")],
)
def test_the_mode_follows_the_score(monitor, mode):
    assert direction(monitor, "checkpoint.mode") == mode


def test_a_score_that_does_not_tell_its_mode_is_asked_for():
    with pytest.raises(SettingError, match=r"monitored val/bananas may be better high or low; give --checkpoint.mode"):
        fit(**{"checkpoint.monitor": "val/bananas"})
    with pytest.raises(SettingError, match=r"give --trainer.callbacks.mode max or min"):
        fit(**{**STOPPING, "trainer.callbacks.monitor": "val/bananas"})
    assert not list(Path().iterdir())


@pytest.mark.parametrize(("by_hand", "mode"), [({}, "max"), ({"mode": "min"}, "min")])
def test_whatever_monitors_accuracy_takes_the_largest_unless_told_otherwise(by_hand, mode):
    flags = {"trainer.callbacks": "EarlyStopping", "lr_scheduler": "ReduceLROnPlateau"}
    for key in ("checkpoint", "trainer.callbacks", "lr_scheduler"):
        flags[f"{key}.monitor"] = "val/accuracy"
        flags |= {f"{key}.mode": value for value in by_hand.values()}
    cli = main(words("fit", **{**TINY, **flags, "trainer.max_epochs": 0}))
    stopping, plateau = cli.config.fit.trainer.callbacks[0].init_args, cli.config.fit.lr_scheduler.init_args
    assert cli.trainer.checkpoint_callback.mode == mode
    assert [stopping.mode, plateau.mode] == [mode, mode]


def damaged_state(content, what):
    """A checkpoint's content without, or with another, part of its training state."""
    if what == "no version":
        del content["pytorch-lightning_version"]
    elif what == "no learning rate":
        del content["optimizer_states"][0]["param_groups"][0]["lr"]
    elif what == "no optimizer":
        content["optimizer_states"] = []
    elif what == "no loops":
        content["loops"] = {}
    elif what == "callbacks that are text":
        content["callbacks"] = "x"
    elif what == "a callback whose name calls":
        content["callbacks"] = {"ModelCheckpoint{'monitor': print()}": {}}
    elif what == "no data":
        content["settings"]["data"] = None
    else:
        content[what] = "x"
    return content


@pytest.mark.parametrize(
    "what",
    [
        *("no version", "no learning rate", "no optimizer", "no loops", "callbacks that are text"),
        *("a callback whose name calls", "no data", "settings", "fresh", "hyper_parameters"),
    ],
)
def test_a_damaged_training_state_is_one_line_and_leaves_nothing(folder, checkpoint, what):
    torch.save(damaged_state(torch.load(checkpoint, weights_only=True), what), folder / "bad.ckpt")
    with pytest.raises(SettingError, match=r"ckpt_path bad\.ckpt was not loaded: its training state is damaged"):
        main(words("fit", **{**TINY, "trainer.max_epochs": 2}, ckpt_path="bad.ckpt"))
    assert [path.name for path in folder.iterdir()] == ["bad.ckpt"]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_weights_that_are_no_dense_tensors_are_one_line(folder, checkpoint, kind):
    content = torch.load(checkpoint, weights_only=True)
    turn = {"sparse": torch.Tensor.to_sparse, "meta": lambda value: value.to("meta")}[kind]
    content["state_dict"] = {name: turn(value) for name, value in content["state_dict"].items()}
    torch.save(content, folder / "bad.ckpt")
    for command in ("fit", "test"):
        with pytest.raises(SettingError, match=r"bad\.ckpt holds no state_dict of dense tensors"):
            main(words(command, **TINY if command == "fit" else DATA, ckpt_path="bad.ckpt"))
