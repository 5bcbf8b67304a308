"""Training: the outer loop, its checkpoints, and what is reported at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from memmeta import Report
from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta.memory import resident_bytes

from . import budget, checkpoints, policies
from .board import Board
from .checkpoints import Best, Checkpoint, CorruptError, Extra
from .compute import SourceName, check_tasks
from .coordinator import Coordinator, ServerLost, StepRecord, StopRequested
from .encoding import encode
from .experiment import Experiment
from .failures import Interrupted, RunFailed
from .footprint import Footprint, measure
from .local import parameters_on_cpu
from .policies import Limits, Verdict
from .progress import Display, peak_bytes
from .runs import Config, RunFolder
from .stores import LocalStore, Store, open_store
from .update import OuterUpdate

Result = TypeVar("Result")


@dataclass
class Run:
    """One run, driven by this process.

    Attributes:
        experiment: on its device.
        config: what is or will be in ``config.yaml``.
        folder: the run's folder.
        display: for the user.
        again: the command that goes on with this run.
        stop: whether the run was asked to stop.
        backend: makes the coordinator, in this process or over those of the service; it is closed with the run.
        limits: what is put up with.

    Raises:
        InputError: ``config.checkpoints`` can't be opened, or the outer optimiser can't be saved.
    """

    experiment: Experiment
    config: Config
    folder: RunFolder
    display: Display
    again: str
    stop: Callable[[], bool]
    backend: Callable[[OuterUpdate], AbstractContextManager[Coordinator]]
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        experiment = self.experiment
        self.store = store_of(self.folder, self.config)
        self.update = OuterUpdate(
            parameters_on_cpu(experiment.learner), experiment.outer, experiment.schedule, experiment.clip_norm
        )
        # Refused here rather than at the first checkpoint.
        state = self.update.state_dict()
        encode(state, {}, "the state of the outer optimiser or its schedule")
        self._extra = Extra(self.config.sha256, encode(state["schedule"], {}, "the schedule"))
        self._held = contextlib.ExitStack()
        self._step, self._behind, self._told = 0, False, False
        self._peaks: dict[str, int] = {}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def begin(self) -> None:
        """Tries the first tasks, then makes the folder with the checkpoint of step 0.

        Raises:
            InputError: what does not fit, a folder that can't be written, or ``config.checkpoints`` can't be read or
                written or has some already. Nothing was written.
            NonFiniteError: at the first task. Nothing was written.
        """
        with _reading(self.store):
            held = self.store.steps()
        if held:
            raise InputError(
                f"--checkpoints {self.store} already holds the checkpoints of a run: name another place, or add "
                "--resume to go on with that run in its --run-dir"
            )
        check_tasks(self.experiment, self.update.sums_layout)
        self._start()
        self.folder.create(self.config)
        self._held.enter_context(self.folder.locked())
        try:
            with self._disk(self.store):
                self.store.clean()
            self._save()
        except MemmetaError as error:
            if self.config.checkpoints is None or not isinstance(error.__cause__, OSError):
                raise
            self.folder.discard()
            raise InputError(f"--checkpoints {error}; name a place that can") from error

    def resume(self, name: str) -> None:
        """Goes back to a checkpoint: weights, optimiser, schedule, metrics. What was written after it is dropped.

        Args:
            name: "last" or "step-00000100".

        Raises:
            InputError: no such checkpoint; a corrupt one (the last good one is named); one of another experiment.
            MemmetaError: later checkpoints can't be removed.
        """
        found = find(self.folder, name, self.again)
        self._check_ours(found)
        self._held.enter_context(self.folder.locked())
        checkpoints.restore(found, self.experiment.learner)  # refused here, before any process is asked to
        self._start()
        self._surviving(lambda: self.coordinator.server.load(self.store, found), replay=False)
        self._step = found.step
        self._extra = dataclasses.replace(self._extra, best=found.best, pending=found.pending)
        try:
            self.folder.cut_metrics(found.step - (found.pending is not None))
            self.folder.write_config(self.config)
        except OSError as error:
            raise InputError(f"{self.folder.path} can't be written: {error.strerror}; copy it elsewhere") from error
        with self._disk(self.store):
            self.store.clean()
            for step in self.store.steps():
                if step > found.step:
                    self.store.remove(step)

    def _start(self) -> None:
        self.coordinator = self._held.enter_context(self.backend(self.update))

    def _check_ours(self, found: Checkpoint) -> None:
        if found.experiment != self.config.sha256:
            with _reading(self.store):
                steps = [step for step in self.store.steps() if step != found.step]
                good = last_good(self.store, steps, self.config.sha256)
            way = f"the last good one: {self.again} {good}" if good else "resume from one of this run"
            raise InputError(f"{found.place} is a checkpoint of another experiment file: remove it; {way}")
        if found.schedule_start != self._extra.schedule_start:
            raise InputError(
                f"{found.place} was made with another learning-rate schedule (does it depend on --steps?): "
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
        self.display.start(self._step, self.config.steps)
        board = Board(self.folder.tensorboard, self._step)
        try:
            self._loop(board)
        except StopRequested:
            self._save_stopped()
            raise Interrupted(self._stopped()) from None
        except MemmetaError as error:
            raise RunFailed(f"{error}; {self._left()}") from error
        finally:
            self.display.stop()
            board.close()

    def _save_stopped(self) -> None:
        if self._behind:
            return  # the last checkpoint stands, and the steps after it are repeated on --resume
        try:
            self._save()
        except StopRequested:
            return  # the server was lost too: as above
        except MemmetaError as error:
            raise RunFailed(f"{error}; {self._left()}") from error

    def _loop(self, board: Board) -> None:
        if self._extra.pending is not None:
            self._finish_step(self._extra.pending, board)
        while self._step < self.config.steps:
            record = self._surviving(self.coordinator.run_step)
            self._step = record.step
            record = self._compared(record)
            self._peaks.update(record.service.get("peak_bytes", {}))
            self.display.step(record)
            self._finish_step(as_json(record), board)

    def _compared(self, record: StepRecord) -> StepRecord:
        """Says, of the first step that is measured, what was predicted and what it took."""
        chosen, measured = self.config.chosen, record.peak_bytes
        if chosen is None or measured is None:
            return record
        if not self._told:
            self._told = True
            self.display.note(budget.outcome(chosen, measured))
        # On the CPU only the first step's bytes are counted; the others show what is resident, and so does this one.
        return dataclasses.replace(record, peak_bytes=None) if self.config.device == "cpu" else record

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
        with self._disk(self.folder.path):
            self.folder.append(line)
        board.write(line)
        self.coordinator.server.observe(line)
        if improved or step % self.experiment.checkpoint_every == 0 or step == self.config.steps:
            board.flush()
            self._save()

    def _score(self, source: SourceName, baseline: str | None = None) -> Report:
        experiment = self.experiment
        steps = experiment.evaluation_steps if baseline is None else None
        return self._surviving(
            lambda: self.coordinator.evaluate(source, experiment.evaluation_tasks, inner_steps=steps, baseline=baseline)
        )

    def _surviving(self, action: Callable[[], Result], *, replay: bool = True, losses: int = 0) -> Result:
        """Does something that needs the server. Should it be lost meanwhile, a fresh one goes back to the last
        checkpoint, repeats the outer steps since, bit for bit, and the action is done again."""
        try:
            if losses:
                self.coordinator.server.restart()
                if replay:
                    self._replay()
            return action()
        except ServerLost as error:
            losses += 1
            if policies.after_server_loss(losses, self.limits) is Verdict.STOP:
                where = f"loss number {losses} in outer step {self._step + 1}"
                raise MemmetaError(f"{error}; that was {where}") from error
            self.display.note(f"{error}; another is started")
        return self._surviving(action, replay=replay, losses=losses)

    def _replay(self) -> None:
        with _reading(self.store):
            steps = self.store.steps()
            if self._step == 0 and not steps:
                return  # a fresh server has the initial weights
            found = find(self.folder, last_good(self.store, steps, self.config.sha256) or "last", self.again)
            self.coordinator.server.load(self.store, found)
        if found.step < self._step:
            self.display.note(f"the parameter server repeats outer steps {found.step + 1} to {self._step}")
        self._behind = True
        while self.coordinator.server.step < self._step:
            self.coordinator.run_step()
        self._behind = False

    def _note_best(self, step: int, report: Report) -> bool:
        metric = "accuracy" if "accuracy" in report.names() else "loss"
        value, best = report.mean(metric), self._extra.best
        if best is not None and not (value > best.value if metric == "accuracy" else value < best.value):
            return False
        self._extra = dataclasses.replace(self._extra, best=Best(step, metric, value))
        return True

    def _save(self) -> None:
        with self._disk(self.folder.path):
            self.folder.sync_metrics()
        with self._disk(self.store):
            self._surviving(self._write)
            self.store.prune(self.experiment.keep, self._extra.best)

    def _write(self) -> None:
        if self._step not in self.store.steps():
            self.coordinator.server.save(self.store, self._extra)

    @contextlib.contextmanager
    def _disk(self, place: object) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MemmetaError(f"{place} can't be written: {error.strerror or error}") from error

    def _left(self) -> str:
        try:
            steps = self.store.steps()
        except OSError:
            steps = []
        return f"the last checkpoint is {self.store.location(steps[-1])}" if steps else f"see {self.store}"

    def _stopped(self) -> str:
        return f"stopped after outer step {self._step} of {self.config.steps}; to go on: {self.again}"

    def finish(self, seconds: float) -> dict[str, Any]:
        """Scores the held-out tasks and the baselines, measures the memory; returns and writes ``summary.json``.

        Raises:
            Interrupted: the run was stopped meanwhile.
            RunFailed: a held-out task can't be scored.
        """
        began = time.perf_counter()
        try:
            test = None if self.experiment.test is None else self._score("test")
            baselines = {name: self._score("test", name) for name in self.experiment.baselines} if test else {}
            footprint = self._measure()
        except StopRequested:
            raise Interrupted(self._stopped()) from None
        except MemmetaError as error:
            raise RunFailed(f"{error}; {self._left()}") from error
        summary = self._summary(test, baselines, footprint)
        summary["seconds"] = {"training": seconds, "evaluation": time.perf_counter() - began}
        self.folder.write_summary(summary)
        return summary

    def _measure(self) -> Footprint | None:
        if not self.coordinator.embedded:
            return None  # the memory is the workers', and what they have had is in every line of the metrics
        try:
            return measure(self.experiment, self.coordinator)
        except NonFiniteError:
            return None  # a task beyond the end of the training has no say in its result

    def _summary(
        self, test: Report | None, baselines: dict[str, Report], footprint: Footprint | None
    ) -> dict[str, Any]:
        best = self._extra.best
        return {
            "step": self._step,
            "checkpoint": checkpoints.name_of(self._step),
            "best": None if best is None else dataclasses.asdict(best),
            "test": None if test is None else summary_of(test),
            "baselines": {name: summary_of(report) for name, report in baselines.items()},
            "chance": self.experiment.chance,
            "memory": None if footprint is None else footprint.as_json(),
            "workers": self._peaks,
            "resident_bytes": resident_bytes(),
            "config": dataclasses.asdict(self.config),
        }


def store_of(folder: RunFolder, config: Config) -> Store:
    """Where the checkpoints of a run are.

    Raises:
        InputError: ``config.checkpoints`` can't be opened.
    """
    return LocalStore(folder.checkpoints) if config.checkpoints is None else open_store(config.checkpoints)


@contextlib.contextmanager
def _reading(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{store} can't be read ({error.strerror or error}): see that it can be reached from here, then try again"
        ) from error


def find(folder: RunFolder, name: str, again: str) -> Checkpoint:
    """Reads the checkpoint ``name`` of a run: "last", "best" or "step-00000100".

    Raises:
        InputError: there is none of that name, or it is corrupt (the last good one is named, with ``again``); or the
            place of the checkpoints can't be read.
    """
    config = folder.config()
    store = store_of(folder, config)
    with _reading(store):
        steps = store.steps()
        wanted = _wanted(folder, steps, name, again)
        try:
            return store.read(wanted)
        except CorruptError as error:
            good = last_good(store, [step for step in steps if step != wanted], config.sha256)
            way = f"{again} {good}" if good else "no other checkpoint is whole: remove the folder, and train anew"
            raise InputError(f"{store.location(wanted)} is corrupt ({error}); the last good one: {way}") from error


def _wanted(folder: RunFolder, steps: list[int], name: str, again: str) -> int:
    """The step of the checkpoint ``name``."""
    if not steps:
        raise InputError(f"{folder.path} has no checkpoint: remove the folder, and train anew")
    known = ", ".join(map(checkpoints.name_of, steps[-5:]))
    if name == "last":
        return steps[-1]
    if name == "best":
        best = find(folder, "last", again).best
        if best is None:
            raise InputError(f"{folder.path} has no best checkpoint (no validation tasks): there are {known}")
        return best.step
    matching = [step for step in steps if checkpoints.name_of(step) == name]
    if not matching:
        raise InputError(f"{folder.path} has no checkpoint {name}: there are {known}")
    return matching[0]


def last_good(store: Store, steps: list[int], experiment: str) -> str | None:
    """The name of the latest of these checkpoints that is whole, and of this experiment file (its SHA-256).

    Raises:
        OSError: the place of the checkpoints.
    """
    for step in reversed(steps):
        try:
            found = store.read(step)
        except InputError:
            continue
        if found.experiment == experiment:
            return checkpoints.name_of(step)
    return None


def as_json(record: StepRecord) -> dict[str, Any]:
    """One line of ``metrics.jsonl``; only ``times``, ``memory`` and ``service`` differ from run to run."""
    return {
        "step": record.step,
        "tasks": record.tasks,
        "values": record.values,
        "learning_rate": record.learning_rate,
        "gradient_norm": record.gradient_norm,
        "skipped": list(record.skipped),
        "times": record.times,
        "memory": {"bytes": peak_bytes(record)},
        **({"service": record.service} if record.service else {}),
    }


def summary_of(report: Report) -> dict[str, Any]:
    """Means and half-widths of the 95% confidence intervals over tasks, as plain data."""
    names = [name for name in report.names() if "@" not in name]
    return {
        "tasks": len(report.tasks),
        "values": {name: report.mean(name) for name in names},
        "intervals": {name: report.interval(name)[1] for name in names},
    }
