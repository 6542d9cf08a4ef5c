"""A warm classifier, and networks that are exported: one picture by itself, or any number."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_lightning import MAML, Classifier, ConvNet, InputSpec, SettingError, support_set
from maml_lightning.command_line.exporting import main as export
from maml_lightning.data.support_sets import read_images
from maml_lightning.trained import load
from tests.data.test_support_query import SYMBOLS, draw_folder, inverted, plain
from tests.runs import run

LESS = {"in_channels": 1, "out_features": 3, "hidden_channels": 8, "blocks": 3, "pooling": False}


@pytest.fixture
def maml() -> MAML:
    """A network for any number of classes, whose queries are evaluated by themselves."""
    found = MAML(ConvNet(**LESS), inner_lr=0.01, head="prototypes", query_statistics="support").eval()
    found.inputs = InputSpec(ways=3, channels=1, side=28, background=0.0)
    return found


@pytest.fixture
def support(tmp_path: Path) -> Path:
    """Five classes, the last of which has more pictures."""
    draw_folder(tmp_path / "support", plain, 1, each=2)
    plain(4, 99).save(tmp_path / "support" / SYMBOLS[4] / "more.png")
    return tmp_path / "support"


def pictures(count: int) -> list[Image.Image]:
    return [plain(number % 5, 300 + number) for number in range(count)]


@pytest.mark.parametrize("name", ["omniglot_5way_1shot", "mine"])
def test_a_picture_alone_is_classified_as_among_others(name: str, maml: MAML, support: Path):
    classifier = Classifier(maml if name == "mine" else name, support)
    many = classifier(pictures(7))
    alone = [classifier(picture) for picture in pictures(7)]
    assert classifier.names == sorted(SYMBOLS)
    for one, other in zip(alone, many, strict=True):
        assert one.name == other.name == max(one.probabilities, key=one.probabilities.__getitem__)
        assert one.probability == max(one.probabilities.values())
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert [*one.probabilities.values()] == pytest.approx([*other.probabilities.values()], abs=1e-6)


def test_it_predicts_what_the_adapted_network_does(maml: MAML, support: Path):
    classifier = Classifier(maml, support)
    images = torch.rand(3, 1, 28, 28)
    assert classifier.probabilities(images).shape == (3, 5)  # more classes than it was trained on
    inputs, targets, _ = support_set(support, maml.inputs)
    assert targets.bincount().tolist() == [2, 3, 2, 2, 2]
    expected = maml.adapt(inputs, targets).eval()(images).softmax(-1)
    assert torch.allclose(classifier.probabilities(images), expected, atol=1e-6)


def test_a_packaged_network_classifies_drawn_symbols(support: Path):
    classifier = Classifier("omniglot_5way_1shot", support)
    found = [classifier(picture).name for picture in pictures(10)]
    assert sum(name == SYMBOLS[number % 5] for number, name in enumerate(found)) >= 8


def test_pictures_of_any_kind_are_the_same(maml: MAML, support: Path, tmp_path: Path):
    classifier = Classifier(maml, support)
    image = plain(0, 5)
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        image,
        image.convert("RGB"),
        inverted(image),
        pixels,
        pixels[..., None].repeat(3, 2),
        pixels / 255,
        torch.from_numpy(pixels.copy()),
        torch.from_numpy(pixels.copy())[None].float() / 255,
    ]
    expected = classifier(image)
    for prediction in classifier(forms):
        assert prediction.name == expected.name
        assert prediction.probability == pytest.approx(expected.probability, abs=1e-4)
    assert classifier([]) == []


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"Picture 0 is an array of \[4, 4, 2\]: give \[H, W\]"),
        (np.zeros((0, 4), np.uint8), r"Picture 0 is an array of \[0, 4\]"),
        (np.full((4, 4), 2.0), r"Picture 0 has floats 2 to 2: scale them to \[0, 1\]"),
        (np.full((4, 4), np.nan), r"Picture 0 has floats nan to nan"),
        (np.zeros((4, 4), np.int64), r"Picture 0 is an array of int64: give uint8, or floats"),
        (7, r"Picture 0 is of int: give a file, a PIL image, an array or a tensor"),
        ("nowhere.png", r"nowhere.png cannot be read"),
    ],
)
def test_what_is_no_picture_is_named(maml: MAML, support: Path, picture: object, message: str):
    with pytest.raises(SettingError, match=message):
        Classifier(maml, support)(picture)  # type: ignore[call-overload]


def test_below_the_threshold_there_is_no_name(maml: MAML, support: Path):
    found = Classifier(maml, support)(pictures(10))
    threshold = float(np.median([each.probability for each in found]))
    rejecting = Classifier(maml, support, reject=threshold)(pictures(10))
    assert [each.name for each in rejecting] == [each.name if each.probability >= threshold else None for each in found]
    assert 0 < sum(each.name is None for each in rejecting) < 10
    for wrong in (0, 1.5):
        with pytest.raises(SettingError, match=r"^reject must be a probability above 0, at most 1"):
            Classifier(maml, support, reject=wrong)


def test_supports_that_do_not_do(maml: MAML, support: Path):
    with pytest.raises(SettingError, match=r"pictures of at least 2 classes \(got 1 of a\)"):
        Classifier(maml, {"a": pictures(1)})
    with pytest.raises(SettingError, match=r"\(got 1 of a, 0 of b\)"):
        Classifier(maml, {"a": pictures(1), "b": []})
    learned = MAML(ConvNet(**LESS)).eval()
    with pytest.raises(SettingError, match=r"The checkpoint does not record what images"):
        Classifier(learned, support)
    learned.inputs = maml.inputs
    with pytest.raises(
        SettingError, match=r"support holds 5 classes, but the checkpoint classifies among 3; .*head proto"
    ):
        Classifier(learned, support)


@pytest.fixture
def checkpoint(maml: MAML, tmp_path: Path) -> Path:
    """A checkpoint of that network, as fit writes it."""
    content = {
        "state_dict": maml.state_dict(),
        "hyper_parameters": {
            "net": {"class_path": "maml_lightning.ConvNet", "init_args": LESS},
            **{name: maml.hparams[name] for name in ("inner_lr", "head", "query_statistics")},
        },
        "inputs": maml.inputs._asdict(),  # type: ignore[union-attr]
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, tmp_path / "mine.ckpt")
    return tmp_path / "mine.ckpt"


def exported(checkpoint: Path, support: Path, output: Path) -> dict:
    export([f"--ckpt_path={checkpoint}", f"--support={support}", f"--output={output}"])
    return json.loads(output.with_suffix(".json").read_text())


def test_an_exported_network_gives_the_same_probabilities_without_the_package(checkpoint: Path, support: Path):
    folder = checkpoint.parent
    told = exported(checkpoint, support, folder / "classifier.pt2")
    assert told["classes"] == sorted(SYMBOLS)
    assert (told["input"]["shape"], told["output"]["shape"]) == (["batch", 1, 28, 28], ["batch", 5])
    assert told["preprocessing"]["size"] == 28
    assert told["preprocessing"]["background"] == 0
    assert "more than 127" in told["preprocessing"]["invert"]
    assert "below 204" in told["preprocessing"]["contrast"]
    classifier = Classifier(load(checkpoint), support)
    images = read_images(pictures(100), classifier.inputs).inputs
    torch.save(images, folder / "images.pt")
    script = (
        "import sys, torch\n"
        "net, images = torch.export.load('classifier.pt2').module(), torch.load('images.pt')\n"
        "torch.save([net(images[:n]) for n in (1, 3, 100)] + [net(images[n : n + 1]) for n in range(5)], 'found.pt')\n"
        "assert not any(name.startswith('maml_lightning') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=folder, check=True)
    found = torch.load(folder / "found.pt")
    expected = classifier.probabilities(images)
    for batch in found[:3]:
        assert torch.allclose(batch, expected[: len(batch)], atol=1e-6)
    assert torch.allclose(torch.cat(found[3:]), expected[:5], atol=1e-6)


@pytest.mark.skipif(not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs the extra export")
@pytest.mark.filterwarnings("ignore")  # within float32's rounding: in float64 ONNX and torch differ by 3e-15
def test_onnx_gives_the_same_probabilities(checkpoint: Path, support: Path):
    import onnxruntime

    file = checkpoint.parent / "classifier.onnx"
    assert exported(checkpoint, support, file)["format"] == "onnx"
    classifier = Classifier(load(checkpoint), support)
    session = onnxruntime.InferenceSession(file)
    for count in (1, 3, 100):
        images = torch.rand(count, 1, 28, 28)
        (found,) = session.run(None, {"inputs": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), classifier.probabilities(images), atol=1e-5)


def test_what_cannot_be_exported_is_told_before_anything_is_written(
    checkpoint: Path, support: Path, monkeypatch: pytest.MonkeyPatch
):
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(SettingError, match=r"omniglot_5way_1shot has model.query_statistics batch.*; take one trained"):
        export(["--ckpt_path=omniglot_5way_1shot", f"--support={support}", "--output=out.pt2"])
    for name, message in (("a.txt", r"must end in .pt2 or .onnx \(got .txt\)"), ("mine", r"\(got none\)")):
        with pytest.raises(SettingError, match=message):
            exported(checkpoint, support, checkpoint.parent / name)
    monkeypatch.setattr("maml_lightning.analysis.export.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"ONNX needs onnx and onnxscript; pip install 'maml_lightning\[export\]'"):
        exported(checkpoint, support, checkpoint.parent / "a.onnx")
    assert sorted(checkpoint.parent.rglob("*")) == before
    (checkpoint.parent / "a.json").write_text("mine")
    with pytest.raises(SettingError, match=r"a.json exists already; remove it or give another name"):
        exported(checkpoint, support, checkpoint.parent / "a.pt2")


def test_as_a_command_it_says_what_it_wrote(checkpoint: Path, support: Path):
    output = checkpoint.parent / "out.pt2"
    ended = run("export", f"--ckpt_path={checkpoint}", f"--support={support}", f"--output={output}")
    assert ended.returncode == 0, ended.stderr
    assert f"5 classes. Written: {output}, {output.with_suffix('.json')}" in ended.stderr
    again = run("export", f"--ckpt_path={checkpoint}", f"--support={support}", f"--output={output}")
    assert again.returncode == 1
    assert again.stderr.strip() == f"error: output: {output} exists already; remove it or give another name."
    assert run("export", "--output=a.pt2").stderr.strip().endswith("(--help describes every setting)")
