"""Tensors as raw bytes: in a slab of memory, or in a nameless temporary file."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from .errors import MemmetaError

_ALIGNED = 64
_CPU = torch.device("cpu")


class Piece(NamedTuple):
    """A tensor's place among bytes, and its form: its elements lie there in the order they have in its own memory, so
    that a kernel which reads it back takes the same path, and gives the same bits."""

    offset: int
    nbytes: int
    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, offset: int) -> Piece:
        """The piece for a tensor that is ``dense``."""
        return cls(offset, tensor.nbytes, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    @property
    def after(self) -> int:
        """Where the next piece may begin."""
        return self.offset - (-self.nbytes // _ALIGNED) * _ALIGNED

    def empty(self, device: torch.device | None = None) -> Tensor:
        """Memory for it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device or self.device)

    def view(self, slab: Tensor) -> Tensor:
        """It, in a slab of bytes."""
        return slab[self.offset : self.offset + self.nbytes].view(self.dtype).as_strided(self.shape, self.stride)


def dense(tensor: Tensor) -> Tensor:
    """A tensor outside any graph whose elements fill its memory, in whatever order: itself, or a copy."""
    filled = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1 and stride != filled:
            return tensor.detach().contiguous()
        filled *= size
    return tensor.detach()


class RawFile:
    """Tensors in a nameless temporary file, one after another.

    The file is in ``tempfile.gettempdir()`` (the environment's TMPDIR says where; a /tmp that is memory is no gain). It
    has no name from the start, so that it is gone with its object, with an exception, and with a process that is
    killed. The system's page cache writes behind, and reads ahead what it is told is wanted.

    Raises:
        MemmetaError: (from every method) the system can't: a disk that is full, a folder that is not there.
    """

    def __init__(self) -> None:
        with _told("make a file for snapshots", 0):
            self._file = cast("BinaryIO", tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 closed by the finalizer
        self._end = 0
        weakref.finalize(self, self._file.close)

    def append(self, tensor: Tensor) -> Piece:
        """Write a tensor, and say where it is."""
        tensor = dense(tensor)
        piece = Piece.of(tensor, self._end)
        with _told("write a snapshot", piece.nbytes):
            _write(self._file, piece.offset, _bytes(piece.empty(_CPU).copy_(tensor)))
        self._end = piece.after
        return piece

    def load(self, piece: Piece) -> Tensor:
        """Read a tensor back, on the device that it was on."""
        tensor = piece.empty(_CPU)
        with _told("read a snapshot", piece.nbytes):
            _read(self._file, piece.offset, _bytes(tensor))
        return tensor.to(piece.device)

    def expect(self, piece: Piece) -> None:
        """Tell the system what is read next, where it listens (Linux)."""
        if _advise is not None and piece.nbytes:
            _advise(self._file.fileno(), piece.offset, piece.nbytes, _WILLNEED)


_advise: Any = getattr(os, "posix_fadvise", None)
_WILLNEED = getattr(os, "POSIX_FADV_WILLNEED", 0)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor on the CPU."""
    array: Any = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return memoryview(array)


def _write(file: BinaryIO, offset: int, data: memoryview) -> None:
    """All of the bytes: one call of the system takes 2 GiB at most."""
    file.seek(offset)
    while data:
        data = data[file.write(data) :]


def _read(file: Any, offset: int, into: memoryview) -> None:
    file.seek(offset)
    while into:
        count = file.readinto(into)
        if not count:
            raise OSError("the file ends too early")
        into = into[count:]


@contextlib.contextmanager
def _told(what: str, nbytes: int) -> Iterator[None]:
    """Turn the system's errors into one that says what was done, where, and what to do instead."""
    try:
        yield
    except OSError as error:
        raise MemmetaError(
            f"Cannot {what} of the inner loop ({nbytes:,} bytes) when using Stepwise(snapshots='disk'): "
            f"{error.strerror or error}, in {_folder()}. Let TMPDIR name a folder with more room, or use "
            "snapshots='sqrt'"
        ) from error


def _folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return "no folder that can be written"
