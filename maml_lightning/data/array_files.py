"""Arrays from Python or from a file, as the examples of classes. Nothing in a file is run: no pickles are loaded."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maml_lightning.data.examples import Examples, Tree, check_finite, grouped
from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.structures import by_place, mapped, plain

FORMS = (
    "an array [classes, examples, ...], a list of one array [examples, ...] for each class, inputs and integer labels "
    "[examples], or a file of these (.npz, .npy, .pt)"
)

MAGIC = b"PK", b"\x80", b"\x93NUMPY"  # of zip files, pickles and arrays


def read_arrays(file: Path, setting: str) -> Any:
    """The arrays of a file: one, or several by name.

    Args:
        file: ``.npz``, ``.npy``, or ``.pt`` of tensors.
        setting: that names it, for errors.

    Raises:
        SettingError: it is missing, damaged or of another format, or holds anything but arrays.
    """
    what = f"{setting} {shown(file)}"
    reading = {".npz": _npz, ".npy": _npy, ".pt": _pt, ".pth": _pt}.get(file.suffix.lower())
    if reading is None:
        raise SettingError(f"{what} is no .npz, .npy or .pt file; give one that holds {FORMS.split(', or a file')[0]}.")
    try:
        return reading(file)
    except OSError as error:
        raise SettingError(f"{what} cannot be read ({error.strerror or error}); give a file that can.") from error
    except (pickle.UnpicklingError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        known = _starts_with(file, *MAGIC)  # of anything else NumPy and PyTorch say that it could hold objects
        if known and any(word in str(error) for word in ("allow_pickle", "weights_only", "Python objects")):
            reason = (
                "it holds Python objects, such as arrays of mixed shapes, which are not loaded: they could run code"
            )
        else:
            reason = "it is damaged or of another format"
        raise SettingError(f"{what} cannot be read ({reason}); save plain arrays of numbers or tensors.") from error


def _starts_with(file: Path, *magic: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(max(map(len, magic))).startswith(magic)


def _npz(file: Path) -> Any:
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    inputs = {name for name in found if name not in ("labels", "targets")}
    if len(inputs) == 1:  # whatever its name: inputs, arr_0, ...
        found["inputs"] = found.pop(inputs.pop())
    return found


def _npy(file: Path) -> Any:
    return np.load(file, allow_pickle=False, mmap_mode="c")  # c: copy on write, because torch warns about read-only


def _pt(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def examples_of(given: Any, setting: str) -> tuple[Examples, set[int] | None]:
    """The examples of a split that were given as arrays.

    Args:
        given: see `ArraysDataModule`.
        setting: that gives them, for errors.

    Returns:
        the examples, checked; and the labels, if there are any.

    Raises:
        SettingError: they cannot be used.
    """
    if isinstance(given, str | Path):
        given = read_arrays(Path(given), setting)
    inputs, labels, targets = map(plain, _parts(given, setting))
    if not by_place(inputs, list):
        raise SettingError(f"{setting} has no inputs; give {FORMS}.")
    if labels is None:
        _check_names(inputs, setting)
        examples = _by_class(inputs, targets, setting)
    else:
        labels = _labels(labels, setting)
        inputs, targets = (
            None if part is None else mapped(lambda leaf: _tensor(leaf, setting), part, whole=list)
            for part in (inputs, targets)
        )
        for kind, part in (("inputs", inputs), ("targets", targets)):
            for place, leaf in by_place(part).items() if part is not None else ():
                if leaf.ndim == 0 or len(leaf) != len(labels):
                    raise SettingError(
                        f"{setting} has {len(labels)} labels, but {kind}{place} {list(leaf.shape)}; give one label for "
                        f"each example: {kind} [{len(labels)}, ...]."
                    )
        names, counts, rows = grouped(labels)
        examples = Examples(inputs, counts, names, rows, targets)
    if not examples.counts or not sum(examples.counts):
        raise SettingError(f"{setting} is empty; give it examples, or leave it out.")
    check_finite(examples, setting)
    examples = examples._replace(
        inputs=mapped(_picture, examples.inputs),
        targets=None if examples.targets is None else mapped(_target, examples.targets),
    )
    return examples, None if labels is None else set(examples.names or ())  # type: ignore[arg-type]


def _parts(given: Any, setting: str) -> tuple[Tree, Any, Tree | None]:
    """Inputs, labels and targets; None for what is not given."""
    if isinstance(given, Mapping):
        rest = {key: value for key, value in given.items() if key not in ("labels", "targets")}
        if "inputs" in rest and len(rest) > 1:
            raise SettingError(
                f"{setting} has inputs and {', '.join(sorted(set(map(str, rest)) - {'inputs'}))}; give either inputs, "
                "or several inputs by their names, beside labels and targets."
            )
        return rest.get("inputs", rest), given.get("labels"), given.get("targets")
    if isinstance(given, tuple) and len(given) in (2, 3) and _are_labels(given[1]):
        return given[0], given[1], given[2] if len(given) == 3 else None
    return given, None, None


def _check_names(inputs: Tree, setting: str) -> None:
    """Check that arrays by their names, without labels, are no inputs and labels of other names."""
    places = by_place(inputs, list)
    if isinstance(inputs, Mapping) and any(
        isinstance(leaf, Tensor | np.ndarray) and leaf.ndim == 1 for leaf in places.values()
    ):
        raise SettingError(
            f"{setting} has no labels among {', '.join(map(str, inputs))}; name the arrays inputs [examples, ...] and "
            "labels [examples]."
        )


def _are_labels(value: Any) -> bool:
    try:
        return _are_texts(value) or _tensor(value, "").ndim == 1
    except SettingError:
        return False


def _are_texts(value: Any) -> bool:
    return isinstance(value, np.ndarray | list) and len(value) > 0 and isinstance(value[0], str)


def _labels(value: Any, setting: str) -> Tensor:
    if _are_texts(value):
        raise SettingError(
            f"{setting} has labels that are texts; number the classes, alike in all splits: integers [examples]."
        )
    labels = _tensor(value, f"{setting} labels")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise SettingError(
            f"{setting} has labels {_kind(labels)}; give integers [examples], the class of each example."
        )
    labels = labels.to(torch.int64)
    if len(labels) and labels.min() < 0:
        row = int(labels.argmin())
        raise SettingError(
            f"{setting} has label {int(labels[row])} at example {row}; labels are class numbers from 0: correct it, or "
            "leave the example out."
        )
    return labels


def _by_class(inputs: Tree, targets: Tree | None, setting: str) -> Examples:
    """The examples of tensors ``[classes, examples, ...]``, or of lists of ``[examples, ...]``."""
    parts = {"": inputs} if targets is None else {"": inputs, " targets": targets}
    flat: dict[str, Any] = {}
    counts: dict[str, list[int]] = {}
    for part, tree in parts.items():
        places = iter(by_place(tree, list))

        def flatten(leaf: Any, part: str = part, places: Any = places) -> Tensor:
            place = f"{setting}{part}{next(places)}"
            values, counts[place] = _class_by_class(leaf, place)
            return values

        flat[part] = mapped(flatten, tree, whole=list)
    first, *others = counts
    for other in others:
        if counts[other] != counts[first]:
            raise SettingError(
                f"{other} has {_sizes(counts[other])}, but {first} {_sizes(counts[first])}; give both as many."
            )
    return Examples(flat[""], counts[first], targets=flat.get(" targets"))


def _class_by_class(leaf: Any, place: str) -> tuple[Tensor, list[int]]:
    if isinstance(leaf, list) and leaf and all(isinstance(each, Tensor | np.ndarray) for each in leaf):
        classes = [_tensor(each, f"{place}: class {index}") for index, each in enumerate(leaf)]
        for index, each in enumerate(classes):
            if each.ndim == 0 or (each.dtype, each.shape[1:]) != (classes[0].dtype, classes[0].shape[1:]):
                raise SettingError(
                    f"{place}: class {index} is {_kind(each)}, but class 0 is {_kind(classes[0])}; give all classes "
                    "the same type and shape of examples."
                )
        return torch.cat(classes), [len(each) for each in classes]
    values = _tensor(leaf, place)
    if values.ndim < 2:
        raise SettingError(f"{place} is {_kind(values)}; give {FORMS}.")
    return values.flatten(0, 1), [values.shape[1]] * values.shape[0]


def _sizes(counts: list[int]) -> str:
    alike = len(set(counts)) <= 1
    return (
        f"{len(counts)} classes of {counts[0] if counts else 0} examples" if alike else f"classes of {counts} examples"
    )


def _kind(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


def _tensor(value: Any, place: str) -> Tensor:
    """A tensor of what has numbers, of the same type.

    Raises:
        SettingError: it has none.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.hasobject or any(step < 0 for step in array.strides):
            array = np.ascontiguousarray(array)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not writable")  # nothing is written to it
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        reason = "mixed shapes" if "inhomogeneous" in str(error) else getattr(value, "dtype", type(value).__name__)
        raise SettingError(f"{place} is not an array of numbers ({reason}); give {FORMS}.") from error


def _picture(leaf: Tensor) -> Tensor:
    """A gray picture of type uint8 with its channel, anything else as it is."""
    return leaf.unsqueeze(1) if leaf.dtype == torch.uint8 and leaf.ndim == 3 else leaf


def _target(leaf: Tensor) -> Tensor:
    """A target as losses take it: integers as int64, yes and no as 1.0 and 0.0."""
    if leaf.dtype == torch.bool:
        return leaf.float()
    return leaf if leaf.is_floating_point() else leaf.to(torch.int64)
