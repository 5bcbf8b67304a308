"""All methods, in the order in which tables show them."""

from __future__ import annotations

import functools

from memmeta.errors import InputError

from . import floors, functional, higher, learn2learn, memmeta, torchopt
from .base import Method

REFERENCES = ("memmeta-unrolled", "memmeta-stepwise")
"""What gradients are compared with: the first of these that runs at a point."""


@functools.cache
def methods() -> dict[str, Method]:
    """Every method by name: peers, memmeta's adjoints, floors; also those that can't run here."""
    files = (learn2learn, higher, torchopt, functional, memmeta, floors)
    return {method.name: method for file in files for method in file.METHODS}


def find(name: str) -> Method:
    """The method of this name.

    Raises:
        InputError: there is none.
    """
    found = methods().get(name)
    if found is None:
        raise InputError(f"there is no method {name!r}: write one of {', '.join(methods())}")
    return found
