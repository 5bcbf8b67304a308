"""Peak memory: counted bytes of live tensors (CPU, deterministic), or the allocator's own peak (CUDA)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter:
    """What was measured: ``live`` and ``peak`` bytes above those at the start."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0


class _Counter(TorchDispatchMode):
    """Counts the storage of every tensor that an operator returns, until the storage dies."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs)):
            self._meet(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        for tensor in self._tensors(out):
            self._meet(tensor, new=True)
        return out

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def _meet(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        if storage.device.type == "meta":  # a tracing's: there is no memory behind it
            return
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes() if new else 0  # an argument never seen before was there at the start
        self.known.add(key)
        self.meter.live += size
        self.meter.peak = max(self.meter.peak, self.meter.live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.meter.live -= size


@contextlib.contextmanager
def count() -> Iterator[Meter]:
    """Count the bytes of live tensors (on every device) that are made inside, above those alive at the start.

    Deterministic: it counts what operators return, not what an allocator does with it; scratch space inside one
    operator is not seen. Cost: some microseconds per operator.
    """
    meter = Meter()
    with _Counter(meter):
        yield meter


def peak_of(function: Callable[[], Any]) -> int:
    """The counted peak of one call, in bytes; its result is dropped."""
    with count() as meter:
        function()
    return meter.peak


@contextlib.contextmanager
def peak(device: torch.device, counted: bool = False) -> Iterator[Callable[[], int | None]]:
    """The peak bytes of a block above those at its start: the allocator's on CUDA, counted ones if asked, else None.

    On CUDA it resets ``torch.cuda.max_memory_allocated``.
    """
    if counted:
        with count() as meter:
            yield lambda: meter.peak
    elif device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - start
    else:
        yield lambda: None


def resident_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    import resource
    import sys

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def in_bytes(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
