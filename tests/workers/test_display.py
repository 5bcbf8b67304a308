"""What a user sees: the live display, plain lines, the picture."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memmeta import Report, TaskScore
from memmeta.errors import InputError
from memmeta.memory import in_bytes
from memmeta_workers import plots, signals
from memmeta_workers.coordinator import StepRecord
from memmeta_workers.dispatch import WorkerStatus
from memmeta_workers.progress import Display, LiveDisplay, PlainDisplay, display, duration


def record(step: int) -> StepRecord:
    values = {"loss": 1.5, "accuracy": 0.75, "loss_before": 2.5, "accuracy_before": 0.25}
    return StepRecord(step, 4, values, 0.1, 1.0, (), {"tasks_per_second": 12.0}, 3 * 1024 * 1024)


REPORT = Report(tuple(TaskScore(None, {"accuracy": value, "accuracy_before": 0.2}) for value in (0.5, 0.7, 0.9)))


def shown(terminal: bool) -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    return display(Console(file=text, force_terminal=terminal, color_system=None, width=100)), text


def test_the_live_display_has_all_there_is_to_see() -> None:
    view, text = shown(True)
    assert isinstance(view, LiveDisplay)
    view.start(0, 50)
    view.step(record(1))
    view.validation(1, REPORT)
    view.step(record(2))
    view.stop()
    for word in ("2/50", "before adaptation", "after adaptation", "75.0%", "25.0%", "1.5", "12 tasks/s", "3.0 MiB"):
        assert word in text.getvalue()
    assert "70.0% ± 22.6%" in text.getvalue()


def test_the_live_display_has_a_line_for_each_worker_as_it_is_now() -> None:
    view, text = shown(True)
    workers = [WorkerStatus("worker-0", "node-a, process 7", "tasks 4 to 7", 40, 20.0, 5 << 20)]
    view.watch(lambda: workers)
    view.start(0, 50)
    view.step(record(1))
    workers.append(WorkerStatus("worker-1", "", "starting", 0, 0.0, 0))
    view.stop()
    for words in (
        ("worker", "where", "now", "tasks/s"),
        ("worker-0", "node-a, process 7", "tasks 4 to 7", "2", "5.0 MiB"),
    ):
        assert any(all(word in line for word in words) for line in text.getvalue().splitlines())
    assert "starting" in text.getvalue()


def test_plain_lines_name_the_workers_memory() -> None:
    view, text = shown(False)
    view.start(0, 50)
    service = {"workers": 2, "peak_bytes": {"worker-0": 7 << 20, "worker-1": 9 << 20}}
    view.step(dataclasses.replace(record(1), peak_bytes=None, service=service))
    assert "2 workers  peak memory 9.0 MiB" in text.getvalue()


def test_plain_lines_are_few() -> None:
    view, text = shown(False)
    assert isinstance(view, PlainDisplay)
    view.start(10, 2010)
    for step in range(11, 2011):
        view.step(record(step))
        view.validation(step, REPORT)
    view.stop()
    lines = text.getvalue().splitlines()
    assert 20 <= len(lines) <= 50
    assert (
        "step 2010/2010  loss 2.5 -> 1.5, accuracy 25.0% -> 75.0%  12 tasks/s  peak memory 3.0 MiB" in text.getvalue()
    )
    assert "0:00 left" in text.getvalue()


def test_numbers_in_words() -> None:
    assert [in_bytes(n) for n in (12, 1536, 5 << 20, 3 << 30)] == ["12 B", "1.5 KiB", "5.0 MiB", "3.00 GiB"]
    assert [duration(s) for s in (5.4, 75, 3675)] == ["0:05", "1:15", "1:01:15"]


def line(step: int, validation: bool = False) -> dict[str, Any]:
    values = {"loss": 1.0 / step, "loss_before": None, "accuracy": 0.5, "accuracy_before": 0.2}
    extra = {"validation": {"values": {"accuracy": 0.6, "loss": 0.4}, "intervals": {"accuracy": None, "loss": 0.1}}}
    return {"step": step, "values": values, **(extra if validation else {})}


def test_the_picture_survives_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    score = {"values": {"loss": 0.3, "accuracy": None}, "intervals": {"loss": None, "accuracy": None}}
    summary = {"test": score, "baselines": {"untrained": score}}
    plots.draw([line(s, s % 2 == 0) for s in range(1, 60)], path, title="t", chance=0.2, summary=summary)
    large = path.read_bytes()
    plots.draw([line(1)], path, title="t")
    assert large.startswith(b"\x89PNG")
    assert path.read_bytes() != large
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]


def test_there_may_be_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no outer step"):
        plots.draw([], tmp_path / "curves.png", title="t")


def test_signals_ask_once_and_then_insist() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    with signals.StopSignals() as stop:
        assert not stop.asked()
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
