"""The rooms: which may import which, no cycles, and nothing too long to read. docs/architecture.md draws them."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.runs import ROOT

PACKAGE = ROOT / "maml_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
LARGEST_FILE, LONGEST_FUNCTION = 350, 50

# From top to bottom; a room imports rooms below it alone. Files in it may import each other.
GROUND = {
    "episodes", "structures", "networks", "sequence_networks", "task_statistics", "errors", "files", "processes",
    "deprecation", "devices",
}  # fmt: skip
ALLOWED = {
    "command_line": {"face", "trained", "training", "data", "analysis", *GROUND},
    "face": {"trained", "training", "algorithms", "data", *GROUND},
    "trained": {"training", "data", "analysis", *GROUND},
    "training": {"algorithms", "engine", "analysis", *GROUND},
    "algorithms": {"engine", *GROUND},
    "engine": {"episodes", "structures", "task_statistics", "errors", "files", "processes", "devices"},
    "data": {"analysis", *GROUND} - {"networks", "sequence_networks"},
    "analysis": {"episodes", "errors", "files"},
    "episodes": {"structures", "errors", "deprecation", "devices"},
    "structures": {"errors"},
    "sequence_networks": {"networks", "errors"},
    "networks": {"task_statistics", "errors"},
    "task_statistics": set(),
    "errors": set(),
    "files": set(),
    "processes": set(),
    "deprecation": set(),
    "devices": set(),
}
# Files at the top level of the package that are no room of their own.
ROOM_OF = {"__init__": "face", "__main__": "command_line", "cli": "command_line", "comparison": "command_line"}


def room(module: str) -> str:
    """The room of a module such as ``maml_lightning.training.module``."""
    name = [*module.split("."), "__init__"][1]
    return ROOM_OF.get(name, name)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


@cache
def imports(file: Path) -> frozenset[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return frozenset(found & MODULES.keys())


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """A cycle of arrows, or nothing."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        found = next(filter(None, (walk(below, [*trail, node]) for below in sorted(arrows.get(node, ())))), [])
        done.add(node)
        return found

    return next(filter(None, (walk(node, []) for node in sorted(arrows))), [])


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downward(file):
    ours = room(module_of(file))
    upward = {module for module in imports(file) if room(module) not in {ours, *ALLOWED[ours]}}
    assert upward == set()


def test_no_cycles_between_rooms_or_files():
    assert cycle(ALLOWED) == []
    files = {module: set(imports(file)) - {module} for module, file in MODULES.items()}
    assert cycle(files) == []


def test_every_room_is_in_the_table():
    assert {room(module) for module in MODULES} == ALLOWED.keys()


def test_data_and_training_do_not_know_each_other():
    below: dict[str, set[str]] = {}
    for name in reversed(ALLOWED):
        below[name] = set(ALLOWED[name]).union(*(below[other] for other in ALLOWED[name]))
    assert "data" not in below["training"]
    assert not {"training", "algorithms", "networks"} & below["data"]
    assert not {"training", "algorithms"} & below["engine"]


def functions(tree: ast.AST, inside: str = ""):
    """Name and node of each function, those in classes and functions as well."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not isinstance(node, ast.ClassDef):
                yield f"{inside}{node.name}", node
            yield from functions(node, f"{inside}{node.name}.")


def long_functions(file: Path) -> list[str]:
    """The functions that are too long and do not say why: ``Long: …`` in the signature's lines or the docstring."""
    source = file.read_text()
    found = []
    for name, node in functions(ast.parse(source)):
        head = source.splitlines()[node.lineno - 1 : node.body[0].end_lineno]
        length = node.end_lineno - node.lineno + 1
        if length > LONGEST_FUNCTION and not any("Long: " in line for line in head):
            found.append(name)
    return found


CODE = [*FILES, ROOT / "cli.py", *sorted((ROOT / "benchmarks").glob("*.py"))]


def shown(file: Path) -> str:
    return str(file.relative_to(PACKAGE if PACKAGE in file.parents else ROOT))


def test_no_file_is_too_large():
    large = {shown(file) for file in CODE if len(file.read_text().splitlines()) > LARGEST_FILE}
    assert large == set()


def test_no_function_is_too_long():
    long = {f"{shown(file)}: {name}" for file in CODE for name in long_functions(file)}
    assert long == set()


def test_a_long_function_is_found_unless_it_says_why(tmp_path):
    file = tmp_path / "a.py"
    body = "\n".join(f"    a = {line}" for line in range(LONGEST_FUNCTION))
    file.write_text(f"def f():\n{body}\n\n\ndef g():  # Long: a table\n{body}\n")
    assert long_functions(file) == ["f"]
