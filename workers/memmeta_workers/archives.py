"""A run on its way home: packed into a tar archive there, and unpacked here without ever leaving its folder."""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from memmeta.errors import InputError
from memmeta.memory import in_bytes

from .files import PIECE, Exact, is_utf8, mode_of, reading, whole

MOST_ENTRIES = 100_000


def pack_tar(folder: Path, names: Sequence[str], target: Path) -> None:
    """Writes files and folders, with all that is in them, into a plain tar archive; the same give the same bytes.

    Symbolic links are not followed: they and what is neither file nor folder are left out. A file that grows meanwhile
    is packed as long as it was when it was opened.

    Args:
        folder: a run's folder.
        names: of files and folders in it, with slashes.
        target: the archive, for its owner alone; replaced if it is there, and removed if this fails.

    Raises:
        InputError: a name leads outside the folder, or there is no such file; one can't be read (or vanished
            meanwhile); or the archive can't be written.
    """
    with (
        whole(target),
        open(target, "wb", opener=_for_its_owner) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
    ):
        for name in sorted(set(names)):
            if _flaw(name):
                raise InputError(f"{name!a} is not the name of something in {folder}: {_flaw(name)}")
            if not os.path.lexists(folder / name):
                raise InputError(f"{folder} has no {name}")
        for name in _below(folder, names):
            path = folder / name
            if not is_utf8(name):
                raise InputError(f"the name of {str(path)!a} is not UTF-8: rename it")
            entry = tarfile.TarInfo(name)
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
                continue
            with reading(path, os.O_NOFOLLOW) as source:
                status = os.fstat(source.fileno())
                entry.size, entry.mode = status.st_size, mode_of(status)
                archive.addfile(entry, Exact(source, path))


def unpack(archive: BinaryIO | Path, target: Path, most: int) -> None:
    """Unpacks a plain tar archive into a new folder: all of it, or nothing.

    The archive may come from anyone. Only plain files and folders are taken, only inside the folder, each once.

    Args:
        archive: a file, or a stream that need not be seekable.
        target: the folder; it may not be there yet, or is empty. Folders above it are made.
        most: bytes of all files together.

    Raises:
        InputError: the folder is not empty or can't be written; the archive is damaged or cut short, has something
            else in it, or too much. The folder is as it was.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is {'not empty' if target.is_dir() else 'a file'}: name a new folder")
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(archive.open("rb")) if isinstance(archive, Path) else archive
        except OSError as error:
            raise InputError(f"{archive} can't be read ({error.strerror})") from error
        made = [folder for folder in target.parents if not folder.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name[:50]}.", dir=target.parent) as temporary:
                inside = Path(temporary, "unpacked")
                inside.mkdir()
                _Unpacking(inside, most).run(source)
                os.rename(inside, target)
        except OSError as error:
            _remove_empty(made)
            raise InputError(f"{target} can't be written ({error.strerror or error})") from error
        except BaseException:
            _remove_empty(made)
            raise


def _for_its_owner(path: str, flags: int) -> int:
    """Opens a file that nobody else can read, also where there was one that others could."""
    found = os.open(path, flags, 0o600)
    os.fchmod(found, 0o600)
    return found


def _flaw(name: str) -> str | None:
    """What is wrong with a name in an archive; ``None`` for a plain way down into a folder."""
    if not is_utf8(name):
        return "it is not UTF-8"
    if name.startswith("/"):
        return "it is absolute"
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return "it is no plain way down into the folder"
    return None


def _below(folder: Path, names: Sequence[str]) -> list[str]:
    """The named files and folders, those above them and those in them, links and special files left out; sorted."""
    found: set[str] = set()

    def take(name: str) -> None:
        status = (folder / name).lstat()
        if stat.S_ISREG(status.st_mode):
            found.add(name)
        elif stat.S_ISDIR(status.st_mode):
            found.add(name)
            for below in os.listdir(folder / name):
                take(f"{name}/{below}")

    for name in names:
        above = [str(path) for path in PurePosixPath(name).parents if path.name]
        if not any((folder / path).is_symlink() for path in above):
            try:
                take(name)
            except OSError as error:
                raise InputError(f"{folder / name} can't be read ({error.strerror})") from error
            found.update(above if name in found else ())
    return sorted(found)


class _Unpacking:
    """One archive on its way into a folder.

    Args:
        folder: an empty one.
        most: bytes of all files.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._most = most
        self._bytes = 0
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._named: set[str] = set()

    def run(self, archive: BinaryIO) -> None:
        """Unpacks it.

        Raises:
            InputError: the archive.
            OSError: the folder.
        """
        source = _Metered(archive)
        end = 0
        with contextlib.ExitStack() as stack:
            with _damaged():
                # Of a stream, and of plain bytes alone: nothing in it is decompressed.
                tar = stack.enter_context(
                    tarfile.open(fileobj=source, mode="r|", encoding="utf-8", errors="surrogateescape")  # type: ignore
                )
            while True:
                with _damaged():
                    source.allow(PIECE)
                    member = tar.next()
                if member is None:
                    break
                if tar.pax_headers:
                    raise _refused("it has headers for all of its files")
                self._check(member)
                if member.isdir():
                    self._make(member.name)
                    end = member.offset_data
                    continue
                self._write(tar, member, source)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        # An archive ends with two empty blocks. tarfile takes whatever is no header, or the end of the file, for them.
        if not source.is_empty(end, 2 * tarfile.BLOCKSIZE):
            raise _refused("it is damaged or cut short")

    def _check(self, member: tarfile.TarInfo) -> None:
        """Refuses what is no plain file or folder, is there twice, lies outside, or is too much."""
        name, shown = member.name, ascii(member.name[:100])
        if flaw := _flaw(name):
            raise _refused(f"the name {shown} is not allowed, {flaw}")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.issparse():
            raise _refused(f"{shown} is neither a plain file nor a folder")
        above = [str(path) for path in PurePosixPath(name).parents if path.name]
        taken = name in (self._folders if member.isfile() else self._files)
        if name in self._named or taken or any(path in self._files for path in above):
            raise _refused(f"{shown} is there twice")
        self._named.add(name)
        self._bytes += max(member.size, 0) if member.isfile() else 0
        if member.size < 0 or self._bytes > self._most:
            raise _refused(f"its files have more than {in_bytes(self._most)}")
        (self._files if member.isfile() else self._folders).add(name)
        self._folders.update(above)
        if len(self._files) + len(self._folders) > MOST_ENTRIES:
            raise _refused(f"it has more than {MOST_ENTRIES} files and folders")

    def _make(self, name: str) -> None:
        (self._folder / name).mkdir(parents=True, exist_ok=True)

    def _write(self, tar: tarfile.TarFile, member: tarfile.TarInfo, source: _Metered) -> None:
        path = self._folder / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        left = member.size
        source.allow(left + PIECE)
        with path.open("xb") as target:
            with _damaged():
                held = tar.extractfile(member)
            while left > 0:
                with _damaged():
                    piece = b"" if held is None else held.read(min(left, PIECE))
                if not piece:
                    raise _refused("it is damaged or cut short")
                target.write(piece)
                left -= len(piece)


class _Metered:
    """A stream of which no more can be read than allowed, so that a header can't fill the memory."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._left = 0
        self._read = 0
        self._recent = b""
        self.allow(PIECE)

    def allow(self, size: int) -> None:
        """Allows ``size`` bytes from here on, and a little more: tarfile reads ahead."""
        self._left = size + 2 * tarfile.RECORDSIZE

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        try:
            data = self._source.read(size)
        except OSError as error:
            raise InputError(f"the archive can't be read ({error.strerror or error}): try again") from error
        self._left -= len(data)
        if self._left < 0:
            raise _refused("it has a header that is far too long")
        self._read += len(data)
        self._recent = (self._recent + data)[-4 * tarfile.RECORDSIZE :]
        return data

    def is_empty(self, start: int, size: int) -> bool:
        """Whether the bytes from ``start`` on, not far back or yet to be read, are there and zero."""
        self.allow(size)
        while self._read < start + size:
            if not self.read(tarfile.BLOCKSIZE):
                return False
        first = start - (self._read - len(self._recent))
        return first >= 0 and self._recent[first : first + size] == bytes(size)


def _refused(why: str) -> InputError:
    return InputError(f"the archive is refused and nothing unpacked: {why}")


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    """Whatever tarfile makes of bytes that are no archive, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise _refused(f"it is damaged or cut short ({' '.join(str(error).split())[:100]})") from error


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
