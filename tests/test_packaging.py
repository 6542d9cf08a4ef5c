"""What pip installs is the whole product."""

import os
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import maml_lightning
from cli import main
from maml_lightning import SettingError
from maml_lightning.cli import console
from maml_lightning.command_line import shipped
from tests.runs import ROOT, TINY, words

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*.yaml"))
SOURCES = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "maml_lightning").rglob("*")
    if file.suffix in (".py", ".ckpt", ".typed") and "__pycache__" not in file.parts
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names inside the sdist and the wheel, and the wheel's metadata, built as pip builds them."""
    if not find_spec("setuptools"):
        pytest.skip("building without downloads takes setuptools")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    code = f"from setuptools import build_meta as b; print(b.build_sdist({str(folder)!r}))"
    copied = [
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
    ]
    for name in (*copied, "cli.py", *CONFIGS, *SOURCES, "tests/__init__.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    sdist = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*") if file.is_file()}
    code = f"from setuptools import build_meta as b; print(b.build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=unpacked, check=True, capture_output=True)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as file:
        names = set(file.namelist())
        (metadata,) = (file.read(name).decode() for name in names if name.endswith("/METADATA"))
        (points,) = (file.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    return sdist, names, metadata, points


def test_the_wheel_holds_the_package_its_networks_and_its_configs(built):
    _, names, metadata, points = built
    assert {name for name in names if ".dist-info/" not in name} == {
        *SOURCES,
        *(f"maml_lightning/{config}" for config in CONFIGS),
    }
    assert f"\nVersion: {maml_lightning.__version__}\n" in metadata
    assert "maml-lightning = maml_lightning.cli:console" in points


def test_the_sdist_holds_what_builds_and_tests_it(built):
    sdist, _, _, _ = built
    assert {*SOURCES, *CONFIGS, "cli.py", "tests/__init__.py", "CITATION.cff", "CONTRIBUTING.md"} <= sdist


def test_one_version():
    assert "version" in PROJECT["project"]["dynamic"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == maml_lightning.__version__


def test_configs_by_name_from_any_folder(folder):
    assert shipped.names()[0] == "glyphs_5way_1shot"
    assert {f"configs/{name}.yaml" for name in shipped.names()} == set(CONFIGS)
    for name in ("glyphs_5way_1shot", "variants/anil", "variants/anil.yaml"):
        found = Path(shipped.find(name))
        assert found.read_bytes() == (ROOT / "configs" / name).with_suffix(".yaml").read_bytes()


def test_a_local_file_wins(folder):
    local = folder / "variants" / "anil"
    local.mkdir(parents=True)
    assert Path(shipped.find("variants/anil")).is_absolute()  # a folder is no config
    local.rmdir()
    local.write_text("model: {inner_lr: 0.25}")
    assert shipped.find("variants/anil") == "variants/anil"


def test_the_text_of_a_config_is_left_as_it_is():
    for text in ("{model: {inner_lr: 0.1}}", "model:\n  inner_lr: 0.1", "s3://bucket/config.yaml"):
        assert shipped.find(text) == text


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("omniglot_5way_1sho", "did you mean omniglot_5way_1shot"),
        ("variants/anill", "did you mean variants/anil "),
        ("configs/glyphs_5way_1shot.yaml", "did you mean glyphs_5way_1shot"),
        ("zzz.yaml", "in the package; maml-lightning configs lists them"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(folder, name, near):
    with pytest.raises(SettingError) as refused:
        main(["fit", "--config", name])
    assert str(refused.value).startswith(f"--config {name}: there is no such file")
    assert near in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(folder.iterdir()) == []


def test_a_run_by_names_and_its_saved_config(folder):
    tiny = words(**{key: value for key, value in TINY.items() if key not in ("data", "model.net", "model.inner_lr")})
    run = main(["fit", "--config", "glyphs_5way_1shot", "--config", "variants/anil", *tiny])
    assert (run.model.hparams["adapted_parameters"], run.model.inner_lr) == ("head", 0.4)
    saved = Path(run.trainer.log_dir) / "config.yaml"
    again = main(["fit", "--config", str(saved)])
    assert again.model.hparams["adapted_parameters"] == "head"
    assert again.trainer.global_step == 2


def test_training_ends(folder):
    def epochs(**flags):
        return main(
            words("fit", **{**TINY, "trainer.max_epochs": None, "trainer.limit_train_batches": 0, **flags})
        ).trainer

    assert epochs().max_epochs == 20
    assert epochs(**{"trainer.max_epochs": 3}).max_epochs == 3
    by_steps = epochs(**{"trainer.max_steps": 40000})
    assert (by_steps.max_epochs, by_steps.max_steps) == (-1, 40000)
    assert epochs(**{"trainer.max_time": "00:01:00:00"}).max_epochs == -1


def test_every_config_ends():
    for file in shipped.names():
        epochs = None
        for part in shipped.with_overridden(file):
            epochs = yaml.safe_load(Path(part).read_text()).get("trainer", {}).get("max_epochs", epochs)
        if not file.startswith("variants/"):
            assert 1 <= epochs <= 120


OWN = """
from torch import nn
from maml_lightning import GlyphsDataModule

class MyNet(nn.Sequential):
    def __init__(self, out_features: int = 2):
        super().__init__(nn.Flatten(), nn.Linear(28 * 28, out_features))

class MyData(GlyphsDataModule):
    pass
"""
SCRIPT = "import sys\nfrom maml_lightning.cli import console\nif __name__ == '__main__':\n    sys.exit(console())\n"


@pytest.fixture
def commands(tmp_path_factory):
    """The three ways to call the command line; the first is the script that pip writes for [project.scripts]."""
    assert PROJECT["project"]["scripts"] == {"maml-lightning": "maml_lightning.cli:console"}
    script = tmp_path_factory.mktemp("bin") / "maml-lightning"
    script.write_text(SCRIPT)
    return {"console": [str(script)], "module": ["-m", "maml_lightning"], "cli.py": [str(ROOT / "cli.py")]}


def call(command, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_the_configs_are_listed_and_printed(folder, monkeypatch, capsys):
    def configs(*names):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["maml-lightning", "configs", *names])
        console()
        return capsys.readouterr().out

    lines = configs().splitlines()
    assert [line.split()[0] for line in lines] == shipped.names()
    assert max(map(len, lines)) <= 120
    assert yaml.safe_load(configs("variants/anil")) == {"model": {"adapted_parameters": "head"}}
    with pytest.raises(SystemExit, match=r"^error: --config anill: .* did you mean variants/anil\? "):
        configs("anill")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("configs",), 128 + signal.SIGPIPE),
        (("configs", "omniglot"), 128 + signal.SIGPIPE),
        (("fit", "--help"), 0),  # argparse's choice
    ],
)
def test_a_reader_that_ends_early_is_no_error(words, status):
    """As in ``maml-lightning configs | head -n 1``."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "maml_lightning", *words]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (status, "")


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "devices"), [("console", 1), ("console", 2), ("module", 1), ("cli.py", 1), ("cli.py", 2)]
)
def test_own_network_and_data_from_the_current_folder(folder, commands, way, devices):
    (folder / "my_module.py").write_text(OWN)
    flags = {key: value for key, value in TINY.items() if not key.startswith("model.net")}
    flags = {**flags, "data": "my_module.MyData", "model.net": "my_module.MyNet", "trainer.devices": devices}
    extra = {"trainer.strategy": "ddp"} if devices > 1 else {}
    ended = call(commands[way], *words("fit", **flags, **extra))
    assert ended.returncode == 0, ended.stderr
    saved = yaml.safe_load((folder / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert (saved["data"]["class_path"], saved["model"]["net"]["class_path"]) == ("my_module.MyData", "my_module.MyNet")
    assert (folder / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt").is_file()
