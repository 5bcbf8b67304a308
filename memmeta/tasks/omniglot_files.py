"""Reading the published Omniglot files, extracted or zipped, without unpacking anything to disk."""

from __future__ import annotations

import functools
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .checks import optional

BACKGROUND, EVALUATION = "images_background", "images_evaluation"
SMALL1, SMALL2 = "images_background_small1", "images_background_small2"
SETS = (BACKGROUND, EVALUATION, SMALL1, SMALL2)
RECIPE = (
    f"get {BACKGROUND}.zip and {EVALUATION}.zip (or the small sets {SMALL1}.zip and {SMALL2}.zip) "
    "from https://github.com/brendenlake/omniglot, folder python"
)
# A drawing is a few hundred bytes and 105 x 105: far beyond that is another file, or one made to fill the memory.
_MOST_BYTES, _MOST_PIXELS = 1 << 20, 1024
_UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, SyntaxError, ValueError, RuntimeError)

Character = tuple[str, str]  # alphabet, character


class SetFile(NamedTuple):
    """One set as found on disk: a folder or a zip, with what tells that it has changed."""

    path: str
    modified: int
    size: int


def find_sets(data_dir: str) -> dict[str, SetFile]:
    """The sets in ``data_dir``: as folders or zips in it or in its ``python`` folder, or ``data_dir`` itself.

    Raises:
        InputError: nothing there, or nothing of Omniglot's.
    """
    root = Path(data_dir).expanduser()
    if not os.access(root, os.R_OK):
        raise InputError(f"Omniglot's folder {data_dir!r} does not exist or can't be read: {RECIPE}")
    found = {name: path for name in SETS for path in _places(root, name)[:1]}
    if not found:
        raise InputError(f"no Omniglot files in {data_dir!r}: {RECIPE}")
    return {name: _stamped(path) for name, path in found.items()}


def _places(root: Path, name: str) -> list[Path]:
    itself = [root] if root.name == name and root.is_dir() else []
    folders = [path for base in (root, root / "python") if (path := base / name).is_dir()]
    zipped = [path for base in (root, root / "python") if (path := base / f"{name}.zip").is_file()]
    if root.name == f"{name}.zip" and root.is_file():
        zipped = [root]
    # The inner folder first: unpacking into a folder of the same name nests the two.
    return [*folders, *itself, *zipped]


def _stamped(path: Path) -> SetFile:
    path = path.resolve()
    status = path.stat()
    return SetFile(os.fspath(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def characters(file: SetFile) -> dict[Character, tuple[str, ...]]:
    """The drawings' names by (alphabet, character), sorted. Reads the listing, decodes nothing.

    Raises:
        InputError: a zip that is not one, or a set without drawings.
    """
    found: dict[Character, list[str]] = {}
    for name in sorted(_names(file)):
        parts = PurePosixPath(name).parts
        if len(parts) >= 3 and name.endswith(".png") and not parts[-1].startswith("."):
            found.setdefault((parts[-3], parts[-2]), []).append(name)
    if not found:
        raise InputError(f"{file.path} holds no drawings (<alphabet>/<character>/<drawing>.png): {RECIPE}")
    return {key: tuple(names) for key, names in sorted(found.items())}


def _names(file: SetFile) -> list[str]:
    path = Path(file.path)
    if path.is_dir():
        return [drawing.relative_to(path).as_posix() for drawing in path.glob("*/*/*.png")]
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except _UNREADABLE as error:
        raise InputError(f"{file.path} is not a readable zip ({error}): {RECIPE}") from error


@functools.lru_cache(maxsize=16)
def drawings(file: SetFile, size: int) -> dict[Character, np.ndarray]:
    """All drawings of a set: uint8 (drawings, size, size) by (alphabet, character), ink = 255, averaged over areas.

    Decoded once in a process (a few seconds for the full background set, 25 MB for all of Omniglot at side 28) and
    again only if the file's time or size changes.

    Raises:
        InputError: a drawing that can't be read, Pillow missing.
    """
    index = characters(file)
    members = [name for names in index.values() for name in names]
    images = dict(zip(members, _decode(file, members, size), strict=True))
    stacked = {key: np.stack([images[name] for name in names]) for key, names in index.items()}
    for stack in stacked.values():
        stack.flags.writeable = False
    return stacked


def _decode(file: SetFile, members: list[str], size: int) -> Iterator[np.ndarray]:
    """One uint8 (size, size) image for each member."""
    images = optional("PIL.Image")
    for name, data in _read(file, members):
        try:
            with images.open(io.BytesIO(data)) as image:
                if max(image.size) > _MOST_PIXELS:
                    raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
                paper = image.convert("L").resize((size, size), images.Resampling.BOX)
        except _UNREADABLE as error:
            raise InputError(f"{file.path}: {name} is not a drawing ({error}): {RECIPE}") from error
        yield 255 - np.asarray(paper, dtype=np.uint8)


def _read(file: SetFile, members: list[str]) -> Iterator[tuple[str, bytes]]:
    path = Path(file.path)
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    try:
        for name in members:
            yield name, _bytes(path, archive, name)
    finally:
        if archive is not None:
            archive.close()


def _bytes(path: Path, archive: zipfile.ZipFile | None, name: str) -> bytes:
    try:
        size = (path / name).stat().st_size if archive is None else archive.getinfo(name).file_size
        if size > _MOST_BYTES:
            raise ValueError(f"{size} bytes")
        return (path / name).read_bytes() if archive is None else archive.read(name)
    except _UNREADABLE as error:
        raise InputError(f"{path}: {name} can't be read ({error}): {RECIPE}") from error
