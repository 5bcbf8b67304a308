"""An ensemble of a run's best checkpoints, each adapted to the task, their logits averaged (MAML++'s evaluation)."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..episode import Episode, check_steps
from ..errors import InputError
from ..learner import MetaLearner
from ..metabatch import AnyTask, Options, Placed, placed_tasks
from ..places import copied
from ..problem import Supervised
from ..report import Report, TaskScore

State = Mapping[str, Tensor]


class Ensemble:
    """The best states of a learner, and predictions by all of them.

    ``offer(score)`` after every epoch keeps a copy of the learner's state if it is among the best; ``evaluate(tasks)``
    adapts each of them to every task and scores the mean of their logits. Costs a state per member, and as many inner
    loops per task as there are members. The learner is as before afterwards.

    Args:
        learner: a learner with a supervised problem (``mm.maml``, ``mm.maml_plus_plus``).
        size: the most members there are; the paper has 5.
        states: members to begin with, such as the ``state_dict()``s of checkpoints, by their scores.

    Raises:
        InputError: fewer than one member; an outer loss that is none of (prediction, target).
    """

    def __init__(self, learner: MetaLearner, size: int = 5, states: Iterable[tuple[float, State]] = ()) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"Ensemble(size={size!r}): write the number of members, at least 1")
        if not isinstance(learner.problem.outer_loss, Supervised):
            raise InputError(
                "Ensemble averages predictions, and this learner's outer loss is not one of (prediction, target): make "
                "it by mm.maml or mm.maml_plus_plus, or with mm.Supervised(loss)"
            )
        self.learner, self.size = learner, size
        self._scored: Supervised = learner.problem.outer_loss
        self._members: list[tuple[float, State]] = []
        for score, state in states:
            self._take(score, copied(dict(state)))

    @property
    def scores(self) -> list[float]:
        """The members' scores, the best first."""
        return [score for score, _ in self._members]

    def offer(self, score: float) -> bool:
        """Keep a copy of the learner's present state if ``score`` (validation accuracy, the higher the better) is
        among the best; whether it was kept. Of equal scores the earlier stays; NaN, a diverged epoch's, is none."""
        if math.isnan(score) or (len(self._members) == self.size and not score > self._members[-1][0]):
            return False
        self._take(score, copied(self.learner.state_dict()))
        return True

    def best(self, size: int) -> Ensemble:
        """An ensemble of the ``size`` best of these members."""
        return Ensemble(self.learner, size, self._members)

    def evaluate(
        self, tasks: Iterable[AnyTask], *, steps: int | None = None, chunk: int = 1, seed: int | None = None
    ) -> Report:
        """The loss and metrics of the mean logits on each task's query set; ``report.interval("accuracy")``.

        Args:
            tasks: ``Task``s or pairs (support, query); a member goes through all of them, so they are kept.
            steps: inner steps, as many as in training if not given.
            chunk: how many tasks are stacked.
            seed: as in ``MetaLearner.accumulate``; modes are used as they are.

        Raises:
            InputError: no members, no tasks.
        """
        if not self._members:
            raise InputError("this ensemble has no members: call offer(score) after an epoch of training")
        steps = self.learner.steps if steps is None else steps
        check_steps(steps, 0)
        tasks = list(tasks)
        sums: list[Tensor] = []
        for _, state in self._members:
            with self._holding(state):
                for i, logits in enumerate(self._logits(tasks, steps, chunk, seed)):
                    sums[i : i + 1] = [sums[i] + logits if i < len(sums) else logits]
        if not sums:
            raise InputError("there are no tasks to evaluate: give at least one")
        means = (total / len(self._members) for total in sums)
        return Report(tuple(self._score(placed, next(means)) for placed in placed_tasks(tasks, seed)))

    def _logits(self, tasks: Sequence[AnyTask], steps: int, chunk: int, seed: int | None) -> Iterator[Tensor]:
        """The adapted network's predictions (n, ways) on each task's query set."""
        learner = self.learner
        options = Options(replace(learner.problem, outer_loss=_prediction).bind(), chunk, None, seed)
        source = placed_tasks(tasks, seed)
        while group := list(itertools.islice(source, chunk)):
            members, seeds = [placed.task for placed in group], [placed.seed for placed in group]
            episode = Episode(options.problem, learner.optimizer, steps, members, seeds)
            logits = episode.score(steps, episode.last_state(learner.adjoint)).metrics["logits"]
            yield from logits if len(group) > 1 else [logits]

    @torch.no_grad()
    def _score(self, placed: Placed, logits: Tensor) -> TaskScore:
        target = placed.task.query[1]
        values = {"loss": self._scored.loss(logits, target)}
        values.update({name: metric(logits, target) for name, metric in self._scored.metrics.items()})
        return TaskScore(placed.task.address, {name: float(value) for name, value in values.items()})

    def _take(self, score: float, state: State) -> None:
        if math.isnan(score):
            raise InputError("Ensemble(states=): a member's score is NaN; leave it out")
        self._members = sorted([*self._members, (score, state)], key=lambda member: -member[0])[: self.size]

    @contextlib.contextmanager
    def _holding(self, state: State) -> Iterator[None]:
        before = copied(self.learner.state_dict())
        self.learner.load_state_dict(state)
        try:
            yield
        finally:
            self.learner.load_state_dict(before)


def _prediction(net: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = net(batch[0])
    return logits.sum(), {"logits": logits}
