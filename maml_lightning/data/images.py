"""Images in one folder per class: your own, or a published data set with that layout (mini-ImageNet, CIFAR-FS, CUB)."""

import contextlib
import hashlib
import io
import os
import re
import time
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from maml_lightning.data.checks import at_least
from maml_lightning.data.datasets import SPLITS, EpisodeDataset, Split
from maml_lightning.data.examples import Examples
from maml_lightning.data.image_files import class_folders, read_image
from maml_lightning.data.image_lists import listed_classes, listed_splits
from maml_lightning.data.modules import EpisodicDataModule
from maml_lightning.data.packs import (
    VERSION,
    Sources,
    abandoned,
    compare,
    load_arrays,
    new_digest,
    read_sources,
    save_arrays,
    state,
    sweep,
    temporary,
)
from maml_lightning.data.splits import check_disjoint, split_classes
from maml_lightning.errors import SettingError
from maml_lightning.files import shown, write_whole

QUERY_SHOTS = 15  # of mini-ImageNet
Shape = tuple[int, Literal[1, 3], int, int]  # images, channels, side, side


def pack(folder: Path, names: list[str], file: Path, side: int, channels: Literal[1, 3]) -> Tensor:
    """Every image as ``[channels, side, side]``, in a file that is mapped into memory, not read.

    Args:
        folder: holds the images.
        names: their paths relative to it.
        file: the pack; the list of its source files is beside it (``.npz``). It is made if it is missing, and again
            if the images or the pack have changed. If it cannot be written, the images stay in memory.
        side: edge length in pixels; images that are not square are cropped.
        channels: 1 or 3.

    Returns:
        ``[images, channels, side, side]`` uint8.

    Raises:
        SettingError: an image cannot be read.
    """
    shape: Shape = (len(names), channels, side, side)
    for part in (file, _about(file)):
        sweep(part)
    found = _packed(file, folder, names, shape)
    if isinstance(found, Tensor):
        return found
    occasion = f"again: {shown(found)}" if found else "once"
    rank_zero_info(f"Packing {len(names)} images into {shown(file)} ({occasion})")
    try:
        file.parent.mkdir(exist_ok=True)
        _write(file, folder, names, shape)
        found = _packed(file, folder, names, shape)
    except OSError as error:
        reason = error.strerror or error
        rank_zero_warn(f"{shown(file)} could not be written ({reason}): all images are read at every start.")
    if isinstance(found, Tensor):
        return found
    return torch.from_numpy(np.stack([read_image(folder / name, side, channels, "crop") for name in names]))


def _about(file: Path) -> Path:
    return file.with_suffix(".npz")


def _settings(shape: Shape) -> str:
    return f"version {VERSION}, {list(shape)}, crop"


def _packed(file: Path, folder: Path, names: list[str], shape: Shape) -> Tensor | str:
    """The packed images; or why they cannot be used, an empty string if there are none."""
    if not file.exists():
        return ""
    about = load_arrays(_about(file))
    try:
        if about is None:
            return "it does not list its source files"
        packed, pixels, settings = Sources.of_arrays(about), about["pixels"].tolist(), str(about["settings"])
        why, now = compare(packed, folder, names)
        if why is not None or settings != _settings(shape):
            return why or "its settings differ"
        with file.open("rb") as opened:
            found = list(state(os.fstat(opened.fileno())))
            if found != pixels and hashlib.file_digest(opened, new_digest).digest() != about["digest"].tobytes():
                return "its pixels have changed"
            opened.seek(0)
            np.lib.format.read_magic(opened)
            np.lib.format.read_array_header_1_0(opened)
            # c: copy on write, because torch warns about read-only arrays
            mapped = np.memmap(opened, np.uint8, "c", opened.tell(), shape)
    except SettingError:  # an image cannot be read
        raise
    except (OSError, ValueError, KeyError):
        return "it cannot be read"
    if found != pixels or not np.array_equal(now.states, packed.states):
        with contextlib.suppress(OSError):  # if it fails, the next start compares digests again
            _describe(file, now, found, about["digest"].tobytes(), shape)
    return torch.from_numpy(mapped)


def _write(file: Path, folder: Path, names: list[str], shape: Shape) -> None:
    """Write the pack, and its description beside it."""
    whole, inode, sources = new_digest(), 0, None
    _, channels, side, _ = shape

    def write(growing: BinaryIO) -> None:
        nonlocal inode, sources

        def add(content: bytes) -> None:
            growing.write(content)
            whole.update(content)

        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        add(header.getvalue())
        sources = read_sources(
            folder,
            names,
            lambda image, content: add(read_image(Path(image), side, channels, "crop", content).tobytes()),
        )
        inode = os.fstat(growing.fileno()).st_ino

    write_whole(file, write, temporary(file))
    assert sources is not None
    time.sleep(0.02)  # a tick of the file system's clock: any later write changes the file's times
    now = state(file.stat())
    try:
        _describe(file, sources, list(now) if now[-1] == inode else [0] * 4, whole.digest(), shape)
    except OSError:
        file.unlink(missing_ok=True)  # useless without its description
        raise


def _describe(file: Path, sources: Sources, pixels: list[int], digest: bytes, shape: Shape) -> None:
    about = {
        **sources.arrays(),
        "pixels": np.array(pixels, np.int64),
        "digest": np.frombuffer(digest, np.uint8),
        "settings": np.array(_settings(shape)),
    }
    save_arrays(_about(file), about)


def packed_digests(file: Path) -> dict[bytes, str]:
    """The files that a pack was made from, by the digest of their bytes; none if it is not there."""
    about = load_arrays(_about(file))
    try:
        sources = None if about is None else Sources.of_arrays(about)
    except (ValueError, KeyError):
        sources = None
    found = () if sources is None else zip(sources.digests, sources.names, strict=True)
    return {digest.tobytes(): name for digest, name in found}


def _superseded(folder: Path, split: Split, side: int, channels: int) -> None:
    """Remove packs with the names of earlier versions, which held a checksum of the files' sizes and times."""
    name = re.compile(rf"(\.?){split}_{channels}x{side}_[0-9a-f]{{8}}\.npy(\.[0-9a-f]{{32}})?")
    for file in folder.glob("*") if folder.is_dir() else ():
        if (found := name.fullmatch(file.name)) is not None:
            with contextlib.suppress(OSError):
                if not found[1] or abandoned(file):
                    file.unlink()


class ImagesDataModule(EpisodicDataModule):
    """Episodes of your own images, ``ROOT/{train,val,test}/CLASS/*.png`` or other common formats.

    Without those three folders (``ROOT/CLASS/*.png``) the classes are split 64/16/20 % by ``split_seed``. With
    ``ROOT/{train,val,test}.csv``, the columns ``filename`` and ``label`` name the images in ``ROOT/images`` or ROOT and
    their classes, as of mini-ImageNet. Subfolders of a class count too. Classes may differ in size. No class and no
    image may be in two splits.

    Images are packed once into ``ROOT/.packed``, again when a file's bytes or the pack have changed, and mapped into
    memory, so they may be larger than it (with ``rotations`` they are held in memory). A start compares each file's
    size, times and inode, and reads the files in which one differs.

    Args:
        root: the folder of the splits, of the classes, or of the lists.
        size: edge length of the images in pixels, at least 1; images that are not square are cropped at the center.
        channels: 3 for color, 1 for grayscale; the network's ``in_channels``.
        split_seed: draws which classes are for training, validation and test, if there are no folders for them.
        class_depth: how many folders deep the classes are: 1 for CLASS, 2 for ALPHABET/CHARACTER.
        query_shots: query examples per class ``Q``, at least 1; null takes 15, or as many as the smallest class has
            beside ``shots``.

    Raises:
        SettingError: a setting is out of range, or a folder or an image cannot be read.
    """

    def __init__(
        self,
        root: str,
        size: int = 84,
        channels: Literal[1, 3] = 3,
        split_seed: int = 0,
        class_depth: int = 1,
        *,
        query_shots: int | None = None,
        meta_batch_size: int = 4,
        train_episodes: int = 4000,
        **settings: Any,
    ):
        super().__init__(
            query_shots=QUERY_SHOTS if query_shots is None else query_shots,
            meta_batch_size=meta_batch_size,
            train_episodes=train_episodes,
            **settings,
        )
        at_least("size", size, 1)
        at_least("class_depth", class_depth, 1)
        self.root, self.size, self.channels, self.split_seed = Path(root), size, channels, split_seed
        self.class_depth, self._fits_query_shots = class_depth, query_shots is None
        self._classes: dict[Split, dict[str, list[Path]]] = {}

    def classes_of(self, split: Split) -> dict[str, list[Path]]:
        """The image files of each class of a split.

        Raises:
            SettingError: there are none, or only some of the three folders or lists exist, or splits share a class.
        """
        if not self._classes:
            self._classes = self._find()
            names = {f"data.root: {name}": list(found) for name, found in self._classes.items()}
            check_disjoint(names, numbered_alone=True)
        found = self._classes[split]
        if not found:
            raise SettingError(
                f"data.root {shown(self.root)} has no folders of images for {split}; add one for each class, or lower "
                "data.class_depth."
            )
        return found

    def _find(self) -> dict[Split, dict[str, list[Path]]]:
        for kind, present in (("list", listed_splits(self.root)), ("folder", _split_folders(self.root))):
            if len(present) == len(SPLITS):
                if kind == "list":
                    return {split: listed_classes(self.root, split) for split in SPLITS}
                return {split: class_folders(self.root / split, self.class_depth) for split in SPLITS}
            if present:
                end = ".csv" if kind == "list" else ""
                missing = next(name for name in SPLITS if name not in present)
                raise SettingError(
                    f"data.root {shown(self.root)} has {', '.join(name + end for name in present)} but no {kind} "
                    f"{missing}{end}; give all of train, val and test, or only the classes."
                )
        classes = class_folders(self.root, self.class_depth)
        splits = split_classes(list(classes), self.split_seed)
        return {split: {name: classes[name] for name in names} for split, names in splits.items()}

    def make_dataset(self, split: Split) -> EpisodeDataset:
        """Episodes of the split's images."""
        if self._fits_query_shots:
            sizes = [len(files) for name in SPLITS for files in self.classes_of(name).values()]
            self.query_shots = max(1, min(QUERY_SHOTS, min(sizes) - self.shots))
        return super().make_dataset(split)

    def load_split(self, split: Split) -> Examples:
        """The images of a split, ``[images, channels, size, size]`` uint8."""
        classes = self.classes_of(split)
        folder = self._folder(split)
        start = len(os.path.join(folder, ""))
        names = [str(image)[start:] for files in classes.values() for image in files]
        _superseded(self.root / ".packed", split, self.size, self.channels)
        images = pack(folder, names, self._pack(split), self.size, self.channels)
        for other in SPLITS:
            if other != split:
                self._check_nothing_shared(split, other)
        return Examples(images, [len(files) for files in classes.values()], list(classes))

    def _separate(self, split: Split) -> bool:
        """Whether a split has a folder of its own."""
        return (self.root / split).is_dir() and not listed_splits(self.root)

    def _folder(self, split: Split) -> Path:
        return self.root / split if self._separate(split) else self.root

    def _pack(self, split: Split) -> Path:
        drawn = not self._separate(split) and not listed_splits(self.root)
        seed = f"_seed{self.split_seed}" if drawn else ""  # draws the split's classes
        return self.root / ".packed" / f"{split}{seed}_{self.channels}x{self.size}.npy"

    def _check_nothing_shared(self, *splits: Split) -> None:
        """Compare the digests of two splits' files, where both are packed."""
        ours, theirs = (packed_digests(self._pack(split)) for split in splits)
        if same := ours.keys() & theirs.keys():
            digest = min(same, key=lambda each: ours[each])
            first, second = (
                shown((self._folder(split) / names[digest]).relative_to(self.root))
                for split, names in zip(splits, (ours, theirs), strict=True)
            )
            raise SettingError(
                f"data.root {shown(self.root)}: {first} of {splits[0]} and {second} of {splits[1]} are the same "
                "picture; remove one."
            )


def _split_folders(root: Path) -> list[str]:
    return [split for split in SPLITS if (root / split).is_dir()]
