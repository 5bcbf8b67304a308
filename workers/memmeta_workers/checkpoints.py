"""Checkpoints on disk: written whole or not at all, checked when read, never pickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memmeta.errors import InputError

from .encoding import decode, encode
from .update import OuterUpdate

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"
_META, _OPTIMIZER, _STATE = "meta.safetensors", "optimizer.safetensors", "state.json"


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
        folder: where it lies.
        step: outer steps made.
        experiment: SHA-256 of the experiment file it belongs to.
        tensors: parameters ("parameter.<name>") and buffers ("buffer.<name>") of the learner.
        update: state of the outer update.
        schedule_start: the fresh schedule's state, to tell another schedule.
        best: the best validation score up to this step.
        pending: the metrics of this step where the run was stopped while it scored the validation tasks after it.
    """

    folder: Path
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


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a ``checkpoints`` folder, in order; unfinished ones are not seen."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return sorted(int(match[1]) for match, entry in found if match and entry.is_dir())


@dataclass(frozen=True)
class Extra:
    """What a checkpoint holds beside weights and outer update; the fields are those of ``Checkpoint``."""

    experiment: str
    schedule_start: Any = None
    best: Best | None = None
    pending: dict[str, Any] | None = None


def write(folder: Path, learner: nn.Module, update: OuterUpdate, extra: Extra) -> Path:
    """Writes the checkpoint of this moment to ``folder/step-<n>``.

    Everything goes to a temporary sibling first, is flushed to the disk, and is then renamed: a crash at any moment
    leaves either no checkpoint of that name, or a whole one. One of the same name must not be there yet.

    Args:
        folder: the ``checkpoints`` folder.
        learner: its parameters (tied ones once) and buffers are saved.
        update: its step, optimiser and schedule are saved.
        extra: the rest.

    Raises:
        InputError: optimiser or schedule hold something that is neither number nor tensor.
        OSError: the disk.
    """
    final = folder / name_of(update.step)
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
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
    folder.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        save_file(_owned(learner_tensors(learner)), temporary / _META)
        save_file(_owned(slots), temporary / _OPTIMIZER)
        state["files"] = {name: _digest(temporary / name) for name in (_META, _OPTIMIZER)}
        state["checksum"] = _checksum(state)
        (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for name in (_META, _OPTIMIZER, _STATE):
            sync(temporary / name)
        sync(temporary)
        os.rename(temporary, final)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    clean(folder)
    return final


def clean(folder: Path) -> None:
    """Removes what writes that never ended have left."""
    for entry in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(entry, ignore_errors=True)


def remove(folder: Path, step: int) -> None:
    """Removes a checkpoint: renamed first, so that a half-removed one is never read."""
    away = folder / f"{_TEMPORARY}gone-{name_of(step)}-{os.getpid()}"
    os.rename(folder / name_of(step), away)
    shutil.rmtree(away, ignore_errors=True)


def prune(folder: Path, keep: int, best: Best | None) -> None:
    """Keeps the last ``keep`` checkpoints and the best one."""
    for step in steps_in(folder)[:-keep]:
        if best is None or step != best.step:
            remove(folder, step)


def read(folder: Path) -> Checkpoint:
    """Reads one checkpoint's folder and checks every byte of it.

    Raises:
        CorruptError: with what is wrong.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise InputError(f"{folder} has format {state['format']}; this memmeta reads format {FORMAT}")
        if state["checksum"] != _checksum(state):
            raise CorruptError(f"{_STATE} was changed")
        for name in (_META, _OPTIMIZER):
            if _digest(folder / name) != state["files"][name]:
                raise CorruptError(f"{name} does not have the bytes that were written")
        slots = load_file(folder / _OPTIMIZER)
        best = state["best"]
        return Checkpoint(
            folder=folder,
            step=state["step"],
            experiment=state["experiment"],
            tensors=load_file(folder / _META),
            update=decode(state["update"], slots),
            schedule_start=state["schedule_start"],
            best=None if best is None else Best(best["step"], best["metric"], best["value"]),
            pending=state["pending"],
        )
    except FileNotFoundError as error:
        raise CorruptError(f"{Path(error.filename).name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptError(f"{_STATE} or a tensor file can't be read ({type(error).__name__})") from error


def restore(checkpoint: Checkpoint, learner: nn.Module) -> None:
    """Copies a checkpoint's weights into the learner; nothing is changed if they do not fit.

    Raises:
        InputError: other names, shapes or dtypes.
    """
    here, there = learner_tensors(learner), checkpoint.tensors
    odd = sorted(set(here) ^ set(there))
    if odd:
        side = "only the checkpoint" if odd[0] in there else "only the experiment"
        raise InputError(f"{checkpoint.folder} is of another network: {side} has {odd[0].partition('.')[2]}")
    for name, tensor in here.items():
        other = there[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise InputError(
                f"{checkpoint.folder} is of another network: {name.partition('.')[2]} is {other.dtype} "
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


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
