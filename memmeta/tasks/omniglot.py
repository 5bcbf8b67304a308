"""Few-shot classification of Omniglot's handwritten characters, from the published files."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .checks import check_choice, check_names, require
from .classes import Classification, check_classification, check_ways
from .omniglot_files import (
    BACKGROUND,
    EVALUATION,
    RECIPE,
    SETS,
    SMALL1,
    SMALL2,
    SetFile,
    characters,
    drawings,
    find_sets,
)

# Held out of the background set for validation: of the 30, five without a close relative among the others.
VALIDATION_ALPHABETS = ("Burmese_(Myanmar)", "Futurama", "Hebrew", "Korean", "Tifinagh")
# What small1 trains on and small2 must therefore not test on.
SMALL1_ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")


class _Class(NamedTuple):
    file: SetFile
    alphabet: str
    character: str
    drawings: int


@dataclass(frozen=True)
class Omniglot(Classification):
    """N-way K-shot classification of Omniglot (Lake, Salakhutdinov and Tenenbaum 2015): 20 drawings a character.

    Which characters a split holds, if ``sets`` and ``alphabets`` are not given:

    | split | with images_background, images_evaluation | with the small sets only |
    | --- | --- | --- |
    | train | images_background less ``VALIDATION_ALPHABETS`` | images_background_small1 |
    | validation | ``VALIDATION_ALPHABETS`` of images_background | none: name ``alphabets`` |
    | test | images_evaluation | images_background_small2 less the alphabets of small1 |

    With ``sets`` given, a split is all of their alphabets, or those named by ``alphabets``; that train and test are
    then disjoint is the caller's affair. A character that two sets share counts once. Training classes are
    multiplied by four with ``rotations`` (by 0, 90, 180 and 270 degrees), validation and test classes never.

    Support and query of a task hold different drawings. Images are averaged over areas to ``size`` and kept as
    bytes, once in a process. A task of 80 images takes about half a millisecond.

    Args:
        data_dir: folder with the published zips or the folders in them (a ``python`` folder in it is looked into, as
            in a clone of Omniglot's repository), or one such zip or folder itself. Every machine that asks for
            tasks needs it.
        ways: N, classes of a task (2 or more).
        shots: K, support drawings of each class.
        query: query drawings of each class; shots + query is at most 20.
        split: "train", "validation" or "test".
        size: pixels of an image's side.
        seed: the stream that ``batch`` reads by default.
        rotations: whether quarter turns of training characters are classes of their own.
        sets: names of the sets to read, such as ("images_background_small1",); by ``split`` if not given.
        alphabets: names of the alphabets to read; by ``split`` if not given.

    Raises:
        InputError: files missing, damaged or not Omniglot's; a split that they do not hold; unknown names; more
            ways than classes or more images than drawings; a count out of range; Pillow missing.
    """

    data_dir: str | os.PathLike[str]
    ways: int = 5
    shots: int = 1
    query: int = 15
    split: str = "train"
    size: int = 28
    seed: int = 0
    rotations: bool = True
    sets: tuple[str, ...] | None = None
    alphabets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_classification(self)
        if not isinstance(self.rotations, bool):
            raise InputError(f"rotations must be True or False, got {self.rotations!r}")
        if not isinstance(self.data_dir, (str, os.PathLike)):
            raise InputError(f"data_dir must be the path of Omniglot's files, got {self.data_dir!r}")
        object.__setattr__(self, "data_dir", os.fspath(self.data_dir))
        for name in ("sets", "alphabets"):
            object.__setattr__(self, name, check_names(name, getattr(self, name)))
        for name in self.sets or ():
            check_choice("each of sets", name, SETS)
        require("PIL")
        check_ways(self)
        fewest = min(self._classes(), key=lambda item: item.drawings)
        if self.shots + self.query > fewest.drawings:
            raise InputError(
                f"shots={self.shots} and query={self.query} need {self.shots + self.query} drawings but "
                f"{fewest.alphabet}/{fewest.character} has {fewest.drawings}: use at most {fewest.drawings} in all"
            )

    @property
    def class_count(self) -> int:
        """Number of classes in this split, rotations included."""
        return len(self._classes()) * self._turns

    @property
    def alphabet_names(self) -> tuple[str, ...]:
        """The alphabets that this split holds, sorted."""
        return tuple(sorted({item.alphabet for item in self._classes()}))

    def draw(self, classes: np.ndarray, images: int, generator: np.random.Generator) -> np.ndarray:
        """``images`` drawings of each of ``classes`` (ways,): float32 (ways, images, size, size) in [0, 1]."""
        known = self._classes()
        batch = np.empty((len(classes), images, self.size, self.size), dtype=np.float32)
        for row, number in zip(batch, classes.tolist(), strict=True):
            item = known[number // self._turns]
            stack = drawings(item.file, self.size)[item.alphabet, item.character]
            picked = stack[generator.choice(len(stack), images, replace=False)]
            row[:] = np.rot90(picked, number % self._turns, axes=(1, 2))
        return batch / np.float32(255)

    def describe(self) -> str:
        """One line for reports."""
        count, alphabets = self.class_count, len(self.alphabet_names)
        return (
            f"omniglot: {self.ways}-way {self.shots}-shot, {self.split} split of {count} classes, {alphabets} alphabets"
        )

    @property
    def _turns(self) -> int:
        return 4 if self.rotations and self.split == "train" else 1

    def _classes(self) -> tuple[_Class, ...]:
        found = find_sets(os.fspath(self.data_dir))
        return _select(tuple(found.items()), self.split, self.sets, self.alphabets)


@functools.lru_cache(maxsize=64)
def _select(
    found: tuple[tuple[str, SetFile], ...],
    split: str,
    sets: tuple[str, ...] | None,
    alphabets: tuple[str, ...] | None,
) -> tuple[_Class, ...]:
    """The characters of a split, by alphabet and name."""
    available = dict(found)
    chosen = sets or (_set_of(split, available, alphabets),)
    for name in chosen:
        if name not in available:
            raise InputError(f"the {split} split needs {name}, found only {', '.join(available)}: {RECIPE}")
    classes: dict[tuple[str, str], _Class] = {}
    for name in chosen:
        for (alphabet, character), names in characters(available[name]).items():
            classes.setdefault((alphabet, character), _Class(available[name], alphabet, character, len(names)))
    present = sorted({alphabet for alphabet, _ in classes})
    wanted = _alphabets_of(split, chosen[0], present) if sets is None and alphabets is None else alphabets or present
    for alphabet in wanted:
        if alphabet not in present:
            raise InputError(f"no alphabet {alphabet!r} in {', '.join(chosen)}: use some of {', '.join(present)}")
    selected = tuple(item for key, item in sorted(classes.items()) if key[0] in wanted)
    if not selected:
        raise InputError(f"{chosen[0]} as found has no alphabet for the {split} split: name some by alphabets=(...)")
    return selected


def _set_of(split: str, available: Mapping[str, SetFile], alphabets: tuple[str, ...] | None) -> str:
    """The set that a split reads if none is named."""
    if BACKGROUND in available or EVALUATION in available:
        return EVALUATION if split == "test" else BACKGROUND
    if split == "validation" and alphabets is None:
        raise InputError(
            "Omniglot's small sets have no validation split: train on sets=('images_background_small1',) with "
            "alphabets=(...) that leave one out, and name that one here, such as alphabets=('Korean',)"
        )
    return SMALL2 if split == "test" else SMALL1


def _alphabets_of(split: str, name: str, present: list[str]) -> list[str]:
    """The alphabets that a split takes from its set if none are named."""
    if name == BACKGROUND:
        return [alphabet for alphabet in present if (alphabet in VALIDATION_ALPHABETS) == (split == "validation")]
    return [alphabet for alphabet in present if name != SMALL2 or alphabet not in SMALL1_ALPHABETS]
