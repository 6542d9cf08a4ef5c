"""Fixtures shared by all tests."""

import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cli import main
from tests.runs import TINY, words

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch does when it compiles
torch.set_num_threads(1)  # the networks are tiny here: more threads only wait for each other

ARCHIVES = Path(__file__).parents[2] / "shared" / "data" / "omniglot-py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that short ones fill up the workers' ends."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same networks whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def omniglot_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ROOT with the whole Omniglot tree, unzipped once; skips where the archives are not at hand."""
    archives = [ARCHIVES / f"{part}.zip" for part in ("images_background", "images_evaluation")]
    if not all(archive.exists() for archive in archives):
        pytest.skip(f"the Omniglot archives are not in {ARCHIVES}")
    root = tmp_path_factory.mktemp("omniglot")
    for archive in archives:
        with zipfile.ZipFile(archive) as file:
            file.extractall(root / "omniglot-py")
    return root


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of one tiny run."""
    folder = tmp_path_factory.mktemp("run")
    main(words("fit", **TINY, **{"trainer.default_root_dir": folder}))
    return folder / "lightning_logs" / "version_0"


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    """The last checkpoint of the tiny run."""
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; skips where it may not be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs may be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
