"""Checkpoints are written whole or not at all, and are checked when read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memmeta.errors import InputError
from memmeta_workers import checkpoints
from memmeta_workers.checkpoints import Best, CorruptError, Extra
from memmeta_workers.update import OuterUpdate


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


def test_a_checkpoint_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    net, update = made(3)
    net.norm(torch.randn(8, 4))
    path = checkpoints.write(tmp_path, net, update, Extra("abc", best=Best(2, "loss", 0.1), pending={"step": 3}))
    assert path == tmp_path / "step-00000003"
    assert {entry.name for entry in path.iterdir()} == {"meta.safetensors", "optimizer.safetensors", "state.json"}
    found = checkpoints.read(path)
    assert (found.step, found.experiment, found.best, found.pending) == (3, "abc", Best(2, "loss", 0.1), {"step": 3})
    other, resumed = made(0)
    checkpoints.restore(found, other)
    resumed.load_state_dict(found.update)
    assert other.a.weight is other.b.weight
    for here, there in ((net, update), (other, resumed)):
        advance(there)
        assert here is not None
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


class Crash(BaseException):
    """The power went."""


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", range(5))
def test_a_crash_while_writing_leaves_the_old_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    net, update = made(1)
    first = checkpoints.write(tmp_path, net, update, Extra("abc"))
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    advance(update)
    calls: Iterator[int] = iter(range(100))
    real = getattr(os, call)

    def crash(*arguments: Any) -> Any:
        if next(calls) == number:
            raise Crash
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        # What a dead process can't do any more.
        patch.setattr(checkpoints.shutil, "rmtree", lambda *arguments, **options: None)
        died = True
        try:
            checkpoints.write(tmp_path, net, update, Extra("abc"))
            died = False
        except Crash:
            pass
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    steps = checkpoints.steps_in(tmp_path)
    # The last fsync (of the parent folder) comes after the rename: the checkpoint is whole by then.
    assert steps == ([1] if died and not (call == "fsync" and number == 4) else [1, 2])
    assert all(checkpoints.read(tmp_path / checkpoints.name_of(step)).step == step for step in steps)
    checkpoints.clean(tmp_path)
    if steps == [1]:
        checkpoints.write(tmp_path, net, update, Extra("abc"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


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
    checkpoints.write(tmp_path / "checkpoints", *made(1), Extra("abc"))
    temporary = f".writing-step-00000001-{os.getpid()}"
    assert events == [
        "fsync meta.safetensors",
        "fsync optimizer.safetensors",
        "fsync state.json",
        f"fsync {temporary}",
        "rename step-00000001",
        "fsync checkpoints",
    ]


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    path = checkpoints.write(tmp_path, *made(1), Extra("abc"))
    assert checkpoints.read(path).step == 1


@pytest.mark.parametrize("name", ["meta.safetensors", "optimizer.safetensors", "state.json"])
def test_any_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    path = checkpoints.write(tmp_path, *made(1), Extra("abc")) / name
    data = path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        with pytest.raises(CorruptError):
            checkpoints.read(path.parent)
    path.write_bytes(data)
    assert checkpoints.read(path.parent).step == 1


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, *made(1), Extra("abc")) / "state.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="format 2"):
        checkpoints.read(path.parent)


def test_a_foreign_checkpoint_changes_nothing(tmp_path: Path) -> None:
    found = checkpoints.read(checkpoints.write(tmp_path, *made(1), Extra("abc")))
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


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    net, update = made(0)
    for step in range(6):
        checkpoints.write(tmp_path, net, update, Extra("abc"))
        checkpoints.prune(tmp_path, 2, Best(1, "loss", 0.0))
        if step < 5:
            advance(update)
    assert checkpoints.steps_in(tmp_path) == [1, 4, 5]
    assert len(list(tmp_path.iterdir())) == 3
