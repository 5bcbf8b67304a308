"""Few-shot classification of printed characters: real letter shapes with no download."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from .alphabets import ALPHABETS
from .checks import require
from .classes import Classification, check_classification, check_ways
from .drawing import FACES, PARAMETERS, font_digest, render

Letter = tuple[int, tuple[int, ...]]  # code point, the faces that draw it


@dataclass(frozen=True)
class Glyphs(Classification):
    """N-way K-shot classification of characters of the fonts that matplotlib ships (DejaVu and STIX).

    A class is a character; its images are the character in different faces (sans, serif, monospaced; regular, bold,
    slanted), each with a random rotation (12 degrees either way), scale, aspect, slant, shift and stroke weight.
    Letters are scaled to one size first, so that no class is told by its size alone.

    Classes are split by Unicode script, and held-out scripts look new:

    - train, 801 classes: Latin, Greek, Coptic, Cyrillic, Old Italic, Lisu, Canadian syllabics and the digits. Scripts
      of one family share shapes (A, O, X), hence they are on one side.
    - validation, 65 classes: Armenian, Hebrew, N'Ko.
    - test, 324 classes: Georgian, Tifinagh, Lao, Arabic.

    That is 1190 characters and, as each has up to 16 faces, 8579 letter shapes.

    Of letters that look alike (o and O, accented and plain, Arabic letters in several joined forms) one is kept; a
    validation or test class that looks like any letter of an earlier split, in any face, is left out
    (``tools/select_glyphs.py`` says how, ``alphabets.py`` holds the result).

    The same address gives the same bits for one version of matplotlib, Pillow and NumPy: run folders should record
    ``fingerprint``. A task of 80 images costs a few milliseconds once its letters have been drawn; they are kept for
    the life of the process (9 kB each, some 70 MB if all are drawn). Letters are drawn at 64 x 64: a larger ``size``
    adds pixels and no detail.

    Args:
        ways: N, classes of a task (2 or more).
        shots: K, support images of each class.
        query: query images of each class.
        split: "train", "validation" or "test".
        size: pixels of an image's side.
        seed: the stream that ``batch`` reads by default.

    Raises:
        InputError: a count out of range, more ways than classes, an unknown split, or matplotlib or Pillow missing.
    """

    ways: int = 5
    shots: int = 1
    query: int = 15
    split: str = "train"
    size: int = 28
    seed: int = 0

    def __post_init__(self) -> None:
        check_classification(self)
        check_ways(self)
        require("matplotlib", "PIL")

    @property
    def class_count(self) -> int:
        """Number of characters in this split."""
        return len(_letters(self.split))

    @property
    def characters(self) -> tuple[str, ...]:
        """The characters of this split, class by class."""
        return tuple(chr(code) for code, _ in _letters(self.split))

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for the class lists, the font files and how tasks are drawn from them here.

        Equal for all settings of a source; where two machines have the same, they make the same tasks. It takes some
        tenths of a second the first time.
        """
        return _fingerprint()

    def draw(self, classes: np.ndarray, images: int, generator: np.random.Generator) -> np.ndarray:
        """``images`` renderings of each of ``classes`` (ways,): float32 (ways, images, size, size) in [0, 1]."""
        letters = _letters(self.split)
        units = generator.random((PARAMETERS + 1, len(classes) * images))
        picks = []
        for unit, number in zip(units[PARAMETERS], np.repeat(classes, images), strict=True):
            code, faces = letters[number]
            picks.append((faces[int(unit * len(faces))], code))
        return render(picks, units[:PARAMETERS], self.size).reshape(len(classes), images, self.size, self.size)

    def describe(self) -> str:
        """One line for reports."""
        return f"glyphs: {self.ways}-way {self.shots}-shot, {self.split} split of {self.class_count} characters"


def _codes(ranges: str) -> list[int]:
    """The code points of hexadecimal ranges such as ``41-5A 61``."""
    ends = [[int(end, 16) for end in word.split("-")] for word in ranges.split()]
    return [code for pair in ends for code in range(pair[0], pair[-1] + 1)]


@functools.cache
def _letters(split: str) -> tuple[Letter, ...]:
    """The classes of a split, by code point."""
    letters: list[Letter] = []
    for rows in ALPHABETS[split].values():
        for bits, ranges in rows:
            faces = tuple(face for face in range(len(FACES)) if bits >> face & 1)
            letters += [(code, faces) for code in _codes(ranges)]
    return tuple(sorted(letters))


@functools.cache
def _fingerprint() -> str:
    digest = hashlib.sha256(repr(ALPHABETS).encode("ascii"))
    for face in range(len(FACES)):
        digest.update(font_digest(face))
    for split in ALPHABETS:
        # Versions of matplotlib, Pillow and NumPy matter by what they draw: whole tasks say that best.
        images, _ = Glyphs(ways=50, query=1, split=split).task(0, 0, 0).query
        digest.update(images.numpy().tobytes())
    return digest.hexdigest()[:16]
