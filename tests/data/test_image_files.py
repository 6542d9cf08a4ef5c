from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maml_lightning import SettingError
from maml_lightning.data.image_files import class_folders, image_files, read_image


def half(mode: str, size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Black left half, white right half."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, size[0] // 2 :] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_gives_the_same_pixels(tmp_path: Path, mode: str, channels: int):
    file = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray(np.asarray(half("L")).astype(np.uint16) * 257).save(file)
    else:
        half(mode).save(file)
    pixels = read_image(file, 10, channels, "crop")  # type: ignore[arg-type]
    assert pixels.shape == (channels, 10, 10)
    assert pixels[:, :, :3].max() <= 12  # Lanczos rings beside the edge
    assert pixels[:, :, -3:].min() >= 243


def test_transparency_is_white(tmp_path: Path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 4, 3, "crop") == 255).all()
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "b.png", transparency=0)
    assert (read_image(tmp_path / "b.png", 4, 3, "crop") == 255).all()


def test_images_that_are_not_square_are_cropped_or_padded(tmp_path: Path):
    pixels = np.full((10, 30), 200, np.uint8)
    pixels[:, 10:20] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 10, 1, "crop") == 0).all()
    padded = read_image(tmp_path / "a.png", 30, 1, "pad")
    assert (padded[0, 10:20, 10:20] == 0).all()
    assert (padded[0, :10] == 200).all()  # the border's color
    assert (padded[0, 20:] == 200).all()


def test_a_rotated_photo_is_rotated_back(tmp_path: Path):
    image = half("L", (20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.jpg", exif=exif)
    pixels = read_image(tmp_path / "a.jpg", 20, 1, "crop")
    assert pixels[0, :, :5].min() > 200
    assert pixels[0, :, -5:].max() < 50


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text", "it is not a complete image"),
        ("cut", "it is not a complete image"),
        ("empty", "it is not a complete image"),
        ("bomb", "is too large"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, reason: str):
    file = tmp_path / "a b;ü.png"
    if content == "bomb":
        Image.new("1", (20_000, 20_000)).save(file)
    else:
        half("RGB", (200, 200)).save(file)
        whole = file.read_bytes()
        file.write_bytes({"text": b"no image", "cut": whole[: len(whole) // 2], "empty": b""}[content])
    with pytest.raises(SettingError, match=rf"{file} .*{reason}"):
        read_image(file, 10, 1, "crop")


def test_folders(tmp_path: Path):
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
        half("L").save(tmp_path / name / "2.PNG")
        half("L").save(tmp_path / name / "1.jpg")
        (tmp_path / name / "notes.txt").write_text("")
        half("L").save(tmp_path / name / ".shown.png")
    assert {name: [file.name for file in files] for name, files in class_folders(tmp_path).items()} == {
        "a": ["1.jpg", "2.PNG"],
        "b": ["1.jpg", "2.PNG"],
    }
    assert [str(file.relative_to(tmp_path)) for file in image_files(tmp_path, nested=True)] == [
        "a/1.jpg",
        "a/2.PNG",
        "b/1.jpg",
        "b/2.PNG",
    ]
    assert image_files(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=rf"{tmp_path / 'empty'} holds no images"):
        class_folders(tmp_path)
    with pytest.raises(SettingError, match=rf"{tmp_path / 'missing'} is not a folder"):
        class_folders(tmp_path / "missing")


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path):
    half("L").save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (40, 20), 255)])
    half("L").save(tmp_path / "b.gif")
    first, alone = (read_image(tmp_path / f"{name}.gif", 10, 1, "crop") for name in "ab")
    assert np.array_equal(first, alone)
    assert first[0, :, 0].max() < 20


def pixels_of(file: Path, values: np.ndarray) -> list:
    Image.fromarray(values).save(file)
    return read_image(file, len(values), 1, "pad")[0].tolist()


def test_images_of_16_bits_keep_their_brightness(tmp_path: Path):
    """One is as dark as the other is bright, whatever its own largest value."""
    file = tmp_path / "a.png"
    assert pixels_of(file, np.array([[0, 257 * 100], [257 * 7, 65535]], np.uint16)) == [[0, 100], [7, 255]]
    assert pixels_of(file, np.array([[0, 257 * 100], [257 * 7, 257 * 50]], np.uint16)) == [[0, 100], [7, 50]]


def test_floats_are_of_0_to_1_in_every_image(tmp_path: Path):
    assert pixels_of(tmp_path / "a.tif", np.array([[0.0, 0.2], [0.1, 0.1]], np.float32)) == [[0, 51], [25, 25]]
    assert pixels_of(tmp_path / "a.tif", np.zeros((2, 2), np.float32)) == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.array([[0, 200.5]] * 2, np.float32),
            r"values 0 to 200.5, but floats are read as 0 to 1: scale them; replace",
        ),
        (
            np.array([[0, 65536]] * 2, np.int32),
            r"a.tif has values 0 to 65536, but integers of 16 bits are read as 0 to",
        ),
        (
            np.array([[-1, 9999]] * 2, np.int16),
            r"a.tif has values -1 to 9999, but integers of 16 bits are read as 0 to",
        ),
        (
            np.array([[-1, 9999]] * 2, np.int32),
            r"a.tif has values -1 to 9999, but integers of 16 bits are read as 0 to",
        ),
        (
            np.array([[-0.5, 0.5]] * 2, np.float32),
            r"a.tif has values -0.5 to 0.5, but floats are read as 0 to 1: scale",
        ),
        (np.array([[np.nan, 0.5]] * 2, np.float32), r"a.tif has values that are NaN or infinite: correct them"),
        (np.array([[-np.inf, 0.5]] * 2, np.float32), r"a.tif has values that are NaN or infinite: correct them"),
        (
            np.array([[0, 255]] * 2, np.int32),
            r"a.tif has values 0 to 255, .* as 0 to 65535, where these are black: scale",
        ),
        (
            np.array([[0, 99]] * 2, np.uint16),
            r"a.tif has values 0 to 99, .* as 0 to 65535, where these are black: scale",
        ),
        (np.array([[0, 1e-3]] * 2, np.float32), r"a.tif has values 0 to 0.001, .* as 0 to 1, where these are black"),
    ],
)
def test_values_of_another_range_are_named(tmp_path: Path, values: np.ndarray, message: str):
    with pytest.raises(SettingError, match=message):
        pixels_of(tmp_path / "a.tif", values)


def test_classes_hold_images_at_any_depth_and_may_be_deep_themselves(tmp_path: Path):
    for name in ("a/1.png", "a/b/2.png", "a/b/c/3.png", "d/b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        half("L").save(tmp_path / name)
    found = {
        name: [str(file.relative_to(tmp_path)) for file in files] for name, files in class_folders(tmp_path).items()
    }
    assert found == {"a": ["a/1.png", "a/b/2.png", "a/b/c/3.png"], "d": ["d/b/4.png"]}
    deep = {name: [file.name for file in files] for name, files in class_folders(tmp_path, 2).items()}
    assert deep == {"a/b": ["2.png", "3.png"], "d/b": ["4.png"]}


def test_a_strip_that_would_not_fit_into_memory_as_a_square_is_named(tmp_path: Path):
    Image.new("L", (60_000, 1)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 4, 1, "crop").shape == (1, 4, 4)
    with pytest.raises(SettingError, match=r"a.png is too large an image \(60000 x 1 pixels, 60000 x 60000 when"):
        read_image(tmp_path / "a.png", 4, 1, "pad")


def test_links(tmp_path: Path):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for place in (folder / "a", elsewhere):
        place.mkdir(parents=True)
        half("L").save(place / "1.png")
    (folder / "a" / "up").symlink_to(folder)  # a loop
    (folder / "linked").symlink_to(elsewhere)
    (folder / "notes.txt").symlink_to("nowhere")
    assert [str(file.relative_to(folder)) for file in image_files(folder, nested=True)] == ["a/1.png", "linked/1.png"]
    for name, target, why in (("b.png", "nowhere", "No such file"), ("c.png", "c.png", "Too many levels")):
        (folder / "a" / name).symlink_to(target)
        with pytest.raises(SettingError, match=rf"a/{name} cannot be read \({why}.*\); give a folder that can"):
            image_files(folder, nested=True)
        (folder / "a" / name).unlink()
    (elsewhere / "class").symlink_to("nowhere")
    with pytest.raises(SettingError, match=r"elsewhere/class cannot be read \(No such file"):
        class_folders(elsewhere)


def test_a_message_about_an_odd_name_is_one_line(tmp_path: Path):
    file = tmp_path / "two\nlines\x1b[2J.png"
    file.write_bytes(b"")
    with pytest.raises(
        SettingError, match=r"two\\nlines\\x1b\[2J.png cannot be read \(it is not a complete image\)"
    ) as error:
        read_image(file, 4, 1, "crop")
    assert str(error.value).isprintable()
