"""What travels to a cluster and back: which files of a folder are shipped, packed as what, and how unpacked."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, BinaryIO

from memmeta.errors import InputError

from .progress import in_bytes

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE_FILE = ".memmetaignore"
MOST_ENTRIES = 100_000
# Never shipped, whatever a pattern says. Compared in lower case.
_NEVER = (
    ".git",
    "__pycache__",
    "*.pyc",
    ".pytest_cache",
    ".ruff_cache",
    ".mypy_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
)
_CREDENTIALS = (
    ".env",
    ".env.*",
    "auth_token",
    "id_rsa",
    "id_dsa",
    "id_ecdsa",
    "id_ed25519",
    "*.pem",
    ".netrc",
    ".git-credentials",
    ".pypirc",
    ".aws",
    ".ssh",
)
# The oldest moment that a zip archive can name.
_MOMENT = (1980, 1, 1, 0, 0, 0)
_PIECE = 1 << 20


@dataclass(frozen=True)
class File:
    """One file that is shipped.

    Attributes:
        path: relative to the folder, with slashes.
        size: bytes.
    """

    path: str
    size: int


@dataclass(frozen=True)
class LeftOut:
    """What is not shipped although no pattern says so.

    Attributes:
        path: relative to the folder, with slashes.
        why: in a few words.
    """

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path} ({self.why})"


@dataclass(frozen=True)
class Contents:
    """What of a folder is shipped.

    Attributes:
        folder: absolute.
        files: sorted by their path.
        left_out: symbolic links, special files and credentials that stay behind; sorted by their path.
    """

    folder: Path
    files: tuple[File, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def bytes(self) -> int:
        """All files together, before they are compressed."""
        return sum(file.size for file in self.files)

    def largest(self, count: int) -> list[tuple[str, int]]:
        """The ``count`` largest files and folders with their bytes; a folder's name ends in a slash.

        A folder that holds next to nothing but one thing is passed over for that thing.
        """
        return sorted(_entries(self.files, ""), key=lambda entry: (-entry[1], entry[0]))[:count]


def _entries(files: Sequence[File], above: str) -> Iterator[tuple[str, int]]:
    """What lies in the folder ``above`` (empty, or with a slash at the end), with the bytes of each."""
    held: dict[str, list[File]] = {}
    for file in files:
        name, slash, _ = file.path[len(above) :].partition("/")
        held.setdefault(above + name + slash, []).append(file)
    for path, inside in held.items():
        total = sum(file.size for file in inside)
        if path.endswith("/"):
            largest = max(_entries(inside, path), key=lambda entry: entry[1])
            yield largest if largest[1] >= 0.9 * total else (path, total)
        else:
            yield path, total


def choose(folder: Path, excludes: Sequence[str] = ()) -> Contents:
    """Which files of a folder are shipped.

    Left out is what the patterns say: those of ``.gitignore`` files, as git reads them, from the top of the repository
    that the folder lies in down to each folder; then those of ``.memmetaignore`` in the folder itself; then
    ``excludes``. A later pattern has the last word (``!data.csv`` ships again what an earlier one leaves out), except
    about git's own folder, virtual environments, caches, memmeta's run folders and credentials, which never travel.

    A symbolic link to a file that is itself shipped becomes that file. All other links, and what is neither file nor
    folder, are left out; ``Contents.left_out`` says which and why.

    Args:
        folder: what is looked through; nothing is written.
        excludes: patterns in the syntax of ``.gitignore``, relative to the folder.

    Raises:
        InputError: no such folder; one in it can't be read; a pattern is wrong; pathspec is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name the folder to ship with --working-dir")
    folder = folder.resolve()
    search = _Search(folder, _Rules.own(folder, excludes))
    search.walk(folder, _Rules.above(folder))
    return search.contents()


def check_size(contents: Contents, most: int) -> None:
    """Refuses what can't or shouldn't be shipped.

    Args:
        contents: of a folder.
        most: bytes, before compression.

    Raises:
        InputError: there are more bytes than that, or no file at all, or a name is not UTF-8; with the way out.
    """
    folder = contents.folder
    if not contents.files:
        raise InputError(
            f"{folder} has no file to ship: name the folder of the experiment with --working-dir, or see whether "
            f".gitignore, {IGNORE_FILE} or --exclude leave out too much"
        )
    for file in contents.files:
        if not _is_utf8(file.path):
            raise InputError(f"the name of {file.path!a} in {folder} is not UTF-8: rename it, or --exclude it")
    if contents.bytes > most:
        largest = ", ".join(f"{path} ({in_bytes(size)})" for path, size in contents.largest(3))
        raise InputError(
            f"{folder} has {in_bytes(contents.bytes)} to ship, more than {in_bytes(most)}; the largest are {largest}: "
            f"leave out what the run does not need (--exclude PATTERN, or a line in {IGNORE_FILE}), name a smaller "
            "folder with --working-dir, or raise --most-megabytes; large data sets should lie on the cluster itself"
        )


def pack(contents: Contents, target: Path) -> None:
    """Writes the files into a zip archive; the same files give the same bytes, whenever and wherever.

    Times are not kept, and of the permissions only whether a file can be executed.

    Args:
        contents: what goes in.
        target: the archive; replaced if it is there, and removed if this fails.

    Raises:
        InputError: a file can't be read, or the archive can't be written.
    """
    with _whole(target), zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in sorted(contents.files, key=lambda file: file.path):
            path = contents.folder / file.path
            with _reading(path) as source:
                status = os.fstat(source.fileno())
                entry = zipfile.ZipInfo(file.path, _MOMENT)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.create_system = 3  # Unix, as the permissions below are
                entry.external_attr = (stat.S_IFREG | _mode(status)) << 16
                entry.file_size = status.st_size
                with archive.open(entry, "w") as held:
                    _copy(source, held, status.st_size, path)


def pack_tar(folder: Path, names: Sequence[str], target: Path) -> None:
    """Writes files and folders, with all that is in them, into a plain tar archive; the same give the same bytes.

    Symbolic links are not followed: they and what is neither file nor folder are left out. A file that grows meanwhile
    is packed as long as it was when it was opened.

    Args:
        folder: a run's folder.
        names: of files and folders in it, with slashes.
        target: the archive; replaced if it is there, and removed if this fails.

    Raises:
        InputError: a name leads outside the folder, or there is no such file; one can't be read (or vanished
            meanwhile); or the archive can't be written.
    """
    with _whole(target), tarfile.open(target, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive:
        for name in sorted(set(names)):
            if _flaw(name):
                raise InputError(f"{name!a} is not the name of something in {folder}: {_flaw(name)}")
            if not os.path.lexists(folder / name):
                raise InputError(f"{folder} has no {name}")
        for name in _below(folder, names):
            path = folder / name
            if not _is_utf8(name):
                raise InputError(f"the name of {str(path)!a} is not UTF-8: rename it")
            entry = tarfile.TarInfo(name)
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
                continue
            with _reading(path, os.O_NOFOLLOW) as source:
                status = os.fstat(source.fileno())
                entry.size, entry.mode = status.st_size, _mode(status)
                archive.addfile(entry, _Exact(source, path))


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


class _Search:
    """A walk through a folder.

    Args:
        folder: resolved.
        own: the patterns that come after those of all ``.gitignore`` files.
    """

    def __init__(self, folder: Path, own: _Rules) -> None:
        self._folder = folder
        self._own = own
        self._files: dict[str, int] = {}
        self._links: list[str] = []
        self._left_out: list[LeftOut] = []

    def walk(self, folder: Path, rules: _Rules) -> None:
        """Takes in ``folder`` and all below it."""
        rules = rules.with_file(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder} can't be read ({error.strerror}): --exclude it, or make it readable") from error
        for entry in entries:
            path = Path(entry.path)
            is_folder = entry.is_dir(follow_symlinks=False)
            if not _matches(entry.name, _NEVER) and not self._ignored(path, rules, is_folder):
                if is_folder:
                    self._take_folder(path, rules)
                else:
                    self._take_file(entry)

    def contents(self) -> Contents:
        """What was found."""
        files = dict(self._files)
        for link in self._links:
            target = os.path.realpath(self._folder / link)
            name = target.removeprefix(f"{str(self._folder).rstrip('/')}/")
            if name in self._files:
                files[link] = self._files[name]
            else:
                self._left_out.append(LeftOut(link, self._why(target, name)))
        return Contents(
            self._folder,
            tuple(File(path, files[path]) for path in sorted(files)),
            tuple(sorted(self._left_out, key=lambda one: one.path)),
        )

    def _ignored(self, path: Path, rules: _Rules, is_folder: bool) -> bool:
        verdict = self._own.verdict(path, is_folder)
        return bool(rules.verdict(path, is_folder) if verdict is None else verdict)

    def _take_folder(self, path: Path, rules: _Rules) -> None:
        if _matches(path.name, _CREDENTIALS):
            self._left_out.append(LeftOut(self._name(path) + "/", "credentials never travel"))
        elif not (path / "pyvenv.cfg").is_file() and not _is_run(path):
            self.walk(path, rules)

    def _take_file(self, entry: os.DirEntry[str]) -> None:
        name = self._name(Path(entry.path))
        if _matches(entry.name, _CREDENTIALS):
            self._left_out.append(LeftOut(name, "credentials never travel"))
        elif entry.is_symlink():
            self._links.append(name)
        elif entry.is_file(follow_symlinks=False):
            self._files[name] = entry.stat(follow_symlinks=False).st_size
        else:
            self._left_out.append(LeftOut(name, "neither a file nor a folder"))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _why(self, target: str, name: str) -> str:
        if not os.path.exists(target):
            return "a link to nothing"
        if name == target != str(self._folder):
            return "a link that leads outside the folder"
        return "a link to a folder" if os.path.isdir(target) else "a link to a file that is left out"


class _Rules:
    """Patterns, each list relative to the folder it was written for; the last one that matches decides."""

    def __init__(self, specs: Sequence[tuple[Path, GitIgnoreSpec]] = ()) -> None:
        self._specs = tuple(specs)

    @staticmethod
    def own(folder: Path, excludes: Sequence[str]) -> _Rules:
        """Those of ``.memmetaignore`` and ``--exclude``; a wrong one is refused."""
        lines = [(IGNORE_FILE, line) for line in _lines(folder / IGNORE_FILE)]
        lines += [("--exclude", line) for line in excludes]
        for origin, line in lines:
            if _spec([line]) is None:
                raise InputError(f"{origin}: {line!r} is not a pattern of .gitignore; write for instance data/ or *.pt")
        spec = _spec([line for _, line in lines])
        return _Rules([] if spec is None else [(folder, spec)])

    @staticmethod
    def above(folder: Path) -> _Rules:
        """Those of the ``.gitignore`` files above the folder in its repository.

        They do not count where they leave out the folder itself: who names it wants what is in it.
        """
        top = next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)
        between = [place for place in folder.parents if place.is_relative_to(top)]
        rules = _Rules()
        for place in reversed(between):
            rules = rules.with_file(place)
        named = [place for place in (folder, *between) if place != top]
        return _Rules() if any(rules.verdict(place, True) for place in named) else rules

    def with_file(self, folder: Path) -> _Rules:
        """These, and then those of the ``.gitignore`` of a folder; git passes over a wrong line, and so does this."""
        lines = _lines(folder / ".gitignore")
        spec = _spec(lines) or _spec([line for line in lines if _spec([line]) is not None])
        return _Rules([*self._specs, (folder, spec)]) if lines and spec is not None else self

    def verdict(self, path: Path, is_folder: bool) -> bool | None:
        """Whether they leave out a path; ``None`` if none says anything about it."""
        for folder, spec in reversed(self._specs):
            if not path.is_relative_to(folder) or path == folder:
                continue
            verdict = spec.check_file(path.relative_to(folder).as_posix() + "/" * is_folder).include
            if verdict is not None:
                return verdict
        return None


def _lines(path: Path) -> list[str]:
    """The lines of a file of patterns; none if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape") if path.is_file() else ""
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): make it readable") from error
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def _spec(lines: Sequence[str]) -> GitIgnoreSpec | None:
    """The patterns in a form that can be asked; ``None`` if one is wrong."""
    try:
        from pathspec import GitIgnoreSpec
    except ModuleNotFoundError as error:
        raise InputError(
            "shipping a folder needs pathspec, which is not installed: pip install 'memmeta[service]'"
        ) from error
    try:
        return GitIgnoreSpec.from_lines(lines)
    except Exception:  # ValueError, or re.error for a range such as [z-a]
        return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _flaw(name: str) -> str | None:
    """What is wrong with a name in an archive; ``None`` for a plain way down into a folder."""
    if not _is_utf8(name):
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


@contextlib.contextmanager
def _reading(path: Path, flags: int = 0) -> Iterator[BinaryIO]:
    """A file, to be read. It does not wait where a pipe has taken the place of a file."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags), "rb")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path} is no longer a plain file: try again")
        yield file


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} can't be read ({error.strerror or error}): make it readable, or leave it out")


def _mode(status: os.stat_result) -> int:
    return 0o755 if status.st_mode & stat.S_IXUSR else 0o644


class _Exact:
    """A file whose errors are those of a source: it can't be read, or is shorter than it was."""

    def __init__(self, source: BinaryIO, path: Path) -> None:
        self._source = source
        self._path = path

    def read(self, size: int = 0, /) -> bytes:
        """Reads ``size`` bytes."""
        try:
            data = self._source.read(size)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if len(data) < size:
            raise InputError(f"{self._path} has become shorter while it was packed: try again")
        return data


def _copy(source: BinaryIO, target: IO[bytes], size: int, path: Path) -> None:
    exact = _Exact(source, path)
    while size > 0:
        piece = exact.read(min(size, _PIECE))
        size -= len(piece)
        target.write(piece)


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
                    source.allow(_PIECE)
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
        source.allow(left + _PIECE)
        with path.open("xb") as target:
            with _damaged():
                held = tar.extractfile(member)
            while left > 0:
                with _damaged():
                    piece = b"" if held is None else held.read(min(left, _PIECE))
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
        self.allow(_PIECE)

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


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[None]:
    """Removes the file if it was not written to its end."""
    try:
        yield
    except OSError as error:
        target.unlink(missing_ok=True)
        raise InputError(f"{target} can't be written ({error.strerror or error})") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
