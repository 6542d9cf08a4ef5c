"""Settings that data modules share: described once, and shown by help, signature and docstring of each."""

import inspect
import re
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest

from cli import main
from maml_lightning.data import (
    ArraysDataModule,
    BenchmarkDataModule,
    DatasetDataModule,
    EpisodicDataModule,
    FunctionDataModule,
    GlyphsDataModule,
    ImagesDataModule,
    OmniglotDataModule,
    SinusoidsDataModule,
    TaskDataModule,
)
from maml_lightning.data.inherited_settings import _entries

MODULES: dict[type, dict[str, Any]] = {
    GlyphsDataModule: {},
    OmniglotDataModule: {"rotations": True},
    ImagesDataModule: {"query_shots": None, "meta_batch_size": 4, "train_episodes": 4000},
    SinusoidsDataModule: {
        "shots": 10,
        "query_shots": 10,
        "meta_batch_size": 25,
        "train_episodes": 25000,
        "test_episodes": 600,
    },
}
SHARED: dict[str, Any] = {
    "shots": 1,
    "query_shots": 1,
    "meta_batch_size": 32,
    "train_episodes": 3200,
    "val_episodes": 600,
    "test_episodes": 1000,
    "seed": 0,
    "num_workers": 0,
}
OF_IMAGES: dict[str, Any] = {
    "ways": 5,
    "rotations": False,
    "eval_rotations": False,
    "pretraining": False,
    "mean": None,
    "std": None,
    "augmentation": None,
}


# How the command line prints types that have no plain name.
TYPES = {
    "mean": "Union[float,list[float],null]",
    "std": "Union[float,list[float],null]",
    "augmentation": "Optional[list[Callable]]",
}


def printed_type(name: str, annotation: Any) -> str:
    """How the command line prints the type of a setting."""
    if name in TYPES:
        return TYPES[name]
    if annotation == int | None:
        return "int|null"
    name = getattr(annotation, "__name__", "")
    return str(annotation).removeprefix("typing.").replace(" ", "") if name == "Literal" else name


def shared(module: type) -> dict[str, Any]:
    """The shared settings of a data module and their defaults."""
    return {**SHARED, **(OF_IMAGES if issubclass(module, EpisodicDataModule) else {}), **MODULES[module]}


def descriptions(module: type) -> dict[str, str]:
    """What the docstring says of each setting, in one line."""
    return {
        name: " ".join(entry.split()).removeprefix(f"{name}: ")
        for name, entry in _entries(module.__doc__ or "").items()
    }


@pytest.mark.parametrize("module", MODULES)
def test_help_has_every_setting_with_its_description_type_and_default(
    module: type, folder: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        main(["fit", "--data.help", module.__name__])
    printed = "".join(capsys.readouterr().out.split())  # help breaks words at hyphens
    described = descriptions(module)
    parameters = inspect.signature(module).parameters
    assert set(described) == set(parameters)
    assert {name: parameters[name].default for name in shared(module)} == shared(module)
    for name, parameter in parameters.items():
        default = "" if parameter.default is Parameter.empty else f",default:{parameter.default}"
        required = "required," if parameter.default is Parameter.empty else ""
        metavar = r"(\{[\w,]+\}|[A-Z_]+)"
        default = default.replace("None", "null")
        expected = re.escape(f"{described[name]}({required}type:".replace(" ", ""))
        kind = re.escape(printed_type(name, parameter.annotation))
        assert re.search(
            rf"--data\.{name}{metavar}(,--data.{name}\+{metavar})?{expected}{kind}{re.escape(default)}[,)]", printed
        ), name


@pytest.mark.parametrize("module", [ArraysDataModule, BenchmarkDataModule, DatasetDataModule, FunctionDataModule])
def test_help_describes_every_setting(module: type, folder: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["fit", "--data.help", module.__name__])
    printed = "".join(capsys.readouterr().out.split())
    described = descriptions(module)
    assert set(described) == set(inspect.signature(module).parameters)
    for name, text in described.items():
        assert re.search(rf"--data\.{name}[^()]*{re.escape(text.replace(' ', ''))}", printed), name


@pytest.mark.parametrize("module", MODULES)
def test_a_shared_description_stands_in_one_place(module: type):
    """Only the sinusoids describe what is a point there and an example elsewhere; null is a number of images."""
    own = {SinusoidsDataModule: {"shots", "query_shots"}, ImagesDataModule: {"query_shots"}}.get(module, set())
    base = EpisodicDataModule if issubclass(module, EpisodicDataModule) else TaskDataModule
    source = _entries(re.search(r'"""(.*?)"""', inspect.getsource(module), re.DOTALL)[1])  # type: ignore[index]
    assert source.keys() & shared(module).keys() == own
    for name in shared(module).keys() - own:
        assert descriptions(module)[name] == descriptions(base)[name]


def test_a_shared_setting_reaches_the_module_and_another_is_an_error():
    data = GlyphsDataModule(3, val_episodes=7, num_workers=2)
    assert (data.classes["train"], data.episodes["val"], data.num_workers) == (3, 7, 2)
    with pytest.raises(TypeError, match="val_episode'"):
        GlyphsDataModule(val_episode=7)


class Derived(GlyphsDataModule):
    """Glyphs with one more setting.

    Raises:
        SettingError: never.
    """

    def __init__(self, more: str = "", **settings: Any):
        super().__init__(**settings)


class Numpy(GlyphsDataModule):
    """Glyphs described in another style.

    Parameters
    ----------
    more : str
        One more setting.
    """

    def __init__(self, more: str, *, ways: int = 7, **settings: Any):
        super().__init__(ways=ways, **settings)


class Silent(GlyphsDataModule):
    pass


def test_classes_derived_from_a_data_set():
    parameters = inspect.signature(Derived).parameters
    assert list(parameters)[:2] == ["more", "train_classes"]
    assert parameters["train_classes"].kind is Parameter.KEYWORD_ONLY
    assert "settings" not in parameters
    assert Derived.__doc__
    assert Derived.__doc__.index("one more") < Derived.__doc__.index("Args:") < Derived.__doc__.index("Raises:")
    assert descriptions(Derived)["val_classes"] == descriptions(GlyphsDataModule)["val_classes"]
    other = inspect.signature(Numpy).parameters
    assert (other["ways"].default, other["more"].default) == (7, Parameter.empty)
    assert Numpy.__doc__
    assert "Args:" not in Numpy.__doc__
    assert Silent.__doc__ is None
    assert inspect.signature(Silent) == inspect.signature(GlyphsDataModule)
