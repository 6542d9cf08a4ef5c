"""One task of your own: folders of labeled images to adapt on, and images to classify."""

import glob
import io
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from maml_lightning.analysis import predictions
from maml_lightning.analysis.calibration import UNCALIBRATED, check_threshold
from maml_lightning.analysis.prediction_sheet import Pictures, prediction_sheet, rows_of
from maml_lightning.analysis.predictions import Query
from maml_lightning.analysis.tables import write_file
from maml_lightning.data.image_files import SUFFIXES, eight_bit, image_files
from maml_lightning.data.support_sets import NO_SPEC, check_ways, classes_of, read_images, targets_of
from maml_lightning.episodes import Episode, InputSpec
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

SHEET = 200  # queries on the contact sheet, at most: wrong ones first
THUMBNAIL = 192  # pixels


def query_files(query: str | Path) -> tuple[Path, list[Path]]:
    """The images to classify, and the folder that their names are relative to.

    Args:
        query: a folder, whose subfolders count too; a file; or a pattern such as ``scans/*/*.png``, in which ``**``
            stands for folders of any depth.

    Raises:
        SettingError: there is none.
    """
    path = Path(query)
    if path.is_dir():
        files = image_files(path, nested=True)
        if not files:
            raise SettingError(f"data.query {shown(query)} holds no images; put some in it.")
        return path, files
    if path.is_file():
        return path.parent, [path]
    if not glob.has_magic(str(query)):
        raise SettingError(f"data.query {shown(query)} is not a folder, a file or a pattern; give one of images.")
    found = (Path(name) for name in glob.glob(str(query), recursive=True))
    files = sorted(file for file in found if file.is_file() and file.suffix.lower() in SUFFIXES)
    if not files:
        raise SettingError(
            f"data.query {shown(query)} matches no images ({', '.join(SUFFIXES)}); give another pattern."
        )
    return next(parent for parent in path.parents if not glob.has_magic(str(parent))), files


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

    Writes a table of probabilities (CSV: ``file``, ``predicted``, then one column per class), the same and more as
    JSON, and a contact sheet (PNG), all with the same name. Images are matched to those that the network was trained
    on. Names of files and classes that a spreadsheet would take for formulas (they begin with ``=``, ``+``, ``-``,
    ``@``, a tab or a line break) get a single quote in front in the CSV. If the outputs for an image are not finite,
    ``predicted`` is empty. With several processes, each predicts everything and the first one writes.

    The JSON has ``checkpoint``, ``support``, ``query``, ``reject``, ``classes``, ``predictions`` (of each query
    ``file``, ``label``, ``predicted``, ``nearest``, ``probability``, ``rejected``, ``probabilities`` by class,
    ``confidence``), and where labels are known ``accuracy``, ``per_class`` (``class``, ``queries``, ``right``,
    ``wrong``, ``none``, ``accuracy``) and ``confusion_matrix``, whose rows are true classes and whose last column is
    none of them; else null.

    Args:
        support: folder of the labeled images, ``SUPPORT/CLASS/*.png`` or other formats; any number per class.
        query: the images to classify: a folder, whose subfolders count too; a file; or a pattern such as
            ``scans/*.png``. Where images are in folders with the classes' names, accuracy is reported.
        output: the CSV file; neither it nor the JSON and PNG of the same name may exist. If one appears during the run,
            it is kept, and ``NAME-1`` is written.
        beside_support: whether queries are evaluated in one batch with the support images. A network that normalizes
            with the statistics of the current batch (model.query_statistics batch) can hardly classify one query alone,
            or many of one class. ``auto``: yes for such a network, unless the folders' names show equally many queries
            of every class, as in a test.
        reject: a query with a confidence below this is "none of these": the probability that it is of one of the
            classes and predicted right, calibrated on validation classes (``maml-lightning calibrate``; the networks of
            the package are). Without a calibration in the checkpoint, the highest probability. Null rejects none.

    Raises:
        SettingError: a folder or an image cannot be used, or the output exists already.
    """

    def __init__(
        self,
        support: str,
        query: str,
        output: str = "predictions.csv",
        beside_support: bool | Literal["auto"] = "auto",
        reject: float | None = None,
    ):
        super().__init__()
        self.beside_support, self.reject = beside_support, reject
        self.support, self.query, self.output = Path(support), query, Path(output)
        if not self.output.name:
            raise SettingError(f"data.output {output} is not a file name; give one such as predictions.csv.")
        check_threshold("data.reject", reject)
        self.sheet, self.json = self.output.with_suffix(".png"), self.output.with_suffix(".json")
        self.folder = Path()  # that the queries' names are relative to
        self.classes: dict[str, list[Path]] = {}
        self.files: list[Path] = []
        self.images: tuple[Tensor, Tensor] | None = None  # support and query, as the network takes them

    @property
    def ways(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def prepare_data(self) -> None:
        """Check all settings before anything is written."""
        if self.output.suffix.lower() in (".png", ".json"):
            raise SettingError(
                f"data.output {shown(self.output)} must not end in {self.output.suffix}; that is another file's name; "
                "use .csv."
            )
        for file in (self.output, self.json, self.sheet):
            if os.path.lexists(file):
                raise SettingError(f"data.output: {shown(file)} exists already; remove it or give another name.")
        _check_writable(self.output)
        self.setup()
        untrained = self._spec() is None and self.trainer is not None and self.trainer.ckpt_path is None
        if self.images is None and (self._spec() is not None or untrained):  # Lightning prepares a second time
            self._read()

    def _module(self, attribute: str, default: Any) -> Any:
        """An attribute of the module that predicts."""
        return default if self.trainer is None else getattr(self.trainer.lightning_module, attribute, default)

    def _spec(self) -> InputSpec | None:
        return self._module("inputs", None)

    def setup(self, stage: str | None = None) -> None:
        """List the image files."""
        self.classes = classes_of(self.support)
        self.folder, self.files = query_files(self.query)
        support = self.support.resolve()
        if any(support in (folder := file.parent.resolve()).parents or support == folder for file in self.files):
            raise SettingError(
                f"data.support {shown(self.support)} and data.query {shown(self.query)} must not contain one another; "
                "move one."
            )

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
        episode = Episode(support, targets_of(self.classes), query, targets)
        tasks: Any = [Episode(*(part[None] for part in episode))]
        # Every process predicts the one task: Lightning's own sampler would split it among them.
        sampler: DistributedSampler[Episode] = DistributedSampler(tasks, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(tasks, sampler=sampler, collate_fn=_only)

    def _beside(self) -> bool:
        if self.beside_support != "auto":
            return self.beside_support
        if self._module("query_statistics", "batch") != "batch":
            return False
        counts = Counter(self._label(file) for file in self.files)
        return set(counts) != set(range(self.ways)) or len(set(counts.values())) > 1

    def _read(self) -> None:
        spec = self._spec()
        if spec is None and self.trainer is not None and self.trainer.ckpt_path is None:
            raise SettingError(f"ckpt_path is not given, or it {NO_SPEC}; give --ckpt_path of such a network.")
        if spec is None:
            raise SettingError(f"The checkpoint {NO_SPEC}; train it on such with this version.")
        check_ways(f"data.support {shown(self.support)}", self.ways, spec, self._module("head", "learned"))
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

    def report(self, probabilities: Tensor, confidences: Tensor | None = None) -> None:
        """Write the predictions, then print them.

        Args:
            probabilities: ``[images, classes]``, the queries last.
            confidences: ``[images]``; None without a calibration.

        Raises:
            SettingError: a file could not be written.
        """
        probabilities = probabilities[-len(self.files) :].float().cpu()
        if confidences is not None:
            confidences = confidences[-len(self.files) :].cpu()
        elif self.reject is not None:
            rank_zero_info(f"data.reject {self.reject} {UNCALIBRATED}")
        classes, labels = list(self.classes), [self._label(file) for file in self.files]
        names = [str(file.relative_to(self.folder)) for file in self.files]
        queries = predictions.queries_of(names, labels, probabilities, self.reject, confidences)
        checkpoint = None if self.trainer is None else getattr(self.trainer, "ckpt_path", None)
        settings = {"checkpoint": checkpoint, "support": self.support, "query": self.query}
        settings = {key: None if value is None else str(value) for key, value in settings.items()}
        written = [
            write_file(self.output, predictions.csv_table(queries, classes)),
            write_file(self.json, predictions.json_table(queries, classes, {**settings, "reject": self.reject})),
        ]
        sheet = io.BytesIO()
        self._contact_sheet(queries).save(sheet, "PNG")
        written.append(write_file(self.sheet, sheet.getvalue()))
        console = Console()
        for table in predictions.screen(queries, classes, console.encoding):
            console.print(table)
        if len(queries) > predictions.ROWS:
            rank_zero_info(f"… and {len(queries) - predictions.ROWS} more in {shown(written[0])}.")
        if known := [query for query in queries if query.label is not None]:
            correct, total = sum(query.predicted == query.label for query in known), len(known)
            rank_zero_info(f"Accuracy: {correct / total:.4f} ({correct} of {total} images in folders named as classes)")
        if rejected := sum(query.rejected for query in queries):
            rank_zero_info(f"{rejected} of {len(queries)} images are none of these: below data.reject {self.reject}.")
        if broken := sum(query.nearest is None for query in queries):
            rank_zero_info(f"{broken} images are not predicted: the network's outputs are not finite.")
        rank_zero_info(f"Written: {', '.join(map(shown, written))}")

    def _label(self, file: Path) -> int | None:
        names = list(self.classes)
        folders = file.relative_to(self.folder).parts[:-1]
        return names.index(folders[-1]) if folders and folders[-1] in names else None

    def _contact_sheet(self, queries: list[Query]) -> Image.Image:
        """A row for each class; the originals of queries that are not on the sheet are not read again."""
        assert self.images is not None
        support, seen = self.images
        of_class = support.split([len(files) for files in self.classes.values()])
        rows = rows_of(queries, list(self.classes), of_class)
        shown_ones = {number for row in rows for number in row.queries[: max(1, SHEET // len(rows))]}
        pictures = [
            Pictures(_thumbnail(file), image) if number in shown_ones else None
            for number, (file, image) in enumerate(zip(self.files, seen, strict=True))
        ]
        return prediction_sheet(rows, queries, list(self.classes), pictures)


def _thumbnail(file: Path) -> Image.Image:
    """The original of an image that was read before."""
    with Image.open(file) as opened:
        image = eight_bit(ImageOps.exif_transpose(opened)).convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image
