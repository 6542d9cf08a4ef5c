"""Every command of README and pages runs as it stands there: in a shell, in a terminal, shrunk by flags alone."""

import os
import re
import shlex
import sys
import textwrap
import zlib
from pathlib import Path

import pytest

from tests.data.test_support_query import symbol
from tests.runs import ROOT, in_terminal

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("folder")]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python cli.py", "maml-lightning", "python -m maml_lightning")
INDENTED = r"(?:^    (?:python|maml-lightning|pip|tensorboard) .*\n)+"


def blocks(text):
    """The blocks of commands of a page, fenced or indented."""
    fenced = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    return fenced + [textwrap.dedent(block).rstrip() for block in re.findall(INDENTED, text, re.MULTILINE)]


BLOCKS = [block for page in PAGES for block in blocks(page.read_text())]
# What is not run here, and where it is.
ELSEWHERE = {
    "pip install": "by .ci/run",
    "python -m pytest": "this is it",
    "tensorboard": "it ends when it is told to",
    "python -m benchmarks": "it trains for long: its words are parsed below, what it does is in tests/test_accuracy.py",
}


def commands(block, programs=PROGRAMS):
    """The command lines of a block, those that begin with another program left out."""
    lines = [line.split(" && ")[-1].split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    assert all(line.startswith((*PROGRAMS, *ELSEWHERE)) for line in lines if line), lines
    return [line for line in lines if line.startswith(programs)]


def shrunk(command):
    """The command with flags after it that make it take seconds."""
    flags = {"trainer.accelerator": "cpu"}
    if " fit " in command:
        flags |= {"trainer.max_epochs": 1, "trainer.log_every_n_steps": 1, "model.tasks_per_chunk": "null"}
        flags |= {"data.meta_batch_size": 4, "data.train_episodes": 8, "data.val_episodes": 4}
        if "omniglot" not in command.lower() and "sinusoids" not in command and "Images" not in command:
            flags |= {"data.train_classes": 8, "data.val_classes": 8}
        if "Images" in command:
            flags |= {"data.ways": 2, "data.query_shots": 1}
        if "trainer.devices" in command:
            flags |= {"trainer.devices": 2}
    elif " test " in command:
        flags |= {"data.test_episodes": 4}
    elif " calibrate " in command:
        flags = {"episodes": 2, "data.val_episodes": 2, "data.ways": 4, "data.query_shots": 1}
    elif " predict " not in command:
        return command
    if any(word in command for word in ("--help", ".help ", "--print_config")):
        return command
    return f"{command} {shlex.join(f'--{key}={value}' for key, value in flags.items())}"


def shell(command):
    """The command's status and what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return in_terminal(["bash", "-c", command], PATH=path)


def succeed(command):
    status, printed = shell(command)
    assert status == 0, f"{command}\n{printed}"
    assert "Traceback" not in printed


def prepare(command, folder, request):
    """The command with what it names made: data, pictures, a checkpoint."""
    if "--data.root data" in command and not (folder / "data").exists():
        (folder / "data").symlink_to(request.getfixturevalue("omniglot_root"))
    folders = [f"ROOT/{split}/{split}" for split in ("train", "val", "test")] if "ROOT" in command else []
    folders += ["support/", "query/"] if "support support" in command else []
    for name in folders:
        for kind in range(4):
            (folder / f"{name}{kind}").mkdir(parents=True, exist_ok=True)
            for picture in range(2):
                symbol(kind, (40, 40), zlib.crc32(f"{name}{picture}".encode())).save(
                    folder / f"{name}{kind}" / f"{picture}.png"
                )
    if "CKPT" in command:
        trained = command.replace(" calibrate ", " fit ").replace("--data.ways 20", "")
        trained = trained.replace(" --output calibrated.ckpt", "")
        succeed(shrunk(trained.replace(" test ", " fit ").replace("--ckpt_path CKPT", "")))
        command = command.replace("CKPT", str(max(folder.rglob("best.ckpt"), key=os.path.getmtime)))
    return command.replace("--data.download true", "")  # there is nothing to download from


@pytest.mark.parametrize("block", [block for block in BLOCKS if commands(block)], ids=lambda block: block[:70])
def test_the_commands_of_a_block_run_one_after_another(block, folder, request):
    for name in ("cli.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    if "lightning_logs/version_0/checkpoints/best.ckpt" in block:
        succeed(shrunk("python cli.py fit --config configs/glyphs_5way_1shot.yaml"))
    for command in commands(block):
        succeed(shrunk(prepare(command, folder, request)))


BENCHMARKS = [command for block in BLOCKS for command in commands(block, "python -m benchmarks")]


@pytest.mark.parametrize("command", BENCHMARKS, ids=lambda command: command[21:])
def test_the_words_of_a_benchmark_are_parsed(command):
    for file in re.findall(r"(?:configs|docs)/[\w/.]+", command):
        assert (ROOT / file).is_file()
    status, printed = shell(f"cd {ROOT} && {command} --print_config")
    assert status == 0, printed
    for value in re.findall(r" --\w+ ([\w/.]+)", command):
        assert value in printed


def test_blocks_are_found():
    page = "a\n```bash\npip x\ny\n```\n- b\n    c\n\n    python -m z\n\n    t(n) = 1\n"
    assert blocks(page) == ["pip x\ny", "python -m z"]


def test_the_documents_have_commands():
    assert sum(len(commands(block)) for block in BLOCKS) > 10
