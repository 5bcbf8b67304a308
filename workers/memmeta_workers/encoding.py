"""Nested state as JSON and tensors, without loss and without pickle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memmeta.errors import InputError

_KIND = "__kind__"


def encode(state: Any, tensors: dict[str, Tensor], what: str, path: str = "") -> Any:
    """``state`` as JSON data; its tensors go to ``tensors`` under the path at which they were found.

    Dicts with any plain keys, counters, tuples, lists, strings, numbers, ``None`` and tensors come back from
    ``decode`` equal, floats to the last bit (JSON keeps Python's shortest round-trip form; infinities and NaN by name).

    Args:
        state: what to encode.
        tensors: filled.
        what: the state's name for the error message.
        path: where ``state`` lies in a larger one.

    Raises:
        InputError: it contains something else, a function for instance.
    """
    if state is None or isinstance(state, (bool, int, str)):
        return state
    if isinstance(state, float):
        return state if math.isfinite(state) else {_KIND: "float", "value": repr(state)}
    if isinstance(state, Tensor):
        name = path or "value"
        tensors[name] = state
        return {_KIND: "tensor", "name": name}
    if isinstance(state, (list, tuple)):
        items = [encode(item, tensors, what, f"{path}.{i}" if path else str(i)) for i, item in enumerate(state)]
        return items if isinstance(state, list) else {_KIND: "tuple", "items": items}
    if isinstance(state, Mapping):
        items = []
        for key, value in state.items():
            if not isinstance(key, (str, int)):
                raise InputError(f"{what} can't be saved: key {key!r} is a {type(key).__name__}")
            items.append([key, encode(value, tensors, what, f"{path}.{key}" if path else str(key))])
        if all(isinstance(key, str) for key, _ in items) and _KIND not in state and not isinstance(state, Counter):
            return dict(items)
        return {_KIND: "counter" if isinstance(state, Counter) else "dict", "items": items}
    raise InputError(
        f"{what} can't be saved: {path or 'it'} is a {type(state).__name__}; "
        "use one whose state is numbers and tensors, for instance LambdaLR with a plain function"
    )


def decode(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``encode`` was given.

    Raises:
        KeyError, ValueError, TypeError: the data is not what ``encode`` makes.
    """
    if isinstance(data, list):
        return [decode(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    kind = data.get(_KIND)
    if kind is None:
        return {key: decode(value, tensors) for key, value in data.items()}
    if kind == "float":
        return float(data["value"])
    if kind == "tensor":
        return tensors[data["name"]]
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in data["items"])
    if kind in ("dict", "counter"):
        items = {key: decode(value, tensors) for key, value in data["items"]}
        return Counter(items) if kind == "counter" else items
    raise ValueError(f"unknown kind {kind!r}")
