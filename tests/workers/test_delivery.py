"""What of a run is brought home, and that what comes damaged, or not at all, leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from memmeta.errors import InputError, MemmetaError
from memmeta_workers import job_commands
from memmeta_workers.archives import pack_tar
from memmeta_workers.checkpoints import name_of
from memmeta_workers.delivery import PARCEL, Parcel, contents, deliver
from memmeta_workers.door import command
from memmeta_workers.jobs import Job, JobFailed
from memmeta_workers.order import Order
from memmeta_workers.runs import RunFolder
from memmeta_workers.train import find

Command = Callable[..., Any]
ORDER = Order("waves.py", "0" * 64, "deep/wave", "memmeta submit waves.py --resume")
ALWAYS = ["config.yaml", "metrics.jsonl", "summary.json", "curves.png"]


def refusal(act: Callable[[], object], kind: type[MemmetaError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- What is brought


def checkpoints(*steps: int) -> list[str]:
    return [f"checkpoints/{name_of(step)}" for step in steps]


def test_the_metrics_and_the_checkpoint_that_was_asked_for(run: Path) -> None:
    folder = RunFolder(run)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in folder.checkpoints.iterdir())
    best = find(folder, "last", "").best
    assert best is not None
    assert len(steps) >= 2
    assert contents(folder, "best") == ([*ALWAYS, *checkpoints(best.step)], "")
    assert contents(folder, "last") == ([*ALWAYS, *checkpoints(steps[-1])], "")
    assert contents(folder, "all") == ([*ALWAYS, *checkpoints(*steps)], "")
    assert contents(folder, "none") == (ALWAYS, "")


PLAIN = """
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta_workers import Experiment


def experiment():
    learner = mm.maml(nn.Linear(1, 1), loss=F.mse_loss, optimizer=mm.SGD(lr=0.1), steps=1)
    return Experiment(learner=learner, train=mm.tasks.Sinusoid(shots=2, query=2), steps=3, meta_batch=1)
"""


def test_without_validation_tasks_the_best_is_the_last(
    memmeta: Command, here: Path, write: Callable[[str, str], Path]
) -> None:
    assert memmeta("train", write("plain.py", PLAIN), "--run-dir", "run").code == 0
    folder = RunFolder(here / "run")
    for which in ("best", "last", "all"):
        names, left = contents(folder, which)
        assert names[-1:] == checkpoints(3)
        assert left == ""
    shutil.rmtree(folder.checkpoints)
    (here / "run" / "summary.json").unlink()
    (here / "run" / "curves.png").unlink()
    assert contents(folder, "best") == (["config.yaml", "metrics.jsonl"], "")


def test_checkpoints_elsewhere_stay_there(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(run)
    there = tmp_path / "there"
    shutil.move(folder.checkpoints, there)
    for place in (str(there), f"file://{there}"):
        config = yaml.safe_load(folder.config_file.read_text())
        folder.config_file.write_text(yaml.safe_dump({**config, "checkpoints": place}))
        names, left = contents(folder, "best")
        assert names == ALWAYS
        assert left.startswith("its checkpoints are at ")
        assert str(there) in left
        assert contents(folder, "none") == (ALWAYS, "")


def test_a_place_without_a_run(here: Path) -> None:
    assert "run" in refusal(lambda: contents(RunFolder(here), "best"))


def test_a_job_without_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMMETA_RUNS", str(here))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": ORDER.metadata("fetch")}))
    text = refusal(lambda: deliver(["best"]))
    assert text == f"there is no run at {here}/deep/wave on the cluster: was its folder moved, or never begun?"


# --- How it is brought


class Cluster:
    """Plays ``Jobs``: a job that has packed a folder."""

    url = "http://head:8265"

    def __init__(self, folder: Path, archive: Path) -> None:
        pack_tar(folder, contents(RunFolder(folder), "best")[0], archive)
        self.bytes = archive.read_bytes()
        self.parcel = Parcel("node", "memmeta-1.tar", len(self.bytes), sha256(self.bytes).hexdigest())
        self.lines: list[str] | None = None
        self.ended = Job("fetching", "SUCCEEDED", "", {}, 1.0, 2.0, 0)
        self.known = Job("wave-1", "SUCCEEDED", "", ORDER.metadata(), 1.0, 2.0, 0)
        self.error: MemmetaError | None = None
        self.submitted: list[tuple[str, str, Mapping[str, str]]] = []
        self.stopped: list[str] = []
        self.brought: list[Path] = []
        self.stop_error: MemmetaError | None = None

    def job(self, job_id: str) -> Job:
        return self.known

    def submit(self, job_id: str, command: str, metadata: Mapping[str, str]) -> None:
        self.submitted.append((job_id, command, metadata))

    def follow(self, job_id: str) -> Iterator[str]:
        yield "something is printed"
        yield from [PARCEL + json.dumps(asdict(self.parcel))] if self.lines is None else self.lines

    def wait(self, job_id: str) -> Job:
        return self.ended

    def hint(self, *words: str) -> str:
        return command(*words)

    def download(self, node: str, name: str, target: Path, size: int) -> None:
        assert (node, name, size) == (self.parcel.node, self.parcel.name, self.parcel.bytes)
        self.brought.append(target)
        target.write_bytes(self.bytes if self.error is None else self.bytes[:100])
        if self.error is not None:
            raise self.error

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)
        if self.stop_error is not None:
            raise self.stop_error


@pytest.fixture
def cluster(run: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that is played; afterwards its job has been stopped, and the temporary folder is as it was."""
    there = tmp_path / "there"
    shutil.move(run, there)
    made = Cluster(there, tmp_path / "packed.tar")
    monkeypatch.setattr(job_commands, "_cluster", lambda values: made)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield made
    assert list(scratch.iterdir()) == []
    assert made.stopped == [name for name, _, _ in made.submitted]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_comes_home(memmeta: Command, cluster: Cluster, here: Path) -> None:
    done = memmeta("fetch", "wave-1")
    assert (done.code, done.err) == (0, "")
    target = here / "runs" / "wave"
    assert {*ALWAYS} < names(target)
    assert [path.name for path in (target / "checkpoints").iterdir()] == [
        name_of(best.step) if (best := find(RunFolder(target), "last", "").best) else ""
    ]
    assert "fetched: runs/wave, " in done.out
    assert "picture: runs/wave/curves.png" in done.out
    assert "to score it: memmeta evaluate runs/wave --experiment waves.py\n" in done.out
    assert [path.parent for path in cluster.brought] == [here]  # on the disk where the run will be
    ((name, words, metadata),) = cluster.submitted
    assert name.startswith("memmeta-fetch-")
    assert words == "python -m memmeta_workers.delivery best"
    assert metadata == ORDER.metadata("fetch")  # not listed among the trainings, and it knows the run's folder


def test_another_folder_and_another_checkpoint(memmeta: Command, cluster: Cluster, here: Path) -> None:
    (here / "mine").mkdir()  # empty: taken
    cluster.parcel = replace(cluster.parcel, left="its checkpoints are at s3://bucket/run")
    done = memmeta("fetch", "wave-1", "--to", "mine", "--checkpoint", "none")
    assert done.code == 0
    assert (here / "mine" / "config.yaml").is_file()
    assert cluster.submitted[0][1].endswith("delivery none")
    assert "its checkpoints are at s3://bucket/run" in done.out


def test_a_picture_is_drawn_where_none_came(memmeta: Command, cluster: Cluster, here: Path, tmp_path: Path) -> None:
    (tmp_path / "there" / "curves.png").unlink()
    done = memmeta_of(cluster, tmp_path, memmeta)
    assert done.code == 0
    assert "picture: runs/wave/curves.png" in done.out
    assert (here / "runs" / "wave" / "curves.png").is_file()


def test_a_run_that_has_made_no_step_yet(memmeta: Command, cluster: Cluster, here: Path, tmp_path: Path) -> None:
    """What there is has come home: no failure."""
    there = tmp_path / "there"
    for name in ("curves.png", "summary.json"):
        (there / name).unlink()
    (there / "metrics.jsonl").write_text("")
    shutil.rmtree(there / "checkpoints")
    done = memmeta_of(cluster, tmp_path, memmeta)
    assert (done.code, done.err) == (0, "")
    assert "no picture: there is nothing to draw yet" in done.out
    assert names(here / "runs" / "wave") == {"config.yaml", "metrics.jsonl"}


def memmeta_of(cluster: Cluster, tmp_path: Path, memmeta: Command) -> Any:
    """Fetches what is there now."""
    again = Cluster(tmp_path / "there", tmp_path / "again.tar")
    cluster.bytes, cluster.parcel = again.bytes, again.parcel
    return memmeta("fetch", "wave-1")


@pytest.mark.parametrize("words", [[], ["--to", "mine"]])
def test_a_folder_that_is_there_stays_as_it_is(
    memmeta: Command, cluster: Cluster, here: Path, words: list[str]
) -> None:
    target = here / (words[1] if words else "runs/wave")
    target.mkdir(parents=True)
    (target / "kept").write_text("kept")
    done = memmeta("fetch", "wave-1", *words)
    assert (done.code, done.out) == (2, "")
    shown = target.relative_to(here)
    assert done.err == f"memmeta: error: {shown} is there already: name another folder with --to\n"
    assert names(here) == {f"{shown}/kept"}
    assert cluster.submitted == []
    shutil.rmtree(target)
    target.write_text("a file")
    assert "is there already" in memmeta("fetch", "wave-1", *words).err
    assert target.read_text() == "a file"


def test_a_job_of_others(memmeta: Command, cluster: Cluster, here: Path) -> None:
    cluster.known = replace(cluster.known, metadata={})
    done = memmeta("fetch", "wave-1")
    assert done.code == 2
    assert done.err == "memmeta: error: wave-1 is not a job of memmeta submit: there is no run to fetch\n"
    assert cluster.submitted == []


@pytest.mark.parametrize("which", ["first", "", "best last"])
def test_another_checkpoint_than_there_are(memmeta: Command, cluster: Cluster, which: str) -> None:
    done = memmeta("fetch", "wave-1", "--checkpoint", which)
    assert done.code == 2
    assert done.err.startswith("memmeta: error: option --checkpoint: expected one of best, last, all, none")
    assert cluster.submitted == []


def archive_of(*members: tuple[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return packed.getvalue()


def test_an_archive_that_came_damaged(memmeta: Command, cluster: Cluster, here: Path) -> None:
    cluster.bytes = cluster.bytes[:1000] + b"x" + cluster.bytes[1001:]
    done = memmeta("fetch", "wave-1")
    assert done.code == 1
    assert done.err == "memmeta: error: the archive came damaged from http://head:8265: fetch it again\n"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        b"no archive",
        archive_of(("../outside", b"x")),
        archive_of(("/outside", b"x")),
        archive_of(("a", b"x"), ("a", b"y")),
        archive_of(("a", b"x" * 2000))[:1500],
    ],
)
def test_an_archive_that_is_none_or_leads_outside(memmeta: Command, cluster: Cluster, here: Path, text: bytes) -> None:
    cluster.bytes = text
    cluster.parcel = replace(cluster.parcel, bytes=len(text), sha256=sha256(text).hexdigest())
    before = names(here.parent)
    done = memmeta("fetch", "wave-1")
    assert done.code == 2
    assert done.err.startswith("memmeta: error: ")
    assert done.err.count("\n") == 1
    assert list(here.iterdir()) == []
    assert names(here.parent) == before


def test_a_cluster_that_goes_away_meanwhile(memmeta: Command, cluster: Cluster, here: Path) -> None:
    """The first reason is told, not that its job can't be stopped either."""
    cluster.error, cluster.stop_error = JobFailed("the answer was cut short"), InputError("no Ray cluster answers")
    done = memmeta("fetch", "wave-1")
    assert (done.code, done.err) == (1, "memmeta: error: the answer was cut short\n")
    assert list(here.iterdir()) == []


def test_a_cluster_that_goes_away_afterwards(memmeta: Command, cluster: Cluster, here: Path) -> None:
    cluster.stop_error = InputError("no Ray cluster answers")
    assert memmeta("fetch", "wave-1").code == 0
    assert (here / "runs" / "wave" / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("lines", "ended", "code", "text"),
    [
        (["memmeta: error: there is no run at /x"], {"status": "FAILED", "exit_code": 2}, 2, ": there is no run at /x"),
        (["python: not found"], {"status": "FAILED", "exit_code": 127}, 2, ": memmeta is not installed for the python"),
        ([], {"status": "FAILED", "exit_code": 1, "message": "KeyError: 5"}, 1, " failed: KeyError: 5"),
        ([], {}, 1, " has packed nothing: see memmeta logs memmeta-fetch-"),
    ],
)
def test_a_job_that_packs_nothing(
    memmeta: Command, cluster: Cluster, here: Path, lines: list[str], ended: dict[str, Any], code: int, text: str
) -> None:
    cluster.lines, cluster.ended = lines, replace(cluster.ended, **ended)
    done = memmeta("fetch", "wave-1")
    assert done.code == code
    assert done.err.startswith("memmeta: error: job ")
    assert text in done.err
    assert done.err.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("again", "named"),
    [
        ("memmeta submit 'my waves/waves.py' --resume", "'my waves/waves.py'"),
        ("memmeta submit ../waves.py --steps 3 --resume", "../waves.py"),
        ("memmeta submit --steps 3 waves.py --resume", "waves.py"),
        ("memmeta submit", "waves.py"),
        ("it's", "waves.py"),
    ],
)
def test_the_experiment_as_the_user_has_named_it(memmeta: Command, cluster: Cluster, again: str, named: str) -> None:
    cluster.known = replace(cluster.known, metadata=replace(ORDER, again=again).metadata())
    done = memmeta("fetch", "wave-1", "--to", "to here")
    assert f"to score it: memmeta evaluate 'to here' --experiment {named}\n" in done.out


@pytest.mark.parametrize(
    "change",
    [
        {"node": 5},
        {"name": None},
        {"bytes": "7"},
        {"bytes": True},
        {"bytes": -1},
        {"bytes": 7.0},
        {"sha256": ["x"]},
        {"left": 0},
        {"more": "x"},
    ],
)
def test_a_parcel_that_is_told_oddly(memmeta: Command, cluster: Cluster, here: Path, change: dict[str, Any]) -> None:
    cluster.lines = [PARCEL + json.dumps({**asdict(cluster.parcel), **change})]
    check_refused(memmeta, here)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{", '"x"', "[" * 100_000, '{"node": "n"}'])
def test_a_parcel_that_is_none(memmeta: Command, cluster: Cluster, here: Path, text: str) -> None:
    cluster.lines = [PARCEL + text]
    check_refused(memmeta, here)


def check_refused(memmeta: Command, here: Path) -> None:
    done = memmeta("fetch", "wave-1")
    assert done.code == 1
    assert done.err.startswith("memmeta: error: what the cluster says of the packed run can't be understood")
    assert done.err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_parcel_is_told_and_understood(cluster: Cluster) -> None:
    cluster.stopped.clear()
    assert Parcel.of(json.dumps(asdict(cluster.parcel))) == cluster.parcel


def test_words_for_the_terminal_are_shown(memmeta: Command, cluster: Cluster) -> None:
    cluster.parcel = replace(cluster.parcel, left="its checkpoints are \x1b]0;elsewhere\x07")
    assert r"its checkpoints are \x1b]0;elsewhere\x07" in memmeta("fetch", "wave-1").out


@pytest.mark.parametrize("there", [False, True])
def test_an_archive_is_its_owners_alone(tmp_path: Path, there: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("x")
    archive = tmp_path / "a.tar"
    if there:
        archive.write_text("before" * 10_000)
        archive.chmod(0o644)
    before = os.umask(0)
    try:
        pack_tar(tmp_path / "run", ["a"], archive)
    finally:
        os.umask(before)
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as packed:
        assert packed.getnames() == ["a"]
