"""What tables and pictures show of rows: panels of curves, medians over rounds, ratios to the fastest peer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]

# A gradient further than this from the reference's is another gradient: more than rounding in float32.
DIFFERS = 1e-3
PROBLEMS = {
    "sinusoid_mlp": "sinusoid MLP",
    "conv4": "Conv4",
    "resnet12": "ResNet12",
    "gpt": "GPT",
}
AXES = {
    "tasks": "tasks in the meta-batch, B",
    "steps": "inner steps, T",
    "shots": "support examples per class",
    "width": "width",
    "depth": "depth (layers)",
    "chunk": "tasks stacked at a time (chunk)",
    "threads": "threads",
}
_SIZES = {
    "tasks": "B = {}",
    "steps": "T = {}",
    "shots": "{}-shot",
    "query": "{} query",
    "width": "width {}",
    "depth": "{} layers",
    "chunk": "chunk {}",
}


@dataclass(frozen=True)
class Panel:
    """Rows that belong together: one problem, one axis, all else the same.

    Attributes:
        problem: its name.
        axis: the size that differs between the points of a curve.
        rest: all other sizes.
        threads: CPU threads.
        device: "cpu" or "cuda".
        methods: the rows of each method, in the order they came.
    """

    problem: str
    axis: str
    rest: tuple[tuple[str, Any], ...]
    threads: int
    device: str
    methods: dict[str, list[Row]] = field(default_factory=dict)

    def title(self) -> str:
        """The problem and its sizes in words."""
        said = [PROBLEMS.get(self.problem, self.problem), *(_SIZES.get(n, n + " {}").format(v) for n, v in self.rest)]
        return ", ".join([*said, self.place()])

    def place(self) -> str:
        """Where it ran."""
        if self.axis == "threads":
            return self.device
        return self.device if self.device != "cpu" else f"{self.threads} thread{'' if self.threads == 1 else 's'}"

    def sizes(self) -> list[Any]:
        """All values of the axis, in order."""
        return sorted({row["sizes"][self.axis] for row in self.rows()})

    def rows(self) -> list[Row]:
        """The rows of all methods."""
        return [row for rows in self.methods.values() for row in rows]

    def curve(self, method: str, value: str) -> dict[Any, float]:
        """The median of ``value`` over rounds, by size, where the method has one."""
        found: dict[Any, list[float]] = {}
        for row in self.methods[method]:
            if row["status"] == "ok" and row.get(value) is not None:
                found.setdefault(row["sizes"][self.axis], []).append(row[value])
        return {size: statistics.median(found[size]) for size in sorted(found)}

    def ended(self, method: str) -> tuple[Any, str] | None:
        """The first size at which the method had no result, and the status there."""
        lost = [(row["sizes"][self.axis], row["status"]) for row in self.methods[method] if row["status"] != "ok"]
        lost = [(size, status) for size, status in lost if status != "unavailable"]
        return min(lost) if lost else None


def panels(rows: Iterable[Row]) -> list[Panel]:
    """Rows with an axis, grouped into the panels they are drawn in."""
    found: dict[tuple[Any, ...], Panel] = {}
    for row in rows:
        axis = row["axis"]
        rest = tuple((name, value) for name, value in row["sizes"].items() if name != axis)
        key = (row["problem"], axis, rest, 0 if axis == "threads" else row["threads"], row["device"])
        found.setdefault(key, Panel(*key)).methods.setdefault(row["method"], []).append(row)
    return list(found.values())


def title_of(rows: Sequence[Row]) -> str:
    """The method's title; where its gradient is another one, that is said with the difference."""
    error = difference(rows)
    said = rows[0].get("title") or rows[0]["method"]
    return said if error is None else f"{said} (gradient differs by {error:.1g})"


def difference(rows: Iterable[Row]) -> float | None:
    """The largest relative error of a method's gradient, if it is more than rounding."""
    errors = [row["relative_error"] for row in rows if row.get("relative_error") is not None]
    worst = max(errors, default=0.0, key=lambda error: error if error == error else float("inf"))
    return None if worst <= DIFFERS else worst


def ours(method: str) -> bool:
    """Whether a method is this library's."""
    return method.startswith("memmeta")


def is_peer(rows: Sequence[Row]) -> bool:
    """Whether a method is one to be measured against: neither this library's nor a floor."""
    return not rows[0]["floor"] and not ours(rows[0]["method"])


@dataclass(frozen=True)
class Timing:
    """What a method took on one problem.

    Attributes:
        method: its name.
        title: what it is called.
        seconds: of one meta-gradient, the median over rounds; None where there is no result.
        ratio: how many times as fast as the fastest peer, the median over rounds of the ratio in the same round.
        compiling: seconds of compiling, before the first meta-gradient.
        pays: meta-gradients after which compiling has paid, against this library's fastest that is not compiled.
        error: how far the gradient is from the reference's, where it is another one.
        floor: it is a bound, not a method.
        reason: why there is no result.
    """

    method: str
    title: str
    seconds: float | None
    ratio: float | None
    compiling: float | None
    pays: int | None
    error: float | None
    floor: bool
    reason: str


def timings(methods: Mapping[str, Sequence[Row]]) -> list[Timing]:
    """The methods of one problem, the fastest first, those without a result last."""
    rounds = {name: _by_round(rows) for name, rows in methods.items()}
    medians = {name: statistics.median(times.values()) for name, times in rounds.items() if times}
    fastest = fastest_peer(methods, medians)
    eager = [seconds for name, seconds in medians.items() if ours(name) and not _compiling(methods[name])]
    found = [_timing(rows, medians.get(name), _ratio(rounds, fastest, name), eager) for name, rows in methods.items()]
    return sorted(found, key=lambda one: (one.seconds is None, one.seconds or 0.0))


def fastest_peer(methods: Mapping[str, Sequence[Row]], medians: Mapping[str, float]) -> str | None:
    """The peer with the least median; one with another gradient does other work and is none."""
    peers = [name for name in medians if is_peer(methods[name]) and difference(methods[name]) is None]
    return min(peers, key=lambda name: medians[name], default=None)


def _timing(rows: Sequence[Row], seconds: float | None, ratio: float | None, eager: Sequence[float]) -> Timing:
    compiling, saved = _compiling(rows), min(eager, default=0.0) - (seconds or 0.0)
    pays = int(compiling / saved) + 1 if compiling and seconds is not None and saved > 0 else None
    reason = "" if seconds is not None else f"{rows[0]['status']}: {rows[0].get('reason') or 'no reason given'}"
    first = rows[0]
    return Timing(
        first["method"], first.get("title") or first["method"], seconds, ratio, compiling, pays, difference(rows),
        bool(first["floor"]), reason,
    )  # fmt: skip


def _by_round(rows: Iterable[Row]) -> dict[int, float]:
    return {row["round"]: row["seconds"] for row in rows if row["status"] == "ok" and row.get("seconds") is not None}


def _compiling(rows: Iterable[Row]) -> float | None:
    """Of the first round: from the second on, the code is found in the compiler's cache."""
    times = {row["round"]: row["compile_seconds"] for row in rows if row.get("compile_seconds")}
    return times[min(times)] if times else None


def _ratio(rounds: Mapping[str, Mapping[int, float]], base: str | None, name: str) -> float | None:
    """Over the rounds that both have; over their medians where they share none."""
    if base is None or not rounds[name]:
        return None
    shared = rounds[name].keys() & rounds[base].keys()
    if shared:
        return statistics.median(rounds[base][number] / rounds[name][number] for number in shared)
    return statistics.median(rounds[base].values()) / statistics.median(rounds[name].values())


def merged(found: Iterable[Panel]) -> list[Panel]:
    """One panel for each problem, sizes, threads and device: what is timed side by side, whatever the axis was."""
    result: dict[tuple[Any, ...], Panel] = {}
    for panel in found:
        if panel.axis == "chunk":
            continue
        for row in panel.rows():
            rest = tuple((name, value) for name, value in row["sizes"].items() if name not in ("chunk", "threads"))
            key = (panel.problem, "", rest, row["threads"], panel.device)
            chunk = row["sizes"].get("chunk", 1)
            name, title = row["method"], row.get("title") or row["method"]
            if chunk != 1:
                name, title = f"{name}, chunk {chunk}", f"{title}, chunk {chunk}"
            rows = result.setdefault(key, Panel(*key)).methods.setdefault(name, [])
            rows.append({**row, "method": name, "title": title})
    return list(result.values())
