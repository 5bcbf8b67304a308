"""What a job of ``memmeta fetch`` does on the cluster: packs a run where the dashboard can hand it out.

``python -m memmeta_workers.delivery``: the run's folder is named in the job's metadata. The archive lies among the
node's logs until the job is stopped. It can be read by its owner, and by who has the cluster's token.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from memmeta.errors import InputError

from . import cli
from .archives import pack_tar
from .checkpoints import name_of
from .failures import JobFailed
from .order import Order
from .runs import RunFolder
from .stores import LocalStore
from .train import find, store_of

PARCEL = "memmeta-parcel: "
_WAIT_SECONDS = 900.0


@dataclass(frozen=True)
class Parcel:
    """An archive that waits to be fetched.

    Attributes:
        node: the id of the node where it lies.
        name: among that node's logs.
        bytes: its size.
        sha256: of its bytes.
        left: what of the run is elsewhere, in words; "" if nothing.
    """

    node: str
    name: str
    bytes: int
    sha256: str
    left: str = ""

    @classmethod
    def of(cls, text: str) -> Parcel:
        """A parcel as the cluster announces it, as JSON.

        Raises:
            JobFailed: it is no such thing.
        """
        kinds = {"node": str, "name": str, "bytes": int, "sha256": str, "left": str}
        try:
            told: Any = json.loads(text)
        except (ValueError, RecursionError):
            told = None
        right = isinstance(told, dict) and {name: type(value) for name, value in told.items()} == kinds
        if not right or told["bytes"] < 0:
            raise JobFailed("what the cluster says of the packed run can't be understood: it may have another memmeta")
        return cls(**told)


def contents(folder: RunFolder, checkpoint: str) -> tuple[list[str], str]:
    """What of a run is fetched, relative to its folder; and what is elsewhere, in words.

    Args:
        folder: the run's.
        checkpoint: "best", "last", "all" or "none". A run without validation tasks has no best one: its last, then.

    Raises:
        InputError: no run is there.
    """
    config = folder.config()
    there = [folder.config_file, folder.metrics_file, folder.summary_file, folder.picture_file]
    names = [path.name for path in there if path.is_file()]
    store = store_of(folder, config)
    steps = store.steps()
    if checkpoint == "none" or not steps:
        return names, ""
    if not isinstance(store, LocalStore) or config.checkpoints is not None:
        return names, f"its checkpoints are at {store}"
    if checkpoint != "all":
        best = find(folder, "last", "memmeta fetch --checkpoint").best
        steps = [best.step] if checkpoint == "best" and best is not None else steps[-1:]
    return [*names, *(f"{folder.checkpoints.name}/{name_of(step)}" for step in steps)], ""


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def deliver(argv: Sequence[str]) -> int:
    """Packs, tells, and waits to be stopped.

    Raises:
        InputError: there is no run.
    """
    order, (checkpoint,) = Order.here(), argv
    folder = RunFolder(order.folder())
    if not folder.config_file.is_file():
        raise InputError(f"there is no run at {folder.path} on the cluster: was its folder moved, or never begun?")
    with _parcel(folder, checkpoint) as parcel:
        print(PARCEL + json.dumps(asdict(parcel)), flush=True)
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
    return 0


@contextlib.contextmanager
def _parcel(folder: RunFolder, checkpoint: str) -> Iterator[Parcel]:
    ray: Any = importlib.import_module("ray")
    context = ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, _end)
    name = f"memmeta-{secrets.token_hex(8)}.tar"
    archive = Path(context.address_info["session_dir"], "logs", name)
    try:
        names, left = contents(folder, checkpoint)
        pack_tar(folder.path, names, archive)
        size, node = archive.stat().st_size, ray.get_runtime_context().get_node_id()
        yield Parcel(node, name, size, digest_of(archive), left)
    finally:
        archive.unlink(missing_ok=True)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    cli.working_directory_last()
    sys.exit(cli.guarded(deliver, sys.argv[1:]))
