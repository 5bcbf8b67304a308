"""Training in one process: the outer loop, its checkpoints, and what is reported at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from memmeta import Report
from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta.memory import resident_bytes

from . import checkpoints
from .board import Board
from .checkpoints import Best, Checkpoint, CorruptError, Extra
from .coordinator import Coordinator, SourceName, StepRecord, StopRequested, check_tasks, local
from .encoding import encode
from .experiment import Experiment
from .footprint import Footprint, measure
from .progress import Display
from .runs import Config, RunFolder
from .update import OuterUpdate


class RunFailed(MemmetaError):
    """A run that began and could not go on; the message says why, and what is left."""


class Interrupted(MemmetaError):
    """A run that was stopped, after its checkpoint was written; the message says how to go on."""


@dataclass
class Run:
    """One run in one process.

    Attributes:
        experiment: on its device.
        config: what is or will be in ``config.yaml``.
        folder: the run's folder.
        display: for the user.
        again: the command that goes on with this run.
        stop: whether the run was asked to stop.
    """

    experiment: Experiment
    config: Config
    folder: RunFolder
    display: Display
    again: str
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        experiment = self.experiment
        self.update = OuterUpdate(
            experiment.learner.meta_parameters(), experiment.outer, experiment.schedule, experiment.clip_norm
        )
        self.coordinator: Coordinator = local(experiment, self.update, self.stop)
        # Refused here rather than at the first checkpoint.
        state = self.update.state_dict()
        encode(state, {}, "the state of the outer optimiser or its schedule")
        self._extra = Extra(self.config.sha256, encode(state["schedule"], {}, "the schedule"))
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def begin(self) -> None:
        """Tries the first tasks, then makes the folder with the checkpoint of step 0.

        Raises:
            InputError: what does not fit, or a folder that can't be written. Nothing was written.
            NonFiniteError: at the first task. Nothing was written.
        """
        check_tasks(self.experiment, self.update.sums_layout)
        self.folder.create(self.config)
        self._held.enter_context(self.folder.locked())
        self._save()

    def resume(self, name: str) -> None:
        """Goes back to a checkpoint: weights, optimiser, schedule, metrics. What was written after it is dropped.

        Args:
            name: "last" or "step-00000100".

        Raises:
            InputError: no such checkpoint; a corrupt one (the last good one is named); one of another experiment.
        """
        found = find(self.folder, name, self.again)
        self._check_ours(found)
        self._held.enter_context(self.folder.locked())
        checkpoints.restore(found, self.experiment.learner)
        self.update.load_state_dict(found.update)
        self._extra = dataclasses.replace(self._extra, best=found.best, pending=found.pending)
        try:
            self.folder.cut_metrics(found.step - (found.pending is not None))
            self.folder.write_config(self.config)
        except OSError as error:
            raise InputError(f"{self.folder.path} can't be written: {error.strerror}; copy it elsewhere") from error
        checkpoints.clean(self.folder.checkpoints)
        for step in checkpoints.steps_in(self.folder.checkpoints):
            if step > found.step:
                checkpoints.remove(self.folder.checkpoints, step)

    def _check_ours(self, found: Checkpoint) -> None:
        if found.experiment != self.config.sha256:
            steps = [step for step in checkpoints.steps_in(self.folder.checkpoints) if step != found.step]
            good = last_good(self.folder, steps, self.config.sha256)
            way = f"the last good one: {self.again} {good}" if good else "resume from one of this run"
            raise InputError(f"{found.folder} is a checkpoint of another experiment file: remove it; {way}")
        if found.schedule_start != self._extra.schedule_start:
            raise InputError(
                f"{found.folder} was made with another learning-rate schedule (does it depend on --steps?): "
                "resume with the same --steps, or train into another --run-dir"
            )
        if found.step > self.config.steps:
            raise InputError(
                f"--steps {self.config.steps}: the checkpoint has {found.step} outer steps already; write a larger "
                "number, or --resume with an earlier checkpoint"
            )

    def train(self) -> None:
        """The outer loop, from where the weights are to the last step.

        Raises:
            Interrupted: after a checkpoint of the last whole step.
            RunFailed: a task, loss or update is not finite or does not fit; or the disk. Checkpoints are as they were.
        """
        self.display.start(self.update.step, self.config.steps)
        board = Board(self.folder.tensorboard, self.update.step)
        try:
            self._loop(board)
        except StopRequested:
            self._save()
            raise Interrupted(self._stopped()) from None
        except MemmetaError as error:
            raise RunFailed(f"{error}; {self._left()}") from error
        finally:
            self.display.stop()
            board.close()

    def _loop(self, board: Board) -> None:
        if self._extra.pending is not None:
            self._finish_step(self._extra.pending, board)
        while self.update.step < self.config.steps:
            record = self.coordinator.run_step()
            self.display.step(record)
            self._finish_step(as_json(record), board)

    def _finish_step(self, line: dict[str, Any], board: Board) -> None:
        step, improved = line["step"], False
        if self.experiment.validation is not None and step % self.experiment.evaluate_every == 0:
            # Should the run be stopped here, the step is whole but its line is not.
            self._extra = dataclasses.replace(self._extra, pending=line)
            report = self._score("validation")
            line = {**line, "validation": summary_of(report)}
            improved = self._note_best(step, report)
            self._extra = dataclasses.replace(self._extra, pending=None)
            self.display.validation(step, report)
        with self._disk():
            self.folder.append(line)
        board.write(line)
        if improved or step % self.experiment.checkpoint_every == 0 or step == self.config.steps:
            board.flush()
            self._save()

    def _score(self, source: SourceName, baseline: str | None = None) -> Report:
        experiment = self.experiment
        steps = experiment.evaluation_steps if baseline is None else None
        return self.coordinator.evaluate(source, experiment.evaluation_tasks, inner_steps=steps, baseline=baseline)

    def _note_best(self, step: int, report: Report) -> bool:
        metric = "accuracy" if "accuracy" in report.names() else "loss"
        value, best = report.mean(metric), self._extra.best
        if best is not None and not (value > best.value if metric == "accuracy" else value < best.value):
            return False
        self._extra = dataclasses.replace(self._extra, best=Best(step, metric, value))
        return True

    def _save(self) -> None:
        if self.update.step in checkpoints.steps_in(self.folder.checkpoints):
            return
        with self._disk():
            self.folder.sync_metrics()
            checkpoints.write(self.folder.checkpoints, self.experiment.learner, self.update, self._extra)
            checkpoints.prune(self.folder.checkpoints, self.experiment.keep, self._extra.best)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MemmetaError(f"{self.folder.path} can't be written: {error.strerror or error}") from error

    def _left(self) -> str:
        steps = checkpoints.steps_in(self.folder.checkpoints)
        return f"the last checkpoint is {self.folder.checkpoints / checkpoints.name_of(steps[-1])}"

    def _stopped(self) -> str:
        return f"stopped after outer step {self.update.step} of {self.config.steps}; to go on: {self.again}"

    def finish(self, seconds: float) -> dict[str, Any]:
        """Scores the held-out tasks and the baselines, measures the memory; returns and writes ``summary.json``.

        Raises:
            Interrupted: the run was stopped meanwhile.
        """
        began = time.perf_counter()
        try:
            test = None if self.experiment.test is None else self._score("test")
            baselines = {name: self._score("test", name) for name in self.experiment.baselines} if test else {}
            footprint = self._measure()
        except StopRequested:
            raise Interrupted(self._stopped()) from None
        summary = self._summary(test, baselines, footprint)
        summary["seconds"] = {"training": seconds, "evaluation": time.perf_counter() - began}
        self.folder.write_summary(summary)
        return summary

    def _measure(self) -> Footprint | None:
        try:
            return measure(self.experiment, self.coordinator)
        except NonFiniteError:
            return None  # a task beyond the end of the training has no say in its result

    def _summary(
        self, test: Report | None, baselines: dict[str, Report], footprint: Footprint | None
    ) -> dict[str, Any]:
        best = self._extra.best
        return {
            "step": self.update.step,
            "checkpoint": checkpoints.name_of(self.update.step),
            "best": None if best is None else dataclasses.asdict(best),
            "test": None if test is None else summary_of(test),
            "baselines": {name: summary_of(report) for name, report in baselines.items()},
            "chance": self.experiment.chance,
            "memory": None if footprint is None else footprint.as_json(),
            "resident_bytes": resident_bytes(),
            "config": dataclasses.asdict(self.config),
        }


def find(folder: RunFolder, name: str, again: str) -> Checkpoint:
    """Reads the checkpoint ``name`` of a run: "last", "best" or "step-00000100".

    Raises:
        InputError: there is none of that name, or it is corrupt; the last good one is named, with ``again``.
    """
    steps = checkpoints.steps_in(folder.checkpoints)
    known = ", ".join(map(checkpoints.name_of, steps[-5:]))
    if not steps:
        raise InputError(f"{folder.path} has no checkpoint: remove the folder, and train anew")
    wanted = steps[-1]
    if name == "best":
        best = find(folder, "last", again).best
        if best is None:
            raise InputError(f"{folder.path} has no best checkpoint (no validation tasks): there are {known}")
        wanted = best.step
    elif name != "last":
        matching = [step for step in steps if checkpoints.name_of(step) == name]
        if not matching:
            raise InputError(f"{folder.path} has no checkpoint {name}: there are {known}")
        wanted = matching[0]
    path = folder.checkpoints / checkpoints.name_of(wanted)
    try:
        return checkpoints.read(path)
    except CorruptError as error:
        good = last_good(folder, [step for step in steps if step != wanted], folder.config().sha256)
        way = f"{again} {good}" if good else "no other checkpoint is whole: remove the folder, and train anew"
        raise InputError(f"{path} is corrupt ({error}); the last good one: {way}") from error


def last_good(folder: RunFolder, steps: list[int], experiment: str) -> str | None:
    """The name of the latest of these checkpoints that is whole, and of this experiment file (its SHA-256)."""
    for step in reversed(steps):
        try:
            found = checkpoints.read(folder.checkpoints / checkpoints.name_of(step))
        except InputError:
            continue
        if found.experiment != experiment:
            continue
        return checkpoints.name_of(step)
    return None


def as_json(record: StepRecord) -> dict[str, Any]:
    """One line of ``metrics.jsonl``; ``times`` and ``memory`` differ from run to run, nothing else does."""
    return {
        "step": record.step,
        "tasks": record.tasks,
        "values": record.values,
        "learning_rate": record.learning_rate,
        "gradient_norm": record.gradient_norm,
        "skipped": list(record.skipped),
        "times": record.times,
        "memory": {"bytes": resident_bytes() if record.peak_bytes is None else record.peak_bytes},
    }


def summary_of(report: Report) -> dict[str, Any]:
    """Means and half-widths of the 95% confidence intervals over tasks, as plain data."""
    names = [name for name in report.names() if "@" not in name]
    return {
        "tasks": len(report.tasks),
        "values": {name: report.mean(name) for name in names},
        "intervals": {name: report.interval(name)[1] for name in names},
    }
