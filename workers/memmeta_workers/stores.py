"""Where checkpoints live: a folder, or any address that fsspec knows. Written whole or not at all, in both."""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.core import url_to_fs
from safetensors.torch import save, save_file
from torch import nn

from memmeta.errors import InputError, MemmetaError

from .checkpoints import (
    META,
    OPTIMIZER,
    STATE,
    Best,
    Checkpoint,
    CorruptError,
    Extra,
    digest,
    is_whole,
    name_of,
    parts,
    seal,
    step_of,
    sync,
    unseal,
)
from .update import OuterUpdate

_TEMPORARY = ".writing-"


class Store(abc.ABC):
    """Where the checkpoints of one run live. It can be pickled; ``str`` of it is the place, for messages.

    Whatever fails in the place itself is an ``OSError``, from every method.
    """

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order; unfinished ones are not seen."""

    @abc.abstractmethod
    def location(self, step: int) -> str:
        """The path or address of the checkpoint of a step, whether there is one or not."""

    @abc.abstractmethod
    def write(self, learner: nn.Module, update: OuterUpdate, extra: Extra) -> str:
        """Writes the checkpoint of this moment; returns its location.

        A crash at any moment leaves either no checkpoint of that step, or a whole one.

        Args:
            learner: its parameters (tied ones once) and buffers are saved.
            update: its step, optimiser and schedule are saved.
            extra: the rest.

        Raises:
            InputError: optimiser or schedule hold something that is neither number nor tensor.
            OSError: the place; or there is a checkpoint of that step.
        """

    @abc.abstractmethod
    def read(self, step: int) -> Checkpoint:
        """Reads one checkpoint and checks every byte of it.

        Raises:
            CorruptError: with what is wrong.
            InputError: of another format.
            OSError: the place.
        """

    @abc.abstractmethod
    def remove(self, step: int) -> None:
        """Removes a checkpoint; a half-removed one is never seen.

        Raises:
            OSError: the place; or there is no such checkpoint.
        """

    @abc.abstractmethod
    def clean(self) -> None:
        """Removes what writes and removals that never ended have left.

        Raises:
            OSError: the place.
        """

    @final
    def prune(self, keep: int, best: Best | None) -> None:
        """Keeps the last ``keep`` checkpoints and the best one.

        Raises:
            OSError: the place.
        """
        for step in self.steps()[:-keep]:
            if best is None or step != best.step:
                self.remove(step)


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder on a disk of this machine; each checkpoint is flushed to the disk.

    Attributes:
        folder: made by the first ``write``.
    """

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = (step_of(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(step for step in found if step is not None)

    def location(self, step: int) -> str:
        return str(self._of(step))

    def write(self, learner: nn.Module, update: OuterUpdate, extra: Extra) -> str:
        """Everything goes to a temporary sibling first, is flushed to the disk, and is then renamed."""
        final = self._of(update.step)
        temporary = self.folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
        tensors, state = parts(learner, update, extra)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            for name, held in tensors.items():
                save_file(held, temporary / name)
            (temporary / STATE).write_bytes(seal(state, {name: digest(temporary / name) for name in tensors}))
            for name in (META, OPTIMIZER, STATE):
                sync(temporary / name)
            sync(temporary)
            os.rename(temporary, final)
            sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.clean()
        return str(final)

    def read(self, step: int) -> Checkpoint:
        return unseal(self.location(step), lambda name: self._of(step) / name)

    def remove(self, step: int) -> None:
        """It is renamed first, so that a half-removed one is never read."""
        away = self.folder / f"{_TEMPORARY}gone-{name_of(step)}-{os.getpid()}"
        os.rename(self._of(step), away)
        shutil.rmtree(away, ignore_errors=True)

    def clean(self) -> None:
        for entry in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _of(self, step: int) -> Path:
        return self.folder / name_of(step)


@dataclass(frozen=True)
class RemoteStore(Store):
    """An address of fsspec: s3://, gs://, file://, memory://, ...

    Such a place may have no rename. ``state.json``, which has the checksums of the rest, is written last and removed
    first: there is a checkpoint where there is a ``state.json`` with its end.

    Attributes:
        address: bucket and prefix, or folder; a bucket must be there already.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def steps(self) -> list[int]:
        with _only_os_errors():
            return [step for step in self._folders() if self._is_whole(step)]

    def location(self, step: int) -> str:
        return f"{self.address.rstrip('/')}/{name_of(step)}"

    def write(self, learner: nn.Module, update: OuterUpdate, extra: Extra) -> str:
        """The tensor files first, ``state.json`` last."""
        tensors, state = parts(learner, update, extra)
        with _only_os_errors():
            if self._is_whole(update.step):
                raise FileExistsError(errno.EEXIST, f"there is {self.location(update.step)} already")
            system, folder = self._of(update.step)
            if folder.startswith("/"):  # the paths of buckets, which have no folders, do not
                system.makedirs(folder, exist_ok=True)
            digests = {}
            for name, held in tensors.items():
                data = save(held)
                digests[name] = digest(data)
                system.pipe_file(f"{folder}/{name}", data)
            system.pipe_file(f"{folder}/{STATE}", seal(state, digests))
        return self.location(update.step)

    def read(self, step: int) -> Checkpoint:
        with _only_os_errors():
            return unseal(self.location(step), lambda name: self._bytes(step, name))

    def remove(self, step: int) -> None:
        with _only_os_errors():
            system, folder = self._of(step)
            system.rm_file(f"{folder}/{STATE}")
            self._remove_rest(step)

    def clean(self) -> None:
        with _only_os_errors():
            for step in self._folders():
                if not self._is_whole(step):
                    self._remove_rest(step)

    def _remove_rest(self, step: int) -> None:
        system, folder = self._of(step)
        # One by one: a recursive removal would take *, ? and [ in the address for patterns.
        for path in system.ls(folder, detail=False):
            system.rm_file(path)
        if folder.startswith("/"):
            system.rmdir(folder)

    def _folders(self) -> list[int]:
        """The steps that have a folder, whole or not, in order."""
        system, root = self._root()
        try:
            paths = system.ls(f"{root}/", detail=False)
        except FileNotFoundError:
            return []
        found = (step_of(path.rstrip("/").rpartition("/")[2]) for path in paths)
        return sorted({step for step in found if step is not None})

    def _is_whole(self, step: int) -> bool:
        try:
            return is_whole(self._bytes(step, STATE))
        except CorruptError:
            return False

    def _bytes(self, step: int, name: str) -> bytes:
        system, folder = self._of(step)
        try:
            return cast(bytes, system.cat_file(f"{folder}/{name}"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptError(f"{name} is missing") from error

    def _of(self, step: int) -> tuple[AbstractFileSystem, str]:
        system, root = self._root()
        return system, f"{root}/{name_of(step)}"

    def _root(self) -> tuple[AbstractFileSystem, str]:
        system, root = url_to_fs(self.address)
        system.invalidate_cache()  # another process may have written or removed
        return system, root.rstrip("/")


@contextlib.contextmanager
def _only_os_errors() -> Iterator[None]:
    """What a backend raises of its own (botocore's errors, say) as an OSError that says something."""
    try:
        yield
    except MemmetaError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and str(error):
            raise
        raise OSError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error


def open_store(address: str | Path) -> Store:
    """The store of a folder, or of an address with ``://``.

    Raises:
        InputError: it is empty; or fsspec does not know it, or needs a package for it that is not installed.
    """
    text = str(address)
    if not text:
        raise InputError("--checkpoints is empty: name a folder or an address such as s3://bucket/run")
    protocol, separator, _ = text.partition("://")
    if not separator:
        return LocalStore(Path(address))
    try:
        get_filesystem_class(protocol)
        url_to_fs(text)
    except ImportError as error:
        cause = error.__cause__
        package = (cause.name if isinstance(cause, ImportError) else None) or "the package it needs"
        raise InputError(
            f"--checkpoints {text} needs a package that is not installed ({error}): pip install {package}"
        ) from error
    except Exception as error:
        raise InputError(
            f"--checkpoints {text} can't be opened ({error}): name a folder or an address such as s3://bucket/run"
        ) from error
    return RemoteStore(text)


def absolute(address: str) -> str:
    """The same address from any working directory."""
    protocol, separator, path = address.partition("://")
    if address and not separator:
        return str(Path(address).absolute())
    return f"{protocol}://{Path(path).absolute()}" if protocol in ("file", "local") else address
