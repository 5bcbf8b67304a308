"""Few-shot classification of colour images in folders, as mini-ImageNet, CUB or CIFAR-FS are kept."""

from __future__ import annotations

import csv
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..task import Task
from .base import TaskSource
from .checks import SPLITS, check_address, check_choice, check_integer, optional, require

_STREAM = 3
_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
_ENDINGS = (".jpg", ".jpeg", ".png")
_KEPT = 16384  # decoded images in a process: 350 MB at side 84
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, by channel
_LAYOUTS = "ROOT/{train,val,test}/CLASS/*.jpg or *.png, or ROOT/{train,val,test}.csv (filename,label) with ROOT/images/"
_UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError)


@dataclass(frozen=True)
class ImageFolders(TaskSource):
    """N-way K-shot tasks of colour images, in the two layouts that mini-ImageNet goes by.

    | layout | images | classes |
    | --- | --- | --- |
    | folders | ROOT/{train,val,test}/CLASS/*.{jpg,jpeg,png} | the folders |
    | tables | ROOT/images/FILENAME | the labels in ROOT/{train,val,test}.csv, columns filename and label |

    Support and query are pairs (images, targets): images (n, 3, size, size) float32 in [0, 1], targets (n,) int64 in
    0..ways-1, n = ways * shots or ways * query, one image of every class, then the next one of every class. They hold
    different images. Which classes are train, validation or test, the files say.

    Images are scaled to ``size`` when they are first used and kept as bytes (the last 16384 of a process). The same
    files give the same tasks on any machine, but for what versions of Pillow make of a JPEG.

    Args:
        root: the folder ROOT. Every machine that asks for tasks needs it.
        ways: N, classes of a task (2 or more).
        shots: K, support images of each class.
        query: query images of each class.
        split: "train", "validation" or "test".
        size: pixels of an image's side; other sizes and shapes are scaled to it.
        seed: the stream that ``batch`` reads by default.
        normalized: shift and scale each channel by ImageNet's mean and deviation, as the reference code of MAML++ does.

    Raises:
        InputError: no such split in the folder, an image that can't be read, more ways than classes, more images than
            a class has, a count out of range, Pillow missing.
    """

    root: str | os.PathLike[str]
    ways: int = 5
    shots: int = 1
    query: int = 15
    split: str = "train"
    size: int = 84
    seed: int = 0
    normalized: bool = False

    def __post_init__(self) -> None:
        check_integer("ways", self.ways, 2)
        for name, least in (("shots", 1), ("query", 1), ("size", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        check_choice("split", self.split, SPLITS)
        if not isinstance(self.root, (str, os.PathLike)):
            raise InputError(f"root must be the path of a folder with images, got {self.root!r}")
        object.__setattr__(self, "root", os.fspath(self.root))
        require("PIL")
        classes, needed = self._classes(), self.shots + self.query
        if self.ways > len(classes):
            raise InputError(
                f"ways={self.ways} but the {self.split} split has {len(classes)} classes: use at most {len(classes)}"
            )
        fewest = min(classes, key=lambda name: len(classes[name]))
        if needed > len(classes[fewest]):
            raise InputError(
                f"shots={self.shots} and query={self.query} need {needed} images but class {fewest!r} has "
                f"{len(classes[fewest])}: use at most {len(classes[fewest])} in all"
            )

    @property
    def class_count(self) -> int:
        """Number of classes in this split."""
        return len(self._classes())

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 1 / ways."""
        return 1 / self.ways

    def task(self, seed: int, step: int, index: int) -> Task:
        """The ``ways`` classes at this address, with ``shots`` support and ``query`` query images of each."""
        address = check_address(seed, step, index)
        generator = address.generator(_STREAM)
        names = tuple(self._classes().values())
        chosen = [names[number] for number in generator.choice(len(names), self.ways, replace=False)]
        each = self.shots + self.query
        picked = [[images[i] for i in generator.choice(len(images), each, replace=False)] for images in chosen]
        rows = [[picked[row][column] for row in range(self.ways)] for column in range(each)]
        return Task(self._batch(rows[: self.shots]), self._batch(rows[self.shots :]), address)

    def describe(self) -> str:
        """One line for reports."""
        return f"images: {self.ways}-way {self.shots}-shot, {self.split} split of {self.class_count} classes"

    def _classes(self) -> dict[str, tuple[str, ...]]:
        # Absolute: what is kept is of a folder, and not of a name that another working folder gives to another.
        return _listed(os.path.abspath(os.path.expanduser(self.root)), self.split)

    def _batch(self, rows: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images per class, each of ``ways`` paths, as a batch of images and targets."""
        pixels = np.stack([_pixels(path, self.size) for row in rows for path in row])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
        if self.normalized:
            mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (_MEAN, _DEVIATION))
            images = (images - mean) / deviation
        return images, torch.arange(self.ways).repeat(len(rows))


@functools.lru_cache(maxsize=64)
def _listed(root: str, split: str) -> dict[str, tuple[str, ...]]:
    """The paths of a split's images by class, both sorted; read once in a process."""
    base = Path(root)
    if not base.is_dir():
        raise InputError(f"the folder of images {root!r} does not exist: make {_LAYOUTS}")
    for name in _FOLDERS[split]:
        if (base / name).is_dir():
            return _from_folders(base / name)
    for name in _FOLDERS[split]:
        if (base / f"{name}.csv").is_file():
            return _from_table(base / f"{name}.csv", base / "images")
    raise InputError(f"{root!r} has no {split} split: make {_LAYOUTS}")


def _from_folders(folder: Path) -> dict[str, tuple[str, ...]]:
    found = {child.name: _images(child) for child in sorted(folder.iterdir()) if child.is_dir()}
    found = {name: images for name, images in found.items() if images}
    if not found:
        raise InputError(f"{os.fspath(folder)!r} has no classes (folders with .jpg or .png files): make {_LAYOUTS}")
    return found


def _images(folder: Path) -> tuple[str, ...]:
    paths = (path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and not path.name.startswith("."))
    return tuple(sorted(os.fspath(path) for path in paths))


def _from_table(table: Path, images: Path) -> dict[str, tuple[str, ...]]:
    labels: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                name, label = row["filename"], row["label"]
                if not name or not label:
                    raise InputError(f"line {number} of {os.fspath(table)!r} has no filename or no label: write both")
                if labels.setdefault(name, label) != label:
                    raise InputError(f"{os.fspath(table)!r} gives {name!r} the labels {labels[name]!r} and {label!r}")
    except (KeyError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{os.fspath(table)!r} is no table with the columns filename and label ({error!r}): make {_LAYOUTS}"
        ) from error
    if not labels:
        raise InputError(f"{os.fspath(table)!r} names no images: make {_LAYOUTS}")
    found: dict[str, list[str]] = {}
    for name, label in labels.items():
        found.setdefault(label, []).append(os.fspath(images / name))
    return {label: tuple(sorted(paths)) for label, paths in sorted(found.items())}


@functools.lru_cache(maxsize=_KEPT)
def _pixels(path: str, size: int) -> np.ndarray:
    """An image as uint8 (size, size, 3)."""
    images = optional("PIL.Image")
    try:
        with images.open(path) as image:
            scaled = image.convert("RGB")
            if scaled.size != (size, size):
                scaled = scaled.resize((size, size), images.Resampling.LANCZOS)
    except _UNREADABLE as error:
        raise InputError(f"{path} is not an image that can be read ({error})") from error
    pixels = np.asarray(scaled, dtype=np.uint8)
    pixels.flags.writeable = False
    return pixels
