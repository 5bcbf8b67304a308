"""Checks that every task source makes on its arguments: one line that says what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from typing import Any

from ..errors import InputError
from ..task import Address

SPLITS = ("train", "validation", "test")
PLOTS_RECIPE = "pip install memmeta[plots]"


def check_integer(name: str, value: object, least: int) -> None:
    """Raise ``InputError`` unless ``value`` is an integer (and no bool) of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_names(name: str, value: object) -> tuple[str, ...] | None:
    """``value`` as a tuple of names; ``None`` stays ``None``. A lone string is refused: it would be read by letters."""
    if value is None:
        return None
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else ()
    if not names or not all(isinstance(item, str) for item in names):
        raise InputError(f"{name} must be a sequence of one or more names, such as {name}=('A', 'B'), got {value!r}")
    return names


def check_address(seed: int, step: int, index: int) -> Address:
    """The address made of these three integers; ``InputError`` if one is negative or no integer."""
    for name, value in (("seed", seed), ("step", step), ("index", index)):
        check_integer(f"a task's {name}", value, 0)
    return Address(int(seed), int(step), int(index))


def require(*packages: str) -> None:
    """Raise ``InputError`` with the recipe unless these optional packages are installed; imports none of them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InputError(f"this task source needs {' and '.join(missing)}: {PLOTS_RECIPE}")


def optional(module: str) -> Any:
    """Import a module of an optional package; ``InputError`` with the recipe where that fails."""
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"this task source needs {module.split('.')[0]}: {PLOTS_RECIPE} ({error})") from error
