"""A function that is called again later, with the variables that it reads as they are now."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

_GLOBAL = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL"})
_SHARED = frozenset({"STORE_DEREF", "DELETE_DEREF"})


def frozen(function: Callable[..., Any], instead: dict[int, Any]) -> Any:
    """A copy of a function that keeps the present values of the variables it reads from outside.

    Python looks such variables up when the function runs: in a loop over batches or tasks they are then another's.
    Those of local functions that it calls are kept too, those of a module's functions are not. What the function itself
    assigns (``nonlocal``, ``global``) stays shared, and what objects hold is not looked at. Other callables are given
    back as they are.

    Args:
        function: a lambda or function, or ``functools.partial`` of one.
        instead: for objects, by id, others that the copy gets in their place.
    """
    if id(function) in instead:
        return instead[id(function)]
    if isinstance(function, functools.partial):
        arguments = [instead.get(id(value), value) for value in function.args]
        options = {name: instead.get(id(value), value) for name, value in function.keywords.items()}
        return functools.partial(frozen(function.func, instead), *arguments, **options)
    if not isinstance(function, types.FunctionType):
        return function
    written = _written(function.__code__, _SHARED)
    names = function.__code__.co_freevars
    cells = [c if n in written else types.CellType() for n, c in zip(names, function.__closure__ or (), strict=True)]
    made = types.FunctionType(
        function.__code__,
        _globals(function, instead),
        function.__name__,
        tuple(instead.get(id(value), value) for value in function.__defaults__ or ()) or None,
        tuple(cells),
    )
    made.__kwdefaults__, made.__module__ = function.__kwdefaults__, function.__module__
    made.__dict__.update(function.__dict__)
    instead = {**instead, id(function): made}  # before its cells: a local function may call itself
    for old, new in zip(function.__closure__ or (), cells, strict=True):
        if new is not old and _full(old):
            value = old.cell_contents
            local = isinstance(value, (types.FunctionType, functools.partial))
            new.cell_contents = frozen(value, instead) if local else instead.get(id(value), value)
    return made


def _globals(function: types.FunctionType, instead: dict[int, Any]) -> dict[str, Any]:
    """The module's variables that a function's code names, as they are now; its very own where it assigns to some."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    if _written(function.__code__, _GLOBAL):
        return function.__globals__
    found = {name: x for name, x in function.__globals__.items() if name in names or name.startswith("__")}
    return {name: instead.get(id(value), value) for name, value in found.items()}


@functools.lru_cache(maxsize=256)
def _written(code: types.CodeType, by: frozenset[str]) -> frozenset[str]:
    """The variables that the code assigns by these instructions: globals, or what functions share (its own too)."""
    found = (i for part in _codes(code) for i in dis.get_instructions(part))
    return frozenset(i.argval for i in found if i.opname in by)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _full(cell: types.CellType) -> bool:
    """Whether the variable is assigned yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
