import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import nn

from maml_lightning import MAML, TestReport
from maml_lightning.cli import main
from maml_lightning.command_line.progress import Bar, with_bar
from maml_lightning.command_line.screen import end_of_test, header
from maml_lightning.trained import packaged
from tests.runs import ROOT, TINY, in_terminal, words


def test_the_header_names_what_will_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"inner_steps": 3, "first_order": True, "head": "prototypes"},
        "data": {"class_path": "maml_lightning.GlyphsDataModule", "init_args": {"ways": 7, "shots": 2}},
    }
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path)
    assert header(config, MAML(nn.Linear(4, 2)), trainer) == (
        "FOMAML, 3 inner steps, head prototypes; 7-way 2-shot of GlyphsDataModule; Linear, 10 parameters in 2 tensors; "
        "on cpu; logs in lightning_logs/version_0"
    )
    trainer = Trainer(accelerator="cpu", logger=False, devices=2)
    sinusoids = {"class_path": "maml_lightning.SinusoidsDataModule", "init_args": {"shots": 10}}
    assert header({"model": {"inner_steps": 1}, "data": sinusoids}, MAML(nn.Linear(1, 1)), trainer) == (
        "MAML, 1 inner step; 10-shot of SinusoidsDataModule; Linear, 2 parameters in 2 tensors; on cpu, 2 processes; "
        "no logs"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_packaged_checkpoint_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, config = Trainer(accelerator="cpu", logger=False), {"ckpt_path": str(packaged("omniglot"))}
    text = "Linear, 2 parameters in 2 tensors; checkpoint omniglot; on cpu; no logs"
    assert header(config, MAML(nn.Linear(1, 1)), trainer, "test") == text
    other = {"ckpt_path": tmp_path / "runs" / "last.ckpt"}
    assert "; checkpoint runs/last.ckpt; " in header(other, MAML(nn.Linear(1, 1)), trainer)


@pytest.mark.long
def test_fit_begins_with_the_header_in_a_terminal(tmp_path):
    command = ["python", str(ROOT / "cli.py"), *words("fit", **{**TINY, "trainer.default_root_dir": tmp_path})]
    status, printed = in_terminal(command)
    assert status == 0, printed
    line = next(line for line in printed.splitlines() if "parameters in" in line)
    assert line.startswith("MAML, 1 inner step; 3-way 1-shot of GlyphsDataModule; ConvNet, ")
    assert Path(line.rpartition("logs in ")[2].rstrip(".\r")).name == "version_0"


NOISE = ("Seed set", "GPU available", "TPU available", "Restoring states", "stopped:", "logging interval", "v_num")


def rows(printed):
    """What a terminal's rows held one after another, without colors."""
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "\n", re.sub(r"\x1b\[[\d;]*m", "", printed))
    return [row for row in re.split(r"[\r\n]+", plain) if row.strip()]


@pytest.mark.long
def test_each_command_begins_with_a_header_and_ends_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = ["python", str(ROOT / "cli.py")]
    status, printed = in_terminal([*program, *words("fit", **TINY)])
    assert status == 0, printed
    assert [noise for noise in NOISE if noise in printed] == []
    header_row, *_, last = rows(printed)
    assert header_row.startswith("MAML, 1 inner step; 3-way 1-shot of GlyphsDataModule; ConvNet, ")
    bars = [row for row in rows(printed) if "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in row]
    assert any(re.match(r"Epoch 0/0 +\S+ \d/2 \S+ loss: \d\.\d+, accuracy: \d\.\d+", bar) for bar in bars)
    assert max(map(len, bars)) <= 80
    assert any(
        re.match(r"Epoch 0, 2 meta-steps: val/accuracy \d\.\d{4}, val/loss \d\.\d{3}$", r) for r in rows(printed)
    )
    following = shlex.split(last.partition("Test it: ")[2])
    assert following[2] == "test"
    status, printed = in_terminal(following)
    assert status == 0, printed
    assert [noise for noise in NOISE if noise in printed] == []
    header_row, *_, last = rows(printed)
    assert header_row.startswith("MAML, 2 inner steps; 3-way 1-shot of GlyphsDataModule; ConvNet, ")
    assert (
        "; checkpoint lightning_logs/version_0/checkpoints/best.ckpt; on cpu; logs in lightning_logs/version_1."
        in header_row
    )
    assert len([row for row in rows(printed) if "test/accuracy_step_2" in row]) == 1
    assert f" predict --ckpt_path {following[-1]} --data SupportQueryDataModule " in last


def test_own_bars_and_none_are_left_as_they_are():
    own, other = Bar(), TQDMProgressBar()
    assert [type(each) for each in with_bar([TestReport()], {})] == [Bar, TestReport]
    assert with_bar([], {"callbacks": [other]}) == with_bar([], {"callbacks": other}) == []
    assert with_bar([own], {"enable_progress_bar": False}) == [own]
    assert with_bar([], {"barebones": True}) == []


def test_scores_are_a_table_that_verbose_switches_off(folder, capsys):
    short = {**TINY, "data.test_episodes": 4, "trainer.logger": False, "trainer.enable_progress_bar": False}
    maml = main(words("test", **short)).model
    (row,) = [row for row in capsys.readouterr().out.splitlines() if " test/accuracy " in row]
    assert float(row.split("│")[2]) == pytest.approx(maml.test_scores["accuracy"][:, -1].mean().item(), rel=1e-3)
    main(words("test", **short, verbose=False))
    assert "test/accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ({"net": {"class_path": "maml_lightning.ConvNet", "init_args": {}}, "loss": None}, ""),
        ({"net": {"class_path": "nets.Mine", "init_args": {"width": 8}}}, "--model.net nets.Mine "),
        ({"net": {"class_path": "torch.nn.Linear"}, "loss": "nets.loss"}, "--model.loss nets.loss "),
    ],
)
def test_the_command_that_predicts_names_code_of_ones_own(model, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = SimpleNamespace(inputs=object())
    line = end_of_test({"model": model, "ckpt_path": str(tmp_path / "best.ckpt")}, module)
    assert line.endswith(
        f"predict --ckpt_path best.ckpt {flags}--data SupportQueryDataModule --data.support FOLDER --data.query FOLDER"
    )
