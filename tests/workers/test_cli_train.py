"""``memmeta train`` from end to end: the folder it makes, and going on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem
from run_contents import contents

from memmeta_workers.cli import main
from memmeta_workers.runs import RunFolder
from memmeta_workers.stores import LocalStore

Command = Callable[..., Any]


@pytest.fixture(scope="session")
def whole_run(finished: Path) -> Path:
    """A run of six steps that nothing interrupted; to be copied."""
    assert main(["train", str(finished / "waves.py"), "--run-dir", str(finished / "whole")]) == 0
    return finished / "whole"


@pytest.fixture
def whole(whole_run: Path) -> dict[str, Any]:
    """What that run came to."""
    return contents(whole_run, 6)


def test_a_run_makes_its_folder_and_reports(memmeta: Command, waves: Path, here: Path) -> None:
    done = memmeta("train", waves, "--threads", "1")
    assert (done.code, done.err) == (0, "")
    folder = here / "runs" / "waves"
    names = {entry.name for entry in folder.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "summary.json", "curves.png"}
    assert names == expected
    assert [line["step"] for line in RunFolder(folder).metrics()] == [1, 2, 3, 4, 5, 6]
    line = RunFolder(folder).metrics()[1]
    assert {"loss", "loss_before", "accuracy", "accuracy_before"} == set(line["values"])
    assert line["validation"]["tasks"] == 4
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["options"]["inner_lr"] == 0.05
    assert config["threads"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["memory"]["batched_tasks"] == 5
    assert summary["memory"]["step_bytes"] > 0
    assert summary["chance"] == 0.25
    for text in ("untrained", "chance", "±", "memory of one outer step, 5 tasks", f"picture: {Path('runs/waves')}"):
        assert text in done.out


def test_two_runs_are_equal_to_the_last_bit(memmeta: Command, waves: Path, here: Path, whole: dict[str, Any]) -> None:
    assert memmeta("train", waves, "--run-dir", "again").code == 0
    assert contents(here / "again", 6) == whole


@pytest.mark.parametrize(
    ("place", "step"),
    [("train:0:3", 0), ("train:3:2", 3), ("train:4:1", 4), ("held-out:0:1", 2)],
    ids=["first step", "after a checkpoint", "between checkpoints", "while validating"],
)
def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(
    memmeta: Command,
    waves: Path,
    here: Path,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    step: int,
) -> None:
    monkeypatch.setenv("TEST_STOP_AT", place)
    # The check before training asks for held-out task 0 only.
    stopped = memmeta("train", waves, "--run-dir", "run")
    assert stopped.code == 130
    assert f"stopped after outer step {step} of 6" in stopped.err
    assert f"memmeta train {waves} --run-dir run --resume" in stopped.err
    assert (here / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (here / "run" / "summary.json").exists()
    monkeypatch.delenv("TEST_STOP_AT")
    resumed = memmeta("train", waves, "--run-dir", "run", "--resume")
    assert (resumed.code, resumed.err) == (0, "")
    assert contents(here / "run", 6) == whole


@pytest.mark.parametrize("kind", ["", "file://", "memory://"])
def test_checkpoints_elsewhere_go_on_bit_for_bit(
    memmeta: Command, waves: Path, here: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = f"{kind}{here}/kept"
    monkeypatch.setenv("TEST_STOP_AT", "train:4:1")
    stopped = memmeta("train", waves, "--run-dir", "run", "--checkpoints", place)
    assert stopped.code == 130
    assert not (here / "run" / "checkpoints").exists()
    monkeypatch.delenv("TEST_STOP_AT")
    again = memmeta("train", waves, "--run-dir", "other", "--checkpoints", place)
    assert again.code == 2
    assert f"--checkpoints {place} already holds the checkpoints of a run" in again.err
    assert not (here / "other").exists()
    resumed = memmeta("train", waves, "--run-dir", "run", "--resume")
    assert (resumed.code, resumed.err) == (0, "")
    assert RunFolder(here / "run").config().checkpoints == place
    assert memmeta("evaluate", "run", "--checkpoint", "best").code == 0
    system, root = url_to_fs(place)
    if kind == "memory://":
        system.get(root, f"{here}/kept", recursive=True)
        system.rm(root, recursive=True)
    assert contents(here / "run", 6, here / "kept") == whole


def test_a_relative_folder_of_checkpoints_is_found_from_elsewhere(
    memmeta: Command, waves: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memmeta("train", waves, "--run-dir", "run", "--checkpoints", "kept", "--steps", "3").code == 0
    monkeypatch.chdir(tmp_path)
    assert memmeta("train", waves, "--run-dir", here / "run", "--resume", "--steps", "4").code == 0
    assert LocalStore(here / "kept").steps()[-1] == 4


def test_a_backend_that_fails_stops_the_run_in_one_line(
    memmeta: Command, waves: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, real = f"memory://{here}/kept", MemoryFileSystem.pipe_file

    def full(system: Any, path: str, data: bytes) -> None:
        if "step-00000003" in path:
            raise RuntimeError("quota\nexceeded")
        real(system, path, data)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", full)
    stopped = memmeta("train", waves, "--run-dir", "run", "--checkpoints", place)
    assert stopped.code == 1
    words = f"{place} can't be written: RuntimeError: quota exceeded; the last checkpoint is {place}/step-00000002\n"
    assert stopped.err == f"memmeta: error: {words}"
    for name in ("ls", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, name, lambda *arguments, **options: 1 / 0)
            for command in (["train", waves, "--run-dir", "run", "--resume"], ["evaluate", "run"]):
                refused = memmeta(*command)
                assert refused.code == 2
                assert refused.err.startswith(f"memmeta: error: {place} can't be read (ZeroDivisionError")
                assert len(refused.err.splitlines()) == 1
    MemoryFileSystem().rm(f"{here}/kept", recursive=True)


def test_a_run_of_an_older_version_goes_on(memmeta: Command, waves: Path, run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("checkpoints: null\n", ""))
    assert "checkpoints" not in yaml.safe_load(config.read_text())
    assert memmeta("train", waves, "--run-dir", run, "--resume", "--steps", "10").code == 0


@pytest.mark.parametrize("outer", ["sgd", "rmsprop"])
def test_other_outer_optimisers_go_on_bit_for_bit(
    memmeta: Command, waves: Path, here: Path, monkeypatch: pytest.MonkeyPatch, outer: str
) -> None:
    assert memmeta("train", waves, "--run-dir", "whole", "--outer", outer).code == 0
    monkeypatch.setenv("TEST_STOP_AT", "train:4:0")
    assert memmeta("train", waves, "--run-dir", "run", "--outer", outer).code == 130
    monkeypatch.delenv("TEST_STOP_AT")
    assert memmeta("train", waves, "--run-dir", "run", "--resume").code == 0
    assert contents(here / "run", 6) == contents(here / "whole", 6)


def test_a_crash_goes_on_from_the_last_checkpoint(
    memmeta: Command, waves: Path, here: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_CRASH_AT", "train:4:3")
    crashed = memmeta("train", waves, "--run-dir", "run")
    assert crashed.code == 1
    assert "the data set is broken here" in crashed.err
    assert crashed.err.splitlines()[1].startswith(f'  File "{waves}"')
    assert crashed.err.splitlines()[-1].startswith("memmeta: error: ZeroDivisionError")
    with (here / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tas')
    monkeypatch.delenv("TEST_CRASH_AT")
    assert memmeta("train", waves, "--run-dir", "run", "--resume").code == 0
    assert contents(here / "run", 6) == whole


def test_resume_from_an_earlier_checkpoint_repeats_the_rest(
    memmeta: Command, waves: Path, here: Path, whole_run: Path, whole: dict[str, Any]
) -> None:
    shutil.copytree(whole_run, here / "whole")
    (here / "whole" / "summary.json").unlink()
    assert memmeta("train", waves, "--run-dir", "whole", "--resume", "step-00000004").code == 2
    assert memmeta("train", waves, "--run-dir", "whole", "--resume", "step-00000003").code == 0
    assert contents(here / "whole", 6) == whole


def test_a_run_may_grow(memmeta: Command, waves: Path, here: Path) -> None:
    assert memmeta("train", waves, "--run-dir", "long", "--steps", "9").code == 0
    assert memmeta("train", waves, "--run-dir", "short", "--steps", "4").code == 0
    assert memmeta("train", waves, "--run-dir", "short", "--resume", "--steps", "9").code == 0
    assert contents(here / "short", 9) == contents(here / "long", 9)
    assert RunFolder(here / "short").config().steps == 9


def test_resume_of_a_finished_run_scores_it_again(
    memmeta: Command, waves: Path, here: Path, whole_run: Path, whole: dict[str, Any]
) -> None:
    shutil.copytree(whole_run, here / "whole")
    assert memmeta("train", waves, "--run-dir", "whole", "--resume").code == 0
    assert contents(here / "whole", 6) == whole


def test_a_task_that_is_not_finite_stops_with_address_and_step(memmeta: Command, waves: Path, here: Path) -> None:
    stopped = memmeta("train", waves, "--bad", "4")
    assert stopped.code == 1
    assert len(stopped.err.splitlines()) == 1
    assert "outer step 5" in stopped.err
    assert "task(seed=0, step=4, index=2)" in stopped.err
    folder = here / "runs" / "waves"
    assert str(Path("runs/waves/checkpoints/step-00000004")) in stopped.err or "step-00000003" in stopped.err
    steps = sorted(entry.name for entry in (folder / "checkpoints").iterdir())
    assert max(steps) <= "step-00000004"
    assert not (folder / "summary.json").exists()


def test_a_first_task_that_is_not_finite_leaves_nothing_behind(memmeta: Command, waves: Path, here: Path) -> None:
    stopped = memmeta("train", waves, "--bad", "0")
    assert stopped.code == 1
    assert "outer step 1" in stopped.err


def test_tasks_that_are_not_finite_can_be_skipped(memmeta: Command, waves: Path, here: Path) -> None:
    done = memmeta("train", waves, "--bad", "4", "--on-nonfinite", "skip")
    assert done.code == 0
    line = RunFolder(here / "runs" / "waves").metrics()[4]
    assert line["tasks"] == 4
    assert line["skipped"] == ["task(seed=0, step=4, index=2)"]


def test_only_the_last_checkpoints_and_the_best_are_kept(memmeta: Command, waves: Path, here: Path) -> None:
    assert memmeta("train", waves, "--steps", "12", "--keep", "1").code == 0
    folder = here / "runs" / "waves" / "checkpoints"
    best = json.loads((here / "runs" / "waves" / "summary.json").read_text())["best"]["step"]
    names = {entry.name for entry in folder.iterdir()}
    assert names == {"step-00000012", f"step-{best:08d}"}


def test_options_come_from_yaml_too(memmeta: Command, waves: Path, here: Path) -> None:
    (here / "options.yaml").write_text("steps: 2\ninner_lr: 0.02\n")
    assert memmeta("train", waves, "--config", "options.yaml", "--inner_lr", "0.03").code == 0
    options = RunFolder(here / "runs" / "waves").config().options
    assert (options["steps"], options["inner_lr"]) == (2, 0.03)


def test_plain_output_is_no_flood(memmeta: Command, waves: Path, here: Path) -> None:
    done = memmeta("train", waves, "--steps", "100")
    assert done.code == 0
    assert sum(line.startswith("step ") for line in done.out.splitlines()) <= 45


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_sigint_to_the_command_itself(waves: Path, here: Path) -> None:
    """A real process, a real signal at some moment, and the same bits in the end."""
    command = [sys.executable, "-m", "memmeta_workers.cli", "train", str(waves), "--steps", "120", "--threads", "1"]
    with (here / "log").open("w") as log:
        child = subprocess.Popen([*command, "--run-dir", "run"], env=environment(), stdout=log, stderr=log)
        metrics = RunFolder(here / "run")
        deadline = time.monotonic() + 120
        while len(metrics.metrics()) < 15 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130, (here / "log").read_text()
    step = metrics.metrics()[-1]["step"]
    assert 15 <= step < 120
    # One more where the signal came while the validation tasks after that step were scored.
    assert LocalStore(metrics.checkpoints).steps()[-1] in (step, step + 1)
    resumed = subprocess.run(
        [*command, "--run-dir", "run", "--resume"], env=environment(), capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    whole = subprocess.run([*command, "--run-dir", "whole"], env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert contents(here / "run", 120) == contents(here / "whole", 120)


def test_a_second_signal_stops_at_once(waves: Path, here: Path) -> None:
    text = waves.read_text().replace(
        "os.kill(os.getpid(), signal.SIGINT)",
        "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)",
    )
    waves.write_text(text)
    command = [sys.executable, "-m", "memmeta_workers.cli", "train", str(waves), "--run-dir", "run"]
    environ = {**environment(), "TEST_STOP_AT": "train:4:1"}
    stopped = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert stopped.returncode == 130
    assert "stopped at once" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    names = sorted(entry.name for entry in (here / "run" / "checkpoints").iterdir())
    assert names[-1] <= "step-00000004"


def test_evaluate_scores_the_same_tasks_again(memmeta: Command, waves: Path, run: Path) -> None:
    done = memmeta("evaluate", "run")
    assert (done.code, done.err) == (0, "")
    assert f"{contents(run, 9)['test']['values']['accuracy']:.1%} ±" in done.out
    assert "step-00000009" in done.out
    assert memmeta("evaluate", "run", "--checkpoint", "best", "--tasks", "3", "--steps", "1").code == 0
    waves.write_text(waves.read_text() + "\n# changed\n")
    changed = memmeta("evaluate", "run")
    assert changed.code == 0
    assert "has changed since this run" in changed.err


def test_plot_draws_a_run(memmeta: Command, here: Path, run: Path) -> None:
    assert memmeta("plot", "run", "--output", "picture.png").code == 0
    assert (here / "picture.png").read_bytes().startswith(b"\x89PNG")
