import csv
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cli import main
from maml_lightning import (
    MAML,
    ConvNet,
    InputSpec,
    OmniglotDataModule,
    SettingError,
    SupportQueryDataModule,
    load,
    support_set,
)
from maml_lightning.data.image_files import class_folders
from maml_lightning.data.omniglot import character_files, split_characters
from maml_lightning.data.support_sets import read_images
from tests.runs import process, run, words

pytestmark = pytest.mark.usefixtures("folder")

OMNIGLOT = InputSpec(ways=5, channels=1, side=28, background=0.0)


def predict(support: Path, query: Path, output: object = "out.csv", checkpoint: object = "omniglot_5way_1shot") -> list:
    """The rows of the table."""
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    data = {"data": "SupportQueryDataModule", "data.support": support, "data.query": query, "data.output": output}
    main(words("predict", ckpt_path=checkpoint, **data, **{"trainer.logger": "false", "trainer.accelerator": "cpu"}))
    with Path(str(output)).open(newline="", errors="surrogateescape") as file:
        return list(csv.reader(file))


def symbol(kind: int, size: tuple[int, int], jitter: int = 0) -> Image.Image:
    """One of twelve symbols, black on white, drawn anew for each ``jitter``."""
    width, height = size
    image = Image.new("L", size, 255)
    draw = ImageDraw.Draw(image)
    rng = np.random.RandomState(jitter)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2

    def at(x: float, y: float) -> tuple[float, float]:
        dx, dy = rng.uniform(-0.03, 0.03, 2)
        return left + side * (x + dx), top + side * (y + dy)

    pen = max(side // 30, 1)
    strokes: list[list[tuple[float, float]]] = [
        [[at(0.2, 0.2), at(0.8, 0.8)], [at(0.8, 0.2), at(0.2, 0.8)]],  # a cross
        [[at(0.5 + 0.3 * np.cos(a), 0.5 + 0.3 * np.sin(a)) for a in np.linspace(0, 6.4, 9)]],  # a ring
        [[at(0.2, 0.2), at(0.8, 0.2), at(0.5, 0.2), at(0.5, 0.8)]],  # a T
        [[at(0.2, 0.8), at(0.35, 0.2), at(0.5, 0.8), at(0.65, 0.2), at(0.8, 0.8)]],  # a zigzag
        [[at(0.3, 0.2), at(0.3, 0.8), at(0.75, 0.8)]],  # an L
        [[at(0.5, 0.2), at(0.8, 0.8), at(0.2, 0.8), at(0.5, 0.2)]],  # a triangle
        [[at(0.25, 0.2), at(0.25, 0.8)], [at(0.75, 0.2), at(0.75, 0.8)], [at(0.25, 0.5), at(0.75, 0.5)]],  # an H
        [[at(0.2, 0.2), at(0.5, 0.5), at(0.5, 0.8)], [at(0.8, 0.2), at(0.5, 0.5)]],  # a Y
        [[at(0.25, 0.2), at(0.75, 0.2), at(0.75, 0.8), at(0.25, 0.8), at(0.25, 0.2)]],  # a square
        [[at(0.8, 0.25), at(0.3, 0.25), at(0.3, 0.75), at(0.8, 0.75)], [at(0.3, 0.5), at(0.7, 0.5)]],  # an E
        [[at(0.5, 0.2), at(0.5, 0.8)], [at(0.2, 0.5), at(0.8, 0.5)]],  # a plus
        [[at(0.3, 0.8), at(0.3, 0.2), at(0.7, 0.35), at(0.3, 0.5)]],  # a flag
    ][kind]
    for stroke in strokes:
        draw.line(stroke, 0, pen, "curve")
    return image


SYMBOLS = ["cross", "ring", "tee", "zigzag", "ell"]
MORE_SYMBOLS = ["triangle", "aitch", "wye", "square", "ee", "plus", "flag"]


def draw_folder(root: Path, made: object, jitter: int, classes: int = 5, each: int = 1) -> None:
    for kind in range(classes):
        (root / SYMBOLS[kind]).mkdir(parents=True)
        for number in range(each):
            picture = made(kind, 100 * jitter + 10 * kind + number)  # type: ignore[operator]
            picture.save(root / SYMBOLS[kind] / f"{number}.png")


def plain(kind: int, jitter: int) -> Image.Image:
    return symbol(kind, (105, 105), jitter)


def inverted(image: Image.Image) -> Image.Image:
    return Image.eval(image, lambda value: 255 - value)


def rgba(image: Image.Image) -> Image.Image:
    ink = Image.new("RGBA", image.size, (20, 40, 120, 255))
    ink.putalpha(inverted(image))
    return ink


LOOKS = {
    "dark on light": lambda kind, jitter: plain(kind, jitter),
    "light on dark": lambda kind, jitter: inverted(plain(kind, jitter)),
    "RGB, blue on yellow": lambda kind, jitter: Image.composite(
        Image.new("RGB", (400, 300), (250, 240, 180)),
        Image.new("RGB", (400, 300), (20, 30, 120)),
        symbol(kind, (400, 300), jitter),
    ),
    "RGBA, transparent": lambda kind, jitter: rgba(symbol(kind, (200, 260), jitter)),
    "palette": lambda kind, jitter: symbol(kind, (150, 90), jitter).convert("P"),
    "30 pixels": lambda kind, jitter: symbol(kind, (30, 34), jitter),
    "2000 pixels": lambda kind, jitter: symbol(kind, (2000, 1400), jitter),
    "faint": lambda kind, jitter: Image.eval(plain(kind, jitter), lambda value: 150 + value * 60 // 255),
}


@pytest.mark.parametrize("look", LOOKS)
def test_drawn_symbols_are_classified_whatever_their_look(tmp_path: Path, look: str):
    draw_folder(tmp_path / "support", plain, 1, each=2)
    draw_folder(tmp_path / "query", LOOKS[look], 2, each=2)
    rows = predict(tmp_path / "support", tmp_path / "query")[1:]
    right = sum(Path(file).parent.name == predicted for file, predicted, *_ in rows)
    assert len(rows) == 10
    assert right >= 8


def test_the_table_and_the_sheet(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    draw_folder(tmp_path / "support", plain, 1, classes=3, each=2)
    (tmp_path / "support" / "ring" / "third.png").write_bytes((tmp_path / "support" / "ring" / "0.png").read_bytes())
    draw_folder(tmp_path / "query", LOOKS["light on dark"], 2, classes=3)
    (tmp_path / "query" / "some where" / "dé$(ep;).png").parent.mkdir()
    plain(0, 5).save(tmp_path / "query" / "some where" / "dé$(ep;).png")
    rows = predict(tmp_path / "support", tmp_path / "query", tmp_path / "new" / "out.csv")
    assert rows[0] == ["file", "predicted", "cross", "ring", "tee"]  # fewer classes than the checkpoint's
    assert [row[0] for row in rows[1:]] == ["cross/0.png", "ring/0.png", "some where/dé$(ep;).png", "tee/0.png"]
    for _, predicted, *probabilities in rows[1:]:
        numbers = [float(value) for value in probabilities]
        assert sum(numbers) == pytest.approx(1, abs=1e-5)
        assert predicted == rows[0][2:][int(np.argmax(numbers))]
    with Image.open(tmp_path / "new" / "out.png") as sheet:
        assert sheet.width > 600
        assert len({tuple(pixel) for pixel in np.asarray(sheet).reshape(-1, 3)}) > 10
    assert "7 support and 4 query images, resized to 1 x 28 x 28; 8 inverted" in caplog.text
    assert "of 3 images in folders named as classes" in caplog.text


def test_queries_of_one_class_are_classified(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    draw_folder(tmp_path / "support", plain, 1, each=2)
    maml = load("omniglot_5way_1shot")
    inputs, targets, _ = support_set(tmp_path / "support", maml.inputs)
    classifier = maml.adapt(inputs, targets)
    for kind, name in enumerate(SYMBOLS):
        query = tmp_path / f"only {name}"
        query.mkdir()
        for number in range(kind + 1):  # of the cross one alone
            plain(kind, 70 + number).save(query / f"{number}.png")
        rows = predict(tmp_path / "support", query, f"{name}.csv")[1:]
        assert [predicted for _, predicted, *_ in rows] == [name] * (kind + 1)
        seen = read_images(sorted(query.iterdir()), maml.inputs).inputs
        with torch.no_grad():
            expected = classifier(torch.cat([inputs, seen]))[len(inputs) :].softmax(-1)
        found = torch.tensor([[float(value) for value in row[2:]] for row in rows])
        assert torch.allclose(found, expected, atol=2e-6)
    together = {
        text for text in caplog.messages if "queries are evaluated in one batch with the support images" in text
    }
    assert len(together) == 5  # each run tells its own number of queries
    alone = SupportQueryDataModule(str(tmp_path / "support"), str(tmp_path / "only cross"), beside_support=False)
    alone.trainer = SimpleNamespace(lightning_module=maml)  # type: ignore[assignment]
    alone.setup()
    (episode,) = alone.predict_dataloader()
    assert episode.query_inputs.shape == (1, 1, 1, 28, 28)


def test_real_characters_as_folders_are_evaluated_as_in_a_test(
    tmp_path: Path, omniglot_root: Path, caplog: pytest.LogCaptureFixture
):
    flags = {
        "data": "OmniglotDataModule",
        "data.root": omniglot_root,
        "data.ways": 20,
        "data.test_episodes": 1,
        "ckpt_path": "omniglot_20way_1shot",
        "trainer.accelerator": "cpu",
    }
    tested = main(words("test", **flags))
    data = OmniglotDataModule(root=str(omniglot_root), ways=20, test_episodes=1)
    data.setup("test")
    files, characters = character_files(omniglot_root / "omniglot-py"), split_characters("finn")["test"]
    classes, drawings = data.datasets["test"].draw([0])  # type: ignore[attr-defined]
    for label, (character, pair) in enumerate(zip(classes[0].tolist(), drawings[0].tolist(), strict=True)):
        for part, drawing in zip(("support", "query"), pair, strict=True):
            (tmp_path / part / f"{label:02d}").mkdir(parents=True)
            file = files[characters[character]][drawing]
            (tmp_path / part / f"{label:02d}" / file.name).symlink_to(file)
    rows = predict(tmp_path / "support", tmp_path / "query", checkpoint="omniglot_20way_1shot")
    accuracy = np.mean([Path(file).parent.name == predicted for file, predicted, *_ in rows[1:]])
    assert accuracy == pytest.approx(tested.trainer.logged_metrics["test/accuracy"].item())
    same = main(words("predict", **flags))
    expected = same.trainer.predict_loop.predictions[0][0]
    written = torch.tensor([[float(value) for value in row[2:]] for row in rows[1:]])
    assert (written - expected).abs().max() < 1e-4  # float32 rounds in another order; logits are as large as 80
    assert f"Accuracy: {accuracy:.4f}" in caplog.text


@pytest.fixture
def good(tmp_path: Path) -> Path:
    draw_folder(tmp_path / "support", plain, 1, classes=2)
    draw_folder(tmp_path / "query", plain, 2, classes=2)
    return tmp_path


def spoil(root: Path, how: str) -> None:
    support, query = root / "support", root / "query"
    if how == "empty class":
        (support / "empty").mkdir()
    elif how == "text":
        (query / "cross" / "note.png").write_text("no image")
    elif how == "cut":
        whole = (support / "ring" / "0.png").read_bytes()
        (support / "ring" / "0.png").write_bytes(whole[:100])
    elif how == "bomb":
        Image.new("1", (20_000, 20_000)).save(query / "huge.png")
    elif how == "one class":
        (support / "ring" / "0.png").unlink()
        (support / "ring").rmdir()
    elif how == "inside":
        support.rename(query / "support")
    elif how == "too many":
        draw_folder(root / "more", plain, 3)
        for kind in range(4):
            (root / "more" / SYMBOLS[kind]).rename(support / f"other {kind}")
    elif how == "no queries":
        for file in query.rglob("*.png"):
            file.unlink()
    elif how in ("there", "sheet there"):
        (root / f"out.{'csv' if how == 'there' else 'png'}").write_text("mine")


BAD = {
    "empty class": r"support/empty holds no images",
    "text": r"query/cross/note.png cannot be read \(it is not a complete image\)",
    "cut": r"support/ring/0.png cannot be read \(it is not a complete image\)",
    "bomb": r"query/huge.png is too large an image",
    "one class": r"support holds 1 folder of images; give one for each of at least 2 classes",
    "inside": r"query/support and data.query .*query must not contain one another",
    "too many": r"support holds 6 classes, but the checkpoint classifies among 5; .* train one with --data.ways 6",
    "no queries": r"query holds no images",
    "there": r"out.csv exists already; remove it or give another name",
    "sheet there": r"out.png exists already; remove it or give another name",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_input_is_named_and_nothing_is_written(good: Path, how: str):
    spoil(good, how)
    before = {file: file.read_bytes() for file in good.rglob("*") if file.is_file()}
    support = good / "query" / "support" if how == "inside" else good / "support"
    with pytest.raises(SettingError, match=BAD[how]):
        predict(support, good / "query", good / "out.csv")
    assert {file: file.read_bytes() for file in good.rglob("*") if file.is_file()} == before


def listed(folder: Path, found: object) -> None:
    if os.getuid() == 0:
        os.setuid(65534)  # nothing is unreadable to root
    try:
        class_folders(folder)
    except SettingError as error:
        found.put(str(error))  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform == "win32", reason="of systems with users")
def test_a_folder_that_may_not_be_read_is_named(good: Path):
    for parent in [good, *good.parents]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (good / "support" / "ring").chmod(0)
    fork = multiprocessing.get_context("fork")
    found = fork.SimpleQueue()
    child = fork.Process(target=listed, args=(good / "support", found))
    child.start()
    child.join()
    (good / "support" / "ring").chmod(0o755)
    assert found.get() == f"{good}/support/ring cannot be read (Permission denied); give a folder that can."


def test_as_a_process_it_ends_in_one_line(good: Path):
    spoil(good, "text")
    flags = {"data": "SupportQueryDataModule", "data.support": good / "support", "data.query": good / "query"}
    child = process(*words("predict", ckpt_path="omniglot_5way_1shot", **flags))
    _, printed = child.communicate(timeout=200)
    assert child.returncode == 1
    assert printed.strip().splitlines()[-1].startswith("error: ")
    assert "note.png" in printed.strip().splitlines()[-1]
    assert "Traceback" not in printed


ODD = ["[", "=cmd()", "a|b$x$_", "-dash %s", "日本"]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Classes and images with names that mean something to a spreadsheet, a terminal, rich or a font."""
    for number, name in enumerate(ODD):
        for part, file in (("support", "1.png"), ("query", "x].png")):
            (tmp_path / part / name).mkdir(parents=True)
            plain(number, number).save(tmp_path / part / name / file)
    others = ["=1+1.png", "+1.png", "@a.png", "\t=.png", "two\nlines.png", "\x1b[31mred.png", "l" * 250 + ".png"]
    for name in (*others, os.fsdecode(b"raw\xff.png")):
        plain(0, 1).save(tmp_path / "query" / name)
    return tmp_path


def test_odd_names_are_printed_as_they_are_and_harmless_in_a_spreadsheet(odd: Path, capsys: pytest.CaptureFixture):
    header, *rows = predict(odd / "support", odd / "query")
    assert header == ["file", "predicted", "'-dash %s", "'=cmd()", "[", "a|b$x$_", "日本"]
    found = {row[0] for row in rows}
    assert found >= {"'=1+1.png", "'+1.png", "'@a.png", "'\t=.png", "two\nlines.png", "\x1b[31mred.png", "[/x].png"}
    assert found >= {"a|b$x$_/x].png", "日本/x].png", "'=cmd()/x].png", os.fsdecode(b"raw\xff.png")}
    assert len(rows) == len(found) == 13
    assert {row[1] for row in rows} <= set(header[2:])
    printed = capsys.readouterr().out
    assert "a|b$x$_/x].png" in printed
    assert "[/x].png" in printed
    assert r"two\nlines.png" in printed
    assert r"\x1b[31mred.png" in printed
    assert "\x1b[31m" not in printed


def test_two_processes_write_what_one_writes_once(odd: Path):
    flags = {"data": "SupportQueryDataModule", "data.support": odd / "support", "data.query": odd / "query"}
    alone = predict(odd / "support", odd / "query", "alone.txt")
    ddp = {"trainer.accelerator": "cpu", "trainer.strategy": "ddp", "trainer.devices": 2}
    ended = run(*words("predict", ckpt_path="omniglot_5way_1shot", **flags, **ddp))  # with its progress bar
    assert ended.returncode == 0, ended.stderr
    assert (odd / "predictions.csv").read_bytes() == (odd / "alone.txt").read_bytes()
    assert len(alone) == 14
    assert ended.stderr.count("Written: predictions.csv, predictions.json, predictions.png") == 1
    assert {file.name for file in odd.glob("predictions*")} == {
        f"predictions.{kind}" for kind in ("csv", "json", "png")
    }


@pytest.fixture
def ready(good: Path) -> SupportQueryDataModule:
    """Two classes and two queries, read, and the task predicted but not written."""
    data = SupportQueryDataModule(str(good / "support"), str(good / "query"), str(good / "new" / "out.csv"))
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(inputs=OMNIGLOT))  # type: ignore[assignment]
    data.prepare_data()
    return data


FOUND = torch.tensor([[0.75, 0.25], [0.5, 0.5]])


def test_a_table_is_written_before_anything_else_can_fail(
    ready: SupportQueryDataModule, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("maml_lightning.data.support_query.prediction_sheet", fail)
    with pytest.raises(RuntimeError, match="no font"):
        ready.report(FOUND)
    assert ready.output.read_text().splitlines()[1] == "cross/0.png,cross,0.750000,0.250000"


def test_what_appears_meanwhile_is_left_as_it_is(ready: SupportQueryDataModule, caplog: pytest.LogCaptureFixture):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    ready.output.parent.mkdir()
    ready.output.write_text("mine")
    ready.report(FOUND)
    assert ready.output.read_text() == "mine"
    assert (ready.output.parent / "out-1.csv").read_text().count("cross/0.png") == 1
    assert f"Written: {ready.output.parent / 'out-1.csv'}, {ready.json}, {ready.sheet}" in caplog.text


def test_a_table_that_cannot_be_written_is_elsewhere(
    ready: SupportQueryDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ready.output.parent.write_text("a file where the folder should be")
    with pytest.raises(
        SettingError, match=r"out.csv could not be written \(File exists\); it is in .*out.csv"
    ) as error:
        ready.report(FOUND)
    where = Path(str(error.value).split("it is in ")[1].removesuffix("."))
    assert "cross/0.png,cross,0.750000" in where.read_text()


def test_what_is_not_finite_is_not_predicted(ready: SupportQueryDataModule, caplog: pytest.LogCaptureFixture):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    ready.report(torch.tensor([[0.25, 0.75], [torch.nan, torch.nan]]))
    assert ready.output.read_text().splitlines()[1:] == ["cross/0.png,ring,0.250000,0.750000", "ring/0.png,,nan,nan"]
    assert "1 images are not predicted" in caplog.text
    assert "Accuracy: 0.0000 (0 of 2" in caplog.text


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("file/out.csv", "Not a directory"),
        (f"{'n' * 300}.csv", "File name too long"),
        ("dangling/out.csv", "No such file or directory"),
    ],
)
def test_an_output_that_cannot_be_is_named_before_the_work(good: Path, output: str, why: str):
    (good / "file").write_text("")
    (good / "dangling").symlink_to(good / "nowhere")
    before = sorted(good.rglob("*"))
    with pytest.raises(SettingError, match=rf"data.output .*{output} could not be written \({why}\); give another"):
        SupportQueryDataModule(str(good / "support"), str(good / "query"), str(good / output)).prepare_data()
    assert sorted(good.rglob("*")) == before


def test_without_a_checkpoint_it_asks_for_one(good: Path):
    before = sorted(good.rglob("*"))
    data = {"data": "SupportQueryDataModule", "data.support": good / "support", "data.query": good / "query"}
    with pytest.raises(SettingError, match=r"ckpt_path is not given.*; give --ckpt_path"):
        main(words("predict", **data, **{"trainer.accelerator": "cpu"}))
    assert sorted(good.rglob("*")) == before


def test_python_gives_a_plain_network_that_exports(good: Path):
    maml = load("omniglot_5way_1shot")
    inputs, targets, names = support_set(good / "support", maml.inputs)
    classifier = maml.adapt(inputs, targets)
    query = torch.rand(4, 1, 28, 28)
    torch.export.save(torch.export.export(classifier.eval(), (query,)), good / "classifier.pt2")
    script = (
        "import sys, torch\n"
        f"out = torch.export.load({str(good / 'classifier.pt2')!r}).module()(torch.load({str(good / 'q.pt')!r}))\n"
        f"torch.save(out, {str(good / 'out.pt')!r})\n"
        "assert not any(name.startswith('maml_lightning') for name in sys.modules)"
    )
    torch.save(query, good / "q.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=good, check=True)
    assert names == ["cross", "ring"]
    assert torch.allclose(torch.load(good / "out.pt"), classifier(query), atol=1e-5)


def test_images_of_the_training_set_are_unchanged(tmp_path: Path):
    pixels = np.random.RandomState(0).randint(0, 256, (28, 28)).astype(np.uint8)
    pixels[[0, -1]] = pixels[:, [0, -1]] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    reading = read_images([tmp_path / "a.png"], OMNIGLOT)
    assert torch.equal(reading.inputs, torch.from_numpy(pixels)[None, None] / 255)
    assert not any(reading.changes.values())
    photo = read_images([tmp_path / "a.png"], OMNIGLOT._replace(background=None, channels=3))
    assert torch.equal(photo.inputs, reading.inputs.expand(1, 3, 28, 28))


def test_an_input_spec_distinguishes_drawings_from_photos():
    drawings = torch.zeros(6, 1, 9, 9)
    drawings[:, :, 3:6, 3:6] = 1
    assert InputSpec.of(drawings, 5) == InputSpec(5, 1, 9, 0.0)
    assert InputSpec.of(1 - drawings, 5) == InputSpec(5, 1, 9, 1.0)
    assert InputSpec.of(torch.rand(2, 4, 3, 9, 9), 5) == InputSpec(5, 3, 9, None)
    assert InputSpec.of(torch.rand(6, 7), 5) is None


def predicted_of(root: Path, query: object, **settings: object) -> list[str]:
    """The names of the queries that are listed."""
    data = SupportQueryDataModule(str(root / "support"), str(query), **settings)  # type: ignore[arg-type]
    data.setup()
    return [str(file.relative_to(data.folder)) for file in data.files]


def test_a_query_is_a_folder_a_file_or_a_pattern(good: Path):
    (good / "query" / "note.txt").write_text("no image")
    (good / "query" / "a[1].png").write_bytes((good / "query" / "cross" / "0.png").read_bytes())
    everything = ["a[1].png", "cross/0.png", "ring/0.png"]
    assert predicted_of(good, good / "query") == everything
    assert predicted_of(good, good / "query" / "ring" / "0.png") == ["0.png"]
    assert predicted_of(good, good / "query" / "a[1].png") == ["a[1].png"]
    assert predicted_of(good, good / "query" / "*" / "*.png") == everything[1:]
    assert predicted_of(good, good / "query" / "**" / "*") == everything
    assert predicted_of(good, good / "query" / "r*" / "0.*") == ["ring/0.png"]
    for query, message in (("*.gif", r"matches no images"), ("none", r"is not a folder, a file or a pattern")):
        with pytest.raises(SettingError, match=message):
            predicted_of(good, good / "query" / query)
    for inside in (good / "support" / "ring", good / "support" / "ring" / "0.png", good / "*" / "*" / "*.png", good):
        with pytest.raises(SettingError, match="must not contain one another"):
            predicted_of(good, inside)


@pytest.mark.parametrize("reject", [0, -1, 1.5])
def test_a_threshold_out_of_range_is_named(good: Path, reject: float):
    with pytest.raises(SettingError, match=r"data.reject must be a probability above 0, at most 1 \(got "):
        predicted_of(good, good / "query", reject=reject)


def test_queries_below_the_threshold_are_none_of_these(ready: SupportQueryDataModule, caplog: pytest.LogCaptureFixture):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    ready.reject = 0.6
    ready.report(FOUND)
    assert [line.split(",")[1] for line in ready.output.read_text().splitlines()] == [
        "predicted",
        "cross",
        "none of these",
    ]
    assert "data.reject 0.6 compares the highest probability" in caplog.text
    told = json.loads(ready.json.read_text())
    assert [each["predicted"] for each in told["predictions"]] == ["cross", None]
    assert [each["nearest"] for each in told["predictions"]] == ["cross", "cross"]
    assert (told["reject"], told["accuracy"], told["classes"]) == (0.6, 0.5, ["cross", "ring"])
    assert told["confusion_matrix"] == [[1, 0, 0], [0, 0, 1]]
    assert "1 of 2 images are none of these: below data.reject 0.6." in caplog.text


def test_the_confidence_is_compared_where_there_is_one(ready: SupportQueryDataModule, caplog: pytest.LogCaptureFixture):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    ready.reject = 0.6
    ready.report(FOUND, torch.tensor([0.1, 0.7]))
    told = json.loads(ready.json.read_text())
    assert [each["predicted"] for each in told["predictions"]] == [None, "cross"]
    assert [each["confidence"] for each in told["predictions"]] == pytest.approx([0.1, 0.7])
    assert [each["probability"] for each in told["predictions"]] == pytest.approx(FOUND.amax(-1).tolist())
    assert "calibration" not in caplog.text


@pytest.mark.parametrize(
    ("statistics", "given", "beside"), [("batch", "auto", True), ("support", "auto", False), ("support", True, True)]
)
def test_a_network_with_statistics_of_the_support_set_gets_queries_alone(
    good: Path, statistics: str, given: object, beside: bool
):
    (good / "query" / "ring" / "0.png").unlink()
    data = SupportQueryDataModule(str(good / "support"), str(good / "query"), beside_support=given)  # type: ignore[arg-type]
    module = SimpleNamespace(inputs=OMNIGLOT, query_statistics=statistics, head="learned")
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    data.setup()
    (episode,) = data.predict_dataloader()
    assert episode.query_inputs.shape[1] == 1 + 2 * beside


def test_prototypes_classify_among_more_classes_of_unequal_shots(tmp_path: Path):
    for number in range(50):
        folder = tmp_path / "support" / f"{number:02d}"
        folder.mkdir(parents=True)
        for shot in range(1 + number % 3):
            plain(number % 5, 10 * number + shot).rotate(90 * (number // 5), fillcolor=255).save(folder / f"{shot}.png")
    net = {"in_channels": 1, "out_features": 5, "hidden_channels": 8, "blocks": 3, "pooling": False}
    settings = {"inner_lr": 0.01, "head": "prototypes", "query_statistics": "support"}
    maml = MAML(ConvNet(**net), **settings)  # type: ignore[arg-type]
    content = {
        "state_dict": maml.state_dict(),
        "hyper_parameters": {"net": {"class_path": "maml_lightning.ConvNet", "init_args": net}, **settings},
        "inputs": OMNIGLOT._asdict(),
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(content, tmp_path / "mine.ckpt")
    (tmp_path / "query").mkdir()
    plain(1, 7).save(tmp_path / "query" / "a.png")
    plain(2, 8).save(tmp_path / "query" / "b.png")
    header, *both = predict(tmp_path / "support", tmp_path / "query", "both.csv", tmp_path / "mine.ckpt")
    assert header[2:] == [f"{number:02d}" for number in range(50)]
    (alone,) = predict(tmp_path / "support", tmp_path / "query" / "b.png", "b.csv", tmp_path / "mine.ckpt")[1:]
    assert alone[1] == both[1][1]
    assert [float(cell) for cell in alone[2:]] == pytest.approx([float(cell) for cell in both[1][2:]], abs=2e-6)
