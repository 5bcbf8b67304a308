"""Files of rows: what was measured, by which command, and what the figures depend on.

``FORMAT`` documents the file; a reader checks that it has what is promised.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from memmeta.errors import InputError

from . import machine

_VERSION = 1
_PACKAGES = ("memmeta", "torch", "numpy", "learn2learn", "higher", "torchopt", "ray")

FORMAT: Mapping[str, Any] = {
    "format": "1, the version of this layout",
    "command": "what was typed, without the names of files",
    "environment": {
        "python": "its version",
        "packages": "name to version, of memmeta, PyTorch, and the peers that are installed",
        "system": "name and release of the operating system",
        "cpu": "the processor's model",
        "cores": "CPU cores that the process may use",
        "memory_bytes": "of the machine, or null",
        "threads": "PyTorch's default",
        "gpu": "the name of the CUDA device, or null",
        "date": "when the file was written, UTC",
    },
    "settings": "the options of the run, by name: cap (bytes, or null), quick, ...",
    "rows": [
        {
            "benchmark": "memory, speed or scaling",
            "axis": "what the curve is drawn against: a name among sizes",
            "problem": "sinusoid_mlp, conv4, resnet12 or gpt",
            "sizes": "name to number: tasks, steps, shots, query, width, depth; chunk and threads where they differ",
            "method": "its name, as in --methods",
            "title": "its name in words",
            "floor": "true where it is a bound and no meta-gradient",
            "status": "ok, cap (it needed more than the cap), unavailable, failed or timeout",
            "reason": "in one line, where the status is not ok",
            "counted_bytes": "peak of live tensors' bytes above those at the start (CPU and CUDA), or null",
            "resident_bytes": "peak of the resident set above that before the work, kernels' code included, or null",
            "allocated_bytes": "CUDA's max_memory_allocated above that before the work, or null",
            "seconds": "of one meta-gradient, the median of several after the first, or null",
            "seconds_min": "the least of them, or null",
            "compile_seconds": "of the first meta-gradient, above the median; of compiled methods, or null",
            "round": "0, 1, ...: rows of the same round were measured in turn",
            "relative_error": "of the gradient against the reference's at the same point (2-norms), or null",
            "compared_in": "float32; float64 (few tasks and steps) where float32 differs by more than a thousandth",
            "threads": "of the CPU",
            "device": "cpu or cuda",
        }
    ],
}
_ROW: Mapping[str, None] = dict.fromkeys(FORMAT["rows"][0])

SCALING: Mapping[str, Any] = {
    "sizes": "workers; shards in the meta-batch and shard_tasks in each; tasks, their product; megabytes (10^6 bytes) "
    "and nbytes of the weights; the machine's cores; the experiment's own options",
    "method": "server or tree: who adds the workers' sums",
    "tasks_per_second": "of the counted outer steps, or null",
    "bytes_in": "to the parameter server in one step, or null",
    "bytes_out": "from it in one step, or null",
    "server_peak_bytes": "resident peak of the server's process, or null",
    "driver_cpu_seconds": "of the process that coordinates, in one step, or null",
    "message_seconds": "what one more shard costs the driver, or null where it was not measured",
    "parts": {
        "publish": "the server writes the weights to the object store",
        "fetch": "the slowest worker takes the weights over",
        "compute": "the busiest worker's seconds on its shards",
        "gather": "until the last shard's answer is there, less the two above",
        "reduce": "until all sums are added, as far as it was not done by then",
        "update": "mean, norm, the optimiser's step, check",
    },
    "held_out": "true where the model of a step is checked on the row, and not fitted to it",
}
"""What rows of ``memmeta bench scaling`` have beside, or otherwise; seconds of a step, medians over outer steps."""


def environment() -> dict[str, Any]:
    """What figures depend on, see ``FORMAT``."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    packages["torch"] = torch.__version__
    return {
        "python": platform.python_version(),
        "packages": packages,
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": machine.processor(),
        "cores": machine.cores(),
        "memory_bytes": machine.memory(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write(path: str | Path, command: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write the file anew; whoever reads it finds the old or the new one, never a part.

    Rows may have more than ``FORMAT`` names; what they lack of it is null.

    Raises:
        InputError: the file can't be written.
    """
    content = {
        "format": _VERSION,
        "command": command,
        "environment": environment(),
        "settings": dict(settings),
        "rows": [_finite(row) for row in rows],
    }
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        try:
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}") from error


def read(path: str | Path) -> dict[str, Any]:
    """The content of a file of rows.

    Raises:
        InputError: there is no such file, or it is none that ``write`` made.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): name a file of memmeta bench --json") from error
    if not isinstance(content, dict) or not content.keys() >= FORMAT.keys():
        raise InputError(f"{path} is no file of rows: name one of memmeta bench --json")
    if content["format"] != _VERSION:
        raise InputError(f"{path} has format {content['format']}, this is version {_VERSION}: measure again")
    for number, row in enumerate(content["rows"]):
        if not isinstance(row, dict) or not row.keys() >= _ROW.keys():
            raise InputError(f"{path}: row {number} has not all of {', '.join(_ROW)}: measure again")
    return content


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null for what is not finite."""
    full = {**_ROW, **row}
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in full.items()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
