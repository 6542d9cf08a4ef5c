"""The configs that come with the package, by name from any folder."""

import re
import textwrap
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from maml_lightning.errors import SettingError

FOLDER = Path(__file__).parents[1] / "configs"  # installed from a wheel
if not FOLDER.is_dir():
    FOLDER = Path(__file__).parents[2] / "configs"  # in a checkout, and installed with -e


def names() -> list[str]:
    """The shipped configs' names, such as ``omniglot_5way_1shot`` and ``variants/anil``, variants last."""
    files = (file.relative_to(FOLDER).with_suffix("") for file in FOLDER.rglob("*.yaml"))
    return [file.as_posix() for file in sorted(files, key=lambda file: (len(file.parts), file))]


def find(config: str) -> str:
    """What ``--config`` stands for: a file, the path of the shipped config of that name, or YAML as it is.

    Args:
        config: a path, which wins where it is a file; the name of a shipped config; or the text of a config.

    Raises:
        SettingError: it is neither, and looks like a path or a name.
    """
    if re.search(r"[\n:{]", config) or Path(config).is_file():  # text has one of these, a URL its colon
        return config
    known = names()
    name = config.removesuffix(".yaml")
    if name in known:
        return str(FOLDER / f"{name}.yaml")
    near = get_close_matches(name.removeprefix("configs/"), known, 3, 0.5) or [
        each for each in known if get_close_matches(name, [each.rpartition("/")[2]], 1, 0.7)
    ]
    remedy = f"did you mean {' or '.join(near)}? " if near else ""
    raise SettingError(
        f"--config {config}: there is no such file, and no config of that name in the package; "
        f"{remedy}maml-lightning configs lists them."
    )


def text(*chosen: str) -> str:
    """What ``maml-lightning configs`` prints: the configs by name, or those that are chosen as they are."""
    files = [find(name) for name in chosen if name not in ("-h", "--help")]
    return "\n".join(Path(file).read_text(encoding="utf-8").rstrip() for file in files) if files else listing()


def listing() -> str:
    """The shipped configs, a line each: the name and what the config's first line says."""
    width = max(map(len, names()), default=0)
    lines = []
    for name in names():
        first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("#")
        lines.append(f"{name:{width}}  {textwrap.shorten(first, 85, placeholder=' …')}")
    return "\n".join(lines)


class ConfigFile(ActionConfigFile):
    """``--config``, which takes the name of a shipped config as well, and the configs that a config overrides first.

    A config names those in its key ``config``, such as ``config: [omniglot_5way_1shot_best]``: the same as several
    ``--config``, of which the last wins.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply the config that is found, after those that it overrides."""
        for config in with_overridden(values):
            super().__call__(parser, cfg, config, option_string)


def with_overridden(config: str, before: tuple[str, ...] = ()) -> list[str]:
    """What a config stands for, and before it the configs that it overrides, in the order in which they apply.

    Args:
        config: as `find` takes it.
        before: the configs that led to this one.

    Raises:
        SettingError: one of them is not found, or overrides itself, or its key ``config`` is not a list of names.
    """
    found = find(config)
    if found in before:
        raise SettingError(f"--config {config} overrides itself; remove it from the key config of {before[-1]}.")
    try:
        content = yaml.safe_load(Path(found).read_text(encoding="utf-8") if Path(found).is_file() else found)
    except (OSError, ValueError, yaml.YAMLError):  # which the parser reports
        return [found]
    overridden = (content.get("config") if isinstance(content, dict) else None) or []
    if not isinstance(overridden, list) or not all(isinstance(name, str) for name in overridden):
        raise SettingError(f"--config {config}: its key config is {overridden!r}; give a list of names or files.")
    return [each for name in overridden for each in with_overridden(name, (*before, found))] + [found]
