"""Few-shot benchmarks that are made of CIFAR-100 (Krizhevsky 2009): 100 classes of 600 color images, 32x32.

CIFAR-FS (Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers") splits the classes at random,
64, 16 and 20. FC100 (Oreshkin et al. 2018, "TADAM: Task dependent adaptive metric for improved few-shot learning")
splits them by superclass, 12, 4 and 4 of five classes each, so that test classes are unlike training classes.
"""

from typing import Any, Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR100
from torchvision.transforms.v2.functional import rgb_to_grayscale

from maml_lightning.data.datasets import Split
from maml_lightning.data.examples import Examples, grouped
from maml_lightning.data.modules import EpisodicDataModule
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

# fmt: off
SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
# Of each benchmark the validation and test classes; all others are for training.
CIFAR_FS = {
    "val": (
        "beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree",
        "motorcycle", "otter", "sea", "shark", "television", "tractor",
    ),
    "test": (
        "baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket",
        "rose", "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm",
    ),
}
FC100 = {  # superclasses
    "val": ("large_carnivores", "large_omnivores_and_herbivores", "non-insect_invertebrates", "small_mammals"),
    "test": ("aquatic_mammals", "insects", "medium_mammals", "people"),
}
# fmt: on


def benchmark_classes(benchmark: Literal["cifar-fs", "fc100"]) -> dict[Split, list[str]]:
    """The published classes of each split, by name."""
    kept: dict[Split, list[str]] = {}
    for split in ("val", "test"):
        if benchmark == "cifar-fs":
            kept[split] = list(CIFAR_FS[split])
        else:
            kept[split] = sorted(name for superclass in FC100[split] for name in SUPERCLASSES[superclass])
    everything = sorted(name for names in SUPERCLASSES.values() for name in names)
    return {"train": [name for name in everything if name not in {*kept["val"], *kept["test"]}], **kept}


def load_cifar100(root: str, download: bool) -> Examples:
    """All images of CIFAR-100, ``[60000, 3, 32, 32]`` uint8, by class; checked by torchvision's checksums.

    Raises:
        SettingError: they are missing or incomplete, or cannot be fetched.
    """
    try:
        parts = [CIFAR100(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = "could not be fetched" if download else "is not there, or incomplete"
        raise SettingError(
            f"data.root {shown(root)}: CIFAR-100 (cifar-100-python) {reason} ({' '.join(str(error).split())}); set "
            "data.root to the folder that holds it, or fetch it with --data.download true."
        ) from error
    images = torch.from_numpy(np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2).copy())
    labels, counts, rows = grouped(torch.tensor([label for part in parts for label in part.targets]))
    return Examples(images, counts, [parts[0].classes[label] for label in labels], rows)


class BenchmarkDataModule(EpisodicDataModule):
    """Episodes of a published few-shot benchmark: CIFAR-FS or FC100, ``[3, 32, 32]``, with their own class splits.

    Args:
        benchmark: ``cifar-fs`` splits the 100 classes at random (64/16/20), ``fc100`` by superclass (60/20/20).
        root: the folder that holds ``cifar-100-python``.
        download: fetch CIFAR-100 if it is missing (169 MB).
        channels: 3 for color, 1 for grayscale; the network's ``in_channels``.

    Raises:
        SettingError: a setting is out of range, or CIFAR-100 is missing or incomplete.
    """

    def __init__(
        self,
        benchmark: Literal["cifar-fs", "fc100"] = "cifar-fs",
        root: str = "data",
        download: bool = False,
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
        if benchmark not in ("cifar-fs", "fc100"):
            raise SettingError(f"data.benchmark must be cifar-fs or fc100 (got {benchmark}).")
        self.benchmark, self.root, self.download, self.channels = benchmark, root, download, channels
        self._images: Examples | None = None

    def prepare_data(self) -> None:
        """Fetch the images, unless they are there."""
        self._whole()
        super().prepare_data()

    def _whole(self) -> Examples:
        if self._images is None:
            examples = load_cifar100(self.root, self.download)
            gray = rgb_to_grayscale(examples.inputs) if self.channels == 1 else examples.inputs
            self._images = examples._replace(inputs=gray)
        return self._images

    def load_split(self, split: Split) -> Examples:
        """The images of a split: those of its classes among all."""
        whole = self._whole()
        names, counts = whole.names or (), np.array(whole.counts)
        chosen = [names.index(name) for name in benchmark_classes(self.benchmark)[split] if name in names]
        rows = np.split(whole.rows.numpy(), counts.cumsum()[:-1])  # type: ignore[union-attr]
        return Examples(
            whole.inputs,
            counts[chosen].tolist(),
            [names[index] for index in chosen],
            torch.from_numpy(np.concatenate([rows[index] for index in chosen])),
        )
