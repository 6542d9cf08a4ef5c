"""Every config runs, shrunk to seconds."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cli import main
from maml_lightning import SettingError
from tests.runs import ROOT, words

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VARIANTS = sorted((ROOT / "configs" / "variants").glob("*.yaml"))
SHORT = {
    "data.meta_batch_size": 4,
    "data.train_episodes": 8,
    "data.val_episodes": 4,
    "model.tasks_per_chunk": "null",
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
}
SMALL = {"model.net.hidden_channels": 4}  # all layers: configs name some
GLYPHS = {"data.train_classes": 8, "data.val_classes": 8}

pytestmark = pytest.mark.usefixtures("folder")


def fit(*configs, **flags):
    cli = main(["fit", *(f"--config={config}" for config in configs), *words(**flags)])
    assert cli.trainer.global_step == 2
    run = Path(cli.trainer.log_dir)
    assert (run / "checkpoints" / "best.ckpt").is_file()
    return cli


@pytest.fixture
def pictures(folder):
    """Folders of noise, enough for five ways in each split."""
    noise = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in range(5):
            of_class = folder / "pictures" / split / f"{split} {label}"
            of_class.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(noise.integers(0, 256, (28, 28, 3), np.uint8)).save(of_class / f"{number}.png")
    return folder / "pictures"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_run(config, request):
    settings = yaml.safe_load(config.read_text())
    functions = "function" in settings.get("data", {}).get("init_args", {})
    sinusoids = config.stem.startswith("sinusoids")
    flags = {} if sinusoids or functions or "initial_checkpoint" in settings else SMALL
    if config.stem.startswith("omniglot"):
        flags = {**flags, "data.root": request.getfixturevalue("omniglot_root")}
    elif config.stem.startswith("images"):
        flags = {**flags, "data.root": request.getfixturevalue("pictures"), "data.size": 28, "data.query_shots": 2}
    elif not sinusoids and not functions:
        flags = {**flags, **GLYPHS}
    fit(config, **SHORT, **flags)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.stem)
def test_variants_run_over_any_config(variant):
    flags = {"model.net.pretraining_classes": 8} if variant.stem == "pretrained" else {}
    cli = fit(ROOT / "configs" / "glyphs_5way_1shot.yaml", variant, **SHORT, **SMALL, **GLYPHS, **flags)
    asked = yaml.safe_load(variant.read_text())["model"]
    for name, value in asked.items():
        if name != "net":
            assert cli.model.hparams[name] == value
    if variant.stem == "maml_plus_plus":
        assert isinstance(cli.model.lr_schedulers(), torch.optim.lr_scheduler.CosineAnnealingLR)


def settings_of(*configs, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *(f"--config={config}" for config in configs), "--data.root=data", "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_config_overrides_those_that_it_names(folder, capsys):
    (folder / "own.yaml").write_text("config: [omniglot_20way_1shot_best]\ndata: {init_args: {shots: 3}}")
    (folder / "alone.yaml").write_text("data: {init_args: {shots: 3}}")
    own = settings_of("own.yaml", capsys=capsys)
    base = settings_of("omniglot_20way_1shot_best", capsys=capsys)
    assert (own["data"]["init_args"]["ways"], own["trainer"]["max_epochs"], own["trainer"]["precision"]) == (
        20,
        18,
        "bf16-mixed",
    )
    base["data"]["init_args"]["shots"] = 3
    assert own == base == settings_of("omniglot_20way_1shot_best", "alone.yaml", capsys=capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config: [own.yaml]", r"--config own.yaml overrides itself; remove it from the key config of own.yaml"),
        ("config: other", r"--config own.yaml: its key config is 'other'; give a list of names or files"),
        ("config: [omniglot_20way]", r"--config omniglot_20way: there is no such file, and no config of that name"),
    ],
)
def test_what_a_config_cannot_override_is_named(folder, content, message):
    (folder / "own.yaml").write_text(content)
    with pytest.raises(SettingError, match=message):
        main(["fit", "--config=own.yaml"])
    assert [file.name for file in folder.iterdir()] == ["own.yaml"]
