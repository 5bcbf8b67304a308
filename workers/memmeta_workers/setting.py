"""How a run takes its meta-gradients where a memory budget has chosen that: plain data in ``config.yaml``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memmeta import Stepwise, Unrolled
from memmeta.adjoints import Adjoint
from memmeta.programs import Programs

from .experiment import Experiment

_ADJOINTS: Mapping[str, type[Stepwise | Unrolled]] = {"Stepwise": Stepwise, "Unrolled": Unrolled}


@dataclass(frozen=True)
class Setting:
    """What ``--memory`` has chosen; the same for every process of a run, and after ``--resume``.

    Attributes:
        memory: the budget in bytes.
        bytes: what was predicted.
        adjoint: its name and fields; ``None`` for that of the learner.
        execution: see ``MetaLearner``.
        check: see ``Programs``.
        chunk: tasks stacked.
        microbatch: examples per pass.
    """

    memory: int
    bytes: int
    adjoint: dict[str, Any] | None
    execution: Literal["eager", "trace", "compile"]
    check: Literal["reverse", "difference"]
    chunk: int
    microbatch: int | None

    def made(self) -> Adjoint | None:
        """The adjoint, ``None`` for that of the learner."""
        if self.adjoint is None:
            return None
        fields = {name: value for name, value in self.adjoint.items() if name != "name"}
        return _ADJOINTS[self.adjoint["name"]](**fields)

    def applied(self, experiment: Experiment) -> Experiment:
        """The experiment with this setting; its learner is changed in place."""
        learner = experiment.learner
        learner.adjoint = self.made() or learner.adjoint
        learner.programs = Programs(self.execution, check=self.check)
        return dataclasses.replace(experiment, chunk=self.chunk, microbatch=self.microbatch)


def applied(experiment: Experiment, setting: Setting | None) -> Experiment:
    """The experiment with a setting, if there is one."""
    return experiment if setting is None else setting.applied(experiment)
