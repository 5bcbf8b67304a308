"""What is shipped and asked for as a job, what is said before anything is sent, and what a job's end comes to."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memmeta.errors import InputError, MemmetaError
from memmeta_workers import job as job_module
from memmeta_workers import submit as module
from memmeta_workers.capacity import Asked, asked, room, total
from memmeta_workers.checking import FACTS
from memmeta_workers.door import command
from memmeta_workers.failures import JobFailed
from memmeta_workers.job import CHECKED, imported
from memmeta_workers.jobs import ClusterNode, Job
from memmeta_workers.options import submit_parser
from memmeta_workers.order import Order, commit_of
from memmeta_workers.policies import Crew
from memmeta_workers.runs import memmeta_version
from memmeta_workers.watching import outcome

Command = Callable[..., Any]


def cluster(*sizes: float | tuple[float, float]) -> list[ClusterNode]:
    """Nodes by their CPUs, or CPUs and GPUs; the first is the head."""
    pairs = [size if isinstance(size, tuple) else (size, 0.0) for size in sizes]
    return [ClusterNode(f"n{i}", f"10.0.0.{i}", i == 0, cpus, gpus) for i, (cpus, gpus) in enumerate(pairs)]


def wishes(**changes: Any) -> dict[str, Any]:
    """What the check tells of the options, but for what is said."""
    usual: dict[str, Any] = dict.fromkeys(
        ("workers", "threads", "gpus_per_worker", "resume", "run_dir", "checkpoints", "patience")
    )
    return {**usual, "device": "auto", **changes}


def refusal(act: Callable[[], object], kind: type[MemmetaError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Whose options they are


@pytest.mark.parametrize(
    ("argv", "own", "rest"),
    [
        ("", "", ""),
        ("exp.py", "", "exp.py"),
        ("exp.py --steps 5 --follow", "--follow", "exp.py --steps 5"),
        ("--wait exp.py --no-check", "--wait --no-check", "exp.py"),
        ("exp.py --address http://h:8265 --workers 2", "--address http://h:8265", "exp.py --workers 2"),
        ("exp.py --address=http://h:8265 --run-dir=x", "--address=http://h:8265 --run-dir=x", "exp.py"),
        ("exp.py --job_id a --any_version", "--job-id a --any-version", "exp.py"),
        ("exp.py --run_dir=a_b --inner_lr 1", "--run-dir=a_b", "exp.py --inner_lr 1"),
        ("exp.py --exclude 'a b' --resume --exclude=c", "--exclude 'a b' --exclude=c", "exp.py --resume"),
        ("exp.py --most-megabytes 5 --shared-run-dir false", "--most-megabytes 5 --shared-run-dir false", "exp.py"),
        ("exp.py --working-dir", "--working-dir", "exp.py"),
        ("exp.py --insecure --seed -1", "--insecure", "exp.py --seed -1"),
        ("exp.py --follow=false", "--follow=false", "exp.py"),
    ],
)
def test_submits_own_options_and_the_jobs(argv: str, own: str, rest: str) -> None:
    assert submit_parser().split(shlex.split(argv)) == (shlex.split(own), shlex.split(rest))


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")


def test_the_folder_and_the_file_in_it(here: Path) -> None:
    lay(here, "exp.py", "code/exp.py")
    assert module._inside("exp.py", None) == (here, Path("exp.py"))
    assert module._inside("code/exp.py", None) == (here / "code", Path("exp.py"))
    assert module._inside("code/exp.py", ".") == (here, Path("code/exp.py"))
    assert module._inside("code/../exp.py", str(here)) == (here, Path("exp.py"))
    assert module._inside(str(here / "code" / "exp.py"), "code") == (here / "code", Path("exp.py"))


def test_files_are_named_as_in_the_shipped_folder(here: Path) -> None:
    lay(here, "code/exp.py", "code/conf/c.yaml", "c.yaml")
    name, file = "code/exp.py", Path("exp.py")

    def shipped(*words: str) -> list[str]:
        return module._shipped_words(words, name, file, here / "code")

    assert shipped(name, "--steps", "5") == ["exp.py", "--steps", "5"]
    assert shipped("--config", "code/conf/c.yaml", name) == ["--config", "conf/c.yaml", "exp.py"]
    assert shipped(name, "--config=code/conf/c.yaml") == ["exp.py", "--config=conf/c.yaml"]
    for words in (("--config", "c.yaml"), ("--config=c.yaml",), (f"--config={here}/code/../c.yaml",)):
        text = refusal(lambda words=words: shipped(name, *words))
        assert text.endswith(f"c.yaml is not in the folder that is shipped, {here}/code: see --working-dir")


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("exp.py", {}),
        ("exp.py --workers 2:8 --device cuda", {"workers": "2:8", "device": "cuda"}),
        ("exp.py --threads=3 --gpus-per-worker 0.5", {"threads": 3, "gpus_per_worker": 0.5}),
        ("exp.py --resume", {"resume": "last"}),
        ("exp.py --resume step-00000100 --steps 5", {"resume": "step-00000100"}),
        ("exp.py --resume --inner-lr 0.1 --patience 9", {"resume": "last", "patience": 9.0}),
        ("exp.py --gpus_per_worker 2", {"gpus_per_worker": 2.0}),
        ("exp.py --config some.yaml", {"workers": "3", "gpus_per_worker": 0.5}),
        ("exp.py --config=some.yaml --workers 4", {"workers": "4", "gpus_per_worker": 0.5}),
        ("exp.py --checkpoints s3://bucket/run --run 5", {"checkpoints": "s3://bucket/run"}),
    ],
)
def test_what_can_be_known_without_the_experiment(here: Path, words: str, changes: dict[str, Any]) -> None:
    (here / "some.yaml").write_text("workers: 3\ngpus-per-worker: 0.5\ninner_lr: 0.1\n")
    assert module._facts(shlex.split(words), here) == wishes(**changes)


@pytest.mark.parametrize("words", ["--threads many", "--threads 1.5", "--gpus-per-worker=all", "--patience soon"])
def test_what_is_no_number(here: Path, words: str) -> None:
    option = words.replace("=", " ").split()[0]
    assert refusal(lambda: module._facts(["exp.py", *words.split()], here)).startswith(
        f"option {option}: expected a number"
    )


# --- What a job takes of the cluster


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "workers"),
    [
        ([], 1, 0, 0),
        ([4], 1, 0, 4),
        ([4, 4, 2], 2, 0, 5),
        ([4, 4, 2], 3, 0, 2),
        ([0, 0.5, 1.5], 1, 0, 1),
        ([(8, 4)], 1, 1, 4),
        ([(2, 4)], 1, 1, 2),
        ([(8, 1)], 1, 0.1, 8),
        ([(16, 1)], 1, 0.1, 10),
        ([(8, 1), (8, 1)], 1, 2, 0),
        ([(8, 3), (8, 3)], 1, 2, 2),
        ([(0, 4), 8], 1, 1, 0),
    ],
)
def test_room(nodes: list[Any], cpus: int, gpus: float, workers: int) -> None:
    assert room(cluster(*nodes), cpus, gpus) == workers


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([4], "1 node, 4 CPUs, no GPU"),
        ([4, 3.5], "2 nodes, 7.5 CPUs, no GPU"),
        ([(8, 1), (8, 1)], "2 nodes, 16 CPUs, 2 GPUs"),
    ],
)
def test_a_cluster_in_words(nodes: list[Any], text: str) -> None:
    assert total(cluster(*nodes)) == text


@pytest.mark.parametrize(
    ("nodes", "changes", "wanted"),
    [
        # Nothing said: a worker for each node, or for each GPU.
        ([4], {}, Asked(Crew(1, 1), 4, 0)),
        ([4, 4, 4], {}, Asked(Crew(1, 3), 4, 0)),
        ([8, 4], {}, Asked(Crew(1, 2), 4, 0)),
        ([16, 4], {}, Asked(Crew(1, 2), 8, 0)),
        ([0, 4], {}, Asked(Crew(1, 1), 4, 0)),
        ([(8, 2)], {}, Asked(Crew(1, 2), 4, 1)),
        ([4, (8, 2)], {}, Asked(Crew(1, 2), 4, 1)),
        ([(8, 2)], {"device": "cpu"}, Asked(Crew(1, 1), 8, 0)),
        ([(8, 2)], {"gpus_per_worker": 0.5}, Asked(Crew(1, 4), 2, 0.5)),
        # As many as there is room for on the nodes, not in all of the cluster together.
        ([(8, 3), (8, 3)], {"gpus_per_worker": 2.0}, Asked(Crew(1, 2), 8, 2)),
        ([(4, 8)], {}, Asked(Crew(1, 4), 1, 1)),
        ([(16, 1)], {"gpus_per_worker": 0.1}, Asked(Crew(1, 10), 1, 0.1)),
        # As said.
        ([4, 4], {"workers": "2"}, Asked(Crew(1, 2), 4, 0)),
        ([4, 4], {"workers": "4"}, Asked(Crew(1, 4), 2, 0)),
        ([4, 4], {"workers": "3"}, Asked(Crew(1, 3), 2, 0)),
        ([4, 4], {"workers": "2:4"}, Asked(Crew(2, 4), 2, 0)),
        ([4, 4], {"workers": "2", "threads": 1}, Asked(Crew(1, 2), 1, 0)),
        ([4, 4], {"threads": 3}, Asked(Crew(1, 2), 3, 0)),
        # There is no room for all of it: small ones, so that some fit.
        ([4, 4], {"workers": "20"}, Asked(Crew(1, 20), 1, 0)),
        ([4], {"device": "cuda"}, Asked(Crew(1, 1), 1, 1)),
        ([], {}, Asked(Crew(1, 1), 1, 0)),
    ],
)
def test_what_is_asked_for(nodes: list[Any], changes: dict[str, Any], wanted: Asked) -> None:
    assert asked(wishes(**changes), cluster(*nodes)) == wanted


SIZES = st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 16.0]), st.sampled_from([0.0, 1.0, 2.0, 8.0]))


@given(
    nodes=st.lists(SIZES, min_size=1, max_size=5),
    workers=st.sampled_from(["0", "1", "3", "40", "2:2", "2:5", "5:9"]),
    threads=st.sampled_from([None, 1, 2, 5]),
    gpus=st.sampled_from([None, 0.0, 0.1, 0.25, 1.0, 2.0]),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
)
def test_it_fits_where_anything_does(
    nodes: list[tuple[float, float]], workers: str, threads: int | None, gpus: float | None, device: str
) -> None:
    there = cluster(*nodes)
    wanted = asked(wishes(workers=workers, threads=threads, gpus_per_worker=gpus, device=device), there)
    fits = room(there, wanted.cpus, wanted.gpus)
    smallest = room(there, threads or 1, wanted.gpus)
    assert (fits >= wanted.crew.least) == (smallest >= wanted.crew.least)
    assert threads is None or wanted.cpus == threads
    assert gpus is None or wanted.gpus == gpus
    if workers == "0" and threads is None:
        # What was left to it has room for all of it, or there is none at all; and not with one CPU more for each.
        assert fits >= wanted.crew.most or smallest == 0
        assert smallest == 0 or room(there, wanted.cpus + 1, wanted.gpus) < wanted.crew.most
    elif workers != "0":
        assert wanted.crew == Crew.parse(workers)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Asked(Crew(1, 1), 1, 0), "1 worker of 1 CPU"),
        (Asked(Crew(1, 3), 4, 0), "3 workers of 4 CPUs"),
        (Asked(Crew(2, 8), 1, 0.5), "2:8 workers of 1 CPU and 0.5 GPU"),
    ],
)
def test_what_is_asked_for_in_words(wanted: Asked, text: str) -> None:
    assert str(wanted) == text


def resources(*, wait: bool = False, nodes: Sequence[Any] = (4, 4), **changes: Any) -> list[str]:
    return module._resources(wishes(**changes), cluster(*nodes), wait)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--workers 2 --threads 4"),
        ({"workers": "2"}, "--threads 4"),
        ({"threads": 2}, "--workers 2"),
        ({"workers": "1:3", "threads": 2}, ""),
        ({"wait": True}, "--workers 2 --threads 4"),
        ({"workers": "9:9", "wait": True}, "--threads 1"),
        # As many as the run had, as it had them.
        ({"resume": "last"}, ""),
        ({"resume": "last", "workers": "2"}, ""),
        # --workers 0: all on the head.
        ({"workers": "0"}, ""),
        ({"workers": "0", "wait": True, "resume": "last"}, ""),
        ({"wait": True, "resume": "last"}, ""),
        ({"checkpoints": "s3://bucket/run"}, "--workers 2 --threads 4"),
        ({"checkpoints": "/data/run"}, "--workers 2 --threads 4"),
    ],
)
def test_what_is_left_to_it(changes: dict[str, Any], words: str) -> None:
    assert resources(**changes) == words.split()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"workers": "9:9"},
            "no room for 9:9 workers of 1 CPU: the cluster has 2 nodes, 8 CPUs, no GPU, enough for 8;",
        ),
        ({"workers": "2", "threads": 5}, "no room for 2 workers of 5 CPUs"),
        ({"device": "cuda"}, "no room for 1 worker of 1 CPU and 1 GPU"),
        ({"nodes": [0]}, "no room for 1 worker of 1 CPU: the cluster has 1 node, 0 CPUs, no GPU, enough for 0"),
        ({"checkpoints": "checkpoints"}, "--checkpoints checkpoints: on a cluster, name an absolute folder"),
        ({"checkpoints": "~/run", "resume": "last"}, "--checkpoints ~/run: on a cluster"),
        ({"workers": "many"}, "--workers many: write a number of workers"),
    ],
)
def test_what_there_is_no_room_for(changes: dict[str, Any], text: str) -> None:
    assert refusal(lambda: resources(**changes)).startswith(text)


# --- How it goes on


@pytest.mark.parametrize(
    ("argv", "again"),
    [
        ("exp.py", "exp.py --run-dir run --resume"),
        ("exp.py --steps 5 --follow", "exp.py --steps 5 --follow --run-dir run --resume"),
        ("exp.py --run-dir x --job-id y --wait", "exp.py --wait --run-dir run --resume"),
        ("exp.py --run-dir=x --job-id=y --wait", "exp.py --wait --run-dir run --resume"),
        ("--run_dir x exp.py --job_id=y", "exp.py --run-dir run --resume"),
        ("exp.py --resume", "exp.py --run-dir run --resume"),
        ("exp.py --resume step-00000100 --seed 1", "exp.py --seed 1 --run-dir run --resume"),
        ("exp.py --resume=step-00000100", "exp.py --run-dir run --resume"),
        ("--resume exp.py", "exp.py --run-dir run --resume"),
        ("exp.py --resume-from there", "exp.py --resume-from there --run-dir run --resume"),
        ("exp.py --resume last --name last", "exp.py --name last --run-dir run --resume"),
        ("'my exp.py' --exclude 'a b' --exclude=c", "'my exp.py' --exclude 'a b' --exclude=c --run-dir run --resume"),
        ("exp.py --job-id --run-dir --wait", "exp.py --wait --run-dir run --resume"),
    ],
)
def test_the_command_that_goes_on(argv: str, again: str) -> None:
    assert module._again(shlex.split(argv), "run") == f"memmeta submit {again}"


OPTIONS = st.lists(
    st.sampled_from(
        [
            *("--follow", "--wait", "--any_version", "--address=http://h:1", "--exclude 'a, b c'", "--steps 5"),
            *(
                "--config c.yaml",
                "--inner_lr=0.1",
                "--run-dir r",
                "--job-id j",
                "--resume=last",
                "--resume step-00000003",
            ),
        ]
    ),
    unique_by=lambda words: words.replace("=", " ").split()[0],
)


@given(options=OPTIONS, before=st.integers(0, 3))
def test_it_submits_with_the_same_options(options: list[str], before: int) -> None:
    words = [word for option in [*options[:before], "exp.py", *options[before:]] for word in shlex.split(option)]
    again = shlex.split(module._again(words, "my run"))
    assert again[:2] == ["memmeta", "submit"]
    assert again[-3:] == ["--run-dir", "my run", "--resume"]
    # From there on it stays the same.
    assert shlex.split(module._again(again[2:], "my run")) == again

    def own(argv: Sequence[str]) -> dict[str, Any]:
        return {**vars(submit_parser().parse(submit_parser().split(argv)[0])), "run_dir": None, "job_id": None}

    def of_the_job(argv: Sequence[str]) -> list[str]:
        return [word for word in submit_parser().split(argv)[1] if not word.startswith(("--resume", "step-"))]

    assert own(again[2:]) == own(words)
    assert of_the_job(again[2:]) == of_the_job(words)


# --- How it ends


def ended(status: str = "FAILED", exit_code: int | None = 1, message: str = "") -> Job:
    return Job("wave-1", status, message, {}, 1.0, 2.0, exit_code)


LOG = ["checked on the cluster: 2 nodes; run folder: /runs/x", "step 1/6  loss 0.5"]


def test_a_job_that_has_done_its_work() -> None:
    assert outcome(ended("SUCCEEDED", 0), LOG) == 0
    assert outcome(ended("SUCCEEDED", 0), [*LOG, "memmeta: error: told by a task, and got over"]) == 0


@pytest.mark.parametrize(
    ("log", "text"),
    [
        (
            [
                *LOG,
                "memmeta: stopping after the tasks under way",
                "memmeta: stopped after step 3; go on with: memmeta x",
            ],
            "memmeta: stopped after step 3; go on with: memmeta x\n",
        ),
        (LOG, "memmeta: job wave-1 was stopped\n"),
        ([], "memmeta: job wave-1 was stopped\n"),
    ],
)
def test_a_job_that_was_stopped(log: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(ended("STOPPED", None), log) == 130
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize(
    ("exit_code", "kind"), [(2, InputError), (1, JobFailed), (130, JobFailed), (-9, JobFailed), (None, JobFailed)]
)
def test_a_job_that_says_why(exit_code: int | None, kind: type[MemmetaError]) -> None:
    log = [*LOG, "memmeta: error: first", "Traceback: ...", "memmeta: error: the loss is not finite"]
    assert refusal(lambda: outcome(ended(exit_code=exit_code), log), kind) == "job wave-1: the loss is not finite"


MISSING = [
    "/usr/bin/python: Error while finding module specification for 'memmeta_workers.job' (ModuleNotFoundError: No "
    "module named 'memmeta_workers')",
    "/usr/bin/python: No module named memmeta_workers",
    "ModuleNotFoundError: No module named 'torch'",
    "ModuleNotFoundError: No module named 'ray.dashboard'",
    "/bin/sh: 1: python: not found",
    "bash: python: command not found",
]


@pytest.mark.parametrize("line", MISSING)
def test_a_cluster_without_memmeta(line: str) -> None:
    for job, log in ((ended(), [line]), (ended(message=f"exit code 1, last logs:\n{line}"), [])):
        text = refusal(lambda job=job, log=log: outcome(job, log))
        assert text.startswith("job wave-1: memmeta is not installed for the python that the cluster's head runs jobs")
        assert "pip install 'memmeta[service]'" in text


@pytest.mark.parametrize(
    ("log", "message", "text"),
    [
        (["Traceback (most recent call last):", "ValueError: no"], "", "job wave-1 failed: ValueError: no"),
        ([], "exit code 1, last logs:\nTraceback\n  KeyError: 5\n\n", "job wave-1 failed: KeyError: 5"),
        ([], "", "job wave-1 failed: see memmeta logs wave-1"),
        (["  ", ""], "", "job wave-1 failed: see memmeta logs wave-1"),
        (["No module named 'torchvision'"], "", "job wave-1 failed: No module named 'torchvision'"),
        (["No module named 'rayleigh'"], "", "job wave-1 failed: No module named 'rayleigh'"),
        ([], "x" * 5000, f"job wave-1 failed: {'x' * 400}"),
    ],
)
def test_a_job_that_failed_without_a_word(log: list[str], message: str, text: str) -> None:
    assert refusal(lambda: outcome(ended(message=message), log), JobFailed) == text


@dataclass
class Watched:
    """A job that prints these lines and ends like this."""

    lines: Sequence[str | BaseException]
    job: Job
    hint = staticmethod(command)

    def follow(self, job_id: str) -> Iterator[str]:
        for line in self.lines:
            if isinstance(line, BaseException):
                raise line
            yield line

    def wait(self, job_id: str, seconds: float | None = None) -> Job:
        return self.job


def test_watching_ends_when_the_training_begins(capsys: pytest.CaptureFixture[str]) -> None:
    jobs: Any = Watched([*LOG, AssertionError("not followed any more")], ended())
    assert module.watch(jobs, "wave-1", whole=False) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"{LOG[0]}\nit trains; to follow it: memmeta logs wave-1 -f    to stop it: memmeta stop wave-1\n"
    )


def test_watching_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    jobs: Any = Watched([*LOG, "memmeta: error: no data"], ended())
    assert refusal(lambda: module.watch(jobs, "wave-1", whole=True), JobFailed) == "job wave-1: no data"
    assert capsys.readouterr().out.splitlines() == LOG  # its error is told once, by the command
    jobs = Watched(["memmeta: error: no module x on 10.0.0.1"], ended(exit_code=2))
    assert refusal(lambda: module.watch(jobs, "wave-1", whole=False)) == "job wave-1: no module x on 10.0.0.1"


def test_no_longer_watching_leaves_the_job_alone(capsys: pytest.CaptureFixture[str]) -> None:
    jobs: Any = Watched([LOG[1], KeyboardInterrupt()], ended())
    assert module.watch(jobs, "wave-1", whole=True) == 130
    assert "the job goes on: memmeta logs wave-1 -f, memmeta stop wave-1" in capsys.readouterr().err


# --- The order


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
ORDERS = st.builds(
    Order, *[TEXTS] * 8, any_version=st.booleans(), shared_run_dir=st.booleans(), wait=st.booleans()
)  # fmt: skip


@given(order=ORDERS)
def test_an_order_survives_the_cluster(order: Order) -> None:
    metadata = order.metadata()
    assert metadata["memmeta"] == "train"
    assert all(isinstance(text, str) for text in metadata.values())
    assert Order.of(json.loads(json.dumps({**metadata, "other": "x"}))) == order
    assert order.metadata("fetch")["memmeta"] == "fetch"


ORDER = Order("exp.py", "0" * 64, "run", "memmeta submit exp.py --resume", git="abc (modified)")


def test_an_order_names_the_versions_here() -> None:
    assert (ORDER.memmeta, ORDER.ray, ORDER.python) == (memmeta_version(), version("ray"), platform.python_version())


@pytest.mark.parametrize("name", [name for name in ORDER.metadata() if name != "memmeta"])
def test_an_order_with_a_part_missing_is_none(name: str) -> None:
    metadata = ORDER.metadata()
    del metadata[name]
    assert Order.of(metadata) is None


@pytest.mark.parametrize("metadata", [{}, {"memmeta": "train"}, {"memmeta.experiment": "exp.py"}])
def test_a_job_of_others_has_no_order(metadata: dict[str, str]) -> None:
    assert Order.of(metadata) is None


@pytest.mark.parametrize("name", ["any_version", "shared_run_dir", "wait"])
@pytest.mark.parametrize("text", ["", "yes", "True", "{"])
def test_an_order_with_garbage_is_none(name: str, text: str) -> None:
    assert Order.of({**ORDER.metadata(), f"memmeta.{name}": text}) is None


def test_the_order_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": ORDER.metadata()}))
    assert Order.here() == ORDER
    for text in ("{}", '{"metadata": {}}', '{"metadata": {"memmeta": "train"}}'):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
        assert refusal(Order.here) == "this is not a job of memmeta submit: write memmeta train FILE.py"
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert "not a job of memmeta submit" in refusal(Order.here)


HERE = platform.python_version()
MINOR = ".".join(HERE.split(".")[:2])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, None),
        ({"python": f"{MINOR}.99"}, None),
        ({"python": "3.9.1"}, f"the cluster has Python {MINOR}, and the job was submitted with 3.9: use the cluster's"),
        ({"python": "4"}, f"the cluster has Python {MINOR}, and the job was submitted with 4: use"),
        (
            {"memmeta": "9.9"},
            f"the cluster has memmeta {memmeta_version()}, and the job was submitted with 9.9: install",
        ),
        ({"memmeta": "9.9", "python": "3.9.1", "any_version": True}, None),
        ({"ray": "9.9"}, None),  # was compared where the job was submitted
    ],
)
def test_versions_on_the_cluster(changes: dict[str, Any], text: str | None) -> None:
    order = replace(ORDER, **changes)
    if text is None:
        order.check_versions()
        assert order == replace(ORDER, **changes)
    else:
        said = refusal(order.check_versions)
        assert said.startswith(text)
        assert said.endswith("or add --any-version")


@pytest.mark.parametrize(
    ("root", "run_dir", "folder"),
    [
        (None, "run", "/home/me/memmeta-runs/run"),
        ("", "run", "/home/me/memmeta-runs/run"),
        (None, "a/b", "/home/me/memmeta-runs/a/b"),
        (None, "/data/run", "/data/run"),
        (None, "~/run", "/home/me/run"),
        ("/shared", "run", "/shared/run"),
        ("/shared", "/data/run", "/data/run"),
        ("~/shared", "run", "/home/me/shared/run"),
        ("relative", "run", "{cwd}/relative/run"),
    ],
)
def test_the_runs_folder(
    monkeypatch: pytest.MonkeyPatch, here: Path, root: str | None, run_dir: str, folder: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("MEMMETA_RUNS", raising=False)
    if root is not None:
        monkeypatch.setenv("MEMMETA_RUNS", root)
    assert replace(ORDER, run_dir=run_dir).folder() == Path(folder.format(cwd=here))


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """git in a new repository, as nobody in particular."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=n@n"]
        done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    return git


def test_the_commit_of_a_folder(git: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "repository"
    assert commit_of(folder) == ""  # nothing is committed yet
    lay(folder, "exp.py", "code/a.py", "other/b.py")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert commit_of(folder) == commit_of(folder / "code") == commit
    (folder / "code" / "a.py").write_text("changed")
    assert commit_of(folder) == commit_of(folder / "code") == f"{commit} (modified)"
    assert commit_of(folder / "other") == commit
    lay(folder, "other/new.py")
    assert commit_of(folder / "other") == f"{commit} (modified)"
    assert commit_of(tmp_path) == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(folder) == ""  # no git


# --- What a job needs of every node


def test_what_a_file_imports_from_elsewhere(tmp_path: Path) -> None:
    lay(tmp_path, "root/code/package/__init__.py", "root/shared.py")
    files = {
        "root/code/exp.py": (
            "from __future__ import annotations\n"
            "import os, sys as system\n"
            "import numpy.linalg as la, torch\n"
            "import package.part\n"
            "from beside import a\n"
            "from shared import b\n"
            "from . import relative\n"
            "from .relative import c\n"
            "try:\n    import tried\nexcept ImportError:\n    tried = None\n"
            "if system.argv:\n    import perhaps\n"
            "def experiment():\n    import late\n"
        ),
        "root/code/beside.py": "import needed_beside\nimport exp\nimport beside\n",
        "root/code/package/__init__.py": "from sub.module import x\n",
        "root/shared.py": "import needed_shared\n",
        "root/code/unused.py": "import not_needed\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = imported(tmp_path / "root" / "code" / "exp.py", tmp_path / "root")
    assert found == {"numpy", "torch", "sub", "needed_beside", "needed_shared"}


@pytest.mark.parametrize("text", ["", "1 +\n", "import a\n\0", "def experiment(): ..."])
def test_a_file_that_imports_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "exp.py"
    path.write_text(text, encoding="utf-8")
    assert imported(path, tmp_path) == set()
    assert imported(tmp_path / "nowhere.py", tmp_path) == set()


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "exp.py"
    path.write_bytes("# -*- coding: latin-1 -*-\n# \xe9\nimport needed\n".encode("latin-1"))
    assert imported(path, tmp_path) == {"needed"}


def test_a_job_that_is_none(memmeta: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert "not a job of memmeta submit" in refusal(lambda: job_module.job(["exp.py"]))


# --- The check, and the command


class Cluster:
    """Plays ``Jobs``: a cluster of two nodes, which remembers what was submitted."""

    made: ClassVar[list[Cluster]] = []
    hint = staticmethod(command)
    nodes_there: ClassVar[list[ClusterNode]] = cluster(4, 4)

    def __init__(self, address: str | None, insecure: bool, note: Callable[[str], None]) -> None:
        self.address, self.insecure = address, insecure
        self.submitted: list[dict[str, Any]] = []
        Cluster.made.append(self)

    def nodes(self) -> list[ClusterNode]:
        return self.nodes_there

    def submit(
        self, job_id: str, command: str, metadata: Mapping[str, str], archive: Path, environment: Mapping[str, str]
    ) -> None:
        with zipfile.ZipFile(archive) as packed:
            names = packed.namelist()
        told = {"id": job_id, "command": command, "order": Order.of(metadata), "names": names, "archive": archive.name}
        self.submitted.append({**told, "environment": dict(environment)})

    def follow(self, job_id: str) -> Iterator[str]:
        yield f"{CHECKED}2 nodes; run folder: /runs/x"

    def wait(self, job_id: str) -> Job:
        return ended("SUCCEEDED", 0)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Cluster]]:
    """A cluster that is played, and a temporary folder that is left as it was."""
    monkeypatch.setattr(module, "Jobs", Cluster)
    monkeypatch.setattr(Cluster, "made", made := [])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield made
    assert list(scratch.iterdir()) == []


@pytest.fixture
def folder(here: Path, waves: Path) -> Path:
    """A folder of an experiment with a module and data of its own, below the working directory."""
    made = here / "project"
    (made / "data").mkdir(parents=True)
    text = waves.read_text(encoding="utf-8").replace("import memmeta as mm\n", "import memmeta as mm\nimport beside\n")
    text = text.replace("    def learner()", "    print(beside.TEXT, end='')\n\n    def learner()")
    (made / "exp.py").write_text(text, encoding="utf-8")
    (made / "beside.py").write_text("from pathlib import Path\nTEXT = Path('data/text').read_text()\n")
    (made / "data" / "text").write_text("the data")
    return made


def contents_of(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*"))


def test_a_good_experiment_is_checked_and_submitted(
    memmeta: Command, folder: Path, here: Path, there: list[Cluster]
) -> None:
    before = contents_of(here)
    done = memmeta(
        "submit",
        "project/exp.py",
        "--steps",
        "7",
        "--address",
        "http://head:8265",
        "--job-id",
        "wave-1",
        "--inner-lr=0.1",
    )
    assert (done.code, done.out) == (0, "wave-1\n")
    assert contents_of(here) == before
    (jobs,) = there
    assert (jobs.address, jobs.insecure) == ("http://head:8265", False)
    (sent,) = jobs.submitted
    assert sent["names"] == ["beside.py", "data/text", "exp.py"]
    assert sent["archive"] == "project.zip"
    assert sent["command"] == "python -m memmeta_workers.job exp.py --steps 7 --inner-lr=0.1 --workers 2 --threads 4"
    assert sent["environment"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    again = "memmeta submit project/exp.py --steps 7 --inner-lr=0.1 --address http://head:8265 --run-dir exp --resume"
    digest = sha256((folder / "exp.py").read_bytes()).hexdigest()
    assert sent["order"] == Order("exp.py", digest, "exp", again, git=sent["order"].git)
    lines = done.err.splitlines()
    assert lines[0].startswith(f"to ship: 3 files of {folder}, ")
    assert lines[1].startswith("checked: one task's meta-gradient, ")
    assert lines[1].endswith(" s; 7 outer steps")
    assert lines[2:6] == [
        "cluster: 2 nodes, 8 CPUs, no GPU",
        "asked for: 2 workers of 4 CPUs",
        "sent: it begins when the cluster has looked at its nodes, and workers are there",
        f"{CHECKED}2 nodes; run folder: /runs/x",
    ]


@pytest.mark.parametrize(
    ("change", "options", "code", "words"),
    [
        (("import beside\n", "import beside\nimport nowhere_at_all\n"), [], 2, "No module named 'nowhere_at_all'"),
        (None, ["--inner-lrr", "0.1"], 2, "unknown option --inner-lrr: did you mean --inner-lr?"),
        (("bad: int = -1", "bad: int = 0"), ["--bad", "0"], 1, "its outer loss is nan"),
        (
            ("    inner_lr: float = 0.05,", "    inner_lr: float = 0.05,\n    wait: int = 1,"),
            [],
            2,
            "experiment(wait=...): that is an option of memmeta submit",
        ),
        (None, ["--exclude", "data"], 1, "No such file or directory: 'data/text'"),
    ],
)
def test_a_bad_one_is_not_sent(
    memmeta: Command, folder: Path, here: Path, there: list[Cluster],
    change: tuple[str, str] | None, options: list[str], code: int, words: str,
) -> None:  # fmt: skip
    path = folder / "exp.py"
    if change is not None:
        assert change[0] in path.read_text()
        text = path.read_text().replace(*change)
        # The first task is the one that is tried.
        path.write_text(text.replace("and index == 2", "and index == 0") if "bad" in change[0] else text)
    before = contents_of(here)
    done = memmeta("submit", path, *options)
    assert done.code == code
    assert done.out == ""
    last = done.err.splitlines()[-1]
    assert last.startswith("memmeta: error: ")
    assert last.endswith("; nothing was sent (--no-check skips this)")
    assert words in last
    assert "scratch" not in last
    assert there[0].submitted == []
    assert contents_of(here) == before


def test_what_the_check_says_when_it_can_t_say_anything(memmeta: Command, folder: Path, there: list[Cluster]) -> None:
    path = folder / "exp.py"
    path.write_text("import os, sys\nsys.stderr.write('broken\\n')\nos._exit(3)\n")
    done = memmeta("submit", path)
    assert done.code == 1
    *_, shown, last = done.err.splitlines()
    assert shown == "broken"
    assert last == ("memmeta: error: the check ended with exit code 3; nothing was sent (--no-check skips this)")
    assert there[0].submitted == []


def test_the_check_by_itself(folder: Path) -> None:
    """It knows options of a config file; what the experiment prints, without ending its line, is not in the way."""
    (folder / "c.yaml").write_text("workers: '1:3'\nthreads: 2\nrun_dir: named\nsteps: 4\n")
    done = subprocess.run(
        [sys.executable, "-m", "memmeta_workers.checking", "exp.py", "--config", "c.yaml", "--resume"],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    printed, line = done.stdout.splitlines()
    assert printed == "the data"
    facts = json.loads(line.removeprefix(FACTS))
    assert facts.pop("seconds") > 0
    digest = sha256((folder / "exp.py").read_bytes()).hexdigest()
    assert facts == {**wishes(workers="1:3", threads=2, run_dir="named", resume="last"), "steps": 4, "sha256": digest}


@pytest.fixture
def _no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be started by mistake is not."""

    def started(*arguments: object) -> None:
        raise AssertionError("the experiment was tried")

    monkeypatch.setattr(module, "_check", started)


@pytest.mark.usefixtures("_no_check")
def test_without_a_check_it_is_sent_as_it_is(memmeta: Command, folder: Path, there: list[Cluster]) -> None:
    (folder / "exp.py").write_text("import only_on_the_cluster\n")
    flags = ["--no-check", "--follow", "--wait", "--any-version", "--insecure", "--shared-run-dir", "false"]
    done = memmeta(
        "submit", folder / "exp.py", *flags, "--run-dir", "/data/run", "--exclude", "*.none", "--exclude", "data/"
    )
    assert done.code == 0, done.err
    (sent,) = there[0].submitted
    assert there[0].insecure
    assert sent["names"] == ["beside.py", "exp.py"]
    assert (sent["order"].run_dir, sent["order"].any_version, sent["order"].shared_run_dir) == (
        "/data/run",
        True,
        False,
    )
    assert sent["command"].endswith("exp.py --workers 2 --threads 4")
    assert sent["order"].wait
    assert sent["id"] == done.out.split()[0]
    assert sent["id"].startswith("memmeta-exp-")
    assert f"{CHECKED}2 nodes; run folder: /runs/x" in done.out


@pytest.mark.usefixtures("_no_check")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "memmeta submit needs an experiment file: memmeta submit FILE.py"),
        ("--follow --steps 5", "memmeta submit needs an experiment file"),
        ("nowhere.py", "no such experiment file: nowhere.py"),
        ("project/beside", "project/beside is not a Python file: name an experiment file such as"),
        ("project", "project is not a Python file"),
        ("project/exp.py --working-dir other", "project/exp.py is not in --working-dir {here}/other: name a folder"),
        ("project/exp.py --working-dir nowhere", "--working-dir nowhere: no such folder"),
        ("project/exp.py --config c.yaml", "--config c.yaml is not in the folder that is shipped, {here}/project: see"),
        ("project/exp.py --config=c.yaml", "--config c.yaml is not in the folder that is shipped"),
        ("project/exp.py --most-megabytes 0", "option --most-megabytes: expected a whole number of at least 1"),
        ("project/exp.py --shared-run-dir perhaps", "option --shared-run-dir: expected true or false"),
        ("project/exp.py --job-id", "option --job-id needs a value"),
    ],
)
def test_what_is_refused_before_the_cluster_is_asked(
    memmeta: Command, folder: Path, here: Path, there: list[Cluster], words: str, text: str
) -> None:
    lay(here, "c.yaml", "other/x.py")
    before = contents_of(here)
    done = memmeta("submit", *words.split())
    assert done.code == 2
    assert done.err.startswith(f"memmeta: error: {text.format(here=here)}")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert there == []
    assert contents_of(here) == before


@pytest.mark.usefixtures("_no_check")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--most-megabytes 1", "--most-megabytes"),
        ("--checkpoints runs/here", "--checkpoints runs/here: on a cluster, name an absolute folder or an address"),
        ("--workers 9:9", "no room for 9:9 workers of 1 CPU: the cluster has 2 nodes, 8 CPUs, no GPU, enough for 8"),
        ("--device cuda", "no room for 1 worker of 1 CPU and 1 GPU"),
        ("--workers two", "--workers two: write a number of workers"),
        ("--threads two", "option --threads: expected a number, got 'two'"),
    ],
)
def test_what_is_refused_before_anything_is_sent(
    memmeta: Command, folder: Path, here: Path, there: list[Cluster], words: str, text: str
) -> None:
    if "megabytes" in words:
        (folder / "big.bin").write_bytes(bytes(1_100_000))
    before = contents_of(here)
    done = memmeta("submit", "project/exp.py", "--no-check", *words.split())
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("memmeta: error: ")
    assert text in last
    assert done.out == ""
    assert there[0].submitted == []
    assert contents_of(here) == before


def test_help_names_the_options(memmeta: Command) -> None:
    done = memmeta("submit", "exp.py", "--help")
    assert done.code == 0
    for option in ("--working-dir", "--exclude", "--most-megabytes", "--wait", "--no-check", "--insecure"):
        assert option in done.out


def test_a_cluster_that_refuses_leaves_nothing_behind(
    memmeta: Command, folder: Path, here: Path, there: list[Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Cluster, *arguments: object) -> None:
        raise InputError("there is a job a already")

    monkeypatch.setattr(Cluster, "submit", refuse)
    before = contents_of(here)
    done = memmeta("submit", folder / "exp.py", "--no-check", "--job-id", "a")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == "memmeta: error: there is a job a already"
    assert contents_of(here) == before
