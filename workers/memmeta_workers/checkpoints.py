"""What a checkpoint is: its three files, how they are made, and how they are checked; never pickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from memmeta.errors import InputError

from .encoding import decode, encode
from .update import OuterUpdate

FORMAT = 1
META, OPTIMIZER, STATE = "meta.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
# How JSON with an indent of one ends, and ends nowhere else.
_END = b"\n}"


class CorruptError(InputError):
    """A checkpoint whose files are missing, cut short or changed."""


@dataclass(frozen=True)
class Best:
    """The best validation score so far: at outer step ``step``, of ``metric``."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read and checked.

    Attributes:
        place: where it lies, a path or an address.
        step: outer steps made.
        experiment: SHA-256 of the experiment file it belongs to.
        tensors: parameters ("parameter.<name>") and buffers ("buffer.<name>") of the learner.
        update: state of the outer update.
        schedule_start: the fresh schedule's state, to tell another schedule.
        best: the best validation score up to this step.
        pending: the metrics of this step where the run was stopped while it scored the validation tasks after it.
    """

    place: str
    step: int
    experiment: str
    tensors: dict[str, Tensor]
    update: dict[str, Any]
    schedule_start: Any
    best: Best | None
    pending: dict[str, Any] | None


def name_of(step: int) -> str:
    """``step-00000100``."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; ``None`` for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


@dataclass(frozen=True)
class Extra:
    """What a checkpoint holds beside weights and outer update; the fields are those of ``Checkpoint``."""

    experiment: str
    schedule_start: Any = None
    best: Best | None = None
    pending: dict[str, Any] | None = None


def parts(learner: nn.Module, update: OuterUpdate, extra: Extra) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A checkpoint of this moment: the tensors of its two tensor files, by file name, and what ``seal`` takes.

    Args:
        learner: its parameters (tied ones once) and buffers are saved.
        update: its step, optimiser and schedule are saved.
        extra: the rest.

    Raises:
        InputError: optimiser or schedule hold something that is neither number nor tensor.
    """
    slots: dict[str, Tensor] = {}
    state = {
        "format": FORMAT,
        "step": update.step,
        "experiment": extra.experiment,
        "update": encode(update.state_dict(), slots, "the state of the outer optimiser or its schedule"),
        "schedule_start": extra.schedule_start,
        "best": None if extra.best is None else dataclasses.asdict(extra.best),
        "pending": extra.pending,
    }
    return {META: _owned(learner_tensors(learner)), OPTIMIZER: _owned(slots)}, state


def seal(state: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    """``state.json``: the state, the SHA-256 of the tensor files by name, and its own checksum."""
    sealed = {**state, "files": dict(digests)}
    sealed["checksum"] = _checksum(sealed)
    return json.dumps(sealed, indent=1).encode()


def is_whole(data: bytes) -> bool:
    """Whether a ``state.json`` was written to its end; whether it was changed since, ``unseal`` finds."""
    return data.endswith(_END)


def unseal(place: str, get: Callable[[str], bytes | Path]) -> Checkpoint:
    """Checks every byte of a checkpoint, and reads it.

    Args:
        place: where it lies, for messages.
        get: the file of a name, as its bytes, or as a path where it need not be held in memory.

    Raises:
        CorruptError: with what is wrong.
        InputError: of another format.
        OSError: from ``get``, or from a path; a missing file is a ``CorruptError``.
    """
    try:
        source = get(STATE)
        text = source if isinstance(source, bytes) else source.read_bytes()
        state = json.loads(text.decode("utf-8"))
        if state["format"] != FORMAT:
            raise InputError(f"{place} has format {state['format']}; this memmeta reads format {FORMAT}")
        if state["checksum"] != _checksum(state):
            raise CorruptError(f"{STATE} was changed")
        tensors = {name: _checked(name, get(name), state["files"][name]) for name in (META, OPTIMIZER)}
        best = state["best"]
        return Checkpoint(
            place=place,
            step=state["step"],
            experiment=state["experiment"],
            tensors=tensors[META],
            update=decode(state["update"], tensors[OPTIMIZER]),
            schedule_start=state["schedule_start"],
            best=None if best is None else Best(best["step"], best["metric"], best["value"]),
            pending=state["pending"],
        )
    except FileNotFoundError as error:
        raise CorruptError(f"{Path(error.filename).name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptError(f"{STATE} or a tensor file can't be read ({type(error).__name__})") from error


def _checked(name: str, source: bytes | Path, wanted: str) -> dict[str, Tensor]:
    if digest(source) != wanted:
        raise CorruptError(f"{name} does not have the bytes that were written")
    return load(source) if isinstance(source, bytes) else load_file(source)


def restore(checkpoint: Checkpoint, learner: nn.Module) -> None:
    """Copies a checkpoint's weights into the learner; nothing is changed if they do not fit.

    Raises:
        InputError: other names, shapes or dtypes.
    """
    here, there = learner_tensors(learner), checkpoint.tensors
    odd = sorted(set(here) ^ set(there))
    if odd:
        side = "only the checkpoint" if odd[0] in there else "only the experiment"
        raise InputError(f"{checkpoint.place} is of another network: {side} has {odd[0].partition('.')[2]}")
    for name, tensor in here.items():
        other = there[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise InputError(
                f"{checkpoint.place} is of another network: {name.partition('.')[2]} is {other.dtype} "
                f"{list(other.shape)} there and {tensor.dtype} {list(tensor.shape)} in the experiment"
            )
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(there[name])


def learner_tensors(learner: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    found = {f"parameter.{name}": parameter.detach() for name, parameter in learner.named_parameters()}
    return found | {f"buffer.{name}": buffer for name, buffer in learner.named_buffers()}


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies with memory of their own: safetensors refuses shared memory."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def digest(source: bytes | Path) -> str:
    """SHA-256 of bytes, or of a file."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    found = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _checksum(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's or a folder's own entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
