"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov and Tenenbaum 2015)."""

import io
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchvision.datasets import Omniglot
from torchvision.datasets.utils import download_and_extract_archive, extract_archive

from maml_lightning.data.datasets import Split
from maml_lightning.data.image_files import DecodeError, Pixels, decode, entries
from maml_lightning.data.modules import EpisodicDataModule
from maml_lightning.data.packs import (
    VERSION,
    Sources,
    compare,
    load_arrays,
    read_sources,
    save_arrays,
    sweep,
)
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

DRAWINGS, DRAWN_SIDE, SIDE = 20, 105, 28

# fmt: off
PARTS = {  # characters per alphabet, in the order of the packed images
    "images_background": {
        "Alphabet_of_the_Magi": 20, "Anglo-Saxon_Futhorc": 29, "Arcadian": 26, "Armenian": 41,
        "Asomtavruli_(Georgian)": 40, "Balinese": 24, "Bengali": 46, "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
        "Braille": 26, "Burmese_(Myanmar)": 34, "Cyrillic": 33, "Early_Aramaic": 22, "Futurama": 26, "Grantha": 43,
        "Greek": 24, "Gujarati": 48, "Hebrew": 22, "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
        "Japanese_(hiragana)": 52, "Japanese_(katakana)": 47, "Korean": 40, "Latin": 26, "Malay_(Jawi_-_Arabic)": 40,
        "Mkhedruli_(Georgian)": 41, "N_Ko": 33, "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14, "Sanskrit": 42,
        "Syriac_(Estrangelo)": 23, "Tagalog": 17, "Tifinagh": 55,
    },
    "images_evaluation": {
        "Angelic": 20, "Atemayar_Qelisayer": 26, "Atlantean": 26, "Aurek-Besh": 26, "Avesta": 26, "Ge_ez": 26,
        "Glagolitic": 45, "Gurmukhi": 45, "Kannada": 41, "Keble": 26, "Malayalam": 47, "Manipuri": 40, "Mongolian": 30,
        "Old_Church_Slavonic_(Cyrillic)": 45, "Oriya": 46, "Sylheti": 28, "Syriac_(Serto)": 23, "Tengwar": 25,
        "Tibetan": 42, "ULOG": 26,
    },
}
# fmt: on
SHAPE = (sum(sum(alphabets.values()) for alphabets in PARTS.values()), DRAWINGS, SIDE, SIDE)
LAKE_VAL_ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")

_NO_DATA = "or use configs/glyphs_5way_1shot.yaml, which needs no data"


def character_files(folder: Path) -> list[list[Path]]:
    """The 20 drawings of each character of a complete folder tree, sorted by part, alphabet and character.

    Args:
        folder: ``ROOT/omniglot-py``.

    Raises:
        SettingError: the tree is missing or incomplete; says what is missing.
    """
    names = [folder / name for name in drawings(folder)]
    return [names[first : first + DRAWINGS] for first in range(0, len(names), DRAWINGS)]


def drawings(folder: Path) -> list[str]:
    """The paths of all 32,460 drawings relative to the folder, as text (faster than `Path`), in the same order.

    Raises:
        SettingError: the tree is missing or incomplete; says what is missing.
    """
    names: list[str] = []
    for part, alphabets in PARTS.items():
        if not (folder / part).is_dir():
            raise SettingError(
                f"Omniglot is not at {shown(folder / part)}: set data.root to the folder that holds omniglot-py, "
                f"fetch it with --data.download true, {_NO_DATA}."
            )
        for alphabet, expected in alphabets.items():
            where = folder / part / alphabet
            characters = [entry.name for entry in entries(where) if entry.is_dir()] if where.is_dir() else []
            _complete(where, "characters", len(characters), expected)
            for character in characters:
                found = [entry.name for entry in entries(where / character) if entry.name.endswith(".png")]
                _complete(where / character, "drawings", len(found), DRAWINGS)
                names += [f"{part}/{alphabet}/{character}/{name}" for name in found]
    return names


def _complete(folder: Path, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise SettingError(
            f"Omniglot is incomplete: {shown(folder)} has {found} of {expected} {what}; unzip the archive again, "
            f"or fetch it with --data.download true, {_NO_DATA}."
        )


def fetch(folder: Path) -> None:
    """Unzip both archives in ``folder``, and download those that are missing.

    Raises:
        SettingError: there is no network, or the disk is full.
    """
    try:
        for part in PARTS:
            archive = folder / f"{part}.zip"
            if zipfile.is_zipfile(archive):
                extract_archive(str(archive), str(folder))
            else:
                url = f"{Omniglot.download_url_prefix}/{archive.name}"
                download_and_extract_archive(url, str(folder), md5=Omniglot.zips_md5[part])
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"Omniglot could not be fetched into {folder} ({reason}); try again, {_NO_DATA}.") from error


def _resized(file: str, content: bytes) -> Pixels:
    try:
        return 255 - decode(io.BytesIO(content), SIDE, 1, "crop", (DRAWN_SIDE, DRAWN_SIDE))[0]
    except DecodeError as error:
        raise SettingError(f"{shown(file)} {error}; unzip the Omniglot archive again.") from error


class Pack(NamedTuple):
    """The packed images ``[1623, 20, 28, 28]``, and the files that they were made from."""

    images: Pixels
    sources: Sources


def pack(folder: Path) -> Pack:
    """Resize every drawing of the tree to 28x28 by Lanczos, ink = 255, in the order of `character_files`.

    Raises:
        SettingError: the tree is missing or incomplete, or an image is damaged.
    """
    images: list[Pixels] = []
    sources = read_sources(folder, drawings(folder), lambda file, content: images.append(_resized(file, content)))
    return Pack(np.stack(images).reshape(-1, DRAWINGS, SIDE, SIDE), sources)


def read_cache(cache: Path) -> Pack | None:
    """The packed images, or None if there is no cache or it is damaged (a zip: its checksum is verified)."""
    arrays = load_arrays(cache)
    try:
        if arrays is None or arrays["version"].tolist() != VERSION:
            return None
        found = Pack(arrays["images"], Sources.of_arrays(arrays))
    except (KeyError, ValueError):
        return None
    images, (names, *_) = found
    return found if images.shape == SHAPE and images.dtype == np.uint8 and len(names) == SHAPE[0] * DRAWINGS else None


def write_cache(cache: Path, packed: Pack) -> None:
    """Write the packed images, completely or not at all; warn if that is impossible."""
    arrays = {"images": packed.images, "version": np.array(VERSION), **packed.sources.arrays()}
    try:
        save_arrays(cache, arrays)
    except OSError as error:
        rank_zero_warn(f"{cache} could not be written ({error}): Omniglot will be packed again at every start.")


def load_characters(root: str | Path, download: bool = False) -> Pixels:
    """All of Omniglot, from the cache ``ROOT/omniglot-py/packed_28.npz``, made if it is missing or the tree changed.

    A start compares each file's size, times and inode, and reads the files in which one differs. If both parts of the
    tree are missing, the cache alone is used.

    Args:
        root: the folder that holds ``omniglot-py``.
        download: fetch the images if the tree is missing or incomplete.

    Returns:
        ``[1623, 20, 28, 28]`` uint8, ink = 255, sorted by part, alphabet and character.

    Raises:
        SettingError: the tree is missing, incomplete or damaged, or cannot be fetched.
    """
    folder = Path(root) / "omniglot-py"
    cache = folder / "packed_28.npz"
    sweep(cache)
    cached = read_cache(cache)
    if cached is not None and not any((folder / part).exists() for part in PARTS):
        return cached.images
    try:
        names = drawings(folder)
    except SettingError:
        if not download:
            raise
        fetch(folder)
        names = drawings(folder)
    why = "it is damaged or of another version" if cache.exists() else None
    if cached is not None:
        why, sources = compare(cached.sources, folder, names)
        if why is None:
            if not np.array_equal(sources.states, cached.sources.states):
                write_cache(cache, cached._replace(sources=sources))
            return cached.images
    occasion = f"again: {shown(why)}" if why else "once, some seconds"
    rank_zero_info(f"Packing the {len(names)} images of {shown(folder)} ({occasion})")
    packed = pack(folder)
    write_cache(cache, packed)
    return packed.images


def alphabet_names() -> list[str]:
    """The alphabet of each character, in the order of the packed images."""
    return [alphabet for alphabets in PARTS.values() for alphabet, count in alphabets.items() for _ in range(count)]


def split_characters(scheme: Literal["finn", "lake"]) -> dict[Split, npt.NDArray[np.int64]]:
    """The characters of each split, as indices into the packed images; the same for all seeds.

    Args:
        scheme: ``finn``, 1100, 100 and 423 characters by a fixed permutation over all (Finn et al. 2017 give the
            sizes, not the permutation); ``lake``, the 30 background alphabets, five of them held out whole for
            validation, and all 20 evaluation alphabets for the test.
    """
    if scheme == "finn":
        # RandomState, because its stream is the same in all NumPy versions
        permutation = np.random.RandomState(1623).permutation(SHAPE[0])
        return {"train": permutation[:1100], "val": permutation[1100:1200], "test": permutation[1200:]}
    held_out = np.isin(alphabet_names(), LAKE_VAL_ALPHABETS)
    background = np.arange(SHAPE[0]) < sum(PARTS["images_background"].values())
    masks: dict[Split, npt.NDArray[np.bool_]] = {
        "train": background & ~held_out,
        "val": background & held_out,
        "test": ~background,
    }
    return {split: np.flatnonzero(mask) for split, mask in masks.items()}


class OmniglotDataModule(EpisodicDataModule):
    """Episodes of handwritten characters, 20 drawings of each, ``[1, 28, 28]``, ink = 1 on 0.

    Args:
        root: the folder that holds ``omniglot-py/{images_background,images_evaluation}``.
        download: fetch the images if they are missing (16 MB).
        split: ``finn`` mixes all alphabets (1100/100/423 characters), ``lake`` tests on alphabets never trained on.
        within_alphabet: whether all classes of an episode are of one alphabet, which is harder; alphabets with fewer
            characters than ``ways`` are left out. Best with ``split: lake``, which keeps alphabets complete.

    Raises:
        SettingError: a setting is out of range.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        split: Literal["finn", "lake"] = "finn",
        rotations: bool = True,
        within_alphabet: bool = False,
        **settings: Any,
    ):
        super().__init__(rotations=rotations, **settings)
        if split not in ("finn", "lake"):
            raise SettingError(f"data.split must be finn or lake (got {split}).")
        self.root, self.download, self.split, self.within_alphabet = root, download, split, within_alphabet
        self._images: Pixels | None = None

    def prepare_data(self) -> None:
        """Fetch and pack the images, unless that is done already."""
        self._images = load_characters(self.root, self.download)
        super().prepare_data()

    def load_split(self, split: Split) -> Tensor:
        """The images of a split: ``[characters, 20, 28, 28]``, uint8, ink = 255."""
        if self._images is None:
            self._images = load_characters(self.root, self.download)
        return torch.from_numpy(self._images[split_characters(self.split)[split]])

    def groups_of(self, split: Split) -> list[int] | None:
        """The alphabet of each character of a split, as a number, if an episode's classes are of one alphabet."""
        if not self.within_alphabet:
            return None
        _, alphabets = np.unique(alphabet_names(), return_inverse=True)
        return alphabets[split_characters(self.split)[split]].tolist()
