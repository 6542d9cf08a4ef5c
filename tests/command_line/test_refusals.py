"""What the command line refuses, it refuses in one message and before it writes anything."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cli import main
from maml_lightning import SettingError
from tests.runs import DATA, TINY, omniglot, run, words

FIXED = {**DATA, "model.net": "tests.own_network.FixedNet"}
pytestmark = pytest.mark.usefixtures("folder")


def test_wrong_output_size_leaves_nothing(folder):
    with pytest.raises(SettingError, match=r"3 outputs, but the episodes have 4 classes"):
        main(words("fit", **{**FIXED, "data.ways": 4}))
    assert list(folder.iterdir()) == []


def test_checkpoint_of_other_ways_leaves_nothing(folder, checkpoint):
    with pytest.raises(SettingError, match=r"net.head.weight is \(3, 4\) in it and \(4, 4\).*data.ways"):
        main(words("test", **{**DATA, "data.ways": 4}, ckpt_path=checkpoint))
    assert list(folder.iterdir()) == []


def test_settings_that_maml_does_not_know_are_no_obstacle(folder, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["of_another_release"] = 1
    torch.save(content, folder / "other.ckpt")
    assert main(words("validate", **DATA, ckpt_path=folder / "other.ckpt")).model.inner_lr == 0.3


def test_no_ways_names_the_ways():
    with pytest.raises(SettingError, match=r"got 0\); raise data.ways"):
        main(words("fit", **{**TINY, "data.ways": 0}))


@pytest.mark.parametrize(
    ("bad", "named"),
    [({"data": "Omnigloot"}, "Omnigloot"), ({"model.inner_lr": "much"}, "model.inner_lr"), ({"mode.net": 1}, "mode")],
)
def test_what_cannot_be_parsed_is_named_without_screens_of_usage(bad, named, folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(words("fit", **{**TINY, **bad}))
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert named in message
    assert "usage" not in message
    assert len(message.splitlines()) < 15
    assert list(folder.iterdir()) == []


def test_a_truncated_picture_is_named(folder, omniglot_root):
    whole, copy = omniglot_root / "omniglot-py", folder / "data" / "omniglot-py"
    for alphabet in whole.glob("images_*/*"):
        (copy / alphabet.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / alphabet.parent.name / alphabet.name).symlink_to(alphabet)
    # the very first picture is the one that is cut in half
    (first := copy / "images_background" / "Alphabet_of_the_Magi").unlink()
    for character in (whole / "images_background" / "Alphabet_of_the_Magi").iterdir():
        (first / character.name).mkdir(parents=True)
        for picture in character.iterdir():
            (first / character.name / picture.name).write_bytes(picture.read_bytes())
    broken = min(first.glob("*/*.png"))
    broken.write_bytes(broken.read_bytes()[:100])
    ended = run(*omniglot(folder / "data"))
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1
    assert last.startswith(f"error: {broken} cannot be read (it is not a complete image)")
    assert "Traceback" not in ended.stderr
    assert not (folder / "lightning_logs").exists()


def test_loss_by_import_path(folder):
    losses = [
        main(words("fit", **TINY, **{"model.loss": loss})).trainer.logged_metrics["train/loss"].item()
        for loss in ("torch.nn.functional.cross_entropy", "tests.command_line.test_refusals.tenfold")
    ]
    assert losses[1] > 5 * losses[0]


def tenfold(outputs: Tensor, targets: Tensor) -> Tensor:  # jsonargparse wants the annotation
    return 10 * F.cross_entropy(outputs, targets)
