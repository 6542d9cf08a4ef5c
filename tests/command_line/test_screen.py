from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from torch import nn

from maml_lightning.command_line.screen import header
from tests.runs import ROOT, TINY, in_terminal, words


def test_the_header_names_what_will_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"inner_steps": 3, "first_order": True, "head": "prototypes"},
        "data": {"class_path": "maml_lightning.GlyphsDataModule", "init_args": {"ways": 7, "shots": 2}},
    }
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path)
    assert header(config, nn.Linear(4, 2), trainer) == (
        "FOMAML, 3 inner steps, head prototypes; 7-way 2-shot of GlyphsDataModule; Linear, 10 parameters in 2 tensors; "
        "on cpu; logs in lightning_logs/version_0"
    )
    trainer = Trainer(accelerator="cpu", logger=False, devices=2)
    sinusoids = {"class_path": "maml_lightning.SinusoidsDataModule", "init_args": {"shots": 10}}
    assert header({"model": {"inner_steps": 1}, "data": sinusoids}, nn.Linear(1, 1), trainer) == (
        "MAML, 1 inner step; 10-shot of SinusoidsDataModule; Linear, 2 parameters in 2 tensors; on cpu, 2 processes; "
        "no logs"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_fit_begins_with_the_header_in_a_terminal(tmp_path):
    command = ["python", str(ROOT / "cli.py"), *words("fit", **{**TINY, "trainer.default_root_dir": tmp_path})]
    status, printed = in_terminal(command)
    assert status == 0, printed
    line = next(line for line in printed.splitlines() if "parameters in" in line)
    assert line.startswith("MAML, 1 inner step; 3-way 1-shot of GlyphsDataModule; ConvNet, ")
    assert Path(line.rpartition("logs in ")[2].rstrip(".\r")).name == "version_0"
