"""``memmeta bench``: every row is kept as it comes, whatever happens next, and bad input is one line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_rows import memory_rows, scaling_rows
from rich.console import Console

from memmeta.errors import InputError
from memmeta_bench import command, peers, record
from memmeta_bench.command import Options, run
from memmeta_workers.cli import main

ROWS = memory_rows(("tasks",))


def shown() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


def test_rows_are_written_as_they_come_and_shown_in_the_end(tmp_path: Path) -> None:
    file, seen = tmp_path / "memory.json", list[int]()

    def measure(options: Options) -> command.Measured:
        def rows() -> Iterator[dict[str, Any]]:
            for row in ROWS:
                yield row
                seen.append(len(record.read(file)["rows"]))

        return len(ROWS), rows()

    console, text = shown()
    options = Options("memory", quick=True, json=str(file), cap="256MiB", problems="conv4")
    assert run(options, measure, console) == 0
    assert seen == list(range(1, len(ROWS) + 1))
    content = record.read(file)
    assert content["command"] == "memmeta bench memory --quick --cap 256MiB --problems conv4"
    assert content["settings"] == {"cap": 256 * 2**20, "quick": True}
    assert sorted(row["status"] for row in content["rows"]) == sorted(row["status"] for row in ROWS)
    names = list(peers.methods())
    places = [names.index(row["method"]) for row in content["rows"]]
    assert places == sorted(places)
    lines = text.getvalue().splitlines()
    assert sum(line.startswith("[") for line in lines) == len(ROWS)
    assert any("memmeta Stepwise: 20.0 MiB counted, 40.0 MiB resident" in line for line in lines)
    assert any("learn2learn MAML, batched: cap, above 256 MiB" in line for line in lines)
    assert any(line.startswith("a peer") or "memmeta's least" in line for line in lines)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_measured_before_an_end_is_kept_and_shown(error: type[BaseException], tmp_path: Path) -> None:
    closed = []

    def rows() -> Iterator[dict[str, Any]]:
        try:
            yield from ROWS[:3]
            raise error
        finally:
            closed.append(True)

    console, text = shown()
    with pytest.raises(error):
        run(Options("memory", json=str(tmp_path / "m.json")), lambda options: (None, rows()), console)
    assert closed == [True]
    assert len(record.read(tmp_path / "m.json")["rows"]) == 3
    assert "60.0 MiB" in text.getvalue()
    assert "memmeta bench plot" in text.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_nothing_measured_is_a_failure() -> None:
    console, text = shown()
    lost = [row for row in ROWS if row["status"] == "unavailable"]
    assert run(Options("memory"), lambda options: (1, iter(lost)), console) == 1
    assert "higher is not installed" in text.getvalue()


def test_a_gradient_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    console, text = shown()
    bad = {**ROWS[0], "relative_error": float("nan")}
    assert run(Options("memory", json=str(tmp_path / "m.json")), lambda options: (1, iter([bad])), console) == 1
    assert record.read(tmp_path / "m.json")["rows"][0]["reason"] == "its gradient is not finite"
    assert "failed, its gradient is not finite" in text.getvalue()


def test_a_file_is_shown_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memory.json"
    record.write(file, "memmeta bench memory", ROWS, {"cap": 256 * 2**20})
    assert main(["bench", "plot", str(file), "--plot", str(tmp_path / "picture.svg")]) == 0
    out = capsys.readouterr().out
    assert "learn2learn MAML, batched" in out
    assert out.count("picture: ") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"memory.json", "picture.png", "picture.svg"}


def test_rows_of_scaling_keep_what_is_theirs_alone(tmp_path: Path) -> None:
    record.write(tmp_path / "s.json", "memmeta bench scaling", scaling_rows(), {"cluster": {"sigma": 0.5}})
    content = record.read(tmp_path / "s.json")
    console, text = shown()
    command.tables.show(command.tables.sheets(content["rows"], content["settings"]), console)
    assert "stragglers sigma 0.5" in text.getvalue()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memroy"], ["memmeta bench memroy", "did you mean memory?"]),
        (["fly"], ["memory, speed, scaling, plot"]),
        (["memory", "--cap", "plenty"], ["--cap plenty", "4GiB"]),
        (["memory", "--threads", "two"], ["--threads two", "numbers from 1"]),
        (["memory", "--threads", "0"], ["--threads 0", "numbers from 1"]),
        (["memory", "--threads", ","], ["--threads ,", "numbers from 1"]),
        (["memory", "--problems", "conv5"], ["--problems conv5", "did you mean conv4?"]),
        (["memory", "--problems", ""], ["--problems is empty", "conv4"]),
        (["speed", "--methods", "xyz"], ["--methods xyz", "memmeta-stepwise"]),
        (["memory", "--json", "missing/a.json"], ["--json missing/a.json", "no folder"]),
        (["memory", "--json", "."], ["--json .", "it is a folder"]),
        (["memory", "--json", ""], ["--json is empty"]),
        (["memory", "--json", "notes.txt"], ["notes.txt", "not JSON"]),
        (["memory", "--plot", "a.pdf"], ["--plot a.pdf", "PNG and SVG"]),
        (["memory", "--plot", "missing/a.png"], ["no folder"]),
        (["memory", "--device", "tpu"], ["option --device", "'tpu'"]),
        (["memory", "--qick"], ["unknown option --qick", "did you mean --quick?"]),
        (["memory", "--workers", "2"], ["unknown option --workers"]),
        (["scaling", "--workers", "many"], ["--workers many", "numbers from 1"]),
        (["scaling", "--bandwidth", "fast"], ["--bandwidth fast", "number of bytes"]),
        (["scaling", "--stragglers", "-1"], ["--stragglers -1.0", "at least 0"]),
        (["scaling", "--failures", "nan"], ["--failures: expected a number", "'nan'"]),
        (["plot"], ["memmeta bench plot needs FILE"]),
        (["plot", "missing.json"], ["missing.json can't be read"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_measures_nothing(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("memmeta: error: ")
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words), said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Options("memory").place() == "cpu"
    with pytest.raises(InputError, match="--device cuda: PyTorch finds no CUDA device here; write --device cpu"):
        Options("memory", device="cuda").place()


def test_help_has_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert main(["bench"]) == 2
    out = capsys.readouterr().out
    assert all(f"memmeta bench {kind}" in out for kind in ("memory", "speed", "scaling", "plot"))
    assert main(["bench", "memory", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out


def test_points_at_a_time_have_room_and_times_are_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memmeta_bench.machine.cores", lambda: 8)
    monkeypatch.setattr("memmeta_bench.machine.available", lambda: 30 * 2**30)
    assert command.jobs(Options("memory", device="cpu")) == 4
    assert command.jobs(Options("memory", device="cpu", threads="1,4")) == 2
    assert command.jobs(Options("memory", device="cpu", cap="100GiB")) == 1
    assert command.jobs(Options("speed", device="cpu")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_a_whole_file(number: int, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    arguments = ["bench", "memory", "--quick", "--methods", "memmeta-stepwise", "--json", str(file), "--device", "cpu"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, "-m", "memmeta_workers.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
    )  # fmt: skip
    end = time.monotonic() + 50
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1].decode()
    assert record.read(file)["rows"][0]["status"] == "ok", errors
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), errors
    assert json.loads(file.read_text())["command"].startswith("memmeta bench memory --quick")
