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
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

PLAIN = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
_FIXED = {"torch", "torchvision", "numpy", "maml_lightning", *LIGHTNING, *sys.stdlib_module_names} - {"__main__"}
_IMPORTS = {"modules", "import_module", "__import__"}  # give modules that code names in texts
_BY_NAME = {"globals", "locals", "vars", "eval", "exec", *_IMPORTS}  # may give any variable
Cache: Any = type(cache(len))  # of functools, also lru_cache
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


def read_by(function: FunctionType) -> Iterator[Variable]:
    """The variables that a function reads: default arguments, its attributes, global variables, those of modules."""
    yield Variable(function, "__defaults__", function.__defaults__)
    yield Variable(function, "__kwdefaults__", function.__kwdefaults__)
    if _root(function.__module__) in _FIXED:
        return
    yield Variable(function, "__dict__", vars(function))
    installed = is_installed(function.__module__)
    names, modules = names_of(function.__code__), _imported(function)
    yield from _found(global_names_of(function.__code__), function.__globals__, installed, modules)
    computed = "getattr" in global_names_of(function.__code__)  # a name that no one can foresee: `f"scale_{step}"`
    for module in modules:  # grows: `settings.training.temperature`
        plain = is_installed(module.__name__)
        yield from _found(names, vars(module), plain, modules)
        if computed and not (installed and plain):
            yield from _found(list(vars(module)), vars(module), True, [])


def _found(names: Iterable[str], owner: dict[str, Any], plain: bool, modules: list[ModuleType]) -> Iterator[Variable]:
    for name in names:
        if name not in owner:
            continue
        value = owner[name]
        if isinstance(value, ModuleType):
            if value not in modules and _root(value.__name__) not in _FIXED:
                modules.append(value)
        elif not plain or type(value) in PLAIN:
            yield Variable(owner, name, value)


def of_class(kind: type) -> Iterator[Variable]:
    """The attributes of a class and its bases that are neither functions, but for caches, nor Python's own."""
    for cls in own_classes(kind):
        for name, value in vars(cls).items():
            fixed = _root(type(value).__module__) in _FIXED and hasattr(type(value), "__get__")
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


def is_fixed(module: str | None) -> bool:
    """Whether a module is of PyTorch, Lightning, NumPy, Python or this package, whose variables no user changes."""
    return _root(module) in _FIXED


@cache
def names_of(code: CodeType) -> tuple[str, ...]:
    """The names that code reads, and the strings in it that could be names; that of functions inside it included."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in names_of(const)]
    return tuple(dict.fromkeys((*code.co_names, *_strings(code), *inner)))


@cache
def global_names_of(code: CodeType) -> tuple[str, ...]:
    """The names of global variables that code reads; all names in it, where it asks for ``globals()`` and the like."""
    if _BY_NAME.intersection(code.co_names):
        return names_of(code)
    read = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in global_names_of(const)]
    return tuple(dict.fromkeys((*read, *inner)))


def _strings(code: CodeType) -> list[str]:
    return [const for const in code.co_consts if isinstance(const, str) and const.isidentifier()]


def _imported(function: FunctionType) -> list[ModuleType]:
    """The modules that a function imports as it runs, as far as they are imported."""
    package = (function.__globals__.get("__package__") or "").split(".")
    packages = [".".join(package[:length]) for length in range(len(package), 0, -1)]
    paths = [
        f"{parent}.{name}".strip(".")
        for name in _import_names(function.__code__)
        for parent in ("", *packages)
        if name or parent
    ]
    modules = [sys.modules[path] for path in dict.fromkeys(paths) if path in sys.modules]
    return [module for module in modules if _root(module.__name__) not in _FIXED]


@cache
def _import_names(code: CodeType) -> tuple[str, ...]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _import_names(const)]
    texts = (
        [const for const in code.co_consts if isinstance(const, str)] if _IMPORTS.intersection(code.co_names) else []
    )
    return (*(step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"), *texts, *inner)


@cache
def is_installed(module: str | None) -> bool:
    """Whether a module is of an installed package, not of the user's own code."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return _root(module) in _FIXED or file.startswith(_INSTALLED)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]
