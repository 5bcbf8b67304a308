"""memmeta: ``accumulate`` of one learner, under several adjoints; the option ``chunk`` says how many tasks are stacked,
one if not given, all in the methods that are named so."""

from __future__ import annotations

from collections.abc import Callable

from memmeta import SGD, Adjoint, Stepwise, Unrolled, maml
from memmeta.programs import Execution

from ..problems import Workload
from .base import Call, Method, Options


def accumulating(adjoint: Adjoint, execution: Execution, stacked: bool) -> Callable[[Workload, Options], Call]:
    """One learner, whose programs are kept from call to call."""

    def prepare(work: Workload, options: Options) -> Call:
        learner = maml(
            work.net,
            loss=work.loss,
            optimizer=SGD(lr=work.lr),
            steps=work.steps,
            metrics={},
            adjoint=adjoint,
            execution=execution,
        )
        chunk = options.get("chunk", len(work.tasks) if stacked else 1)

        def call() -> None:
            learner.accumulate(work.tasks, chunk=chunk)

        return call

    return prepare


def _method(adjoint: Adjoint, *words: str, execution: Execution = "eager", stacked: bool = False) -> Method:
    return Method(
        "-".join(["memmeta", *words]).lower(),
        "memmeta " + ", ".join(words),
        accumulating(adjoint, execution, stacked),
        exact=adjoint.exact,
        options=("chunk",),
        programs=execution != "eager" or adjoint is _FORWARD,
        compiled=execution == "compile",
    )


_FORWARD = Stepwise(hvp="forward")
METHODS = (
    _method(Unrolled(), "Unrolled"),
    _method(Unrolled(), "Unrolled", "stacked", stacked=True),
    _method(Stepwise(), "Stepwise"),
    _method(Stepwise(), "Stepwise", "stacked", stacked=True),
    _method(Stepwise(snapshots="sqrt"), "Stepwise", "sqrt"),
    _method(_FORWARD, "Stepwise", "forward"),
    _method(Stepwise(), "Stepwise", "traced", execution="trace"),
    _method(_FORWARD, "Stepwise", "forward", "traced", execution="trace"),
    _method(Stepwise(), "Stepwise", "compiled", execution="compile"),
    _method(Stepwise(), "Stepwise", "stacked", "compiled", execution="compile", stacked=True),
    _method(_FORWARD, "Stepwise", "forward", "compiled", execution="compile"),
)
