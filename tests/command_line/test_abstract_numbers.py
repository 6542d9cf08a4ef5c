"""Transforms whose arguments are numbers or sequences are saved as they were given, and run again from there."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cli import main
from tests.runs import TINY, words

V2 = "torchvision.transforms.v2"
GIVEN = [
    {"class_path": f"{V2}.RandomAffine", "init_args": {"degrees": 10, "shear": 2.5, "interpolation": "bilinear"}},
    {"class_path": f"{V2}.RandomAffine", "init_args": {"degrees": [-5, 7.5], "scale": [0.9, 1.1]}},
    {"class_path": f"{V2}.RandomRotation", "init_args": {"degrees": 0.5, "fill": [1, 2, 3]}},
    {"class_path": f"{V2}.ColorJitter", "init_args": {"brightness": 0.4, "contrast": [0.8, 1.2]}},
    {
        "class_path": f"{V2}.RandomApply",
        "init_args": {"transforms": [{"class_path": f"{V2}.RandomRotation", "init_args": {"degrees": 5}}]},
    },
]


def settings_of(config: dict) -> list[dict]:
    """What was given of each transform, as a config has it."""
    found = config["data"]["init_args"]["augmentation"]
    return [
        {key: value for key, value in each["init_args"].items() if key in given["init_args"]}
        for each, given in zip(found, GIVEN, strict=True)
    ]


def test_numbers_or_sequences_are_saved_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split, first in (("train", 0), ("val", 10)):
        pictures = random.integers(0, 256, (24, 3, 8, 8), np.uint8)
        np.savez(f"{split}.npz", inputs=pictures, labels=np.repeat(np.arange(first, first + 6), 4))
    Path("given.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"augmentation": GIVEN}}}))
    flags = {key: value for key, value in TINY.items() if not key.endswith("classes") and key != "data"}
    flags |= {"data": "ArraysDataModule", "data.train": "train.npz", "data.val": "val.npz", "model.net.in_channels": 3}
    first = main(["fit", "--data", "ArraysDataModule", "--config", "given.yaml", *words("fit", **flags)[1:]])
    run = Path(first.trainer.log_dir)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    expected = [{**each["init_args"]} for each in GIVEN]
    found = settings_of(saved)
    found[-1]["transforms"] = [
        {"class_path": each["class_path"], "init_args": {"degrees": each["init_args"]["degrees"]}}
        for each in found[-1]["transforms"]
    ]
    assert found == expected
    assert "Unable" not in (run / "config.yaml").read_text()
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert "Unable" not in repr(checkpoint)
    again = main(["fit", "--config", str(run / "config.yaml")])
    assert again.datamodule.pictures.augmentation[0].degrees == [-10.0, 10.0]
    assert again.datamodule.pictures.augmentation[2].degrees == [-0.5, 0.5]
    for ours, theirs in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
