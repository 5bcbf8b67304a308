"""Points of ``memmeta bench scaling``: what they are, what becomes of them, and one that is measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from typing import Any

import pytest

from memmeta_bench import scaling, service_steps
from memmeta_bench.scaling import measure, points, run, wide
from memmeta_bench.step_model import PARTS, Measured, fit
from memmeta_workers.coordinator import StepRecord

SMALL = wide(2, 0.1, "tree", steps=2, warm=1, timeout=120.0)


def record(publish: float, compute: float, gather: float, update: float, fetch: float) -> StepRecord:
    times = {"publish": publish, "compute": compute, "gather": gather, "update": update}
    service = {"fetch_seconds": fetch, "bytes_in": 20, "bytes_out": 10, "server_peak_bytes": 1000}
    return StepRecord(
        step=1,
        tasks=6,
        values={},
        learning_rate=0.1,
        gradient_norm=1.0,
        skipped=(),
        times={**times, "step": sum(times.values())},
        peak_bytes=None,
        service=service,
    )


def test_the_parts_of_a_step_are_all_of_it() -> None:
    step = service_steps.Step(record(0.0, 1.0, 0.25, 0.5, 0.125), busy=0.75)
    parts = step.parts(publish=0.125)
    expected = {"publish": 0.125, "fetch": 0.125, "compute": 0.75, "gather": 0.125, "reduce": 0.25, "update": 0.375}
    assert tuple(parts) == PARTS
    assert parts == expected
    assert sum(parts.values()) == step.seconds
    found = service_steps.figures([step, step, service_steps.Step(record(0, 2, 1, 1, 0), 1.0)], publish=0.125)
    assert (found["seconds"], found["seconds_min"], found["tasks_per_second"]) == (1.75, 1.75, 6 / 1.75)
    assert (found["bytes_in"], found["bytes_out"], found["server_peak_bytes"]) == (20, 10, 1000)
    assert found["parts"] == expected


@pytest.mark.parametrize("workers", [None, (1,), (4,), (1, 4, 16)])
@pytest.mark.parametrize("quick", [True, False])
def test_the_points_are_enough_to_fit_the_model_and_check_it(
    quick: bool, workers: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    chosen = points(quick, workers)
    parts = dict.fromkeys(PARTS, 1.0)
    rows = [
        point.row(nbytes=round(1e6 * (point.megabytes or 0.5)), parts=parts, message_seconds=1e-3) for point in chosen
    ]
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
    model = fit(Measured.of(row) for row in rows if not row["held_out"])
    held_out = [Measured.of(row) for row in rows if row["held_out"]]
    assert all(model.covers(point.load) for point in held_out)
    assert len(model.check(held_out)) == len(held_out) > 0
    assert {row["method"] for row in rows} == {"server", "tree"}
    assert {row["axis"] for row in rows} == {"workers", "megabytes"}
    assert all(row["sizes"][row["axis"]] is not None for row in rows)
    if quick:
        assert len(rows) <= 6  # a process with its cluster takes about 12 seconds
    else:
        sizes = {row["sizes"]["megabytes"] for row in rows if row["axis"] == "megabytes"}
        assert (min(sizes), max(sizes)) == (0.1, 400.0)


def test_numbers_of_workers_are_powers_of_two_and_the_cores() -> None:
    assert [scaling._counts(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_what_is_not_installed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    (row,) = measure([SMALL])
    assert (row["status"], row["reason"], row["seconds"]) == ("unavailable", "ray is not installed", None)


def test_a_process_that_takes_too_long_is_a_row() -> None:
    row = run(wide(1, 0.1, "server", timeout=0.01))
    assert (row["status"], row["reason"], row["parts"]) == ("timeout", "not done after 0.01 s", None)


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (-9, [], "killed by signal 9"),
        (3, [], "exit 3"),
        (0, [], "exit 0"),
        (1, ["Traceback", "InputError: no"], "InputError: no"),
    ],
)
def test_a_process_that_fails_is_a_row(code: int, said: list[str], reason: str) -> None:
    row = scaling._outcome(SMALL, code, False, [], said)
    assert (row["status"], row["reason"]) == ("failed", reason)
    assert row["sizes"]["workers"] == 2


def test_an_interrupt_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    wait = subprocess.Popen.wait

    def interrupted(process: Any, timeout: float | None = None) -> int:
        started.append(process)
        if len(started) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL)
    assert started[0].poll() is not None


@pytest.mark.cluster
def test_a_point_on_a_private_cluster() -> None:
    (row,) = measure([SMALL])
    assert (row["status"], row["reason"]) == ("ok", "")
    sizes = row["sizes"]
    assert (sizes["workers"], sizes["shards"], sizes["tasks"], sizes["megabytes"]) == (2, 2, 2, 0.1)
    assert tuple(row["parts"]) == PARTS
    assert all(seconds >= 0 for seconds in row["parts"].values())
    assert row["seconds"] >= row["seconds_min"] >= row["parts"]["compute"] / 2 > 0
    assert row["tasks_per_second"] == pytest.approx(2 / row["seconds"])
    # The tree brings the root alone to the server, which publishes its weights once a step.
    assert row["bytes_in"] == row["bytes_out"] == sizes["nbytes"] > 90_000
    assert row["server_peak_bytes"] > 0
    assert row["driver_cpu_seconds"] > 0 <= row["message_seconds"]
    assert Measured.of(row).load.reduce == "tree"
