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
from maml_lightning.data.datasets import Split
from maml_lightning.data.image_files import class_folders, read_image
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
from maml_lightning.data.splits import SHARES, split_classes
from maml_lightning.errors import SettingError
from maml_lightning.files import shown, write_whole

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

    Without those three folders (``ROOT/CLASS/*.png``) the classes are split 64/16/20 % by ``split_seed``. Classes may
    differ in size; each needs at least ``shots + query_shots`` images. Images are packed once into ``ROOT/.packed``,
    again when a file's bytes or the pack have changed, and mapped into memory, so they may be larger than it (with
    ``rotations`` they are held in memory). A start compares each file's size, times and inode, and reads the files in
    which one differs.

    Args:
        root: the folder of the splits, or of the classes.
        size: edge length of the images in pixels, at least 1; images that are not square are cropped at the center.
        channels: 3 for color, 1 for grayscale; the network's ``in_channels``.
        split_seed: draws which classes are for training, validation and test, if there are no folders for them.

    Raises:
        SettingError: a setting is out of range, or a folder or an image cannot be read.
    """

    def __init__(
        self,
        root: str,
        size: int = 84,
        channels: Literal[1, 3] = 3,
        split_seed: int = 0,
        *,
        query_shots: int = 15,
        meta_batch_size: int = 4,
        train_episodes: int = 4000,
        **settings: Any,
    ):
        super().__init__(
            query_shots=query_shots, meta_batch_size=meta_batch_size, train_episodes=train_episodes, **settings
        )
        at_least("size", size, 1)
        self.root, self.size, self.channels, self.split_seed = Path(root), size, channels, split_seed

    def classes_of(self, split: Split) -> dict[str, list[Path]]:
        """The image files of each class of a split.

        Raises:
            SettingError: there are none, or only some of the three folders exist.
        """
        present = [name for name in SHARES if (self.root / name).is_dir()]
        if len(present) == len(SHARES):
            found = class_folders(self.root / split)
        elif present:
            missing = next(name for name in SHARES if name not in present)
            raise SettingError(
                f"data.root {shown(self.root)} has {', '.join(present)} but no folder {missing}; give all of train, "
                "val and test, or only the classes."
            )
        else:
            classes = class_folders(self.root)
            found = {name: classes[name] for name in split_classes(list(classes), self.split_seed)[split]}
        if not found:
            raise SettingError(
                f"data.root {shown(self.root)} has no folders of images for {split}; add one for each class."
            )
        return found

    def load_split(self, split: Split) -> tuple[Tensor, list[int]]:
        """The images of a split, ``[images, channels, size, size]`` uint8, and how many each class has."""
        classes = self.classes_of(split)
        separate = (self.root / split).is_dir()
        folder, packs = self.root / split if separate else self.root, self.root / ".packed"
        seed = "" if separate else f"_seed{self.split_seed}"  # draws the split's classes
        names = [os.path.join(name, image.name) for name, files in classes.items() for image in files]
        _superseded(packs, split, self.size, self.channels)
        file = packs / f"{split}{seed}_{self.channels}x{self.size}.npy"
        images = pack(folder, names, file, self.size, self.channels)
        return images, [len(files) for files in classes.values()]
