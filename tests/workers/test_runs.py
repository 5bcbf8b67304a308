"""The run folder: its config, its metrics, its lock."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from memmeta.errors import InputError
from memmeta_workers.board import Board
from memmeta_workers.runs import Config, RunFolder, default_folder, make_config


def config(**options: Any) -> Config:
    rest = {"steps": 5, "threads": 1, "device": "cpu", "seed": 0, "chance": None}
    return make_config(Path("/somewhere/mine.py"), "abc", {"lr": 0.1, "hidden": [1, 2]}, **{**rest, **options})


def test_a_config_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.check_new()
    folder.create(config())
    assert folder.config() == config()
    assert yaml.safe_load(folder.config_file.read_text())["options"] == {"lr": 0.1, "hidden": [1, 2]}
    with pytest.raises(InputError, match="already holds a run"):
        folder.check_new()
    assert default_folder(Path("/somewhere/mine.py")) == Path("runs/mine")


@pytest.mark.parametrize("text", ["steps: [", "3", "steps: 5", "!!python/object:os.system {}"])
def test_a_config_of_someone_else_is_refused(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    folder.config_file.write_text(text)
    with pytest.raises(InputError, match="is not a config that memmeta wrote"):
        folder.config()


def test_what_may_change_and_what_may_not() -> None:
    made = config()
    made.check_file(Path("moved.py"), "abc")
    made.check_options({"lr": 0.1, "hidden": [1, 2]}, 1, "cpu")
    made.check_options({"lr": 0.1, "hidden": [1, 2], "steps": 99}, 1, "cpu")
    for options, threads, device, words in (
        ({"lr": 0.2, "hidden": [1, 2]}, 1, "cpu", "--lr 0.1, not 0.2"),
        ({"lr": 0.1}, 1, "cpu", "--hidden"),
        (made.options, 2, "cpu", "--threads 1, not 2"),
        (made.options, 1, "cuda", "--device cpu, not cuda"),
    ):
        with pytest.raises(InputError, match=words):
            made.check_options(options, threads, device)
    with pytest.raises(InputError, match="restore that file"):
        made.check_file(Path("mine.py"), "abd")


def test_metrics_are_cut_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    for step in range(1, 6):
        folder.append({"step": step, "loss": float("nan")})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 6, "lo')
    assert folder.metrics() == [{"step": step, "loss": None} for step in range(1, 6)]
    folder.cut_metrics(3)
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]
    folder.append({"step": 4})
    assert len(folder.metrics_file.read_text().splitlines()) == 4
    folder.metrics_file.write_text("nonsense\n")
    with pytest.raises(InputError, match="a line that is not JSON"):
        folder.metrics()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(InputError, match="another process"), RunFolder(tmp_path).locked():
        pass
    with folder.locked():
        assert folder.path == tmp_path


def test_a_summary_is_written_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.summary() is None
    folder.write_summary({"test": {"loss": float("inf")}, "n": (1, 2)})
    assert folder.summary() == {"test": {"loss": None}, "n": [1, 2]}
    folder.summary_file.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        folder.summary()


def test_a_second_start_hides_what_the_first_wrote_too_much(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(steps: range, value: float) -> None:
        board = Board(tmp_path, steps[0] - 1)
        for step in steps:
            board.write(
                {
                    "step": step,
                    "values": {"loss": value},
                    "learning_rate": 0.1,
                    "gradient_norm": 1.0,
                    "times": {"step": 0.5},
                    "memory": {"bytes": 1},
                    "validation": {"values": {"accuracy": 0.5}},
                }
            )
        board.close()

    write(range(1, 6), 1.0)
    write(range(4, 8), 2.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    assert "validation/accuracy" in events.Tags()["scalars"]


def test_fields_are_those_of_the_file() -> None:
    names = [field.name for field in dataclasses.fields(Config)]
    assert names == [
        "experiment", "sha256", "options", "steps", "threads", "device", "seed", "chance", "memmeta", "torch",
        "checkpoints", "workers", "memory", "setting",
    ]  # fmt: skip
