"""``python -m maml_lightning.data.layout SOURCE ROOT``: lay out downloaded mini-ImageNet or tieredImageNet.

What it reads in SOURCE, of each split ``train``, ``val`` and ``test``:

- ``mini-imagenet-cache-SPLIT.pkl``: a dict of ``image_data``, uint8 ``[n, H, W, 3]``, and ``class_dict``, the rows of
  each class (mini-ImageNet of Ravi and Larochelle 2017);
- ``SPLIT_images_png.pkl``, a list of ``n`` pictures as PNG bytes, and ``SPLIT_labels.pkl``, a dict with the numbers
  ``label_specific`` of their classes (tieredImageNet of Ren et al. 2018).

It writes ``ROOT/SPLIT/CLASS/NUMBER.png``, which ``--data ImagesDataModule --data.root ROOT`` takes. ``SPLIT.csv``
beside ``images/`` is taken as it is and needs no layout. Pickles can run code; these are read by an unpickler that
makes plain values and NumPy arrays alone.
"""

import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maml_lightning.data.datasets import SPLITS
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

# What a pickle of plain values and arrays names, by Python 2 and 3, NumPy 1 and 2.
_ARRAYS = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _Arrays(pickle.Unpickler):
    """Reads plain values and arrays; whatever else a pickle names raises."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return super().find_class(module, name)


def read_pickle(file: Path) -> Any:
    """Plain values and arrays of a pickle; keys and labels that Python 2 wrote are bytes.

    Raises:
        SettingError: it is missing, damaged, or names anything else.
    """
    try:
        with file.open("rb") as opened:
            return _named(_Arrays(opened, encoding="bytes").load())
    except OSError as error:
        raise SettingError(f"{shown(file)} cannot be read ({error.strerror}); give a file that can.") from error
    except Exception as error:  # whatever a damaged pickle raises
        reason = " ".join(str(error).split())[:200]
        raise SettingError(f"{shown(file)} cannot be read ({reason}); download it again.") from error


def _named(value: Any) -> Any:
    """A dict whose keys are texts, those that are bytes decoded."""
    if not isinstance(value, dict):
        return value
    return {key.decode() if isinstance(key, bytes) else key: _named(item) for key, item in value.items()}


def _mini(source: Path, split: str) -> Iterator[tuple[str, int, Any]]:
    file = source / f"mini-imagenet-cache-{split}.pkl"
    content = read_pickle(file)
    _check(
        isinstance(content, dict) and {"image_data", "class_dict"} <= set(content), file, "image_data and class_dict"
    )
    pixels, classes = content["image_data"], content["class_dict"]
    fits = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3
    _check(fits and isinstance(classes, dict), file, "uint8 pictures [n, H, W, 3] and the rows of each class")
    for name, rows in classes.items():
        for row in rows:
            _check(0 <= int(row) < len(pixels), file, f"row {row} of class {name}, of {len(pixels)} pictures")
            yield str(name), int(row), Image.fromarray(pixels[row])


def _tiered(source: Path, split: str) -> Iterator[tuple[str, int, Any]]:
    file, labeled = source / f"{split}_images_png.pkl", source / f"{split}_labels.pkl"
    pictures, labels = read_pickle(file), read_pickle(labeled)
    _check(isinstance(labels, dict) and "label_specific" in labels, labeled, "label_specific")
    numbers = [int(number) for number in labels["label_specific"]]
    _check(len(numbers) == len(pictures), labeled, f"a label for each of {len(pictures)} pictures")
    width = len(str(max(numbers, default=0)))
    for row, (number, picture) in enumerate(zip(numbers, pictures, strict=True)):
        content = np.asarray(picture).tobytes() if isinstance(picture, np.ndarray) else picture
        try:
            yield f"{split}{number:0{width}}", row, Image.open(io.BytesIO(content))
        except (OSError, TypeError) as error:
            raise SettingError(f"{shown(file)}: picture {row} is no PNG; download it again.") from error


def _check(fits: bool, file: Path, wanted: str) -> None:
    if not fits:
        raise SettingError(f"{shown(file)} has not {wanted}; give the file as it was published.")


_FORMATS = {"mini-imagenet-cache-{}.pkl": _mini, "{}_images_png.pkl": _tiered}


def lay_out(source: str | Path, root: str | Path) -> dict[str, int]:
    """Write the pictures of the published pickles as ``ROOT/SPLIT/CLASS/NUMBER.png``.

    Args:
        source: the folder of the pickles.
        root: a folder that does not exist, or is empty.

    Returns:
        how many pictures each split has.

    Raises:
        SettingError: a file is missing or cannot be used, or ``root`` holds something.
    """
    source, root = Path(source), Path(root)
    form = next((form for form in _FORMATS if any((source / form.format(split)).is_file() for split in SPLITS)), None)
    if form is None:
        names = " or ".join(form.format("train") for form in _FORMATS)
        raise SettingError(f"{shown(source)} has no {names}; give the folder that holds them.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise SettingError(f"{shown(root)} is there already; give a new folder.")
    for split in SPLITS:
        if not (file := source / form.format(split)).is_file():
            raise SettingError(f"{shown(file)} is missing; download all three splits.")
    counts = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for name, row, picture in _FORMATS[form](source, split):
            if Path(name).name != name or name.startswith("."):
                raise SettingError(
                    f"{shown(source)}: {shown(name)} is no name of a class; give the files as published."
                )
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{row:08}.png")
            counts[split] += 1
    return {str(split): count for split, count in counts.items()}


def main(words: list[str]) -> None:
    """Lay out what the two words after the command name; an error is one line."""
    if len(words) != 2 or words[0].startswith("-"):
        sys.exit(str(__doc__))
    try:
        counts = lay_out(*words)
    except SettingError as error:
        sys.exit(f"error: {error}")
    print(f"{', '.join(f'{count} {split}' for split, count in counts.items())} pictures written to {words[1]}.")


if __name__ == "__main__":
    main(sys.argv[1:])
