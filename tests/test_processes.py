"""The command line as people run it: as a process, piped or in a terminal, with everything at its defaults."""

import os
import re
import shlex
import socket
import sys
import time

import psutil
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from cli import main
from maml_lightning import MAML, ConvNet, GlyphsDataModule, NonFiniteError, SettingError
from maml_lightning.cli import console
from maml_lightning.processes import every_process, rows_of_every_process
from tests.runs import ROOT, TINY, end, in_terminal, process, run, words

pytestmark = pytest.mark.usefixtures("folder")

DDP = {"trainer.strategy": "ddp", "trainer.devices": 2}
CLI = (sys.executable, str(ROOT / "cli.py"))


def left_over(folder):
    """Processes that still run in a folder after some seconds, this one apart."""
    for _ in range(100):
        every = psutil.process_iter(["cwd"])
        found = [each.pid for each in every if each.info["cwd"] == str(folder) and each.pid != os.getpid()]
        if not found:
            break
        time.sleep(0.1)
    return found


def last_line(printed):
    return printed.strip().splitlines()[-1].strip()


@pytest.mark.long
def test_a_run_says_what_came_out_and_the_next_command_runs(folder):
    ended = run(*words("fit", **TINY))
    assert ended.returncode == 0, ended.stderr
    printed = ended.stdout + ended.stderr
    for noise in ("litlogger", "weights_only", "FLOPs", "MeanMetric", "CatMetric", "Warning"):
        assert noise not in printed
    best = re.search(r"Best val/accuracy: (0\.\d+) \((\S+best.ckpt)\)\. Test it: (.*)", ended.stderr)
    score = torch.load(best[2], weights_only=True)["callbacks"]
    (score,) = [value["best_model_score"] for name, value in score.items() if name.startswith("ModelCheckpoint")]
    assert float(best[1]) == pytest.approx(score.item(), abs=1e-4)
    ended = end(process(*shlex.split(best[3])[2:], program=CLI))
    assert ended.returncode == 0, ended.stderr
    assert (folder / "lightning_logs" / "version_1" / "test_results.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("terminal", [False, True], ids=["piped", "terminal"])
def test_two_processes_end_with_the_progress_bar_on(folder, terminal):
    own = {"trainer.callbacks+": "tests.own_callbacks.LogsForAll"}  # before or after which the bar reads metrics
    command = words("fit", **{**TINY, **DDP, **own, "trainer.max_epochs": 2})
    if terminal:
        status, printed = in_terminal([*CLI, *command], timeout=150)
        assert "loss: " in printed  # the bar
    else:
        ended = end(process(*command), timeout=150)
        status, printed = ended.returncode, ended.stderr
    assert status == 0, printed
    assert printed.count("Best val/accuracy") == 1
    assert left_over(folder) == []


@pytest.mark.long
def test_an_evaluation_that_is_not_finite_in_one_process_ends_both_with_one_line(folder):
    ended = run(*words("fit", **{**TINY, "data": "tests.own_data.BrokenValidation"}, **DDP))
    assert ended.returncode == 1
    assert re.match(
        r"error: An adapted network's output is not finite \(val split, episodes 3\)", last_line(ended.stderr)
    ), ended.stderr
    assert ended.stderr.count("error:") == 1
    assert "Traceback" not in ended.stderr
    assert left_over(folder) == []


@pytest.mark.long
def test_a_busy_port_ends_the_run_and_leaves_no_process(folder):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        ended = end(process(*words("fit", **TINY, **DDP), MASTER_ADDR="127.0.0.1", MASTER_PORT=port), timeout=100)
    assert ended.returncode == 1
    assert last_line(ended.stderr).startswith("error: "), ended.stderr
    assert port in last_line(ended.stderr)
    assert "Traceback" not in ended.stderr
    assert left_over(folder) == []


REFUSED = [
    ({"trainer.devices": 0}, r"devices='?0'?.* is not a valid input"),
    ({"trainer.max_epochs": -5}, r"`max_epochs` must be a non-negative integer or -1\. You passed in -5\."),
    ({"trainer.accelerator": "quantum"}, r"accelerator='quantum'`\. Available names are: .*cpu"),
    ({"data.ways": "null"}, r"model\.net\.out_features must be at least 1 \(got None\); raise data\.ways"),
    ({"data.shots": "null"}, r"data\.shots must be an integer \(got None\); give one of at least 1"),
    ({"ckpt_path": ""}, r"ckpt_path is empty \(a shell variable that is not set\?\)"),
    ({"data.root": ""}, r"data\.root is empty"),
    ({"config": "binary.yaml"}, r"config binary\.yaml is not a text file .*; give one in YAML"),
    ({"config": "nowhere.yaml"}, r"nowhere\.yaml"),
    ({"data": "Omnigloot"}, r"Omnigloot"),
    ({"model.inner_lr": "much"}, r"model\.inner_lr.*much"),
    ({"trainer.accumulate_grad_batches": 0}, r"trainer\.accumulate_grad_batches must be above 0 \(got 0\)"),
    ({"trainer.check_val_every_n_epoch": 0}, r"trainer\.check_val_every_n_epoch must be above 0"),
    ({"trainer.val_check_interval": 0}, r"trainer\.val_check_interval must be above 0"),
    ({"trainer.val_check_interval": 100}, r"val_check_interval.*100"),  # Lightning's, when data are loaded
    ({"trainer.limit_train_batches": 0.1}, r"limit_train_batches"),
    ({"model.loss": "torch.nn.functional.relu"}, r"model\.loss relu "),
    ({"model.loss": "torch.nn.functional.mse_loss"}, r"model\.loss mse_loss cannot be computed from outputs \[3, 3\]"),
    ({"optimizer": "SparseAdam"}, r"SparseAdam"),
    ({"trainer.default_root_dir": "/proc/none"}, r"/proc/none"),
    ({"trainer.max_time": "soon"}, r"soon"),
    ({"optimizer": "SGD", "optimizer.lr": -1}, r"Invalid learning rate: -1"),
    (
        {**DDP, "data.ways": 30},
        r"data\.ways is 30, but the train split has 8",
    ),
    (
        {**DDP, "data.meta_batch_size": 1},
        r"data\.meta_batch_size \(1\) must be a multiple of the number of processes \(2\); use 2",
    ),
    (
        {**DDP, "trainer.sync_batchnorm": "true"},
        r"sync_batchnorm true is not",
    ),
]


@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_refused_is_one_line_and_leaves_nothing(folder, monkeypatch, capsys, bad, message):
    (folder / "binary.yaml").write_bytes(bytes(range(128, 256)))
    monkeypatch.setattr(sys, "argv", ["cli.py", *words("fit", **{**TINY, **bad})])
    with pytest.raises(SystemExit) as ended:
        console()
    line = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err.strip()
    assert re.match(rf"error: .*{message}", line)
    assert "\n" not in line
    assert [path.name for path in folder.iterdir()] == ["binary.yaml"]


class Faulty(nn.Module):
    def __init__(self, out_features: int = 2):
        super().__init__()
        self.layer = nn.Linear(784, out_features)

    def forward(self, x):
        return {}["no such key"]


@pytest.mark.parametrize("asked", ["no", "flag", "variable"])
def test_an_error_of_the_users_own_code_names_its_line_and_the_traceback_is_a_flag_away(folder, monkeypatch, asked):
    tiny = {key: value for key, value in TINY.items() if not key.startswith("model.net")}
    flags = words("fit", **tiny, **{"model.net": "tests.test_processes.Faulty"})
    monkeypatch.setattr(sys, "argv", ["cli.py", *flags, *(["--traceback"] if asked == "flag" else [])])
    if asked == "variable":
        monkeypatch.setenv("MAML_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(SystemExit if asked == "no" else KeyError) as ended:
        console()
    if asked == "no":
        assert re.match(
            r"error: 'no such key' \(KeyError at .*test_processes\.py, line \d+; --traceback", ended.value.code
        )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("flags", [{"overfit_batches": 1}, {"enable_checkpointing": "false"}, {"fast_dev_run": "true"}])
def test_what_the_trainer_offers_works(flags):
    cli = main(words("fit", **TINY, **{f"trainer.{key}": value for key, value in flags.items()}))
    assert cli.trainer.global_step == (2 if "enable_checkpointing" in flags else 1)


def test_stochastic_weight_averaging_names_what_works_with_batch_normalization():
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[StochasticWeightAveraging(0.01)], logger=False)
    data = GlyphsDataModule(ways=3, meta_batch_size=2, train_episodes=8, val_episodes=2, train_classes=8, val_classes=8)
    with pytest.raises(SettingError, match=r"StochasticWeightAveraging is not .*; use EMAWeightAveraging"):
        trainer.fit(MAML(ConvNet(out_features=3, hidden_channels=4, blocks=2)), data)


def test_overfitting_repeats_its_episodes():
    seen = []

    class Seen(MAML):
        def training_step(self, batch, batch_idx):
            seen.append(batch.support_inputs)
            return super().training_step(batch, batch_idx)

    data = GlyphsDataModule(ways=3, meta_batch_size=2, train_episodes=8, val_episodes=2, train_classes=8, val_classes=8)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        overfit_batches=2,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(Seen(ConvNet(out_features=3, hidden_channels=4, blocks=2), tasks_per_chunk=None), data)
    assert len(seen) == 6
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[5])
    assert not torch.equal(seen[0], seen[1])


def test_where_all_meta_steps_are_skipped_nothing_was_learned():
    broken = {"model.inner_lr": 1e30, "model.non_finite": "skip", "trainer.limit_val_batches": 0}
    with pytest.raises(NonFiniteError, match=r"2 of 2 meta-steps were skipped.*: nothing was learned; lower"):
        main(words("fit", **{**TINY, **broken}))


@pytest.mark.long
def test_anomaly_detection_has_nothing_to_report():
    ended = run(*words("fit", **TINY, **{"trainer.detect_anomaly": "true"}))
    assert ended.returncode == 0, ended.stderr
    assert "Error detected" not in ended.stderr
    assert len(ended.stderr.splitlines()) < 20


def test_barebones_trains_and_writes_nothing(folder):
    bare = {key: value for key, value in TINY.items() if key != "trainer.log_every_n_steps"}
    cli = main(words("fit", **bare, **{"trainer.barebones": "true"}))
    assert cli.trainer.global_step == 2
    assert list(folder.iterdir()) == []


def test_one_process_is_every_process():
    values = torch.tensor([1.0, 2.0])
    assert every_process(values).tolist() == [[1.0, 2.0]]
    assert rows_of_every_process(values[None]).tolist() == [[1.0, 2.0]]


def test_a_setting_that_is_wrong_starts_no_process(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(SettingError, match=r"data\.ways is 30"):
        main(words("fit", **{**TINY, "data.ways": 30}, **DDP))
