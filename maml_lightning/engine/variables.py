"""The variables that code reads beside its arguments: global ones, those of modules that it imports, of its class.

Which names code reads is known without running it; a few more than it reads are taken for read. Variables of installed
packages count where they hold plain values: the rest of them is not the user's to change.
"""

import dis
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import _GeneratorContextManager as Manager
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

PLAIN = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
_FIXED = {"torch", "torchvision", "numpy", "maml_lightning", *LIGHTNING, *sys.stdlib_module_names} - {"__main__"}
_IMPORTS = {"modules", "import_module", "__import__"}  # give modules that code names in texts
_ENVIRONMENT = {"environ", "getenv"}
_BY_NAME = {"globals", "locals", "vars", "eval", "exec", *_IMPORTS}  # may give any variable
Cache: Any = type(cache(len))  # of functools, also lru_cache
_SITES = {"site-packages", "dist-packages"}  # also of the user, and of the Python that an environment extends
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


class Variable(NamedTuple):
    """Where a value is that code reads.

    Args:
        owner: a dictionary of variables, an object with attributes, or a variable of the context.
        name: in it.
        value: now.
    """

    owner: Any
    name: str
    value: Any

    def set(self, value: Any) -> None:
        """Put another value in its place, where it does not have that one."""
        if isinstance(self.owner, ContextVar):
            self.owner.set(value)
        elif isinstance(self.owner, dict):
            self.owner[self.name] = value
        elif getattr(self.owner, self.name, None) is not value:
            with suppress(AttributeError, TypeError):  # code cannot write to it either
                setattr(self.owner, self.name, value)


def read_by(function: FunctionType) -> list[Variable]:
    """The variables that a function reads: default arguments, its attributes, global variables, those of modules."""
    installed, fixed = is_installed(function.__module__), is_fixed(function.__module__)
    attributes = ("__defaults__", "__kwdefaults__") if fixed else ("__defaults__", "__kwdefaults__", "__dict__")
    # Those of a library are empty for the most part, and stay so.
    found = [Variable(function, n, v) for n in attributes if (v := getattr(function, n)) or not installed]
    if fixed:
        return found
    reads, modules = reads_of(function.__code__), _imported(function)
    _find(reads.variables, function.__globals__, installed, found, modules)
    computed = "getattr" in reads.variables  # a name that no one can foresee: `f"scale_{step}"`
    for module in modules:  # grows: `settings.training.temperature`
        plain = is_installed(module.__name__)
        _find(reads.names, vars(module), plain, found, modules)
        if computed and not (installed and plain):
            _find(list(vars(module)), vars(module), True, found, [])
    return found


def _find(
    names: Iterable[str], owner: dict[str, Any], plain: bool, found: list[Variable], modules: list[ModuleType]
) -> None:
    """Add the variables and the modules of these names to those found already."""
    for name in names:
        if name not in owner:
            continue
        value = owner[name]
        if type(value) in PLAIN:
            found.append(Variable(owner, name, value))
        elif isinstance(value, ModuleType):
            if not is_fixed(value.__name__) and value not in modules:
                modules.append(value)
        elif not plain:
            found.append(Variable(owner, name, value))


def of_class(kind: type) -> Iterator[Variable]:
    """The attributes of a class and its bases that are neither functions, but for caches, nor Python's own."""
    for cls in own_classes(kind):
        for name, value in vars(cls).items():
            fixed = is_fixed(type(value).__module__) and hasattr(type(value), "__get__")
            own = not fixed or isinstance(value, Cache)
            if own and not name.startswith("__"):
                yield Variable(cls, name, value)


def functions_of(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class and its bases, see :func:`functions_in`."""
    for cls in own_classes(kind):
        yield from functions_in(cls)


def functions_in(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class without its bases: methods, and those of properties and other descriptors."""
    for name, value in vars(cls).items():
        for attribute in ("", "__func__", "fget", "func", "__wrapped__"):
            if isinstance(found := getattr(value, attribute, None) if attribute else value, FunctionType):
                yield name, found
                break


def own_classes(kind: type) -> list[type]:
    """The class and its bases, but for those of PyTorch, Lightning, NumPy, Python and this package."""
    return [cls for cls in kind.__mro__ if not is_fixed(cls.__module__)]


def ingredients(value: Any) -> tuple[Any, tuple, dict[str, Any]] | None:
    """A function and the arguments with which a value calls it: ``partial``, and a context manager not yet entered.

    Such a manager, of ``contextlib.contextmanager``, is in the closure of each function that it decorates. None for
    anything else.
    """
    if type(value) is partial:
        return value.func, value.args, value.keywords
    if isinstance(value, Manager) and inspect.getgeneratorstate(value.gen) == inspect.GEN_CREATED:
        return value.func, value.args, value.kwds
    return None


@cache
def is_fixed(module: str | None) -> bool:
    """Whether a module is of PyTorch, Lightning, NumPy, Python or this package, whose variables no user changes."""
    return _root(module) in _FIXED


class Reads(NamedTuple):
    """What code reads.

    Args:
        names: those in it, and the strings in it that could be names; that of functions inside it included.
        variables: the names of global variables; all names, where it asks for ``globals()`` and the like.
        imports: the names of modules that it imports as it runs.
        environment: whether it may read environment variables.
    """

    names: tuple[str, ...]
    variables: tuple[str, ...]
    imports: tuple[str, ...]
    environment: bool


@cache
def reads_of(code: CodeType) -> Reads:
    """What code reads, known without running it."""
    inner = [reads_of(const) for const in code.co_consts if isinstance(const, CodeType)]
    strings = [const for const in code.co_consts if isinstance(const, str)]
    steps = [*dis.get_instructions(code)]
    names = (*code.co_names, *[text for text in strings if text.isidentifier()], *_all("names", inner))
    own = [step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    variables = names if _BY_NAME.intersection(code.co_names) else (*own, *_all("variables", inner))
    texts = strings if _IMPORTS.intersection(code.co_names) else []
    imports = (*[step.argval for step in steps if step.opname == "IMPORT_NAME"], *texts, *_all("imports", inner))
    return Reads(_once(names), _once(variables), _once(imports), not _ENVIRONMENT.isdisjoint(names))


def _all(part: str, inner: list[Reads]) -> list[str]:
    return [name for reads in inner for name in getattr(reads, part)]


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _imported(function: FunctionType) -> list[ModuleType]:
    """The modules that a function imports as it runs, as far as they are imported."""
    if not (imports := reads_of(function.__code__).imports):
        return []
    paths = _paths(imports, function.__globals__.get("__package__") or "")
    modules = [sys.modules[path] for path in paths if path in sys.modules]
    return [module for module in modules if not is_fixed(module.__name__)]


@cache
def _paths(imports: tuple[str, ...], package: str) -> tuple[str, ...]:
    """The paths that may be meant by names of modules in a package."""
    names = package.split(".")
    packages = [".".join(names[:length]) for length in range(len(names), 0, -1)]
    return _once(f"{parent}.{name}".strip(".") for name in imports for parent in ("", *packages) if name or parent)


@cache
def is_installed(module: str | None) -> bool:
    """Whether a module is of an installed package, not of the user's own code."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return _root(module) in _FIXED or file.startswith(_INSTALLED) or not _SITES.isdisjoint(Path(file).parts)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]
