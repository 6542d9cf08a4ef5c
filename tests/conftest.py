"""Fixtures shared by all tests."""

import zipfile
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the networks are tiny here: more threads only wait for each other

ARCHIVES = Path(__file__).parents[2] / "shared" / "data" / "omniglot-py"


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
