"""Few-shot benchmarks of data sets that torchvision reads, with their published class splits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR100, DTD, FGVCAircraft, Flowers102
from torchvision.transforms.v2.functional import rgb_to_grayscale

from maml_lightning.data.benchmark_classes import BENCHMARKS, Benchmark, benchmark_classes
from maml_lightning.data.checks import at_least
from maml_lightning.data.datasets import Split
from maml_lightning.data.examples import Examples, grouped
from maml_lightning.data.images import pack
from maml_lightning.data.modules import EpisodicDataModule
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

CIFAR_SIZE, SIZE = 32, 84  # pixels; 84 is usual in few-shot papers
DATASETS = {  # what errors call the data set, and its folder in root
    "cifar-fs": "CIFAR-100 (cifar-100-python)",
    "fc100": "CIFAR-100 (cifar-100-python)",
    "aircraft": "FGVC-Aircraft (fgvc-aircraft-2013b)",
    "flowers": "Flowers102 (flowers-102)",
    "dtd": "DTD (dtd)",
}


class Pictures(NamedTuple):
    """All pictures of a data set.

    Args:
        content: ``[pictures, C, H, W]`` uint8, or their files.
        labels: of each, the place of its class in ``names``.
        names: of the classes.
    """

    content: Tensor | Sequence[Path]
    labels: Sequence[int]
    names: Sequence[str]


def load_pictures(benchmark: Benchmark, root: str, download: bool) -> Pictures:
    """All pictures that a benchmark's classes are of; its own split into parts does not matter.

    Raises:
        SettingError: they are missing or incomplete, or cannot be fetched.
    """
    try:
        return _load(benchmark, root, download)
    except ModuleNotFoundError as error:  # torchvision reads the labels of flowers with SciPy
        raise SettingError(f"data.benchmark {benchmark} needs {error.name}: pip install {error.name}.") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # torchvision raises these on incomplete files
        reason = "could not be fetched" if download else "is not there, or incomplete"
        raise SettingError(
            f"data.root {shown(root)}: {DATASETS[benchmark]} {reason} ({' '.join(str(error).split())}); set data.root "
            "to the folder that holds it, or fetch it with --data.download true."
        ) from error


def _load(benchmark: Benchmark, root: str, download: bool) -> Pictures:
    if benchmark in ("cifar-fs", "fc100"):
        cifar = [CIFAR100(root, train=train, download=download) for train in (True, False)]
        images = torch.from_numpy(np.concatenate([part.data for part in cifar]).transpose(0, 3, 1, 2).copy())
        return Pictures(images, [label for part in cifar for label in part.targets], cifar[0].classes)
    dataset = {"aircraft": FGVCAircraft, "flowers": Flowers102, "dtd": DTD}[benchmark]
    parts = [dataset(root, split=split, download=download) for split in ("train", "val", "test")]
    names = [str(number) for number in range(1, 103)] if benchmark == "flowers" else parts[0].classes
    # torchvision has no other name for these; its argument `loader` is not in the earliest version that works here
    files = [Path(file) for part in parts for file in part._image_files]
    return Pictures(files, [label for part in parts for label in part._labels], names)


class BenchmarkDataModule(EpisodicDataModule):
    """Episodes of a published few-shot benchmark with its own class splits.

    Of CIFAR-100, ``[3, 32, 32]``: ``cifar-fs`` splits the 100 classes at random (64/16/20), ``fc100`` by superclass
    (60/20/20). ``aircraft`` (FGVC-Aircraft), ``flowers`` (Flowers102) and ``dtd`` (textures) have the class splits of
    Meta-Dataset; all of their pictures are used, cropped to the square at the center (aircraft are not cropped to their
    boxes), and packed into ``ROOT/.packed`` as by ``ImagesDataModule``.

    Args:
        benchmark: which one.
        root: the folder that holds what torchvision fetches: ``cifar-100-python``, ``fgvc-aircraft-2013b``,
            ``flowers-102`` or ``dtd``.
        download: fetch it if it is missing (0.2 to 2.8 GB).
        size: edge length of the images in pixels; null takes 84, and 32 of CIFAR-100, which has no other.
        channels: 3 for color, 1 for grayscale; the network's ``in_channels``.

    Raises:
        SettingError: a setting is out of range, or the data set is missing or incomplete.
    """

    def __init__(
        self,
        benchmark: Benchmark = "cifar-fs",
        root: str = "data",
        download: bool = False,
        size: int | None = None,
        channels: Literal[1, 3] = 3,
        *,
        query_shots: int = 15,
        meta_batch_size: int = 4,
        train_episodes: int = 4000,
        **settings: Any,
    ):
        super().__init__(
            query_shots=query_shots, meta_batch_size=meta_batch_size, train_episodes=train_episodes, **settings
        )
        if benchmark not in BENCHMARKS:
            raise SettingError(f"data.benchmark must be one of {', '.join(BENCHMARKS)} (got {benchmark}).")
        cifar = benchmark in ("cifar-fs", "fc100")
        if cifar and size not in (None, CIFAR_SIZE):
            raise SettingError(f"data.size must be {CIFAR_SIZE} with data.benchmark {benchmark} (got {size}).")
        self.size = size if size is not None else CIFAR_SIZE if cifar else SIZE
        at_least("size", self.size, 1)
        self.benchmark, self.root, self.download, self.channels = benchmark, root, download, channels
        self._pictures: Pictures | None = None

    def prepare_data(self) -> None:
        """Fetch the pictures, unless they are there."""
        self._whole()
        super().prepare_data()

    def _whole(self) -> Pictures:
        if self._pictures is None:
            pictures = load_pictures(self.benchmark, self.root, self.download)
            if isinstance(pictures.content, Tensor) and self.channels == 1:
                pictures = pictures._replace(content=rgb_to_grayscale(pictures.content))
            self._pictures = pictures
        return self._pictures

    def load_split(self, split: Split) -> Examples:
        """The pictures of a split: those of its classes among all."""
        content, labels, names = self._whole()
        present, counts, rows = grouped(torch.tensor(labels))
        found = {names[label]: part for label, part in zip(present, rows.split(counts), strict=True)}
        classes = benchmark_classes(self.benchmark)[split]
        for name in classes:
            if name not in found:
                raise SettingError(
                    f"data.root {shown(self.root)}: {DATASETS[self.benchmark]} has no pictures of {name}, of the "
                    f"{split} split; remove it and fetch it again with --data.download true."
                )
        chosen, counts = torch.cat([found[name] for name in classes]), [len(found[name]) for name in classes]
        if isinstance(content, Tensor):
            return Examples(content, counts, classes, chosen)
        root = Path(self.root).expanduser()  # as torchvision does
        pictures = [str(content[row].relative_to(root)) for row in chosen.tolist()]
        file = root / ".packed" / f"{self.benchmark}_{split}_{self.channels}x{self.size}.npy"
        return Examples(pack(root, pictures, file, self.size, self.channels), counts, classes)
