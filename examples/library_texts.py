"""Texts to adapt to: the modules and packages of Python's standard library, each with a subject and a style of its own.

Nothing is downloaded. The library differs a little between versions of Python, and so do the figures made from it;
which texts are for training, validation and testing depends on their names alone.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import memmeta as mm
from memmeta.errors import InputError
from memmeta.task import Address

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""Line feed and printable ASCII: what texts are made of, each character's place its token."""
SPLITS = {"train": range(0, 70), "validation": range(70, 80), "test": range(80, 100)}
_LEAST = 16_000  # characters, below which a module is no source
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "__phello__"}
_CODES = np.full(128, CHARACTERS.index("?"), dtype=np.uint8)  # by ASCII code
_CODES[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))


def tokens(text: str) -> Tensor:
    """The tokens of a text, (n,) of uint8: tabs as spaces, characters that are not ASCII as question marks."""
    plain = text.replace("\r\n", "\n").expandtabs(4).encode("ascii", errors="replace")
    return torch.from_numpy(_CODES[np.frombuffer(plain, dtype=np.uint8)])


def characters(found: Tensor) -> str:
    """The text of tokens (n,)."""
    return "".join(CHARACTERS[token] for token in found.tolist())


@functools.cache
def library(split: str) -> dict[str, Tensor]:
    """The tokens of every source of a split, by name: a module, or all modules of a package one after the other.

    Raises:
        InputError: an unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r}: write one of {', '.join(SPLITS)}")
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED.intersection(parts):
            files.setdefault(parts[0].removesuffix(".py"), []).append(path)
    texts = {name: "".join(map(_read, paths)) for name, paths in files.items() if _place(name) in SPLITS[split]}
    return {name: tokens(text) for name, text in texts.items() if len(text) >= _LEAST}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few say their encoding in the first line
        return path.read_text(encoding="latin-1")


def _place(name: str) -> int:
    """From 0 to 99, by name alone: a source is in the same split whatever else a version of Python has."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100


@dataclass(frozen=True)
class Passages(mm.TaskSource):
    """Adapt to a passage of a source never seen before, predict the passage that follows.

    A task's source is drawn uniformly, its place in the source too. Support and query are (inputs, targets), each
    (rows, length) of int64: the passage in rows, and the same one character later.

    Args:
        split: "train", "validation" or "test".
        rows: of a passage; its ``rows * length`` characters are one piece of text.
        length: of a row, the context of a model.
        seed: the stream that ``batch`` reads by default.
    """

    split: str = "train"
    rows: int = 16
    length: int = 64
    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> mm.Task:
        """The passages at this address."""
        address = Address(seed, step, index)
        source, place = address.generator(0).random(2)
        texts = list(library(self.split).values())
        return self._cut(texts[int(source * len(texts))], place, address)

    def each(self, passages: int) -> Iterator[tuple[str, mm.Task]]:
        """Every source's name with a task, ``passages`` times, at places spread evenly over the source."""
        for index, (name, text) in enumerate(library(self.split).items()):
            for number in range(passages):
                yield name, self._cut(text, (number + 0.5) / passages, Address(self.seed, number, index))

    def _cut(self, text: Tensor, place: float, address: Address) -> mm.Task:
        size = self.rows * self.length
        first = int(place * (len(text) - 2 * size))
        piece = text[first : first + 2 * size + 1].long()

        def pair(start: int) -> tuple[Tensor, Tensor]:
            part = piece[start : start + size + 1]
            return part[:-1].view(self.rows, self.length), part[1:].view(self.rows, self.length)

        return mm.Task(pair(0), pair(size), address)
