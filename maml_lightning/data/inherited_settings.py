"""Signatures and docstrings that show the settings a class inherits through ``**settings``.

The command line needs neither: jsonargparse follows ``super().__init__(**settings)`` and reads the docstrings of the
base classes by itself. These are for ``inspect.signature``, ``help`` and editors, which stop at ``**settings``.
"""

import inspect
import re
from inspect import Parameter, Signature

_ARGS = re.compile(r"^Args:\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)
_SECTION = re.compile(r"^[A-Z]\w+:\n|\Z", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+):.*\n(?:[ ]{5}.*\n)*", re.MULTILINE)
_OTHER_STYLE = re.compile(r"^(Parameters\n---|:param )", re.MULTILINE)


def full_signature(cls: type) -> Signature:
    """The signature of a class with the parameters of its bases in place of ``**settings``.

    What comes through ``**settings`` is keyword-only. A parameter that several classes name is that of the most derived
    one.
    """
    parameters: dict[str, Parameter] = {}
    derived_first = [base for base in cls.__mro__ if "__init__" in vars(base)]
    for base in derived_first:
        _, *own = inspect.signature(vars(base)["__init__"]).parameters.values()
        for parameter in own:
            if parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL):
                kind = Parameter.KEYWORD_ONLY if base is not derived_first[0] else parameter.kind
                parameters.setdefault(parameter.name, parameter.replace(kind=kind))
        if not own or own[-1].kind is not Parameter.VAR_KEYWORD:
            break
    return Signature(sorted(parameters.values(), key=lambda parameter: parameter.kind))


def full_docstring(cls: type) -> str | None:
    """The docstring of a class in which ``Args`` describes every parameter of `full_signature`.

    A description that several classes give is that of the most derived one. A docstring in another style than
    Google's is returned as it is.
    """
    described = vars(cls).get("__doc__")
    if described is None or _OTHER_STYLE.search(text := f"{inspect.cleandoc(described)}\n"):
        return described
    entries: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        entries |= _entries(vars(base).get("__doc__") or "")
    names = full_signature(cls).parameters
    section = "Args:\n" + "".join(entries[name] for name in names if name in entries)
    replaced = _ARGS.search(text)
    first, last = replaced.span() if replaced else [_SECTION.search(f"{text}\n").start()] * 2  # type: ignore[union-attr]
    return "\n\n".join(part.strip() for part in (text[:first], section, text[last:]) if part.strip()) + "\n"


def _entries(docstring: str) -> dict[str, str]:
    """The descriptions under ``Args``, indented as they stand, by name."""
    found = _ARGS.search(f"{inspect.cleandoc(docstring)}\n")
    return {entry[1]: entry[0] for entry in _ENTRY.finditer(found[1])} if found else {}
