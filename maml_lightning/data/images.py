"""Folders of pictures, a folder a class: one's own, or a published set laid out so (mini-ImageNet, CIFAR-FS, CUB)."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from maml_lightning.data.episodic import EpisodicDataModule, Split, at_least, choose, random_bits
from maml_lightning.data.pictures import class_folders, fingerprint, read_picture
from maml_lightning.errors import SettingError
from maml_lightning.files import write_whole

SHARES: dict[Split, float] = {"train": 0.64, "val": 0.16, "test": 0.2}  # of the classes; mini-ImageNet's proportions


def pack(classes: dict[str, list[Path]], file: Path, side: int, channels: Literal[1, 3]) -> Tensor:
    """Every picture as ``[channels, side, side]``, in a file that is mapped into memory, not read.

    Args:
        classes: the pictures of each class.
        file: the packed pictures; made where it is not there. Where it cannot be written they stay in memory.
        side: edge in pixels; what is not square is cut.
        channels: 1 or 3.

    Returns:
        ``[pictures, channels, side, side]`` uint8.

    Raises:
        SettingError: a picture cannot be read.
    """
    files = [picture for pictures in classes.values() for picture in pictures]
    shape = (len(files), channels, side, side)
    if not file.exists():
        rank_zero_info(f"Packing {len(files)} pictures into {file} (once)")
        try:
            file.parent.mkdir(exist_ok=True)

            def write(growing: BinaryIO) -> None:
                np.lib.format.write_array_header_1_0(growing, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for picture in files:
                    growing.write(read_picture(picture, side, channels, "crop").tobytes())

            write_whole(file, write, f".{file.name}.{uuid.uuid4().hex}")
        except OSError as error:
            rank_zero_warn(f"{file} could not be written ({error}): the pictures are read at every start.")
            return torch.from_numpy(np.stack([read_picture(picture, side, channels, "crop") for picture in files]))
    return torch.from_numpy(np.load(file, mmap_mode="c"))  # c: never written back; torch warns of read-only ones


def split_classes(names: Sequence[str], seed: int) -> dict[Split, list[str]]:
    """Disjoint classes of each split, 64, 16 and 20 per cent, by a permutation that the seed draws."""
    order = choose(random_bits(seed, "classes", [0], 2 * len(names)), len(names))[0]
    ends = np.round(np.cumsum([0, *SHARES.values()]) * len(names)).astype(int)
    return {
        split: sorted(names[index] for index in order[first:last])
        for split, first, last in zip(SHARES, ends[:-1], ends[1:], strict=True)
    }


class ImagesDataModule(EpisodicDataModule):
    """Episodes of your own pictures, ``ROOT/{train,val,test}/CLASS/*.png`` or of any other common format.

    Without those three folders, ``ROOT/CLASS/*.png``, classes are split 64/16/20 by ``split_seed``. Pictures are packed
    once into ``ROOT/.packed``, again when files change, and mapped into memory, so they may be larger than it.

    Args:
        root: the folder of the splits, or of the classes.
        size: edge of the pictures in pixels, at least 1; what is not square is cut in the middle.
        channels: 3 for colour, 1 for grey; the network's ``in_channels``.
        split_seed: draws which classes train, validate and test, where there are no folders for them.
        rotations: whether training adds each class turned by 90, 180 and 270 degrees as further classes; in memory.
        pretraining: train on all training classes at once, the examples of a meta-batch pooled, for a network
            with so many outputs in training and ``inner_steps`` 0 (ordinary pre-training, the baseline).
        ways: classes per episode ``N``, at least 2.
        shots: support examples per class ``K``, at least 1; a class may have any number from
            ``shots + query_shots`` on.
        query_shots: query examples per class ``Q``, at least 1.
        meta_batch_size: episodes per outer step ``T``, over all processes.
        train_episodes: episodes per epoch, a multiple of ``meta_batch_size``.
        val_episodes: episodes per validation, always the same.
        test_episodes: episodes per test, always the same.
        seed: seed of the episodes, any integer; it does not move the splits.
        num_workers: worker processes per data loader; 0 samples in the main process.

    Raises:
        SettingError: a setting is out of range, or a folder or a picture cannot be read.
    """

    def __init__(
        self,
        root: str,
        size: int = 84,
        channels: Literal[1, 3] = 3,
        split_seed: int = 0,
        rotations: bool = False,
        pretraining: bool = False,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 15,
        meta_batch_size: int = 4,
        train_episodes: int = 4000,
        val_episodes: int = 600,
        test_episodes: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(
            ways=ways,
            shots=shots,
            query_shots=query_shots,
            meta_batch_size=meta_batch_size,
            train_episodes=train_episodes,
            val_episodes=val_episodes,
            test_episodes=test_episodes,
            seed=seed,
            num_workers=num_workers,
            rotations=rotations,
            pretraining=pretraining,
        )
        at_least("size", size, 1)
        self.root, self.size, self.channels, self.split_seed = Path(root), size, channels, split_seed

    def classes_of(self, split: Split) -> dict[str, list[Path]]:
        """The pictures of each class of a split.

        Raises:
            SettingError: there are none, or only some of the three folders are there.
        """
        there = [name for name in SHARES if (self.root / name).is_dir()]
        if len(there) == len(SHARES):
            found = class_folders(self.root / split)
        elif there:
            missing = next(name for name in SHARES if name not in there)
            raise SettingError(
                f"data.root {self.root} has {', '.join(there)} but no folder {missing}; give all of train, val and "
                "test, or the classes alone."
            )
        else:
            every = class_folders(self.root)
            found = {name: every[name] for name in split_classes(list(every), self.split_seed)[split]}
        if not found:
            raise SettingError(f"data.root {self.root} has no folders of pictures for {split}; give one a class.")
        return found

    def load_split(self, split: Split) -> tuple[Tensor, list[int]]:
        """The pictures of a split, ``[pictures, channels, size, size]`` uint8, and how many each class has."""
        classes = self.classes_of(split)
        files = [picture for pictures in classes.values() for picture in pictures]
        name = f"{split}_{self.channels}x{self.size}_{fingerprint(files)}.npy"
        images = pack(classes, self.root / ".packed" / name, self.size, self.channels)
        return images, [len(pictures) for pictures in classes.values()]
