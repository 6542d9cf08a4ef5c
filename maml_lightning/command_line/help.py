"""What ``--help`` shows: a first screen of the settings that matter, and the ways to all the others."""

import argparse
import contextlib
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from maml_lightning import trained
from maml_lightning.command_line import shipped
from maml_lightning.command_line.class_paths import BASES, known, listing, problem
from maml_lightning.data import GlyphsDataModule

WIDTH = 100

COMMANDS = {
    "fit": "Train an initialization that adapts to a new task in a few steps.",
    "validate": "Evaluate a checkpoint on the episodes of the validation classes.",
    "test": "Evaluate a checkpoint on the episodes of the test classes, and write test_results.json.",
    "predict": "Classify your own pictures with a checkpoint, or with a network of the package.",
    "export": "Adapt a checkpoint to your own pictures, and write the network as ONNX or torch.export.",
    "calibrate": "Measure on validation classes how sure a checkpoint can be, for --data.reject.",
}
# Of each group the settings that matter most; None takes the first clause of the setting's description.
SETTINGS: dict[str, dict[str, str | None]] = {
    "Data": {
        "data": "{data}, or my_module.MyData",
        "data.ways": None,
        "data.shots": None,
        "data.query_shots": None,
        "data.meta_batch_size": None,
        "data.train_episodes": None,
        "data.num_workers": None,
        "data.root": "the folder of data on disk; --data.download true fetches Omniglot",
    },
    "Model": {
        "model.net": "{model.net}, or my_module.MyNet",
        "model.inner_lr": None,
        "model.inner_steps": None,
        "model.eval_inner_steps": None,
        "model.outer_lr": "learning rate of Adam on the initialization (0.001)",
        "model.first_order": None,
        "model.algorithm": "maml, imaml or reptile (maml)",
        "model.adapted_parameters": "all, head (ANIL), body (BOIL), or name patterns (all)",
        "model.learn_inner_lr": "network, tensor, step (LSLR) or weight (Meta-SGD) (null)",
        "model.meta_curvature": "learn matrices that transform the inner gradient (false)",
        "model.tasks_per_chunk": None,
        "model.compile": None,
    },
    "Training": {
        "optimizer": "Adam with model.outer_lr by default",
        "lr_scheduler": "of the outer learning rate, such as CosineAnnealingLR",
        "trainer.max_epochs": "{epochs} by default, unless max_steps or max_time is given",
        "trainer.accelerator": "cpu, gpu, auto",
        "trainer.devices": "how many processes; --trainer.strategy ddp for several",
        "trainer.precision": "32-true, bf16-mixed, 64-true",
        "seed_everything": "seed of the training, 0 by default",
    },
    "Checkpoints": {
        "ckpt_path": "a path, last, or a network of the package: resume, evaluate, predict",
        "ensemble": "checkpoints to test as one, their probabilities averaged",
        "initial_checkpoint": "a path or a network of the package whose weights training starts from",
        "checkpoint.monitor": "the metric that selects best.ckpt; val/accuracy or val/mse by default",
    },
}

# Descriptions that say what holds here.
INSTEAD = {
    "trainer.max_epochs": "Stop training after so many epochs; -1 does not. By default after {epochs}, unless "
    "max_steps or max_time is given.",
    "trainer.max_steps": "Stop training after so many meta-steps; -1 does not.",
}


def command() -> str:
    """How this command line was called."""
    called = Path(sys.argv[0])
    if called.name == "cli.py":
        return f"python {sys.argv[0]}"
    return "python -m maml_lightning" if called.name == "__main__.py" else "maml-lightning"


def overview() -> str:
    """The first screen of the command line as a whole."""
    called = command()
    lines = [f"usage: {called} COMMAND [--config NAME] [flags]", "", "Commands:"]
    lines += [f"  {name:9} {text}" for name, text in COMMANDS.items()]
    lines += [
        "  configs   List the configs of the package; with a name, print that one.",
        "",
        f"  {called} COMMAND --help describes the settings that matter, --help_all every one.",
        "  --version prints the version.",
        "",
        "Configs of the package, for --config:",
    ]
    lines += _names(shipped.names())
    lines += ["", "Pretrained networks of the package, for --ckpt_path and --initial_checkpoint:"]
    lines += _names(sorted(file.stem for file in trained.FOLDER.glob("*.ckpt")))
    lines += ["", "For example:", f"  {called} fit --config glyphs_5way_1shot", ""]
    return "\n".join(lines)


def _names(names: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(names), WIDTH, initial_indent="  ", subsequent_indent="  ")


def first_screen(parser: Any, name: str, epochs: int) -> str:
    """The first screen of a command: the settings that matter, and how to see the others.

    Args:
        parser: the command's.
        name: ``fit``, ``validate``, ``test`` or ``predict``.
        epochs: how many by default.
    """
    settings = _settings(parser)
    filled = {"epochs": str(epochs), **{setting: ", ".join(known(setting)) for setting in ("data", "model.net")}}
    lines = [f"usage: {command()} {name} [--config NAME] [flags]", "", COMMANDS[name], "", "Configs:"]
    lines += _line("config", "a file or a name that configs lists; of several the last wins")
    lines += _line("print_config", "print all settings as a config, and exit")
    for group, chosen in SETTINGS.items():
        lines += ["", f"{group}:"]
        for setting, text in chosen.items():
            if setting == "ensemble" and name != "test":
                continue
            if text is None:
                text = _clause(settings[setting], default=not setting.startswith("data."))
            lines += _line(setting, re.sub(r"\{([\w.]+)\}", lambda match: filled[match[1]], text))
        if group == "Model":
            also = ", ".join(key.removeprefix("model.") for key in settings if _further(key, chosen))
            lines += textwrap.wrap(
                f"also, as --model.NAME: {also}", WIDTH, initial_indent="  ", subsequent_indent="    "
            )
    lines += ["", "More:"]
    lines += _line("data.help", "the data modules; --data.help NAME: every setting of one")
    lines += _line("model.help", "every setting of the model; likewise --trainer.help, …")
    lines += _line("help_all", "every setting of this command")
    return "\n".join([*lines, ""])


def _further(setting: str, shown: Any) -> bool:
    return setting.startswith("model.") and setting not in shown and not setting.endswith(".help")


def _settings(parser: Any) -> dict[str, argparse.Action]:
    """The settings of a command, and those that data modules of episodes share, by name."""
    data = type(parser)()
    data.add_class_arguments(GlyphsDataModule, "data")
    return {action.dest: action for each in (data, parser) for action in each._actions}


def _clause(action: argparse.Action, default: bool) -> str:
    """The first clause of a description, and the default."""
    text = re.split(r"[;:]|\.(?=\s|$)", " ".join((action.help or "").split()))[0].replace("``", "")
    if not default:
        return text
    value = action.default
    return f"{text} ({'null' if value is None else str(value).lower() if isinstance(value, bool) else value})"


def _line(setting: str, text: str) -> list[str]:
    start = f"  --{setting:<{max(26, len(setting))}} "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)


class _Page(argparse._HelpAction):
    """An option that prints a page and ends."""

    page: Callable[[], str]

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        print(self.page())
        sys.exit()


def _add_page(parser: Any, option: str, page: Callable[[], str], text: str) -> None:
    parser.add_argument(option, action=_Page, help=text).page = page


class _Names(argparse._HelpAction):
    """``--data.help`` and its like: without a name, the names; with one, jsonargparse's help of that class."""

    def __init__(self, one: argparse.Action, setting: str):
        super().__init__(one.option_strings, one.dest, help=one.help)
        self.nargs, self.one, self.setting = "?", one, setting

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is None:
            print(listing(self.setting))
            parser.exit()
        reason = problem(values, self.setting)
        if reason:
            parser.error(f"{option_string} {values}: {reason}")
        found = known(self.setting).get(values) or known(self.setting).get(f"maml_lightning.{values}")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                self.one(parser, namespace, f"{found.__module__}.{found.__name__}" if found else values, option_string)
        finally:  # without every class that there is of a setting's type
            print(re.sub(r",\s+known\s+subclasses:[^)]*", "", printed.getvalue()), end="")


def add_pages(parser: Any, epochs: int) -> None:
    """Give a command's parser ``--help_all``, ``--GROUP.help`` and names for ``--data.help`` and its like.

    Args:
        parser: the command's, with all of its settings.
        epochs: how many by default.
    """
    for setting in BASES:
        option = f"--{setting}.help"
        parser._option_string_actions[option] = _Names(parser._option_string_actions[option], setting)
    for action in parser._actions:
        if action.dest in INSTEAD:
            action.help = INSTEAD[action.dest].format(epochs=epochs)
        if action.dest in ("model.net", "model.loss", "model.metric"):  # the list of every class that there is
            action.extra_help = str
    groups = sorted({action.dest.split(".")[0] for action in parser._actions if "." in action.dest} - {*BASES})
    for group in groups:
        _add_page(parser, f"--{group}.help", partial(_page, parser, group), f"Describe every setting of {group}.")
    _add_page(parser, "--help_all", partial(_page, parser, ""), "Describe every setting.")


def _page(parser: Any, group: str) -> str:
    return "\n\n".join(_sections(parser.full_help(), group))


def _sections(text: str, group: str) -> Iterator[str]:
    """The sections of a full help that have settings of a group; without a group all, but not the usage."""
    for section in re.split(r"\n\n(?=\S)", text):
        if re.search(rf"^  --{group}(\s|\.(?!help\b))" if group else "^  -", section, re.MULTILINE):
            yield section.rstrip()
