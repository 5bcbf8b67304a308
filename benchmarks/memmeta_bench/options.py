"""The options of ``memmeta bench``, checked before anything is measured."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memmeta.costs import parse_bytes
from memmeta.errors import InputError

from . import record

KINDS = ("memory", "speed", "scaling")
CAP = "4GiB"


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        kind: "memory", "speed" or "scaling".
        quick: smaller sweeps, under three minutes on two cores.
        json: the file of rows, written after each of them.
        plot: the picture, as PNG and SVG.
        cap: bytes at which a method is stopped, such as "4GiB".
        problems: names with commas; the benchmark's own if None.
        methods: names with commas; the benchmark's own if None.
        threads: numbers with commas; the benchmark's own if None.
        device: "auto", "cpu" or "cuda".
        workers: scaling: numbers of workers with commas; powers of two up to the cores if None.
        bandwidth: scaling, extrapolated: bytes per second of a node's link, such as "1.25GB".
        stragglers: scaling, extrapolated: sigma of the lognormal factor on a worker's time.
        failures: scaling, extrapolated: of a worker, per hour.

    Raises:
        InputError: one of them can't be; nothing was measured.
    """

    kind: str
    quick: bool = False
    json: str | None = None
    plot: str | None = None
    cap: str = CAP
    problems: str | None = None
    methods: str | None = None
    threads: str | None = None
    device: str = "auto"
    workers: str | None = None
    bandwidth: str | None = None
    stragglers: float | None = None
    failures: float | None = None

    def __post_init__(self) -> None:
        _known("bench", [self.kind], KINDS)
        for option, value in (("--json", self.json), ("--plot", self.plot)):
            if value == "":
                raise InputError(f"{option} is empty: name a file")
        self.bytes()
        self.counts("threads")
        self.counts("workers")
        self.cluster()
        _target("--json", self.json)
        if self.plot is not None:
            from . import plots

            for path in plots.pictures(self.plot):
                _target("--plot", path)
        if self.json is not None and Path(self.json).exists():
            record.read(self.json)  # what is replaced must be such a file

    def bytes(self) -> int:
        """The cap in bytes."""
        return _bytes("--cap", self.cap)

    def counts(self, option: str) -> tuple[int, ...] | None:
        """The numbers of ``--threads`` or ``--workers``."""
        given: str | None = getattr(self, option)
        if given is None:
            return None
        words, most = _names(given), 16 * (os.cpu_count() or 1)
        if not words or not all(word.isdigit() and 1 <= int(word) <= most for word in words):
            raise InputError(f"--{option} {given}: write numbers from 1 to {most} with commas, such as 1,2")
        return tuple(int(word) for word in words)

    def cluster(self) -> dict[str, float]:
        """What is extrapolated to, where it was given: entries of ``step_terms.Cluster``."""
        found: dict[str, float] = {}
        for option, name in (("stragglers", "sigma"), ("failures", "failures")):
            value: float | None = getattr(self, option)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"--{option} {value}: write a number of at least 0")
            found |= {} if value is None else {name: value}
        return found | ({} if self.bandwidth is None else {"bandwidth": _bytes("--bandwidth", self.bandwidth)})

    def settings(self) -> dict[str, Any]:
        """What the file of rows says of them, for tables and pictures."""
        found = {"cap": self.bytes(), "quick": self.quick}
        return {**found, **({"cluster": self.cluster()} if self.cluster() else {})}

    def chosen(self, option: str, known: Sequence[str]) -> tuple[str, ...] | None:
        """The names given for ``--problems`` or ``--methods``, None if there are none."""
        given: str | None = getattr(self, option)
        if given is None:
            return None
        names = _names(given)
        if not names:
            raise InputError(f"--{option} is empty: write one of {', '.join(known)}")
        _known(f"--{option}", names, known)
        return names

    def place(self) -> str:
        """ "cpu" or "cuda"."""
        import torch

        _known("--device", [self.device], ("auto", "cpu", "cuda"))
        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise InputError("--device cuda: PyTorch finds no CUDA device here; write --device cpu")
        return "cuda" if there and self.device != "cpu" else "cpu"

    def command(self) -> str:
        """The command that gives these rows, without the files that it writes."""
        words = ["memmeta", "bench", self.kind, *(["--quick"] if self.quick else [])]
        if self.cap != CAP:
            words += ["--cap", self.cap]
        for option in ("problems", "methods", "threads", "workers", "bandwidth", "stragglers", "failures"):
            value = getattr(self, option)
            words += [] if value is None else [f"--{option}", str(value)]
        return shlex.join([*words, *(["--device", self.device] if self.device != "auto" else [])])


def _bytes(option: str, value: str) -> int:
    try:
        return parse_bytes(value)
    except InputError as error:
        raise InputError(f"{option} {value}: write a number of bytes such as 4GiB, 512MiB or 2e9") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"write one of {', '.join(known)}"
            raise InputError(f"{option} {name}: {hint}")


def _target(option: str, place: str | Path | None) -> None:
    """Refuses a file that can't be written before hours of measuring."""
    if place is None:
        return
    folder = Path(place).absolute().parent
    if Path(place).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if Path(place).is_dir() else f"there is no folder {folder} that can be written to"
        raise InputError(f"{option} {place}: {why}; name another file")
