"""A guard against growing memory: counted bytes of key problems against those of a committed file.

    python -m memmeta_bench.guard            # fails where a count has grown by more than 3%
    python -m memmeta_bench.guard --write    # renews the file

Counted bytes (``memmeta.memory.count``) are the same on every run with the same PyTorch. The committed file is one of
the sources, not of what is installed: elsewhere, name another with ``--against``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memmeta.errors import InputError, MemmetaError
from memmeta.memory import in_bytes, peak_of

from . import peers, problems

COMMITTED = Path(__file__).resolve().parents[1] / "results" / "guard.json"
MOST = 1.03


@dataclass(frozen=True)
class Case:
    """A method on a problem of small sizes, and options of the method."""

    problem: str
    method: str
    sizes: Mapping[str, int]
    options: Mapping[str, int] = field(default_factory=dict)

    def name(self) -> str:
        """What the file calls it."""
        words = [f"{name}={value}" for name, value in {**self.sizes, **self.options}.items()]
        return " ".join([self.problem, self.method, *words])


_CONV4, _GPT = {"tasks": 4, "steps": 5}, {"tasks": 1, "steps": 8}
CASES = (
    Case("conv4", "memmeta-unrolled", _CONV4),
    Case("conv4", "memmeta-stepwise", _CONV4),
    Case("conv4", "memmeta-stepwise", {"tasks": 4, "steps": 5}, {"chunk": 2}),
    Case("conv4", "memmeta-stepwise-forward-traced", _CONV4),
    Case("gpt", "memmeta-stepwise", _GPT),
    Case("gpt", "memmeta-stepwise-sqrt", {"tasks": 1, "steps": 16}),
    Case("gpt", "memmeta-stepwise-forward-traced", _GPT),
    Case("sinusoid_mlp", "memmeta-stepwise", {"tasks": 32, "steps": 5}, {"chunk": 32}),
    Case("sinusoid_mlp", "memmeta-stepwise-traced", {"tasks": 32, "steps": 5}, {"chunk": 32}),
    Case("resnet12", "memmeta-stepwise", {"tasks": 1, "steps": 2, "width": 16}),
)


def counted(case: Case) -> int:
    """The counted peak bytes of a meta-gradient from ``.grad`` None, after one that is not counted: the first use of a
    traced program is checked against eager execution, which takes more."""
    work = problems.make(case.problem, **dict[str, Any](case.sizes))
    call = peers.find(case.method).call(work, case.options)
    call()
    work.net.zero_grad(set_to_none=True)
    gc.collect()
    return peak_of(call)


def measured(cases: Sequence[Case] | None = None) -> dict[str, int]:
    """The counted bytes of all cases by name, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {case.name(): counted(case) for case in (CASES if cases is None else cases)}
    finally:
        torch.set_num_threads(threads)


def grown(before: Mapping[str, int], now: Mapping[str, int], most: float = MOST) -> list[str]:
    """A line for each case whose bytes have grown too much, or which only one of the two has."""
    lines = [
        f"{name}: memory has grown: {in_bytes(before[name])} before, {in_bytes(size)} now, {size / before[name]:.3f}x "
        f"(at most {most}x)"
        for name, size in now.items()
        if name in before and size > most * before[name]
    ]
    lines += [f"{name}: not in the file; renew it with --write" for name in now if name not in before]
    return lines + [
        f"{name}: in the file, but no longer measured; renew it with --write" for name in before.keys() - now
    ]


def read(path: Path) -> dict[str, int]:
    """The counts of a file.

    Raises:
        InputError: there is none, or it is not one of counts.
    """
    try:
        content = json.loads(path.read_text())
        return {str(name): int(size) for name, size in content["counted_bytes"].items()}
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): write it with --write") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a file of counted bytes: write it anew with --write") from error


def write(path: Path, counts: Mapping[str, int]) -> None:
    """Replaces the file as a whole.

    Raises:
        InputError: it can't be written.
    """
    content = {"torch": torch.__version__, "counted_bytes": dict(counts)}
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}): name another file with --against") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and compares or writes; returns the exit code: 1 where something has grown, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m memmeta_bench.guard", description="Guards against growing memory.")
    parser.add_argument("--write", action="store_true", help="renew the file")
    parser.add_argument("--against", type=Path, default=COMMITTED, metavar="FILE", help="the file of counted bytes")
    options = parser.parse_args(arguments)
    try:
        before = {} if options.write else read(options.against)
        now = measured()
        if options.write:
            write(options.against, now)
    except MemmetaError as error:
        sys.stderr.write(f"memmeta_bench.guard: error: {error}\n")
        return 2
    for name, size in now.items():
        ratio = f"  {size / before[name]:.3f}x" if name in before else ""
        print(f"{name:60s} {in_bytes(size):>10s}{ratio}")
    lines = [] if options.write else grown(before, now)
    for line in lines:
        sys.stderr.write(f"memmeta_bench.guard: {line}\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
