"""One job, and what is said of a user's code that can't do it."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memmeta
from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta_workers.compute import (
    LESS_MEMORY,
    Job,
    TaskFailed,
    check_tasks,
    compute,
    is_about_memory,
    users_traceback,
)
from memmeta_workers.experiment import Experiment, load
from memmeta_workers.shards import Shard
from memmeta_workers.update import Layout

USERS = '''
"""An experiment whose tasks, loss and metric can be made to fail."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta.errors import InputError, UnsupportedError
from memmeta.tasks.base import Task, TaskSource
from memmeta_workers import Experiment

FAILURES = {
    "zero": lambda: 1 / 0,
    "lines": lambda: fail(ValueError("first line\\n   second line")),
    "chained": lambda: chained(),
    "memory": lambda: fail(MemoryError()),
    "device": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")),
    "allocator": lambda: fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")),
    "input": lambda: fail(InputError("the data set has no such class")),
    "unsupported": lambda: fail(UnsupportedError("no double backward")),
    "stop": lambda: fail(StopIteration("empty")),
    "index": lambda: [][3],
}


def fail(error):
    raise error


def chained():
    try:
        1 / 0
    except ZeroDivisionError as error:
        raise KeyError("class") from error


@dataclass(frozen=True)
class Failing(TaskSource):
    """Sine waves; task ``at`` can't be made."""

    failure: str = ""
    at: int = -1
    classes: int = 0

    def task(self, seed, step, index):
        if self.failure and index == self.at:
            FAILURES[self.failure]()
        if self.classes:
            x, y = torch.randn(6, 2), torch.arange(6) % self.classes
            return Task((x, y), (x, y))
        return mm.tasks.Sinusoid(shots=5, query=5).task(seed, step, index)


def experiment(
    source: str = "", loss: str = "", metric: str = "", at: int = 4, chunk: int = 1, classes: int = 0, raw: bool = False
) -> Experiment:
    """A sine wave learner."""
    def mse(prediction, target):
        if loss:
            FAILURES[loss]()
        return F.cross_entropy(prediction, target) if classes else F.mse_loss(prediction, target)

    def score(prediction, target):
        if metric:
            FAILURES[metric]()
        return (prediction - target).abs().mean()

    net = nn.Sequential(nn.Linear(2, 3)) if classes else nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    metrics = {} if classes else {"error": score}
    def whole(net, batch):
        return mse(net(batch[0]), batch[1])

    learner = mm.maml(net, loss=mse, optimizer=mm.SGD(lr=0.05), steps=2, metrics=metrics)
    if raw:
        learner = mm.MetaLearner(mm.Problem(net, whole, whole), optimizer=mm.SGD(lr=0.05), steps=2)
    sources = {"train": Failing(source, at, classes), "test": Failing("", 0, classes)}
    return Experiment(learner=learner, **sources, meta_batch=8, chunk=chunk)
'''

SHARD = Shard(0, 7, 2, 6)
JOB = Job(1, SHARD, "train", True)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Experiment]:
    path = tmp_path / "users.py"
    path.write_text(USERS, encoding="utf-8")
    file = load(path)
    return lambda **options: file.build(options)


def layout(experiment: Experiment) -> Layout:
    return Layout.of(experiment.learner.meta_parameters(), sums=True)


def failed(experiment: Experiment, job: Job = JOB) -> TaskFailed:
    with pytest.raises(TaskFailed) as caught:
        compute(experiment, layout(experiment), job)
    return caught.value


def frames(error: TaskFailed) -> list[str]:
    return [line.strip() for line in error.traceback.splitlines() if line.lstrip().startswith("File ")]


@pytest.mark.parametrize(
    "options", [{"source": "zero"}, {"loss": "zero"}, {"metric": "zero"}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_users_exception_begins_in_the_users_file(
    made: Callable[..., Experiment], options: dict[str, str], chunk: int, tmp_path: Path
) -> None:
    error = failed(made(**options, chunk=chunk))
    assert (error.kind, error.message, error.memory) == ("ZeroDivisionError", "division by zero", False)
    assert error.traceback.startswith("Traceback (most recent call last):\n")
    assert error.traceback.endswith("ZeroDivisionError: division by zero\n")
    assert frames(error)[0].startswith(f'File "{tmp_path / "users.py"}", line ')
    assert "1 / 0" in error.traceback
    assert "memmeta_workers" not in error.traceback
    assert isinstance(error.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("options", "chunk", "where"),
    [
        # The shard's tasks have the positions 2 to 7.
        ({"source": "zero", "at": 2}, 1, "task(seed=0, step=7, index=2)"),
        ({"source": "zero", "at": 6}, 1, "task(seed=0, step=7, index=6)"),
        ({"loss": "zero"}, 1, "task(seed=0, step=7, index=2)"),
        ({"source": "zero", "at": 2}, 3, "task(seed=0, step=7, index=2)"),
        ({"source": "zero", "at": 4}, 3, "one of the 3 stacked tasks up to task(seed=0, step=7, index=4)"),
        ({"source": "zero", "at": 5}, 3, "task(seed=0, step=7, index=5)"),
        ({"loss": "zero"}, 3, "one of the 3 stacked tasks up to task(seed=0, step=7, index=4)"),
        ({"loss": "zero"}, 4, "one of the 4 stacked tasks up to task(seed=0, step=7, index=5)"),
    ],
)
def test_the_task_is_named(made: Callable[..., Experiment], options: dict[str, Any], chunk: int, where: str) -> None:
    error = failed(made(**options, chunk=chunk))
    assert error.where == where
    assert str(error) == f"ZeroDivisionError: division by zero (in {where})"


def test_scoring_names_the_task_too(made: Callable[..., Experiment]) -> None:
    error = failed(made(loss="zero"), Job(0, Shard(9, 0, 3, 2), "test", False))
    assert error.where == "task(seed=9, step=0, index=3)"


@pytest.mark.parametrize("failure", ["memory", "device", "allocator"])
@pytest.mark.parametrize("place", ["source", "loss"])
def test_a_lack_of_memory_has_a_remedy(made: Callable[..., Experiment], failure: str, place: str) -> None:
    error = failed(made(**{place: failure, "at": 2}))
    assert error.memory
    assert str(error).endswith(f"(in task(seed=0, step=7, index=2)); {LESS_MEMORY}")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (OSError("Cannot allocate memory"), False),
    ],
)
def test_what_is_about_memory(error: BaseException, memory: bool) -> None:
    assert is_about_memory(error) is memory


def test_a_message_of_several_lines_is_told_in_one(made: Callable[..., Experiment]) -> None:
    error = failed(made(source="lines", at=2))
    assert str(error).startswith("ValueError: first line second line (in task(")
    assert "second line" in error.message


def test_a_chain_of_exceptions_is_told(made: Callable[..., Experiment], tmp_path: Path) -> None:
    error = failed(made(source="chained", at=2))
    assert error.kind == "KeyError"
    assert "direct cause of the following exception" in error.traceback
    assert all(frame.startswith(f'File "{tmp_path}') for frame in frames(error))


@pytest.mark.parametrize("kind", ["stop", "index"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_no_exception_is_mistaken(made: Callable[..., Experiment], kind: str, chunk: int) -> None:
    """A StopIteration is not the end of the shard, an IndexError not a label."""
    error = failed(made(source=kind, at=4, chunk=chunk))
    assert error.where.endswith("task(seed=0, step=7, index=4)")


@pytest.mark.parametrize("failure", ["zero", "memory", "lines"])
def test_it_can_be_sent(made: Callable[..., Experiment], failure: str) -> None:
    error = failed(made(source=failure, at=2))
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is TaskFailed
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


def call_from_library(function: Callable[[], object], path: str) -> BaseException:
    """What ``function`` raises when a file of the library calls it, without this file's own frames."""
    scope: dict[str, Any] = {}
    exec(compile("def call(function):\n    function()\n", path, "exec"), scope)
    with pytest.raises(KeyError) as caught:
        scope["call"](function)
    error = caught.value
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
    return error


def test_an_exception_outside_users_code_keeps_its_traceback() -> None:
    library = Path(memmeta.__file__).parent
    scope: dict[str, Any] = {}
    exec(compile("def fail():\n    raise KeyError('theirs')\n", str(library / "trees.py"), "exec"), scope)
    text = users_traceback(call_from_library(scope["fail"], str(library / "episode.py")))
    assert "episode.py" in text
    assert "trees.py" in text


@pytest.mark.parametrize("name", ["memmeta_trial.py", "memmeta-examples/waves.py", "memmeta2/experiment.py"])
def test_a_users_file_beside_the_library_is_the_users(name: str) -> None:
    """``/home/me/memmeta_trial.py`` does not lie in ``/home/me/memmeta``."""
    library = Path(memmeta.__file__).parent
    scope: dict[str, Any] = {}
    exec(compile("def fail():\n    raise KeyError('mine')\n", str(library.parent / name), "exec"), scope)
    text = users_traceback(call_from_library(scope["fail"], str(library / "episode.py")))
    assert name in text
    assert "episode.py" not in text


# What is no failure of the user's code.


@pytest.mark.parametrize(("failure", "message"), [("input", "no such class"), ("unsupported", "no double backward")])
@pytest.mark.parametrize("place", ["source", "loss"])
def test_a_users_memmeta_error_passes_through(
    made: Callable[..., Experiment], failure: str, message: str, place: str
) -> None:
    experiment = made(**{place: failure, "at": 2})
    with pytest.raises(MemmetaError, match=message) as caught:
        compute(experiment, layout(experiment), JOB)
    assert not isinstance(caught.value, TaskFailed)


# Stacked tasks of a user's own losses: it can't be told from any other index that is out of bounds.
@pytest.mark.parametrize(("raw", "chunk"), [(False, 1), (False, 3), (True, 1)])
def test_a_label_that_the_network_does_not_have(made: Callable[..., Experiment], raw: bool, chunk: int) -> None:
    experiment = made(classes=5, chunk=chunk, raw=raw)
    for job in (JOB, Job(0, SHARD, "test", False)):
        with pytest.raises(InputError, match=r"labels .*do not fit the network.* as many outputs") as caught:
            compute(experiment, layout(experiment), job)
        assert f"task(seed=0, step=7, index={chunk + 1})" in str(caught.value)


def test_before_task_interrupts_between_tasks(made: Callable[..., Experiment]) -> None:
    class Enough(BaseException):
        pass

    experiment = made(source="zero", at=5)
    asked = []

    def before() -> None:
        asked.append(1)
        if len(asked) == 4:  # before task 5 of the shard, which can't be made
            raise Enough

    with pytest.raises(Enough):
        compute(experiment, layout(experiment), JOB, before_task=before)
    assert len(asked) == 4
    asked.clear()
    compute(
        experiment, layout(experiment), Job(0, Shard(0, 0, 0, 3), "train", True), before_task=lambda: asked.append(1)
    )
    assert len(asked) == 3
    assert all(parameter.grad is None for parameter in experiment.learner.parameters())


def test_a_buffer_is_written_anew(made: Callable[..., Experiment]) -> None:
    experiment = made()
    fresh = layout(experiment)
    jobs = [Job(0, Shard(0, step, 0, 2), "train", True) for step in range(3)]
    alone = [compute(experiment, fresh, job).sums for job in jobs]
    buffer = torch.zeros_like(alone[0])
    for job, wanted in zip(jobs, alone, strict=True):
        found = compute(experiment, fresh, job, into=buffer)
        assert found.sums is buffer
        assert torch.equal(buffer, wanted)
    assert not torch.equal(alone[0], alone[1])


def test_the_result_says_what_was_done(made: Callable[..., Experiment]) -> None:
    experiment = made()
    found = compute(experiment, layout(experiment), Job(3, Shard(0, 7, 2, 2), "train", True))
    assert (found.job.index, found.count, len(found.report.tasks)) == (3, 2, 2)
    assert "loss_before" in found.report.names()
    scored = compute(experiment, layout(experiment), Job(0, Shard(1, 0, 0, 3), "test", False))
    assert (scored.sums, scored.count) == (None, 3)
    with pytest.raises(InputError, match="no validation tasks"):
        compute(experiment, layout(experiment), Job(0, Shard(1, 0, 0, 3), "validation", False))


def test_the_learner_is_prepared_for_its_step(made: Callable[..., Experiment]) -> None:
    """What changes with the outer step is set from the step that a shard belongs to, whatever was done before."""

    def prepare(learner: memmeta.MetaLearner, step: int) -> None:
        learner.step_weights = [0.5, 0.5] if step < 5 else None

    plain = made()
    changing = dataclasses.replace(plain, prepare=prepare)
    of_layout = layout(plain)
    early, late = (Job(0, Shard(0, step, 0, 2), "train", True) for step in (4, 5))
    last = [compute(plain, of_layout, job).sums for job in (early, late)]
    found = [compute(changing, of_layout, job).sums for job in (early, late, early)]
    assert torch.equal(found[1], last[1])
    assert not torch.equal(found[0], last[0])
    assert torch.equal(found[0], found[2])
    scored = compute(changing, of_layout, Job(0, Shard(1, 0, 0, 2), "test", False))  # its address is no outer step
    assert scored.report.means()


def test_an_error_of_the_preparation_is_the_users(made: Callable[..., Experiment]) -> None:
    experiment = dataclasses.replace(made(), prepare=lambda learner, step: [][step])
    assert "IndexError" in str(failed(experiment))
    with pytest.raises(InputError, match=r"prepare=.*function of \(learner, step\)"):
        dataclasses.replace(made(), prepare=3)  # pyright: ignore[reportArgumentType]


def test_the_first_tasks_are_tried(made: Callable[..., Experiment]) -> None:
    experiment = made(source="zero", at=0)
    with pytest.raises(TaskFailed, match=r"\(in task\(seed=0, step=0, index=0\)\)"):
        check_tasks(experiment, layout(experiment))
    check_tasks(made(source="zero", at=7), layout(experiment))
    experiment = made()
    with torch.no_grad():
        next(iter(experiment.learner.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"^outer step 1: .*index=0"):
        check_tasks(experiment, layout(experiment))
