"""What a user's experiment file returns, and how such a file is read."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from memmeta import MetaLearner
from memmeta.errors import InputError
from memmeta.tasks.base import TaskSource

# Streams of the held-out tasks: the same for every run, so that all methods and seeds are scored on the same tasks.
VALIDATION_SEED = 2**32 - 2
TEST_SEED = 2**32 - 1


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The default outer optimiser: Adam, learning rate 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)


@dataclass(frozen=True)
class Experiment:
    """One meta-learning run: what is learned, from which tasks, and how the outer loop goes.

    Attributes:
        learner: the meta-learner; its meta-parameters are trained in place.
        train: tasks of the outer loop. Meta-batch ``s`` of the run is ``train.batch(s, meta_batch, seed=seed)``.
        test: held-out tasks, scored once at the end. The same tasks for every ``seed``.
        validation: held-out tasks, scored every ``evaluate_every`` outer steps; they choose the best checkpoint.
        outer: makes the outer optimiser from the list of meta-parameters.
        schedule: makes the learning-rate schedule of that optimiser; it is stepped once per outer step.
        prepare: ``prepare(learner, step)`` sets what of the learner changes with the outer step (``step_weights``,
            ``adjoint``; MAML++'s annealing); called before every meta-gradient of outer step ``step``, on every worker.
            It must depend on the step alone: steps are repeated and skipped when a run is resumed or a worker is lost.
        steps: length of the run in outer steps.
        meta_batch: tasks per outer step, B.
        shard_size: tasks whose gradient sum is one unit of work and of the fixed order of addition. Another value
            changes the rounding of the result, nothing else. ``None``: the larger of ``chunk`` and 4.
        chunk: tasks stacked and run together inside a shard.
        microbatch: examples of a support or query set that are run at a time; ``None``: all.
        evaluate_every: outer steps between two scores of the validation tasks.
        evaluation_tasks: how many validation or test tasks are scored.
        evaluation_steps: inner steps T in evaluation; ``None``: as many as the learner takes in training.
        checkpoint_every: outer steps between two checkpoints.
        keep: how many of the last checkpoints stay on disk, beside the best one.
        on_nonfinite: ``"raise"`` stops the run at a task whose loss or gradient is not finite; ``"skip"`` leaves the
            task out of sum and count.
        clip_norm: largest 2-norm of the mean meta-gradient over all meta-parameters; ``None``: not clipped.
        seed: the stream of the training tasks, and of the randomness inside the losses. The sources' own ``seed``
            fields are not read.
        baselines: learners that are not meta-trained, by name; adapted to and scored on the same test tasks.
        chance: accuracy of guessing, drawn and printed beside the accuracy; ``None``: unknown.

    Raises:
        InputError: a field has the wrong type or value.
    """

    learner: MetaLearner
    train: TaskSource
    test: TaskSource | None = None
    validation: TaskSource | None = None
    outer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = adam
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    prepare: Callable[[MetaLearner, int], None] | None = None
    steps: int = 1000
    meta_batch: int = 16
    shard_size: int | None = None
    chunk: int = 1
    microbatch: int | None = None
    evaluate_every: int = 100
    evaluation_tasks: int = 100
    evaluation_steps: int | None = None
    checkpoint_every: int = 100
    keep: int = 3
    on_nonfinite: Literal["raise", "skip"] = "raise"
    clip_norm: float | None = None
    seed: int = 0
    baselines: Mapping[str, MetaLearner] = field(default_factory=lambda: MappingProxyType({}))
    chance: float | None = None

    def __post_init__(self) -> None:
        _instance("learner", self.learner, MetaLearner)
        _instance("train", self.train, TaskSource)
        for name in ("test", "validation"):
            if getattr(self, name) is not None:
                _instance(name, getattr(self, name), TaskSource)
        for name in ("steps", "meta_batch", "chunk", "evaluate_every", "evaluation_tasks", "checkpoint_every", "keep"):
            _whole(name, getattr(self, name), 1)
        for name in ("shard_size", "microbatch", "evaluation_steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0, VALIDATION_SEED - 1)
        if self.on_nonfinite not in ("raise", "skip"):
            raise InputError(f'Experiment(on_nonfinite={self.on_nonfinite!r}): write "raise" or "skip"')
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"Experiment(clip_norm={self.clip_norm!r}): write a number above 0, or None")
        if self.chance is not None and not 0 <= self.chance <= 1:
            raise InputError(f"Experiment(chance={self.chance!r}): write an accuracy between 0 and 1, or None")
        if not callable(self.outer) or not (self.schedule is None or callable(self.schedule)):
            raise InputError("Experiment(outer=..., schedule=...) take functions: outer=lambda p: torch.optim.Adam(p)")
        if not (self.prepare is None or callable(self.prepare)):
            raise InputError("Experiment(prepare=...) takes a function of (learner, step)")
        self._check_baselines()

    def _check_baselines(self) -> None:
        trained = {id(parameter) for parameter in self.learner.parameters()}
        for name, learner in self.baselines.items():
            _instance(f"baselines[{name!r}]", learner, MetaLearner)
            if any(id(parameter) in trained for parameter in learner.parameters()):
                raise InputError(
                    f"Experiment(baselines={{{name!r}: ...}}) shares parameters with the learner and would be "
                    "trained along: give it a network of its own (copy.deepcopy)"
                )

    @property
    def tasks_per_shard(self) -> int:
        """``shard_size``, or its default."""
        return self.shard_size if self.shard_size is not None else max(self.chunk, 4)

    def source(self, name: Literal["train", "validation", "test"]) -> TaskSource:
        """The source of that name.

        Raises:
            InputError: the experiment has none.
        """
        found = {"train": self.train, "validation": self.validation, "test": self.test}[name]
        if found is None:
            raise InputError(f"this experiment has no {name} tasks: return Experiment(..., {name}=source)")
        return found


def _instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise InputError(f"Experiment({name}=...) must be a {kind.__name__}, got a {type(value).__name__}")


def _whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"Experiment({name}={value!r}): write a whole number {limit}")


@dataclass(frozen=True)
class ExperimentFile:
    """A user's experiment file, imported.

    Attributes:
        path: the file, absolute.
        sha256: of its text.
        function: its function ``experiment``.
    """

    path: Path
    sha256: str
    function: Callable[..., Experiment]

    def build(self, options: Mapping[str, Any]) -> Experiment:
        """Calls ``experiment(**options)``.

        The global random state of torch, NumPy and Python is seeded first (with ``options["seed"]`` where the
        function has such an argument, else 0), so that the initial weights depend on file and options alone.

        Raises:
            InputError: it returned something else than an Experiment, or could not import what it needs.
        """
        seed = options.get("seed", 0)
        _seed_everything(seed if isinstance(seed, int) and 0 <= seed < 2**32 else 0)
        with _importable(self.path.parent), _import_errors(self.path):
            built = self.function(**options)
        if not isinstance(built, Experiment):
            raise InputError(
                f"experiment() in {self.path.name} returned a {type(built).__name__}: "
                "return a memmeta_workers.Experiment"
            )
        return built


def load(path: str | Path) -> ExperimentFile:
    """Imports an experiment file.

    The module is called ``memmeta_experiment_<stem>``; the file's folder is importable while it runs.

    Raises:
        InputError: no such file, not a Python file, a syntax or import error in it (with file and line), or no
            function called ``experiment``. Any other exception in the file passes through.
    """
    path = Path(path)
    if path.suffix != ".py":
        raise InputError(f"{path} is not a Python file: name an experiment file such as examples/sinusoid.py")
    if not path.is_file():
        raise InputError(f"no such experiment file: {path}")
    path = path.resolve()
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    module = _import(path)
    function = module.__dict__.get("experiment")
    if not inspect.isfunction(function):
        raise InputError(f"{path.name} has no function experiment(...): write one that returns an Experiment")
    return ExperimentFile(path, hashlib.sha256(text).hexdigest(), function)


def _import(path: Path) -> ModuleType:
    name = "memmeta_experiment_" + "".join(c if c.isalnum() else "_" for c in path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} can't be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(path.parent), _import_errors(path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder first on ``sys.path``, as it is for ``python FILE``; ``sys.path`` is as before afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _import_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SyntaxError as error:
        place = f"{error.filename}:{error.lineno}"
        raise InputError(f"{place}: {type(error).__name__}: {error.msg}; correct that line") from error
    except ImportError as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        place = f"{path}:{frames[-1].lineno}" if frames else str(path)
        raise InputError(f"{place}: {error}; install it or correct the import") from error


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - users' code may draw from this global state; it's theirs, not this library's
    torch.manual_seed(seed)
