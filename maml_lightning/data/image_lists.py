"""Lists of pictures and their classes: ``train.csv``, ``val.csv`` and ``test.csv``, as published with mini-ImageNet."""

import csv
from collections import Counter
from pathlib import Path

from maml_lightning.data.datasets import SPLITS
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

COLUMNS = ("filename", "label")


def listed_splits(root: Path) -> list[str]:
    """The splits of which there is a list."""
    return [split for split in SPLITS if (root / f"{split}.csv").is_file()]


def listed_classes(root: Path, split: str) -> dict[str, list[Path]]:
    """The pictures of each class that the list of a split names, classes and pictures by name.

    Args:
        root: holds ``SPLIT.csv`` with the columns ``filename`` and ``label``; and the pictures, in ``images``, in a
            folder with the split's name, or in itself.
        split: name of the split.

    Raises:
        SettingError: the list cannot be read, or names a picture twice, or one that is not there.
    """
    file = root / f"{split}.csv"
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            columns = reader.fieldnames or []
            if not set(COLUMNS) <= set(columns):
                has = f"has the columns {shown(', '.join(columns))}" if columns else "is empty"
                raise SettingError(f"{shown(file)} {has}; its first line must name {' and '.join(COLUMNS)}.")
            rows = [(row["filename"] or "", row["label"] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(f"{shown(file)} cannot be read ({shown(reason)}); give a CSV file in UTF-8.") from error
    name, times = max(Counter(name for name, _ in rows).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise SettingError(f"{shown(file)} names {shown(name)} {times} times; leave one line.")
    places = [root / "images", root / split, root]
    classes: dict[str, list[Path]] = {}
    for line, (name, label) in enumerate(rows, 2):
        found = next((place / name for place in places if name and (place / name).is_file()), None)
        if found is None or not label:
            what = "has no label" if found else f"is not in {shown(root)} or {shown(root / 'images')}"
            raise SettingError(
                f"{shown(file)}, line {line}: {shown(name) or 'a picture without a name'} {what}; mend it."
            )
        classes.setdefault(label, []).append(found)
    return {label: sorted(classes[label]) for label in sorted(classes)}
