"""Places for checkpoints: which address is which store, and what is said of one that can't be used."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from memmeta.errors import InputError
from memmeta_workers.checkpoints import Extra
from memmeta_workers.stores import LocalStore, RemoteStore, Store, absolute, open_store
from memmeta_workers.update import OuterUpdate


@pytest.mark.parametrize(
    ("address", "store"),
    [
        ("runs/a", LocalStore(Path("runs/a"))),
        (Path("/runs/a"), LocalStore(Path("/runs/a"))),
        ("file:///runs/a", RemoteStore("file:///runs/a")),
        ("memory://runs/a/", RemoteStore("memory://runs/a/")),
    ],
)
def test_an_address_says_which_store(address: str | Path, store: Store) -> None:
    assert open_store(address) == store
    assert pickle.loads(pickle.dumps(store)) == store
    assert str(store) == str(address)
    assert store.location(7) == str(address).rstrip("/") + "/step-00000007"


def test_an_address_holds_from_any_folder(here: Path) -> None:
    assert absolute("a/b") == f"{here}/a/b"
    assert absolute("/a/b") == "/a/b"
    assert absolute("file://a/b") == f"file://{here}/a/b"
    assert absolute("file:///a/b/") == "file:///a/b"
    assert absolute("s3://bucket/run/") == "s3://bucket/run/"
    assert absolute("") == ""


@pytest.mark.parametrize("address", ["nope://bucket/run", "simplecache::memory://run"])
def test_an_unknown_protocol_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(InputError, match=r"--checkpoints .* can't be opened .* such as s3://bucket/run") as caught:
        open_store(address)
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("sftp", "paramiko")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, protocol: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(vars(sys.modules["fsspec.registry"])["_registry"], protocol, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.sftp", raising=False)
    with pytest.raises(InputError, match=rf"--checkpoints {protocol}://bucket/run .*pip install {package}$") as caught:
        open_store(f"{protocol}://bucket/run")
    assert "\n" not in str(caught.value)


def a_learner() -> tuple[nn.Module, OuterUpdate]:
    net = nn.Linear(2, 2)
    return net, OuterUpdate(dict(net.named_parameters()), torch.optim.Adam)


class BackendError(Exception):
    """What a backend raises: no OSError."""


def complaint(act: Callable[[], object]) -> str | None:
    """What it says as an OSError."""
    try:
        act()
    except OSError as error:
        return str(error)
    return None


@pytest.mark.parametrize("words", ["no credentials", ""])
@pytest.mark.parametrize("failing", ["ls", "cat_file", "makedirs", "pipe_file", "rm_file", "rmdir"])
def test_what_a_backend_raises_becomes_an_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, words: str
) -> None:
    store = RemoteStore(f"memory://{tmp_path}")
    store.write(*a_learner(), Extra("abc"))

    def fail(*arguments: Any, **options: Any) -> Any:
        raise BackendError(*filter(None, [words]))

    monkeypatch.setattr(MemoryFileSystem, failing, fail)
    other = RemoteStore(f"memory://{tmp_path}-other")
    acts = [store.steps, store.clean, lambda: store.read(0), lambda: store.remove(0)]
    failed = {complaint(act) for act in [*acts, lambda: other.write(*a_learner(), Extra("abc"))]}
    assert failed - {None} == {f"BackendError: {words}" if words else "BackendError"}
    monkeypatch.undo()
    for place in (tmp_path, f"{tmp_path}-other"):
        if MemoryFileSystem().exists(str(place)):
            MemoryFileSystem().rm(str(place), recursive=True)


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    """Patterns in an address are no patterns, and other names are someone else's."""
    store = RemoteStore(f"file://{tmp_path}/[ab]*")
    for name in ("[ab]*/notes", "ab/step-00000000", "[ab]*/step-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "[ab]*" / "step-00000003").mkdir()
    store.write(*a_learner(), Extra("abc"))
    store.clean()
    assert store.steps() == [0]
    store.remove(0)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("file")) == [
        "[ab]*/notes/file",
        "[ab]*/step-1/file",
        "ab/step-00000000/file",
    ]
    assert sorted(entry.name for entry in (tmp_path / "[ab]*").iterdir()) == ["notes", "step-1"]


def test_the_root_of_a_backend_is_a_place_too() -> None:
    store = RemoteStore("memory://")
    store.write(*a_learner(), Extra("abc"))
    assert store.steps() == [0]
    store.remove(0)
    assert store.steps() == []


def test_another_process_is_seen(tmp_path: Path) -> None:
    """Nothing is remembered between two calls."""
    one, two = (RemoteStore(f"file://{tmp_path}") for _ in range(2))
    assert one.steps() == two.steps() == []
    one.write(*a_learner(), Extra("abc"))
    assert two.steps() == [0]
