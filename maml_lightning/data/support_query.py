"""One task of your own: folders of labeled images to adapt on, and images to classify."""

import io
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from maml_lightning.analysis.drawing import Tile, contact_sheet
from maml_lightning.analysis.tables import csv_bytes, text_cell, write_file
from maml_lightning.data.image_files import Pixels, class_folders, image_files, read_image
from maml_lightning.episodes import Episode, InputSpec
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

FAINT = 0.5  # of full ink; below it an image's contrast is raised
ROWS = 40  # of the printed table; the file has all
SHEET = 200  # support images and queries on the contact sheet, at most, of each


class Prepared(NamedTuple):
    """Images as a network takes them, and how many of them each change was made to."""

    inputs: Tensor
    changes: dict[str, int]


def read_images(files: list[Path], spec: InputSpec) -> Prepared:
    """Read images and match them to a network's training images: size, channels and, for drawings, ink and background.

    If the training images had a plain background, images of the opposite polarity are inverted, their background is
    shifted to that of the training images, and faint ink is raised to full contrast.

    Args:
        files: ``n`` images of any size and mode.
        spec: what the network was trained on.

    Returns:
        inputs ``[n, C, H, W]`` in [0, 1], and how many images each change was made to.

    Raises:
        SettingError: an image cannot be read.
    """
    changes = {"padded to a square": 0, "inverted": 0, "shifted to the background": 0, "raised in contrast": 0}
    images: list[Pixels] = []
    for file in files:
        pixels = read_image(file, spec.side, spec.channels, "pad")
        with Image.open(file) as image:
            changes["padded to a square"] += image.width != image.height
        if spec.background is not None:
            target = round(255 * spec.background)
            if abs(_border(pixels) - target) > 127:
                pixels, changes["inverted"] = 255 - pixels, changes["inverted"] + 1
            ink = pixels.astype(np.float64) - target
            if abs(base := _border(pixels) - target) > 5:
                ink, changes["shifted to the background"] = ink - base, changes["shifted to the background"] + 1
            peak = np.abs(ink).max()
            if abs(base) > 5 or 0 < peak < 255 * FAINT:
                changes["raised in contrast"] += 0 < peak < 255 * FAINT
                pixels = (target + ink * 255 / max(peak, 1)).clip(0, 255).round().astype(np.uint8)
        images.append(pixels)
    return Prepared(torch.from_numpy(np.stack(images)).float() / 255, changes)


def _border(pixels: Pixels) -> float:
    edges = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    return float(np.median(np.concatenate(edges, axis=1)))


def support_set(folder: str | Path, spec: InputSpec) -> tuple[Tensor, Tensor, list[str]]:
    """Read a support set, one folder per class, to adapt on.

    Args:
        folder: ``FOLDER/CLASS/*.png``, or other formats, any number of images per class.
        spec: what the network was trained on, ``maml.inputs``.

    Returns:
        inputs ``[n, C, H, W]``, normalized as the network takes them, targets ``[n]`` and the names of the classes.

    Raises:
        SettingError: there are fewer than 2 classes, or something cannot be read.
    """
    classes = _classes(Path(folder))
    inputs = read_images([file for files in classes.values() for file in files], spec).inputs
    return spec.normalized(inputs), _targets(classes), list(classes)


def _classes(folder: Path) -> dict[str, list[Path]]:
    classes = class_folders(folder)
    if len(classes) < 2:
        raise SettingError(
            f"{shown(folder)} holds {len(classes)} folder{'s' * (len(classes) != 1)} of images; give one for each of "
            "at least 2 classes."
        )
    return classes


def _targets(classes: dict[str, list[Path]]) -> Tensor:
    return torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in classes.values()]))


def _only(batch: list[Episode]) -> Episode:
    return batch[0]


def _check_writable(output: Path) -> None:
    """Check before the work that a file can be written.

    Raises:
        SettingError: it cannot.
    """
    folder = next(parent for parent in output.absolute().parents if os.path.lexists(parent))
    try:
        trial = folder / uuid.uuid4().hex.ljust(len(os.fsencode(output.with_suffix(".png").name)), "x")
        trial.open("xb").close()
        trial.unlink()
    except OSError as error:
        raise SettingError(
            f"data.output {shown(output)} could not be written ({error.strerror}); give another name."
        ) from error


class SupportQueryDataModule(LightningDataModule):
    """Classify your own images: ``cli.py predict --ckpt_path CKPT --data SupportQueryDataModule``.

    Writes a table of probabilities (CSV: ``file``, ``predicted``, then one column per class) and a contact sheet (PNG)
    with the same name. Images are matched to those that the network was trained on. Names of files and classes that a
    spreadsheet would take for formulas (they begin with ``=``, ``+``, ``-``, ``@``, a tab or a line break) get a
    single quote in front in the table. If the outputs for an image are not finite, ``predicted`` is empty. With
    several processes, each predicts everything and the first one writes.

    Args:
        support: folder of the labeled images, ``SUPPORT/CLASS/*.png`` or other formats; any number per class.
        query: folder of the images to classify; subfolders count too. Where they have the classes' names, accuracy is
            reported.
        output: the CSV file; neither it nor the PNG of the same name may exist. If one appears during the run, it is
            kept, and ``NAME-1`` is written.
        beside_support: whether queries are evaluated in one batch with the support images. A network that normalizes
            with the statistics of the current batch can hardly classify one query alone, or many of one class.
            ``auto``: yes, unless the folders' names show equally many queries of every class, as in a test.

    Raises:
        SettingError: a folder or an image cannot be used, or the output exists already.
    """

    def __init__(
        self,
        support: str,
        query: str,
        output: str = "predictions.csv",
        beside_support: bool | Literal["auto"] = "auto",
    ):
        super().__init__()
        self.beside_support = beside_support
        self.support, self.query, self.output = Path(support), Path(query), Path(output)
        if not self.output.name:
            raise SettingError(f"data.output {output} is not a file name; give one such as predictions.csv.")
        self.sheet = self.output.with_suffix(".png")
        self.classes: dict[str, list[Path]] = {}
        self.files: list[Path] = []
        self.images: tuple[Tensor, Tensor] | None = None  # support and query, as the network takes them

    @property
    def ways(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def prepare_data(self) -> None:
        """Check all settings before anything is written."""
        support, query = self.support.resolve(), self.query.resolve()
        if support == query or support in query.parents or query in support.parents:
            raise SettingError(
                f"data.support {shown(self.support)} and data.query {shown(self.query)} must not contain one another; "
                "move one."
            )
        if self.output.suffix.lower() == ".png":
            raise SettingError(
                f"data.output {shown(self.output)} must not end in .png; that is the contact sheet's name; use .csv."
            )
        for file in (self.output, self.sheet):
            if os.path.lexists(file):
                raise SettingError(f"data.output: {shown(file)} exists already; remove it or give another name.")
        _check_writable(self.output)
        self.setup()
        if self._spec() is not None or (self.trainer is not None and self.trainer.ckpt_path is None):
            self._read()

    def _spec(self) -> InputSpec | None:
        return None if self.trainer is None else getattr(self.trainer.lightning_module, "inputs", None)

    def setup(self, stage: str | None = None) -> None:
        """List the image files."""
        self.classes = _classes(self.support)
        if not self.query.is_dir():
            raise SettingError(f"data.query {shown(self.query)} is not a folder; give one that holds images.")
        self.files = image_files(self.query, nested=True)
        if not self.files:
            raise SettingError(f"data.query {shown(self.query)} holds no images; put some in it.")

    def predict_dataloader(self) -> DataLoader[Episode]:
        """The one task."""
        if self.images is None:
            self._read()
        assert self.images is not None
        spec = self._spec()
        support, query = self.images if spec is None else map(spec.normalized, self.images)
        if self._beside():
            query = torch.cat([support, query])
        targets = torch.zeros(len(query), dtype=torch.int64)  # unused: the classes of queries are unknown
        episode = Episode(support, _targets(self.classes), query, targets)
        tasks: Any = [Episode(*(part[None] for part in episode))]
        # Every process predicts the one task: Lightning's own sampler would split it among them.
        sampler: DistributedSampler[Episode] = DistributedSampler(tasks, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(tasks, sampler=sampler, collate_fn=_only)

    def _beside(self) -> bool:
        if self.beside_support != "auto":
            return self.beside_support
        counts = Counter(self._label(file) for file in self.files)
        return set(counts) != set(range(self.ways)) or len(set(counts.values())) > 1

    def _read(self) -> None:
        spec = self._spec()
        if spec is None and self.trainer is not None and self.trainer.ckpt_path is None:
            raise SettingError(
                "ckpt_path is not given, or it does not record what images its network was trained on: they were not "
                "square, or normalized in another way than by data.mean and data.std, or it is of an earlier version; "
                "give --ckpt_path of a network trained on square images with this version."
            )
        if spec is None:
            raise SettingError(
                "The checkpoint does not record what images its network was trained on: they were not square, or not "
                "in [0, 1] (data.mean, data.std), or it is of an earlier version; train it on such with this version."
            )
        if self.ways > spec.ways:
            raise SettingError(
                f"data.support {shown(self.support)} holds {self.ways} classes, but the checkpoint classifies among "
                f"{spec.ways}; remove some, or train one with --data.ways {self.ways}."
            )
        support = read_images([file for files in self.classes.values() for file in files], spec)
        query = read_images(self.files, spec)
        changes = {what: count + query.changes[what] for what, count in support.changes.items()}
        changed = "".join(f"; {count} {what}" for what, count in changes.items() if count)
        rank_zero_info(
            f"{len(support.inputs)} support and {len(query.inputs)} query images, resized to {spec.channels} x "
            f"{spec.side} x {spec.side}{changed}"
            f"{'; queries are evaluated in one batch with the support images' if self._beside() else ''}."
        )
        self.images = support.inputs, query.inputs

    def report(self, probabilities: Tensor) -> None:
        """Write the predictions, then print them.

        Args:
            probabilities: ``[images, classes]``, the queries last.

        Raises:
            SettingError: a file could not be written.
        """
        probabilities = probabilities[-len(self.files) :].float().cpu()
        finite, names = probabilities.isfinite().all(1).tolist(), list(self.classes)
        predicted = [
            index if usable else None for index, usable in zip(probabilities.argmax(-1).tolist(), finite, strict=True)
        ]
        files = [str(file.relative_to(self.query)) for file in self.files]
        true = [self._label(file) for file in self.files]
        rows = list(zip(files, predicted, probabilities.tolist(), strict=True))
        table = [["file", "predicted", *map(text_cell, names)]]
        for file, index, row in rows:
            name = "" if index is None else text_cell(names[index])
            table.append([text_cell(file), name, *(f"{value:.6f}" for value in row)])
        written = [write_file(self.output, csv_bytes(table))]
        sheet = io.BytesIO()
        self._contact_sheet(predicted, probabilities, true).save(sheet, "PNG")
        written.append(write_file(self.sheet, sheet.getvalue()))
        console = Console()

        def cell(name: str) -> Text:
            return Text(shown(name).encode(console.encoding, "backslashreplace").decode(console.encoding))

        screen = Table("file", "predicted", "probability")
        for file, index, row in rows[:ROWS]:
            screen.add_row(cell(file), *(("", "") if index is None else (cell(names[index]), f"{row[index]:.2f}")))
        console.print(screen)
        if len(rows) > ROWS:
            rank_zero_info(f"… and {len(rows) - ROWS} more in {shown(written[0])}.")
        labeled = [(index, label) for index, label in zip(predicted, true, strict=True) if label is not None]
        if labeled:
            correct, total = sum(index == label for index, label in labeled), len(labeled)
            rank_zero_info(f"Accuracy: {correct / total:.4f} ({correct} of {total} images in folders named as classes)")
        if not all(finite):
            rank_zero_info(f"{finite.count(False)} images are not predicted: the network's outputs are not finite.")
        rank_zero_info(f"Written: {', '.join(map(shown, written))}")

    def _label(self, file: Path) -> int | None:
        names = list(self.classes)
        folders = file.relative_to(self.query).parts[:-1]
        return names.index(folders[-1]) if folders and folders[-1] in names else None

    def _contact_sheet(self, predicted: list[int | None], probabilities: Tensor, true: list[int | None]) -> Image.Image:
        """Support images by class, then queries with their predicted classes; wrong ones in red."""
        assert self.images is not None
        names, (support, query) = list(self.classes), self.images
        labels = _targets(self.classes).tolist()
        support_tiles = [Tile(image, names[label]) for image, label in zip(support, labels, strict=True)]
        query_tiles = [
            Tile(
                image,
                "not finite" if index is None else f"{names[index]} {row[index]:.2f}",
                "red" if label not in (None, index) else "green",
            )
            for image, index, row, label in zip(query, predicted, probabilities.tolist(), true, strict=True)
        ]
        return contact_sheet([("support", support_tiles[:SHEET]), ("query", query_tiles[:SHEET])])
