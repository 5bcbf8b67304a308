"""What travels to a cluster: which files of a folder are shipped, and as what."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from memmeta.errors import InputError
from memmeta.memory import in_bytes

from . import access
from .files import copy, is_utf8, mode_of, reading, whole
from .ignores import IGNORE_FILE, Rules

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
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    ".netrc",
    ".git-credentials",
    ".pypirc",
    ".npmrc",
    "application_default_credentials.json",
    ".aws",
    ".ssh",
    ".kube",
    ".docker",
)
# What Ray's dashboard takes as one upload, in bytes.
RAY_TAKES = 100 << 20
# Beside Python's own: what memmeta imports, and nothing that is shipped may hide.
_NEEDED = frozenset(
    {"torch", "numpy", "ray", "memmeta", "memmeta_workers", "jsonargparse", "yaml", "rich", "safetensors"}
)
# The oldest moment that a zip archive can name.
_MOMENT = (1980, 1, 1, 0, 0, 0)


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
    search = _Search(folder, Rules.own(folder, excludes))
    search.walk(folder, Rules.above(folder))
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
        if not is_utf8(file.path):
            raise InputError(f"the name of {file.path!a} in {folder} is not UTF-8: rename it, or --exclude it")
    if contents.bytes > most:
        largest = ", ".join(f"{path} ({in_bytes(size)})" for path, size in contents.largest(3))
        raise InputError(
            f"{folder} has {in_bytes(contents.bytes)} to ship, more than {in_bytes(most)}; the largest are {largest}: "
            f"leave out what the run does not need (--exclude PATTERN, or a line in {IGNORE_FILE}), name a smaller "
            "folder with --working-dir, or raise --most-megabytes; large data sets should lie on the cluster itself"
        )


def check_names(contents: Contents, places: Iterable[str]) -> None:
    """Refuses modules that would be imported in the place of Python's own, or of those that memmeta needs.

    Args:
        contents: of a folder.
        places: folders in it from which modules are imported; "." is the folder itself.

    Raises:
        InputError: names the first one.
    """
    folders = set(places)
    for file in contents.files:
        path = PurePosixPath(file.path)
        if path.name == "__init__.py":
            path = path.parent
        elif path.suffix not in (".py", ".so"):
            continue
        name = path.name.partition(".")[0]
        if str(path.parent) not in folders or path == path.parent:
            continue
        if name in sys.stdlib_module_names or name in _NEEDED:
            whose = "Python's module" if name in sys.stdlib_module_names else "the module"
            raise InputError(f"{path} hides {whose} {name}: rename it")


def check_packed(archive: Path, contents: Contents) -> None:
    """Refuses an archive that is larger than Ray's dashboard takes.

    Raises:
        InputError: with the way out.
    """
    size = archive.stat().st_size
    if size >= RAY_TAKES:
        largest = ", ".join(f"{path} ({in_bytes(size)})" for path, size in contents.largest(3))
        raise InputError(
            f"{contents.folder} packed is {in_bytes(size)}, more than the {in_bytes(RAY_TAKES)} that Ray takes; the "
            f"largest are {largest}: data belongs on the cluster; --exclude PATTERN leaves it out"
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
    with whole(target), zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in sorted(contents.files, key=lambda file: file.path):
            path = contents.folder / file.path
            with reading(path) as source:
                status = os.fstat(source.fileno())
                entry = zipfile.ZipInfo(file.path, _MOMENT)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.create_system = 3  # Unix, as the permissions below are
                entry.external_attr = (stat.S_IFREG | mode_of(status)) << 16
                entry.file_size = status.st_size
                with archive.open(entry, "w") as held:
                    copy(source, held, status.st_size, path)


class _Search:
    """A walk through a folder.

    Args:
        folder: resolved.
        own: the patterns that come after those of all ``.gitignore`` files.
    """

    def __init__(self, folder: Path, own: Rules) -> None:
        self._folder = folder
        self._own = own
        self._tokens = _token_files()
        self._files: dict[str, int] = {}
        self._links: list[str] = []
        self._left_out: list[LeftOut] = []

    def walk(self, folder: Path, rules: Rules) -> None:
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

    def _ignored(self, path: Path, rules: Rules, is_folder: bool) -> bool:
        verdict = self._own.verdict(path, is_folder)
        return bool(rules.verdict(path, is_folder) if verdict is None else verdict)

    def _take_folder(self, path: Path, rules: Rules) -> None:
        if _secret(path.name) or (path.name, path.parent.name) == ("gcloud", ".config"):
            self._left_out.append(LeftOut(self._name(path) + "/", "credentials never travel"))
        elif not (path / "pyvenv.cfg").is_file() and not _is_run(path):
            self.walk(path, rules)

    def _take_file(self, entry: os.DirEntry[str]) -> None:
        name = self._name(Path(entry.path))
        if _secret(entry.name):
            self._left_out.append(LeftOut(name, "credentials never travel"))
        elif entry.is_symlink():
            self._links.append(name)
        elif entry.is_file(follow_symlinks=False):
            status = entry.stat(follow_symlinks=False)
            if any(os.path.samestat(status, token) for token in self._tokens):
                self._left_out.append(LeftOut(name, "the cluster's token never travels"))
            else:
                self._files[name] = status.st_size
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


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _secret(name: str) -> bool:
    return _matches(name, _CREDENTIALS) and not name.lower().endswith(".pub")


def _token_files() -> list[os.stat_result]:
    """The files that a cluster's token may lie in here, those that are there."""
    found: list[os.stat_result] = []
    for path in (os.environ.get(access.TOKEN_PATH), access.default_path()):
        with contextlib.suppress(OSError, RuntimeError):
            if path:
                found.append(Path(path).expanduser().stat())
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()
