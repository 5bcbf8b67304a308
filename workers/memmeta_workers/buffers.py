"""Flat buffers between processes: parameters that lie in one, sums that are added in few, arrays without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .shards import TreeSum
from .update import Layout


def from_array(array: np.ndarray) -> Tensor:
    """A flat array of bytes as a tensor on the same memory, which is only to be read. Cost: none."""
    with warnings.catch_warnings():
        # Received memory is shared and read-only; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class Landing:
    """Where published weights arrive. The parameters come to lie in one buffer, so that arriving is one copy.

    On CUDA the copy goes through pinned memory.

    Args:
        parameters: by name, all on one device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters, self._layout = dict(parameters), Layout.of(parameters)
        self._device = next(iter(parameters.values())).device
        self._flat = self._layout.adopt(self._parameters)
        self._pinned: Tensor | None = None
        if self._device.type == "cuda":
            self._pinned = torch.empty(self._layout.nbytes, dtype=torch.uint8, pin_memory=True)

    def land(self, weights: np.ndarray) -> None:
        """Copies published weights into the parameters: received memory may be shared, and is never kept."""
        if self._pinned is not None:
            np.copyto(self._pinned.numpy(), weights)
            arrived = self._pinned.to(self._device, non_blocking=True)
        else:
            arrived = from_array(weights)
        if self._flat is None:
            self._layout.write_to(self._parameters, arrived)
        else:
            self._flat.copy_(arrived)


class HostCopy:
    """Gradient sums as arrays of bytes in host memory; through pinned memory from CUDA. Each call ends the last's."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None

    def array(self, sums: Tensor) -> np.ndarray:
        """The bytes of ``sums``: without a copy on the CPU."""
        if sums.device.type == "cpu":
            return sums.numpy()
        if self._pinned is None:
            self._pinned = torch.empty(sums.shape, dtype=torch.uint8, pin_memory=True)
        return self._pinned.copy_(sums).numpy()


@dataclass(frozen=True)
class _Partial:
    """A value in the tree: received memory, or a buffer of our own that may be overwritten."""

    buffer: Tensor
    own: bool


class Sums:
    """The tree sum of received arrays, in as few buffers as it takes; they are used again for the next meta-batch.

    Args:
        layout: of the sums.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._free: list[Tensor] = []
        self._tree: TreeSum[_Partial] | None = None

    def begin(self, shards: int) -> None:
        """A new sum over so many shards; what was there is dropped."""
        self._tree = TreeSum(shards, self._add)

    def put(self, index: int, array: np.ndarray) -> None:
        """Hands in the sum of a shard. Cost: none, or one addition or more."""
        assert self._tree is not None
        self._tree.put(index, _Partial(from_array(array), own=False))

    def total(self) -> tuple[Tensor, Tensor]:
        """The sum, only to be read, and a buffer that the caller may write to until ``recycle``: perhaps the same.

        Raises:
            MemmetaError: shards are missing.
        """
        assert self._tree is not None
        total = self._tree.total()
        return total.buffer, total.buffer if total.own else self._take()

    def recycle(self, buffer: Tensor) -> None:
        """Gives the buffer from ``total`` back."""
        self._tree = None
        self._free.append(buffer)

    def _add(self, left: _Partial, right: _Partial) -> _Partial:
        into = left if left.own else right
        if not into.own:
            into = _Partial(self._take(), own=True)
        self.layout.add(left.buffer, right.buffer, into=into.buffer)
        if left.own and right.own:
            self._free.append(right.buffer)
        return into

    def _take(self) -> Tensor:
        return self._free.pop() if self._free else torch.zeros(self.layout.nbytes, dtype=torch.uint8)
