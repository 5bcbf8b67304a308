"""Where snapshots of the inner loop's states lie: on their own device, in host memory, or on disk."""

from __future__ import annotations

import abc
import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import trees
from .raw import Piece, RawFile, dense
from .rollout import Rollout, State
from .schedules import Policy

Kept = TypeVar("Kept")
Place = TypeVar("Place")


def store_for(policy: Policy, rollout: Rollout) -> Store[Any]:
    """An empty store of the kind that a policy names."""
    kinds: dict[Policy, Callable[[Rollout], Store[Any]]] = {"host": HostStore, "disk": DiskStore}
    return kinds.get(policy, DeviceStore)(rollout)


class _Form(NamedTuple):
    """The names in a state."""

    params: list[str]
    slots: dict[str, list[str]]
    buffers: list[str]

    @classmethod
    def of(cls, state: State) -> _Form:
        return cls(list(state.params), {name: list(group) for name, group in state.slots.items()}, list(state.buffers))

    def filled(self, tensors: Iterable[Tensor]) -> State:
        """The state of these names and tensors, which come in the order of ``trees.tensors``."""
        values = iter(tensors)
        params = {name: next(values) for name in self.params}
        slots = {name: {slot: next(values) for slot in group} for name, group in self.slots.items()}
        return State(params, slots, {name: next(values) for name in self.buffers})


class Store(abc.ABC, Generic[Kept]):
    """Snapshots by step. Nobody changes a state that was put in; s_0 is there without being put."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._kept: dict[int, Kept] = {}

    def __contains__(self, t: int) -> bool:
        return t == 0 or t in self._kept

    def put(self, t: int, state: State) -> None:
        """Keep s_t, unless it is there."""
        if t not in self:
            self._kept[t] = self._write(state)

    def get(self, t: int) -> State:
        """The state s_t on its device, without a graph. The start is made anew: its fresh slots are not kept either."""
        return self._read(t) if t > 0 else self._rollout.start()

    def drop(self, t: int) -> None:
        """Forget s_t."""
        self._kept.pop(t, None)

    def drop_after(self, t: int) -> None:
        """Forget the states of all later steps."""
        for step in [step for step in self._kept if step > t]:
            self.drop(step)

    @abc.abstractmethod
    def _write(self, state: State) -> Kept:
        """What is kept of a state."""

    @abc.abstractmethod
    def _read(self, t: int) -> State:
        """The state of a step that is kept."""


class DeviceStore(Store[State]):
    """The states themselves, where they are; what did not change from one to the next they share."""

    def _write(self, state: State) -> State:
        return state

    def _read(self, t: int) -> State:
        return self._kept[t]


class CopyStore(Store["list[Place | Tensor]"], Generic[Place]):
    """What stores have in common that copy tensors elsewhere: what did not change is not copied again.

    A tensor of the rollout's own that is still in the state (a buffer that no step changes) stays where it is; one that
    is the same as in the snapshot before is in its place there.
    """

    def __init__(self, rollout: Rollout) -> None:
        super().__init__(rollout)
        own = [*rollout.leaves.params.values(), *rollout.buffers.values()]
        self._own = {id(tensor): tensor for tensor in own}
        self._last: list[tuple[weakref.ref[Tensor], Place | Tensor]] = []
        self._form: _Form | None = None

    def _write(self, state: State) -> list[Place | Tensor]:
        self._form = self._form or _Form.of(state)
        tensors = trees.tensors(state)
        known = [self._known(index, tensor) for index, tensor in enumerate(tensors)]
        new = iter(self._copy([tensor for tensor, place in zip(tensors, known, strict=True) if place is None]))
        places = [next(new) if place is None else place for place in known]
        self._last = [(weakref.ref(tensor), place) for tensor, place in zip(tensors, places, strict=True)]
        return places

    def _known(self, index: int, tensor: Tensor) -> Place | Tensor | None:
        if id(tensor) in self._own:
            return tensor
        before, place = self._last[index] if self._last else (None, None)
        return place if before is not None and before() is tensor else None

    def _read(self, t: int) -> State:
        assert self._form is not None
        places = self._kept[t]
        loaded = iter(self._load(t, self._away(t)))
        if t - 1 in self._kept:
            self._expect(t - 1, self._away(t - 1))
        return self._form.filled(place if isinstance(place, Tensor) else next(loaded) for place in places)

    def _away(self, t: int) -> list[Place]:
        return [place for place in self._kept[t] if not isinstance(place, Tensor)]

    @abc.abstractmethod
    def _copy(self, tensors: list[Tensor]) -> list[Place]:
        """Copy tensors away; where each of them is then."""

    @abc.abstractmethod
    def _load(self, t: int, places: list[Place]) -> list[Tensor]:
        """The tensors of s_t that are in these places."""

    @abc.abstractmethod
    def _expect(self, t: int, places: list[Place]) -> None:
        """Told that s_t is wanted next."""


class HostStore(CopyStore[tuple[Tensor, Piece]]):
    """Copies in host memory, one slab of bytes for each state; on CUDA pinned, and copied beside the computation.

    A state leaves while the next step runs, and comes back while the step after it is walked back: at most two of them
    are on the device besides the one at hand. The two streams wait for each other, so that memory is free in the order
    of the computation; ``record_stream`` would free it when the CPU has seen the copy done, and a CPU that runs ahead
    of the device would have many states there. Slabs come from torch's pool of pinned memory: allocated in the first
    inner loop, used again in the next.
    """

    def __init__(self, rollout: Rollout) -> None:
        super().__init__(rollout)
        self._device = next(iter(rollout.leaves.params.values())).device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._leaving: list[Tensor] = []
        self._coming: dict[int, list[Tensor]] = {}
        if self._stream is not None:
            weakref.finalize(self, _settle, self._stream, self._coming).atexit = False

    def _copy(self, tensors: list[Tensor]) -> list[tuple[Tensor, Piece]]:
        tensors, pieces, end = [dense(tensor) for tensor in tensors], [], 0
        for tensor in tensors:
            pieces.append(Piece.of(tensor, end))
            end = pieces[-1].after
        slab = torch.empty(end, dtype=torch.uint8, pin_memory=self._stream is not None)
        self._wait()
        with self._beside():
            for tensor, piece in zip(tensors, pieces, strict=True):
                piece.view(slab).copy_(tensor, non_blocking=True)
        self._leaving = tensors if self._stream is not None else []
        return [(slab, piece) for piece in pieces]

    def _load(self, t: int, places: list[tuple[Tensor, Piece]]) -> list[Tensor]:
        self._expect(t, places)
        self._wait()
        return self._coming.pop(t)

    def _expect(self, t: int, places: list[tuple[Tensor, Piece]]) -> None:
        if t in self._coming:
            return
        views = [piece.view(slab) for slab, piece in places]
        # In the computation's memory, so that it is freed in its order.
        into = [v if p.device.type == "cpu" else p.empty() for v, (_, p) in zip(views, places, strict=True)]
        with self._beside():
            for tensor, view in zip(into, views, strict=True):
                if tensor is not view:
                    tensor.copy_(view, non_blocking=True)
        self._coming[t] = into

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of copies, after all that is computed so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _wait(self) -> None:
        """Compute on only after all copies so far; what they have read may then go."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._leaving = []


def _settle(stream: torch.cuda.Stream, coming: dict[int, list[Tensor]]) -> None:
    """Before memory that is still copied to is given to others."""
    if coming:
        stream.synchronize()


class DiskStore(CopyStore[Piece]):
    """Copies in a ``RawFile``: nothing but the state at hand is in memory."""

    def __init__(self, rollout: Rollout) -> None:
        super().__init__(rollout)
        self._file = RawFile()

    def _copy(self, tensors: list[Tensor]) -> list[Piece]:
        return [self._file.append(tensor) for tensor in tensors]

    def _load(self, t: int, places: list[Piece]) -> list[Tensor]:
        return [self._file.load(place) for place in places]

    def _expect(self, t: int, places: list[Piece]) -> None:
        for place in places:
            self._file.expect(place)
