"""One task of your own: folders of pictures to adapt on, and pictures to be told apart."""

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
from maml_lightning.data.image_files import Pixels, class_folders, pictures_in, read_picture
from maml_lightning.episodes import Episode, Inputs
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

FAINT = 0.5  # of full ink; below it a picture's contrast is raised
ROWS = 40  # of the printed table; the file has them all
SHEET = 200  # of support pictures and of queries on the contact sheet


class Reading(NamedTuple):
    """Pictures as a network takes them, and what was done to them."""

    inputs: Tensor
    done: dict[str, int]


def read_pictures(files: list[Path], like: Inputs) -> Reading:
    """Bring pictures to what a network was trained on: size, channels and, for drawings, ink and background.

    Where the training pictures had a plain background, pictures of the other polarity are inverted, their background
    is brought to it, and faint ink to full contrast.

    Args:
        files: ``n`` pictures of any size and mode.
        like: what the network was trained on.

    Returns:
        inputs ``[n, C, H, W]`` in [0, 1], and how many pictures each change was made to.

    Raises:
        SettingError: a picture cannot be read.
    """
    done = {"made square": 0, "inverted": 0, "brought to the background": 0, "raised in contrast": 0}
    read: list[Pixels] = []
    for file in files:
        pixels = read_picture(file, like.side, like.channels, "pad")
        with Image.open(file) as image:
            done["made square"] += image.width != image.height
        if like.background is not None:
            target = round(255 * like.background)
            if abs(_border(pixels) - target) > 127:
                pixels, done["inverted"] = 255 - pixels, done["inverted"] + 1
            ink = pixels.astype(np.float64) - target
            if abs(base := _border(pixels) - target) > 5:
                ink, done["brought to the background"] = ink - base, done["brought to the background"] + 1
            peak = np.abs(ink).max()
            if abs(base) > 5 or 0 < peak < 255 * FAINT:
                done["raised in contrast"] += 0 < peak < 255 * FAINT
                pixels = (target + ink * 255 / max(peak, 1)).clip(0, 255).round().astype(np.uint8)
        read.append(pixels)
    return Reading(torch.from_numpy(np.stack(read)).float() / 255, done)


def _border(pixels: Pixels) -> float:
    edges = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    return float(np.median(np.concatenate(edges, axis=1)))


def support_set(folder: str | Path, like: Inputs) -> tuple[Tensor, Tensor, list[str]]:
    """The pictures of a folder of class folders, to adapt on.

    Args:
        folder: ``FOLDER/CLASS/*.png``, or other formats, any number for each class.
        like: what the network was trained on, ``maml.inputs``.

    Returns:
        inputs ``[n, C, H, W]``, targets ``[n]`` and the names of the classes.

    Raises:
        SettingError: there are fewer than 2 classes, or something cannot be read.
    """
    classes = _classes(Path(folder))
    inputs = read_pictures([file for files in classes.values() for file in files], like).inputs
    return inputs, _targets(classes), list(classes)


def _classes(folder: Path) -> dict[str, list[Path]]:
    classes = class_folders(folder)
    if len(classes) < 2:
        raise SettingError(
            f"{shown(folder)} holds {len(classes)} folder{'s' * (len(classes) != 1)} of pictures; give one for each of "
            "at least 2 classes."
        )
    return classes


def _targets(classes: dict[str, list[Path]]) -> Tensor:
    return torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in classes.values()]))


def _only(batch: list[Episode]) -> Episode:
    return batch[0]


def _check_writable(output: Path) -> None:
    """Refuse a file that could not be written after the work.

    Raises:
        SettingError: it could not.
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
    """Tell your own pictures apart: ``cli.py predict --ckpt_path CKPT --data SupportQueryDataModule``.

    Writes a table of probabilities (CSV: ``file``, ``predicted``, then a column a class) and a contact sheet (PNG)
    beside it. Pictures are brought to what the network was trained on. Names of files and classes that a spreadsheet
    would take for formulas, those that begin with ``=``, ``+``, ``-``, ``@``, a tab or a line's end, get a single
    quote in front in the table. Where the outputs for a picture are not finite, ``predicted`` is empty. Of several
    processes each predicts everything and the first one writes.

    Args:
        support: the classes, ``SUPPORT/CLASS/*.png`` or of other formats; any number of pictures in each.
        query: the pictures to tell apart, in this folder or in folders of it; where such a folder has a class's name,
            accuracy is reported.
        output: the CSV file; it must not be there yet, nor the PNG of that name. What appears there meanwhile is
            left as it is, and ``NAME-1`` is written.
        beside_support: whether the network sees queries together with the support pictures. It normalises with what it
            sees: one query alone, or many of one class, it can hardly tell. ``auto``: unless the folders' names say
            that there are equally many queries of every class, as in a test.

    Raises:
        SettingError: a folder or picture cannot be used, or the output is there already.
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
            raise SettingError(f"data.output {output} is no file's name; give one such as predictions.csv.")
        self.sheet = self.output.with_suffix(".png")
        self.classes: dict[str, list[Path]] = {}
        self.files: list[Path] = []
        self.pictures: tuple[Tensor, Tensor] | None = None  # support and query, as the network takes them

    @property
    def ways(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def prepare_data(self) -> None:
        """Refuse what cannot be used before anything is written."""
        support, query = self.support.resolve(), self.query.resolve()
        if support == query or support in query.parents or query in support.parents:
            raise SettingError(
                f"data.support {shown(self.support)} and data.query {shown(self.query)} must not lie in one another; "
                "move one."
            )
        if self.output.suffix.lower() == ".png":
            raise SettingError(
                f"data.output {shown(self.output)} must not end in .png; that is the contact sheet's name."
            )
        for file in (self.output, self.sheet):
            if os.path.lexists(file):
                raise SettingError(f"data.output: {shown(file)} is there already; remove it or give another name.")
        _check_writable(self.output)
        self.setup()
        if self._like() is not None or (self.trainer is not None and self.trainer.ckpt_path is None):
            self._read()

    def _like(self) -> Inputs | None:
        return None if self.trainer is None else getattr(self.trainer.lightning_module, "inputs", None)

    def setup(self, stage: str | None = None) -> None:
        """List the pictures."""
        self.classes = _classes(self.support)
        if not self.query.is_dir():
            raise SettingError(f"data.query {shown(self.query)} is not a folder; give one that holds pictures.")
        self.files = pictures_in(self.query, nested=True)
        if not self.files:
            raise SettingError(f"data.query {shown(self.query)} holds no pictures; put some in it.")

    def predict_dataloader(self) -> DataLoader[Episode]:
        """The one task."""
        if self.pictures is None:
            self._read()
        assert self.pictures is not None
        support, query = self.pictures
        if self._beside():
            query = torch.cat([support, query])
        targets = torch.zeros(len(query), dtype=torch.int64)  # not asked for
        episode = Episode(support, _targets(self.classes), query, targets)
        tasks: Any = [Episode(*(part[None] for part in episode))]
        # Every process predicts the one task: Lightning would spread it over them with a sampler of its own.
        sampler: DistributedSampler[Episode] = DistributedSampler(tasks, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(tasks, sampler=sampler, collate_fn=_only)

    def _beside(self) -> bool:
        if self.beside_support != "auto":
            return self.beside_support
        counts = Counter(self._label(file) for file in self.files)
        return set(counts) != set(range(self.ways)) or len(set(counts.values())) > 1

    def _read(self) -> None:
        like = self._like()
        if like is None and self.trainer is not None and self.trainer.ckpt_path is None:
            raise SettingError("ckpt_path is not given, and an untrained network predicts nothing; give --ckpt_path.")
        if like is None:
            raise SettingError(
                "The checkpoint does not say what pictures its network was trained on; train it with this version."
            )
        if self.ways > like.ways:
            raise SettingError(
                f"data.support {shown(self.support)} holds {self.ways} classes, but the checkpoint tells {like.ways} "
                f"apart; remove some, or train one with --data.ways {self.ways}."
            )
        support = read_pictures([file for files in self.classes.values() for file in files], like)
        query = read_pictures(self.files, like)
        done = {what: count + query.done[what] for what, count in support.done.items()}
        told = ", ".join(f"{count} {what}" for what, count in done.items() if count)
        rank_zero_info(
            f"{len(support.inputs)} support and {len(query.inputs)} query pictures, each brought to {like.channels} x "
            f"{like.side} x {like.side}{'; ' + told if told else ''}"
            f"{'; queries are seen together with the support pictures' if self._beside() else ''}."
        )
        self.pictures = support.inputs, query.inputs

    def report(self, probabilities: Tensor) -> None:
        """Write what was found, then print it.

        Args:
            probabilities: ``[pictures, classes]``, the queries last.

        Raises:
            SettingError: a file could not be written.
        """
        probabilities = probabilities[-len(self.files) :].float().cpu()
        finite, names = probabilities.isfinite().all(1).tolist(), list(self.classes)
        found = [
            index if whole else None for index, whole in zip(probabilities.argmax(-1).tolist(), finite, strict=True)
        ]
        files = [str(file.relative_to(self.query)) for file in self.files]
        true = [self._label(file) for file in self.files]
        rows = list(zip(files, found, probabilities.tolist(), strict=True))
        table = [["file", "predicted", *map(text_cell, names)]]
        for file, index, row in rows:
            predicted = "" if index is None else text_cell(names[index])
            table.append([text_cell(file), predicted, *(f"{value:.6f}" for value in row)])
        written = [write_file(self.output, csv_bytes(table))]
        picture = io.BytesIO()
        self._contact_sheet(found, probabilities, true).save(picture, "PNG")
        written.append(write_file(self.sheet, picture.getvalue()))
        console = Console()

        def cell(name: str) -> Text:
            return Text(shown(name).encode(console.encoding, "backslashreplace").decode(console.encoding))

        screen = Table("file", "predicted", "probability")
        for file, index, row in rows[:ROWS]:
            screen.add_row(cell(file), *(("", "") if index is None else (cell(names[index]), f"{row[index]:.2f}")))
        console.print(screen)
        if len(found) > ROWS:
            rank_zero_info(f"… and {len(found) - ROWS} more in {shown(written[0])}.")
        told = [(index, label) for index, label in zip(found, true, strict=True) if label is not None]
        if told:
            right = sum(index == label for index, label in told)
            rank_zero_info(f"Accuracy: {right / len(told):.4f} ({right} of {len(told)} pictures in folders of classes)")
        if not all(finite):
            rank_zero_info(f"{finite.count(False)} pictures are not predicted: the network's outputs are not finite.")
        rank_zero_info(f"Written: {', '.join(map(shown, written))}")

    def _label(self, file: Path) -> int | None:
        names = list(self.classes)
        folders = file.relative_to(self.query).parts[:-1]
        return names.index(folders[-1]) if folders and folders[-1] in names else None

    def _contact_sheet(self, found: list[int | None], probabilities: Tensor, true: list[int | None]) -> Image.Image:
        """Support pictures by class, then queries with what they were taken for; wrong ones in red."""
        assert self.pictures is not None
        names, (support, query) = list(self.classes), self.pictures
        labels = _targets(self.classes).tolist()
        shown = [Tile(picture, names[label]) for picture, label in zip(support, labels, strict=True)]
        asked = [
            Tile(
                picture,
                "not finite" if index is None else f"{names[index]} {row[index]:.2f}",
                "red" if label not in (None, index) else "green",
            )
            for picture, index, row, label in zip(query, found, probabilities.tolist(), true, strict=True)
        ]
        return contact_sheet([("support", shown[:SHEET]), ("query", asked[:SHEET])])
