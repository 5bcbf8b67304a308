"""Checkpoints are written whole or not at all, and are checked when read, wherever they live."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from memmeta.errors import InputError
from memmeta_workers import checkpoints
from memmeta_workers.checkpoints import Best, CorruptError, Extra
from memmeta_workers.stores import LocalStore, RemoteStore, Store
from memmeta_workers.update import OuterUpdate

Maker = Callable[[str], Store]
KINDS = ("folder", "file://", "memory://")


class Tied(nn.Module):
    """Two names for one weight, a strided parameter, a frozen one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.strided = nn.Parameter(torch.randn(3, 5).t())
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(4)


def made(steps: int) -> tuple[Tied, OuterUpdate]:
    torch.manual_seed(0)
    net = Tied()
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    update = OuterUpdate(parameters, torch.optim.Adam)
    for _ in range(steps):
        advance(update)
    return net, update


def advance(update: OuterUpdate) -> None:
    torch.manual_seed(update.step)
    sums = {name: torch.randn_like(parameter) for name, parameter in update.parameters.items()}
    update.apply(update.sums_layout.flatten(sums), 1)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    """Makes a store of each kind, of a name."""
    kind = request.param
    yield lambda name: LocalStore(tmp_path / name) if kind == "folder" else RemoteStore(f"{kind}{tmp_path}/{name}")
    system = MemoryFileSystem()
    if system.exists(str(tmp_path)):
        system.rm(str(tmp_path), recursive=True)


@pytest.fixture
def store(make: Maker) -> Store:
    return make("checkpoints")


def listed(store: Store) -> list[str]:
    """Everything that lies in the store, by path."""
    system, root = url_to_fs(str(store))
    return sorted(path.removeprefix(root).lstrip("/") for path in system.find(root, withdirs=True) if path != root)


def files_of(step: int) -> list[str]:
    name = checkpoints.name_of(step)
    return [name, *(f"{name}/{file}" for file in ("meta.safetensors", "optimizer.safetensors", "state.json"))]


def get(store: Store, step: int, name: str) -> bytes:
    system, folder = url_to_fs(store.location(step))
    return bytes(system.cat_file(f"{folder}/{name}"))  # pyright: ignore[reportArgumentType]


def put(store: Store, step: int, name: str, data: bytes) -> None:
    system, folder = url_to_fs(store.location(step))
    system.pipe_file(f"{folder}/{name}", data)


def test_a_checkpoint_comes_back_with_the_same_bits(store: Store) -> None:
    net, update = made(3)
    net.norm(torch.randn(8, 4))
    assert store.steps() == []
    place = store.write(net, update, Extra("abc", best=Best(2, "loss", 0.1), pending={"step": 3}))
    assert place == store.location(3) == f"{store}/step-00000003"
    assert listed(store) == files_of(3)
    assert store.steps() == [3]
    found = store.read(3)
    assert (found.step, found.experiment, found.best, found.pending) == (3, "abc", Best(2, "loss", 0.1), {"step": 3})
    assert found.place == place
    other, resumed = made(0)
    checkpoints.restore(found, other)
    resumed.load_state_dict(found.update)
    assert other.a.weight is other.b.weight
    for there in (update, resumed):
        advance(there)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_step_is_written_once(store: Store) -> None:
    net, update = made(1)
    store.write(net, update, Extra("abc"))
    with pytest.raises(OSError, match="step-00000001"):
        store.write(net, update, Extra("other"))
    assert listed(store) == files_of(1)
    assert store.read(1).experiment == "abc"


def test_a_removed_checkpoint_is_gone(store: Store) -> None:
    net, update = made(1)
    store.write(net, update, Extra("abc"))
    advance(update)
    store.write(net, update, Extra("abc"))
    store.remove(1)
    assert store.steps() == [2]
    assert listed(store) == files_of(2)
    with pytest.raises(FileNotFoundError):
        store.remove(1)
    with pytest.raises(CorruptError, match=r"state\.json is missing"):
        store.read(1)


def test_the_last_and_the_best_are_kept(store: Store) -> None:
    net, update = made(0)
    for step in range(6):
        store.write(net, update, Extra("abc"))
        store.prune(2, Best(1, "loss", 0.0))
        if step < 5:
            advance(update)
    assert store.steps() == [1, 4, 5]
    assert listed(store) == files_of(1) + files_of(4) + files_of(5)


class Crash(BaseException):
    """The power went."""


class Power:
    """Goes off at the ``last``-th operation that changes a disk or a backend; there are no others after it.

    With ``half``, what was to be written then is written to its half.
    """

    OPERATIONS = (
        *((os, name) for name in ("fsync", "rename")),
        (shutil, "rmtree"),
        *((kind, name) for kind in (LocalFileSystem, MemoryFileSystem) for name in ("makedirs", "rm_file", "rmdir")),
    )

    def __init__(self, patch: pytest.MonkeyPatch, last: int, half: bool) -> None:
        self.left = last
        for owner, name in self.OPERATIONS:
            patch.setattr(owner, name, self._until_then(getattr(owner, name)))
        for kind in (LocalFileSystem, MemoryFileSystem):
            patch.setattr(kind, "pipe_file", self._until_then(kind.pipe_file, self._cut if half else None))

    @property
    def went(self) -> bool:
        return self.left < 0

    def _until_then(self, real: Any, at_last: Any = None) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                return real(*arguments, **options)
            if self.left == -1 and at_last is not None:
                at_last(real, *arguments)
            raise Crash

        return operation

    @staticmethod
    def _cut(real: Any, system: Any, path: str, data: bytes) -> None:
        real(system, path, data[: len(data) // 2])


def outages(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None], half: bool = False) -> Iterator[int]:
    """Acts again and again; the power goes one operation later each time, until the act comes to its end."""
    for last in range(100):
        with monkeypatch.context() as patch:
            power = Power(patch, last, half)
            try:
                act(last)
            except Crash:
                assert power.went
        yield last
        if not power.went:
            assert last >= 2
            return
    raise AssertionError("it never ended")


@pytest.mark.parametrize("half", [False, True], ids=["before", "within"])
def test_a_crash_while_writing_leaves_whole_checkpoints_only(
    make: Maker, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    net, update = made(1)
    stores = [make(f"{last}") for last in range(100)]
    for store in stores[:20]:
        store.write(net, update, Extra("abc"))
    advance(update)
    ends = []
    for last in outages(monkeypatch, lambda last: void(stores[last].write(net, update, Extra("abc"))), half):
        store = stores[last]
        ends.append(store.steps())
        assert all(store.read(step).step == step for step in store.steps())
        store.clean()
        assert store.steps() == ends[-1]
        assert listed(store) == [file for step in store.steps() for file in files_of(step)]
        if store.steps() == [1]:
            store.write(net, update, Extra("abc"))
        assert listed(store) == files_of(1) + files_of(2)
        assert store.read(2).step == 2
    assert ends[0] == [1]
    assert ends[-1] == [1, 2]


def void(value: object) -> None:
    """An act has no result."""


def test_a_write_goes_over_what_an_unfinished_one_left(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process id has written it, and nothing was cleaned meanwhile."""
    net, update = made(1)
    another = os.getpid() + 1
    for last in outages(monkeypatch, lambda last: void(make(f"{last}").write(net, update, Extra("abc"))), half=True):
        store = make(f"{last}")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: another)
            if store.steps() == []:
                store.write(net, update, Extra("abc"))
        store.clean()
        assert store.read(1).step == 1
        assert listed(store) == files_of(1)


def test_a_crash_while_removing_leaves_whole_checkpoints_only(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    net, update = made(1)
    stores = [make(f"{last}") for last in range(20)]
    for store in stores:
        store.write(net, update, Extra("abc"))
    advance(update)
    for store in stores:
        store.write(net, update, Extra("abc"))
    ends = []
    for last in outages(monkeypatch, lambda last: stores[last].remove(1)):
        store = stores[last]
        ends.append(store.steps())
        assert all(store.read(step).step == step for step in store.steps())
        store.clean()
        assert listed(store) == [file for step in ends[-1] for file in files_of(step)]
    assert ends[0] == [1, 2]
    assert ends[-1] == [2]


def test_every_file_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_open, real_rename = os.open, os.rename
    names: dict[int, str] = {}

    def opened(path: Any, *arguments: Any) -> int:
        descriptor = real_open(path, *arguments)
        names[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(f"fsync {names[descriptor]}"))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name}"), real_rename(a, b)))
    LocalStore(tmp_path / "checkpoints").write(*made(1), Extra("abc"))
    temporary = f".writing-step-00000001-{os.getpid()}"
    assert events == [
        "fsync meta.safetensors",
        "fsync optimizer.safetensors",
        "fsync state.json",
        f"fsync {temporary}",
        "rename step-00000001",
        "fsync checkpoints",
    ]


def test_nothing_is_pickled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    store.write(*made(1), Extra("abc"))
    assert store.read(1).step == 1


@pytest.mark.parametrize("name", ["meta.safetensors", "optimizer.safetensors", "state.json"])
def test_any_changed_byte_is_found(store: Store, name: str) -> None:
    store.write(*made(1), Extra("abc"))
    data = get(store, 1, name)
    for place in range(0, len(data), max(1, len(data) // 40)):
        put(store, 1, name, data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        with pytest.raises(CorruptError):
            store.read(1)
        assert store.steps() == [1]
    for size in (0, 1, len(data) // 2, len(data) - 1):
        put(store, 1, name, data[:size])
        with pytest.raises(CorruptError):
            store.read(1)
    put(store, 1, name, data)
    assert store.read(1).step == 1


@pytest.mark.parametrize("name", ["meta.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_file_is_named(store: Store, name: str) -> None:
    store.write(*made(1), Extra("abc"))
    system, folder = url_to_fs(store.location(1))
    system.rm_file(f"{folder}/{name}")
    with pytest.raises(CorruptError, match=f"{name} is missing"):
        store.read(1)


def test_a_format_of_the_future_is_refused(store: Store) -> None:
    store.write(*made(1), Extra("abc"))
    put(store, 1, "state.json", get(store, 1, "state.json").replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(InputError, match=r"step-00000001 has format 2"):
        store.read(1)


def test_a_foreign_checkpoint_changes_nothing(store: Store) -> None:
    store.write(*made(1), Extra("abc"))
    found = store.read(1)
    for other, words in (
        (nn.Linear(2, 2), "only the checkpoint has"),
        (_changed(lambda net: setattr(net, "extra", nn.Linear(1, 1))), "only the experiment has extra"),
        (_changed(lambda net: setattr(net, "frozen", nn.Parameter(torch.zeros(3)))), "frozen is torch.float32"),
        (_changed(lambda net: setattr(net, "frozen", nn.Parameter(torch.zeros(2).double()))), "float64"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(InputError, match=words):
            checkpoints.restore(found, other)
        assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def _changed(change: Any) -> nn.Module:
    net = Tied()
    change(net)
    return net
