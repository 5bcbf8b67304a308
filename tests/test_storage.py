"""Where snapshots lie: copies that share what did not change, nameless files that are gone whatever happens."""

from __future__ import annotations

import errno
import gc
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import PROBLEMS, Tree
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta import raw, storage
from memmeta.raw import Piece, RawFile, dense

STEPS = 9


def cubic(params: Tree, meta: Any, batch: Any) -> Tensor:
    if batch is not None and batch():
        raise ArithmeticError("told to")
    return (params["w"] ** 3).sum() / 3


def adapted(steps: int = STEPS, fails: Any = None) -> mm.Adapted:
    """Three numbers after some steps, with their snapshots on disk; a step whose ``fails()`` is true raises."""
    w = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64, requires_grad=True)
    return mm.adapt(cubic, {"w": w}, [fails] * steps, optimizer=mm.SGD(0.1), adjoint=mm.Stepwise("disk"))


def test_host_copies_hold_what_changed_and_share_the_rest() -> None:
    """One buffer changes with each step, one changes once, one never: as many copies of each."""
    net = Drifting().double()
    learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=8, adjoint=mm.Stepwise("host"))
    kept: list[storage.HostStore] = []

    class Watched(storage.HostStore):
        def __init__(self, rollout: Any) -> None:
            super().__init__(rollout)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memmeta.adjoints.stepwise.store_for", lambda policy, rollout: Watched(rollout))
        found = helpers.meta_gradient(learner, PROBLEMS["mlp"].tasks(1))
    learner.adjoint = mm.Unrolled()
    assert helpers.error(found, helpers.meta_gradient(learner, PROBLEMS["mlp"].tasks(1))) < 1e-10
    snapshots = list(kept[0]._kept.values())
    assert len(snapshots) == 6  # s_1 .. s_6: the start is there, the last state is at hand
    distinct: dict[str, set[int]] = {"each": set(), "once": set(), "never": set()}
    for places in snapshots:
        tensors = [place if isinstance(place, Tensor) else place[1].view(place[0]) for place in places]
        for name, tensor in zip(distinct, tensors[-3:], strict=True):
            distinct[name].add(tensor.data_ptr())
    assert {name: len(found) for name, found in distinct.items()} == {"each": 6, "once": 1, "never": 1}


class Drifting(nn.Module):
    """Buffers that change at every forward, at the first one, never."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.each: Tensor
        self.once: Tensor
        self.never: Tensor
        self.register_buffer("each", torch.zeros(5))
        self.register_buffer("once", torch.zeros(5))
        self.register_buffer("never", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.each = self.each + 1
        self.once = self.once.clamp(min=1)
        return torch.tanh(self.layer(x)) * self.never


# Files: nameless, and gone whatever happens.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    monkeypatch.setattr(tempfile, "tempdir", None)


def open_files(folder: Path) -> int:
    """How many files of a folder this process has open, with a name or without."""
    links = [f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by Linux' /proc")


@linux
def test_no_file_outlives_its_inner_loop(folder: Path) -> None:
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        result = adapted()
        assert (open_files(folder), list(folder.iterdir())) == (1, [])
        result.params["w"].sum().backward(retain_graph=True)
        assert open_files(folder) == 1  # it may be pulled back again
        del result
        assert open_files(folder) == 0
        never = adapted()
        assert open_files(folder) == 1
        del never
        assert open_files(folder) == 0
        calls = iter(range(100))
        broken = adapted(fails=lambda: next(calls) == STEPS + 3)
        with pytest.raises(ArithmeticError):
            broken.params["w"].sum().backward()
        del broken
        gc.collect()  # the traceback that pytest holds is a cycle
        assert open_files(folder) == 0
    finally:
        gc.enable()
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(raw, "_write", full)
    wanted = (
        r"Cannot write a snapshot of the inner loop \(24 bytes\) when using Stepwise\(snapshots='disk'\): No space .*"
    )
    with pytest.raises(mm.MemmetaError, match=f"{wanted}{folder}.*TMPDIR.*'sqrt'"):
        adapted()


def test_a_limit_of_the_system_is_the_same_error(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(mm.MemmetaError, match=r"Cannot write a snapshot .*File too large"):
            adapted()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_is_not_there_and_a_file_that_is_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RawFile()
    piece = file.append(torch.ones(4))
    file._file.truncate(8)
    with pytest.raises(mm.MemmetaError, match=r"Cannot read a snapshot .*the file ends too early"):
        file.load(piece)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "gone"))
    with pytest.raises(mm.MemmetaError, match=r"Cannot make a file for snapshots .*No such file"):
        RawFile()


def tensors() -> dict[str, Tensor]:
    return {
        "plain": torch.randn(3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5).bfloat16(),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "complex": torch.randn(2, 2, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "transposed": torch.randn(3, 4).t(),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "with gaps": torch.randn(6, 6)[::2, 1:3],
        "leaf": torch.randn(3, requires_grad=True),
    }


@pytest.mark.parametrize("name", tensors())
def test_bytes_come_back_as_they_were(name: str) -> None:
    """Values to the bit, and the order in memory where there are no gaps."""
    tensor, file = tensors()[name], RawFile()
    file.append(torch.ones(3))  # so that it does not begin at 0
    piece = file.append(tensor)
    file.expect(piece)
    slab, held = torch.zeros(4096, dtype=torch.uint8), Piece.of(dense(tensor), 64)
    held.view(slab).copy_(tensor.detach())
    for found in (file.load(piece), held.view(slab)):
        assert torch.equal(found, tensor.detach())
        assert (found.dtype, found.requires_grad) == (tensor.dtype, False)
        if name not in ("expanded", "with gaps"):
            assert found.stride() == tensor.stride()
