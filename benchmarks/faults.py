"""A run whose processes are killed and frozen at random, against one that nothing happens to: the same bits?

    .venv/bin/python benchmarks/faults.py --json benchmarks/results/faults.json

``memmeta train`` runs the experiment of tests/sabotage.py with ``--workers`` in a child process. So many times, at
random moments (``--seed``), one of these is done from outside: SIGKILL to a worker, to several at once, or to the
parameter server; SIGSTOP to a worker, which ``--deadline`` then ends. A strike waits until the run has written another
outer step with all its workers, so that none is spent on processes that are still starting (three workers in a row
that end while starting stop a run, rightly). Should the run end before all strikes are done, it is resumed with more
steps.

Then the same command runs without ``--workers``, undisturbed, and the last checkpoints (SHA-256 of meta.safetensors
and optimizer.safetensors) and metrics.jsonl (without times, memory and what the service says of itself) are compared.
The exit code is 1 on any difference, if a run fails, or if a process is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak import actors, descendants

from memmeta_bench.record import environment
from memmeta_workers.checkpoints import META, OPTIMIZER
from memmeta_workers.runs import VOLATILE

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from sabotage import EXPERIMENT, kill

KINDS = {"worker": 4, "several workers": 2, "parameter server": 3, "freeze": 2}  # with their weights
PAUSE = 0.1


@dataclass
class Strikes:
    """What is done to a run, and when.

    Args:
        count: how many strikes.
        seed: of their moments, kinds and victims.
        workers: of the run.
    """

    count: int
    seed: int
    workers: int
    done: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._began = time.monotonic()
        self._next = 0.0
        self._step = -1

    @property
    def left(self) -> int:
        """Strikes to be done."""
        return self.count - len(self.done)

    def consider(self, run: int, folder: Path) -> None:
        """Strikes if it is time, and the run (its process, its folder) has gone on since the last strike."""
        line = _last_line(folder / "metrics.jsonl")
        if not self.left or line is None or line["step"] <= self._step or line["service"]["workers"] < self.workers:
            return
        if not self._next:
            self._next = time.monotonic() + self._random.uniform(0.0, 3.0)
        if time.monotonic() >= self._next and self._strike(run, line["step"]):
            self._step, self._next = line["step"] + 1, 0.0

    def _strike(self, run: int, step: int) -> bool:
        kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
        found = actors(run, "ParameterServer" if kind == "parameter server" else "TaskWorker")
        if kind == "several workers" and len(found) < 2:
            kind = "worker"
        count = self._random.randint(2, len(found)) if kind == "several workers" else 1
        if len(found) < count:
            return False
        victims = self._random.sample(found, count)
        if kind == "freeze":
            with contextlib.suppress(ProcessLookupError):
                os.kill(victims[0], signal.SIGSTOP)
        else:
            victims = [process for process in victims if kill(process)]
        self.done.append({"kind": kind, "victims": len(victims), "after_step": step, "seconds": self._seconds()})
        what = f"{kind}, {len(victims)} of them" if kind == "several workers" else kind
        print(f"  {self._seconds():6.1f} s, after outer step {step}: {what}", flush=True)
        return True

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 1)


def _last_line(path: Path) -> dict[str, Any] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return None
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else None


def disturbed(base: list[str], folder: Path, steps: int, more: int, strikes: Strikes) -> tuple[int, list[int], str]:
    """Trains and strikes.

    Returns:
        the outer steps that it took, the processes that were left behind, and why it failed (or nothing).
    """
    seen: dict[int, str] = {}
    resume: list[str] = []
    while True:
        command = [*base, "--run-dir", str(folder), "--steps", str(steps), *resume]
        log = folder.with_suffix(".log")
        with log.open("a") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                while child.poll() is None:
                    strikes.consider(child.pid, folder)
                    seen.update((one, title) for one, title in descendants(child.pid).items() if _is_ray(title))
                    time.sleep(0.05)
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait(60)
        if child.returncode:
            return steps, _left(seen), f"exit code {child.returncode}: {log.read_text()[-3000:]}"
        if not strikes.left:
            return steps, _left(seen), ""
        steps, resume = steps + more, ["--resume"]
        print(f"  {strikes.left} strikes are left: resumed, to outer step {steps}", flush=True)


def _is_ray(title: str) -> bool:
    return title.startswith("ray::") or "/ray/" in title


def _left(seen: dict[int, str]) -> list[int]:
    """Which of these processes are there still, ten seconds after their run; they are ended."""
    there = list(seen.items())
    ends = time.monotonic() + 10
    while there and time.monotonic() < ends:
        time.sleep(0.2)
        there = [(process, title) for process, title in there if _alive(process, title)]
    for process, _ in there:
        kill(process)
    return [process for process, _ in there]


def _alive(process: int, title: str) -> bool:
    """Whether that process is there, and no other one has got its number."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        now = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return False
    return stat != "Z" and (now == title or (now.startswith("ray::") and title.startswith("ray::")))


def result(folder: Path, steps: int) -> dict[str, Any]:
    """What must be the same: the last checkpoint's digests and the lines of the metrics."""
    checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]
    digests = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in (META, OPTIMIZER)}
    return {**digests, "metrics": kept}


def counted(folder: Path) -> dict[str, int]:
    """What the metrics say of restarts, shards given out again and copies."""
    lines = [json.loads(line)["service"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: sum(line[name] for line in lines) for name in ("restarts", "reissued", "copies")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, compare, print the verdict, write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="outer steps, at first (default: 20 for each strike)")
    parser.add_argument("--kills", type=int, default=20, help="strikes, freezing included (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of moments, kinds and victims (default: 0)")
    parser.add_argument("--workers", type=int, default=3, help="worker processes (default: 3)")
    parser.add_argument("--reduce", choices=("server", "tree"), default="server", help="who adds (default: server)")
    parser.add_argument("--deadline", type=float, default=8.0, help="seconds that a shard may take (default: 8)")
    parser.add_argument("--json", type=Path, help="where to write events and verdict")
    options = parser.parse_args(arguments)
    steps = options.steps or 20 * options.kills
    strikes = Strikes(options.kills, options.seed, options.workers)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="memmeta-faults-") as name:
        root = Path(name)
        (root / "sabotage.py").write_text(EXPERIMENT)
        base = [sys.executable, "-m", "memmeta_workers.cli", "train", str(root / "sabotage.py"), "--threads", "1"]
        served = [*base, "--workers", str(options.workers), "--address", "local", "--reduce", options.reduce]
        served += ["--deadline", f"{options.deadline:g}", "--pause", str(PAUSE)]
        print(f"{options.kills} strikes at a run with {options.workers} workers, --reduce {options.reduce}", flush=True)
        steps, left, failed = disturbed(served, root / "struck", steps, 10 * max(1, options.kills), strikes)
        differing: list[str] = []
        if not failed:
            print(f"  {len(strikes.done)} strikes in {steps} outer steps; now undisturbed, in one process", flush=True)
            plain = [*base, "--run-dir", str(root / "calm"), "--steps", str(steps)]
            subprocess.run(plain, check=True, stdout=subprocess.DEVNULL)
            struck, calm = result(root / "struck", steps), result(root / "calm", steps)
            differing = [key for key in calm if struck[key] != calm[key]]
        counts = {} if failed else counted(root / "struck")
    bad = [*([failed] if failed else []), *(f"{name} differs" for name in differing)]
    bad += [f"processes were left behind: {left}"] if left else []
    kinds = dict(Counter(one["kind"] for one in strikes.done))
    print(f"  {kinds}; {counts}")
    print(f"  {'; '.join(bad) if bad else 'the same bits: weights, optimiser and every line of the metrics'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "environment": environment(),
            "workers": options.workers,
            "reduce": options.reduce,
            "seed": options.seed,
            "steps": steps,
            "kinds": kinds,
            "counts": counts,
            "bad": bad,
            "strikes": strikes.done,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
