"""Points: rows of whatever happens to a process; meters; sweeps; files of rows."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from memmeta.errors import InputError
from memmeta.memory import peak_of
from memmeta_bench import child, memory, meter, points, record, scaling, speed
from memmeta_bench.peers import methods
from memmeta_bench.points import Compared, Point, Row, fitting, measure, relative_error
from memmeta_bench.problems import names, sizes_of
from memmeta_bench.processes import Children, Outcome

SIZES = {**sizes_of("sinusoid_mlp"), "tasks": 2, "steps": 2, "width": 4}
POINT = Point("memory", "tasks", "sinusoid_mlp", SIZES, "memmeta-stepwise")

EMPTY = {"format": 1, "command": "", "environment": {}, "settings": {}, "rows": []}


def at(tasks: int, method: str = POINT.method, **changes: Any) -> Point:
    return dataclasses.replace(POINT, sizes={**SIZES, "tasks": tasks}, method=method, **changes)


class Scripted(Children):
    """Outcomes by method and tasks, instead of processes; a vector of ones as each gradient, but for torch.func's, and
    for what rounding in float32 makes of higher's."""

    outcomes: ClassVar[Mapping[tuple[str, int], Outcome]] = {}
    ran: ClassVar[list[tuple[Any, ...]]] = []

    def run(self, module: str, order: str, threads: int, timeout: float, resident: int | None) -> Outcome:
        given = json.loads(order)
        key = (given["point"]["method"], given["point"]["sizes"]["tasks"])
        precise = given["point"]["dtype"] == "float64"
        self.ran.append((*key, "float64") if precise else key)
        other = key[0] == "torch.func" or (key[0] == "higher-batched" and not precise)
        torch.save(torch.full((3,), 1.5 if other else 1.0), given["gradient"])
        return self.outcomes.get(key, Outcome("ok", values={"counted_bytes": 8 * key[1]}))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(points, "Children", Scripted)
    monkeypatch.setattr(Scripted, "outcomes", {})
    monkeypatch.setattr(Scripted, "ran", [])
    return Scripted


def places(rows: list[Row]) -> list[tuple[str, int, str]]:
    return [(row["method"], row["sizes"]["tasks"], row["status"]) for row in rows]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_curve_ends_where_a_method_does(scripted: type[Scripted], jobs: int) -> None:
    scripted.outcomes = {("torch.func", 2): Outcome("cap", "too much")}
    given = [at(tasks, method) for method in ("torch.func", "memmeta-stepwise") for tasks in (1, 2, 4)]
    rows = list(measure(given, jobs=jobs))
    expected = [("torch.func", 1, "ok"), ("torch.func", 2, "cap")]
    expected += [("memmeta-stepwise", tasks, "ok") for tasks in (1, 2, 4)]
    assert sorted(places(rows)) == sorted(expected)
    assert [row["reason"] for row in rows if row["status"] == "cap"] == ["too much"]


def test_gradients_are_compared_with_the_reference(scripted: type[Scripted]) -> None:
    rows = list(measure([at(1, "torch.func"), at(1, "memmeta-unrolled"), at(1, "floor-training")], jobs=1))
    assert [row["relative_error"] for row in rows] == [0.5, 0.0, None]
    assert [row["compared_in"] for row in rows] == ["float64", "float32", None]
    exactly = [("torch.func", 1, "float64"), ("memmeta-unrolled", 1, "float64")]
    assert scripted.ran == [("torch.func", 1), ("memmeta-unrolled", 1), *exactly, ("floor-training", 1)]


def test_what_rounding_makes_of_a_gradient_is_no_difference(scripted: type[Scripted]) -> None:
    rows = list(measure([at(tasks, "higher-batched") for tasks in (1, 8, 16)], jobs=1))
    assert [(row["relative_error"], row["compared_in"]) for row in rows] == [(0.0, "float64")] * 3
    assert [run[:2] for run in scripted.ran if run[0] == "higher-batched" and len(run) == 3] == [
        ("higher-batched", 1),
        ("higher-batched", 2),
    ]


def test_where_the_first_reference_fails_the_second_is_taken(scripted: type[Scripted]) -> None:
    scripted.outcomes = {("memmeta-unrolled", 1): Outcome("cap", "too much")}
    (row,) = measure([at(1, "torch.func")])
    assert row["relative_error"] == 0.5
    assert scripted.ran[1:3] == [("memmeta-unrolled", 1), ("memmeta-stepwise", 1)]


def test_a_point_on_two_axes_is_measured_once(scripted: type[Scripted]) -> None:
    rows = list(measure([at(2, "memmeta-unrolled"), at(2, "memmeta-unrolled", axis="steps")], jobs=1))
    assert [row["axis"] for row in rows] == ["tasks", "steps"]
    assert len(scripted.ran) == 1
    rows = list(measure([at(tasks, "floor-training-step") for tasks in (1, 2, 4)], jobs=1))
    assert [row["sizes"]["tasks"] for row in rows] == [1, 2, 4]
    assert len(scripted.ran) == 1 + 1


def test_a_peer_that_is_not_installed_is_a_row_without_a_process(
    scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = dataclasses.replace(methods()["higher-batched"], module="no_such_package_here")
    monkeypatch.setitem(methods(), "higher-batched", missing)
    rows = list(measure([at(tasks, "higher-batched") for tasks in (1, 2)]))
    assert places(rows) == [("higher-batched", 1, "unavailable")]
    assert "no_such_package_here is not installed" in rows[0]["reason"]
    assert not scripted.ran


def test_an_unknown_method_is_refused_before_anything_is_measured(scripted: type[Scripted]) -> None:
    with pytest.raises(InputError, match="there is no method 'reptile'"):
        list(measure([at(1), at(1, "reptile")]))
    assert not scripted.ran


def test_rows_have_what_the_file_documents(scripted: type[Scripted]) -> None:
    (row,) = measure([at(1, options={"chunk": 2}, axis="chunk", threads=2)])
    assert list(row) == list(record.FORMAT["rows"][0])
    assert row["sizes"] == {**SIZES, "tasks": 1, "chunk": 2}
    assert Point(**json.loads(POINT.to_json())) == POINT


def test_relative_error(tmp_path: Path) -> None:
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(torch.tensor([3.0, 4.0]), a)
    torch.save(torch.tensor([0.0, 4.0]), b)
    assert relative_error(a, b) == 0.75


def test_outcomes_in_this_process(tmp_path: Path) -> None:
    found = child.outcome(POINT, str(tmp_path / "gradient.pt"))
    assert found.status == "ok"
    assert found.values["counted_bytes"] > 0
    assert torch.load(tmp_path / "gradient.pt").shape == (1 * 4 + 4 + 4 * 4 + 4 + 4 + 1,)
    capped = child.outcome(dataclasses.replace(POINT, cap=1000))
    assert (capped.status, capped.reason) == ("cap", "more than 1000 B of live tensors")
    assert capped.values["counted_bytes"] > 1000
    timed = child.outcome(dataclasses.replace(POINT, benchmark="speed", seconds=0.0))
    assert timed.values["seconds"] >= timed.values["seconds_min"] > 0
    assert timed.values["compile_seconds"] is None
    refused = child.outcome(dataclasses.replace(POINT, method="torch.func", options={"chunk": 2}))
    assert refused == Outcome("unavailable", "torch.func has no option 'chunk': leave it out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_points_are_unavailable() -> None:
    assert child.outcome(dataclasses.replace(POINT, device="cuda")).status == "unavailable"


def test_the_meter_counts_as_memmeta_does_and_stops_at_the_cap() -> None:
    def call() -> None:
        kept = [torch.zeros(100, dtype=torch.float64) for _ in range(4)]
        del kept

    assert meter.counted_peak(call) == meter.counted_peak(call, cap=3200) == peak_of(call) == 3200
    with pytest.raises(meter.OverCap) as error:
        meter.counted_peak(call, cap=2000)
    assert error.value.live == 2400


def test_seconds_are_those_of_single_calls() -> None:
    calls: list[int] = []
    assert len(meter.seconds_of(lambda: calls.append(1), least=0.0, most=9, device="cpu")) == len(calls) == 3
    assert min(meter.seconds_of(lambda: time.sleep(0.002), least=0.0, most=2, device="cpu")) >= 0.002


def test_points_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points.machine, "cores", lambda: 8)
    monkeypatch.setattr(points.machine, "available", lambda: 40 * 2**30)
    capped = dataclasses.replace(POINT, cap=7 * 2**30)
    assert fitting([capped]) == 4
    assert fitting([dataclasses.replace(capped, threads=8)]) == 1
    assert fitting([capped, dataclasses.replace(capped, benchmark="speed")]) == 1


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("sweep", [memory.points, speed.points])
def test_sweeps_are_points_that_can_be_measured(sweep: Any, quick: bool) -> None:
    for given in ({}, {"problems": names()}, {"problems": ("gpt",)}):
        found = sweep(quick=quick, cap=2**30, **given)
        assert found
        assert all(set(sizes_of(point.problem)) == set(point.sizes) and point.place() > 0 for point in found)
        assert all(set(point.options) <= set(methods()[point.method].options) for point in found)
    named = sweep(quick=quick, problems=("conv4",), methods=("torch.func",), threads=(3,))
    assert {(point.problem, point.method, point.threads) for point in named} == {("conv4", "torch.func", 3)}
    assert {point.problem for point in sweep(quick=quick, problems=names())} == set(names())


def test_rows_of_scaling_have_what_the_format_says() -> None:
    row = scaling.points(quick=True)[0].row()
    known = {*record.FORMAT["rows"][0], *record.SCALING}
    assert row.keys() == known


def test_curves_come_in_the_order_of_their_axis() -> None:
    seen: dict[Any, int] = {}
    for point in memory.points():
        assert seen.get(point.curve(), 0) < point.place()
        seen[point.curve()] = point.place()


def test_rounds_take_turns() -> None:
    found = speed.points(problems=("gpt",), methods=("torch.func", "floor-training"), threads=(1,), rounds=2)
    assert [(point.round, point.method) for point in found] == [
        (number, method) for number in (0, 1) for method in ("torch.func", "floor-training")
    ]


def test_compiled_programs_can_not_be_counted_on_the_cpu() -> None:
    with pytest.raises(InputError, match="memmeta-stepwise-compiled allocates can't be counted on the CPU"):
        memory.points(methods=("memmeta-stepwise-compiled",))
    assert memory.points(methods=("memmeta-stepwise-compiled",), device="cuda")


def test_files_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = POINT.row(Outcome("ok", values={"counted_bytes": 8}), Compared(float("inf"), "float32"))
    for count in (1, 2):
        record.write(path, "memmeta bench memory", [row] * count, {"quick": True})
        content = record.read(path)
        assert len(content["rows"]) == count
    assert content["rows"][0] == {**row, "relative_error": None}
    assert content.keys() == record.FORMAT.keys()
    assert content["environment"].keys() == record.FORMAT["environment"].keys()
    assert os.listdir(tmp_path) == ["rows.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "is no file of rows: name one of memmeta bench --json"),
        (
            '{"format": 9, "command": "", "environment": {}, "settings": {}, "rows": []}',
            "has format 9, this is version 1",
        ),
        ('{"format": 1, "command": "", "environment": {}, "settings": {}, "rows": [{}]}', "row 0 has not all of bench"),
    ],
)
def test_refused_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        record.read(path)


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be written: No such file"):
        record.write(tmp_path / "none" / "rows.json", "", [], {})


def test_processes_that_fail_are_outcomes(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(
        "import json, os, signal, sys, time\n"
        "order = json.load(sys.stdin)\n"
        "if order == 'sleep': time.sleep(60)\n"
        "if order == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if order == 'raise': raise ValueError('no such thing')\n"
        "if order == 'grow': kept = bytes(range(256)) * 4_000_000; time.sleep(60)\n"
        "if order == 'fine': print(json.dumps({'status': 'ok', 'reason': '', 'values': {'seconds': 1.0}}))\n"
    )
    children = Children({})
    children._variables = lambda threads: {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(order: str, timeout: float = 60.0, resident: int | None = None) -> Outcome:
        return children.run("dying", json.dumps(order), 1, timeout, resident)

    assert run("fine") == Outcome("ok", "", {"seconds": 1.0})
    assert run("sleep", timeout=0.3) == Outcome("timeout", "not done after 0.3 seconds")
    assert run("kill") == Outcome("failed", "killed by SIGKILL, as the system does when memory runs out")
    assert run("raise") == Outcome("failed", "ValueError: no such thing")
    assert run("nothing") == Outcome("failed", "ended with code 0 and without a result")
    assert run("grow", resident=500 * 2**20).status == "cap"
    children.stop()
    assert run("fine") == Outcome("failed", "stopped")


@pytest.mark.slow
def test_points_in_processes_of_their_own() -> None:
    found = list(measure([at(tasks, cap=2**30) for tasks in (1, 2)]))
    assert [row["status"] for row in found] == ["ok", "ok"]
    assert all(row["relative_error"] < 1e-4 and row["resident_bytes"] > 0 for row in found)
    assert found[0]["counted_bytes"] == pytest.approx(found[1]["counted_bytes"], rel=0.1)
    (again,) = measure([at(2, cap=2**30)])
    assert again["counted_bytes"] == found[1]["counted_bytes"]


@pytest.mark.slow
def test_closing_ends_the_processes() -> None:
    rows = measure([at(2), at(2, "floor-training", timeout=50.0)], jobs=1)
    next(rows)
    started = time.monotonic()
    rows.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert time.monotonic() - started < 20
