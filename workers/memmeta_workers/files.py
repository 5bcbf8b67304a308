"""Files that may vanish, shrink or turn into something else while they are read; and none that is half-written."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from memmeta.errors import InputError

PIECE = 1 << 20


@contextlib.contextmanager
def reading(path: Path, flags: int = 0) -> Iterator[BinaryIO]:
    """A file, to be read. It does not wait where a pipe has taken the place of a file."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags), "rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path} is no longer a plain file: try again")
        yield file


def unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} can't be read ({error.strerror or error}): make it readable, or leave it out")


def mode_of(status: os.stat_result) -> int:
    return 0o755 if status.st_mode & stat.S_IXUSR else 0o644


class Exact:
    """A file whose errors are those of a source: it can't be read, or is shorter than it was."""

    def __init__(self, source: BinaryIO, path: Path) -> None:
        self._source = source
        self._path = path

    def read(self, size: int = 0, /) -> bytes:
        """Reads ``size`` bytes."""
        try:
            data = self._source.read(size)
        except OSError as error:
            raise unreadable(self._path, error) from error
        if len(data) < size:
            raise InputError(f"{self._path} has become shorter while it was packed: try again")
        return data


def copy(source: BinaryIO, target: IO[bytes], size: int, path: Path) -> None:
    exact = Exact(source, path)
    while size > 0:
        piece = exact.read(min(size, PIECE))
        size -= len(piece)
        target.write(piece)


@contextlib.contextmanager
def whole(target: Path) -> Iterator[None]:
    """Removes the file if it was not written to its end."""
    try:
        yield
    except OSError as error:
        target.unlink(missing_ok=True)
        raise InputError(f"{target} can't be written ({error.strerror or error})") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
