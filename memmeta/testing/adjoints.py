"""check_adjoint: an adjoint on every built-in problem, under every inner optimiser and option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from .. import memory
from ..adjoints import Adjoint
from ..errors import InputError, UnsupportedError
from ..optimizers import InnerOptimizer
from ..rollout import Rollout
from .conformance import Conformance, named, require
from .contract import Setting, Trial
from .learners import check_adapt, check_learner
from .problems import STEPS, Case, built_in, inner_optimizers

TERMS = frozenset({1})  # where the outer loss has terms before the last step: not at every step


def check_adjoint(
    adjoint: Adjoint,
    *,
    problems: Mapping[str, Case] | None = None,
    optimizers: Mapping[str, InnerOptimizer] | None = None,
    tolerance: float = 1e-9,
    trajectory: bool = True,
    growth: float | None = None,
) -> Conformance:
    """Check that an adjoint keeps the contract of ``mm.Adjoint``; about five seconds on one core.

    On each problem, under each inner optimiser, with three inner steps; then with terms of the outer loss at earlier
    steps (``step_weights``), three tasks stacked (``chunk``), and in microbatches, where the problem allows it; on the
    first problem also with none, one and seven inner steps:

    - theta_T, the buffers after it and the losses are those of the plain inner loop, the losses without a graph;
    - the pullback gives a finite gradient of its leaf's shape for every leaf that requires grad and no other, zeros for
      zeros, the same when called again, and changes neither its argument nor any leaf or buffer;
    - ``along`` is called once for each step before the last, with the state before that step;
    - two runs give the same bits; random numbers and buffers are replayed;
    - for an exact adjoint (``approximation`` is empty) the gradient of each group of leaves (params, meta, hyper) is
      that of ``Unrolled()`` to ``tolerance``, and of central finite differences of the plain inner loop to 1e-6.

    Then through ``MetaLearner.accumulate`` and ``mm.adapt``: network, random numbers and autograd mode are as before,
    also when the loss raises, wherever it does; nothing frozen gets a gradient.

    Args:
        adjoint: the instance to check.
        problems: by name, ``built_in()`` if not given.
        optimizers: by name, ``inner_optimizers()`` if not given; tensors that require grad are learned.
        tolerance: of gradients and values, relative.
        trajectory: False for a method that changes the inner loop itself (by a proximal term, say): its theta_T,
            losses and what it shows ``along`` are not compared, and it can't be exact.
        growth: if given, how much the counted peak may grow from 4 to 64 inner steps, as a ratio (1.1 for a method
            whose memory does not depend on T).

    Returns:
        What passed, and what the adjoint refused with an ``UnsupportedError``.

    Raises:
        AssertionError: of one line that names the adjoint, problem, inner optimiser, option, leaf and error; or that
            everything was refused.
    """
    problems, optimizers = problems or built_in(), optimizers or inner_optimizers()
    passed: list[str] = []
    refused: dict[str, str] = {}
    require(trajectory or not adjoint.exact, f"{adjoint}: an exact adjoint has the plain inner loop's trajectory")
    for place, setting, option in _settings(adjoint, problems, optimizers):
        with named(f"{adjoint} on {place}"):
            try:
                _check_setting(Trial(adjoint, setting, tolerance, trajectory), thorough=not option)
            except UnsupportedError as error:
                refused[place] = str(error)
                continue
        passed.append(place)
    require(bool(passed), f"{adjoint}: everything was refused, {next(iter(refused.values()), 'as nothing was given')}")
    for name, case in problems.items():
        place = f"{name}, through accumulate"
        with named(f"{adjoint} on {place}"):
            found = check_learner(adjoint, case, optimizers, tolerance)
        if found:
            passed.append(f"{place} with {found}")
    with named(f"{adjoint} through mm.adapt"):
        passed += ["through mm.adapt"] if check_adapt(adjoint, tolerance) else []
    if growth is not None:
        passed.append(_check_growth(adjoint, problems, optimizers, growth))
    return Conformance(tuple(passed), refused)


def _check_setting(trial: Trial, thorough: bool) -> None:
    solution, along = trial.solve()
    found = trial.check(solution, along)
    if thorough:
        trial.check_again(solution, found)
        if trial.adjoint.exact:
            trial.check_differences(found)


def _settings(
    adjoint: Adjoint, problems: Mapping[str, Case], optimizers: Mapping[str, InnerOptimizer]
) -> Iterator[tuple[str, Setting, str]]:
    """Every composition, with its name and option."""
    for problem, case in problems.items():
        for optimizer, rule in optimizers.items():
            place = f"{problem} with {optimizer}"
            single = case.rollout(rule, STEPS, (0,), None)
            yield place, Setting(single, [single]), ""
            yield f"{place}, step weights", Setting(single, [single], TERMS), "step weights"
            if case.microbatch:
                pieces = case.rollout(rule, STEPS, (0,), 2)
                yield f"{place}, microbatch=2", Setting(pieces, [single]), "microbatch"
            if case.stacks:
                parts = [case.rollout(rule, STEPS, (index,), None) for index in range(3)]
                stacked = case.rollout(rule, STEPS, (0, 1, 2), None)
                terms = TERMS if _accepts_terms(adjoint, stacked) else frozenset()
                yield f"{place}, chunk=3" + ", step weights" * bool(terms), Setting(stacked, parts, terms), "chunk"
    problem, case = next(iter(problems.items()))
    optimizer, rule = next(iter(optimizers.items()))
    place = f"{problem} with {optimizer}, microbatch=2"
    if case.microbatch:
        single, pieces = (case.rollout(rule, STEPS, (0,), size) for size in (None, 2))
        terms = TERMS if _accepts_terms(adjoint, pieces) else frozenset()
        yield f"{place}" + ", step weights" * bool(terms), Setting(pieces, [single], terms), "microbatch"
    if case.microbatch and case.stacks:
        parts = [case.rollout(rule, STEPS, (index,), None) for index in range(3)]
        yield f"{place}, chunk=3", Setting(case.rollout(rule, STEPS, (0, 1, 2), 2), parts), "chunk"
    for steps in (0, 1, 7):  # nothing, nothing to recompute, and enough for a schedule of snapshots
        for optimizer, rule in optimizers.items():
            rollout = case.rollout(rule, steps, (0,), None)
            yield f"{problem} with {optimizer}, steps={steps}", Setting(rollout, [rollout]), "steps"


def _accepts_terms(adjoint: Adjoint, rollout: Rollout) -> bool:
    try:
        adjoint.check(rollout.leaves, rollout.rule, True)
    except UnsupportedError:
        return False
    return True


def _check_growth(
    adjoint: Adjoint, problems: Mapping[str, Case], optimizers: Mapping[str, InnerOptimizer], growth: float
) -> str:
    """Compare the counted peaks of few and many steps under the first inner optimiser that is not refused."""
    for problem, case in problems.items():
        for optimizer, rule in optimizers.items():
            try:
                few, many = (_peak(adjoint, case, rule, steps) for steps in (4, 64))
            except (UnsupportedError, InputError):  # refused, or with rates for fewer steps
                continue
            text = f"{many / few:.2f} times the bytes for 64 inner steps as for 4"
            place = f"memory on {problem} with {optimizer}"
            require(many <= growth * few, f"{adjoint}: {place}: {text}, where {growth} is allowed")
            return f"{place}: {text}"
    raise AssertionError(f"{adjoint}: memory: everything was refused")


def _peak(adjoint: Adjoint, case: Case, rule: InnerOptimizer, steps: int) -> int:
    """Bytes of one meta-gradient with enough examples that a graph outweighs the parameters."""
    rollout = case.rollout(rule, steps, (0,), None)
    rollout = replace(rollout, batches=[case.task(0, examples=200).support] * steps)
    cotangent = {name: p.detach() for name, p in rollout.leaves.params.items()}
    return memory.peak_of(lambda: adjoint.solve(rollout).pullback(cotangent))
