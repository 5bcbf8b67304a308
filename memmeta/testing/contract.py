"""The contract of an adjoint on one rollout: values, cotangents, what must stay as it was; and exactness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import trees
from ..adjoints import Adjoint, Solution, Unrolled
from ..rollout import Leaves, Rollout, State
from ..trees import Tensors
from .conformance import require
from .measures import central_difference, copies, moved, norm, random_like, same_bits, slope

GROUPS = ("params", "meta", "hyper")


class Path(NamedTuple):
    """A plain inner loop: the states s_0 .. s_T and the T losses."""

    states: list[State]
    losses: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One composition to check.

    Attributes:
        rollout: the inner loop that the adjoint gets.
        parts: inner loops of single tasks on whole batches that together must give the same.
        terms: the steps where the outer loss has terms before the last one.
    """

    rollout: Rollout
    parts: list[Rollout]
    terms: frozenset[int] = frozenset()

    @property
    def stacked(self) -> bool:
        return len(self.parts) > 1

    def cotangents(self, t: int) -> list[Tensors]:
        """Those of theta_t, one for each part: normal numbers."""
        return [random_like(part.leaves.params, 10 * t + index) for index, part in enumerate(self.parts)]

    def cotangent(self, t: int) -> Tensors:
        """That of theta_t, for all parts together."""
        return joined(self.cotangents(t), self.stacked)


def joined(trees_of_parts: list[Tensors], stacked: bool) -> Tensors:
    """Each part's tensors on a leading dimension."""
    if not stacked:
        return trees_of_parts[0]
    return {name: torch.stack([tree[name] for tree in trees_of_parts]) for name in trees_of_parts[0]}


def plain_path(rollout: Rollout) -> Path:
    """The inner loop as ``rollout.advance`` runs it."""
    with rollout.session():
        states, losses = [rollout.start()], []
        for t in range(rollout.steps):
            loss, state = rollout.advance(t, states[-1])
            losses.append(loss)
            states.append(state)
    return Path(states, losses)


def unrolled(setting: Setting) -> Leaves:
    """The meta-gradient by ``Unrolled()``, task by task."""
    found: list[Leaves] = []
    for index, part in enumerate(setting.parts):

        def along(t: int, params: Tensors, buffers: Tensors, index: int = index) -> Tensors | None:
            return setting.cotangents(t)[index] if t in setting.terms else None

        solution = Unrolled().solve(part, along if setting.terms else None)
        found.append(solution.pullback(setting.cotangents(part.steps)[index]))
    params = joined([leaves.params for leaves in found], setting.stacked)
    meta, hyper = ({n: sum_of([g[i][n] for g in found]) for n in found[0][i]} for i in (1, 2))
    return Leaves(params, meta, hyper)


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


class Along:
    """The gradients of the outer loss's terms, and a record of when it was asked for them with what."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.calls: list[tuple[int, Tensors, Tensors]] = []

    def __call__(self, t: int, params: Tensors, buffers: Tensors) -> Tensors | None:
        self.calls.append((t, copies(params), copies(buffers)))
        return self._setting.cotangent(t) if t in self._setting.terms else None

    def check(self, steps: int) -> None:
        """It was called once for each step before the last, so that no term of the outer loss is lost."""
        asked = [t for t, _, _ in self.calls]
        for t in sorted(set(asked) | set(range(1, steps))):
            require(0 < t < steps, f"along was called for step {t}: only 1 to {steps - 1} have terms of their own")
            require(asked.count(t) < 2, f"along was called {asked.count(t)} times for step {t}: call it once")
            require(t in asked, f"along was never called for step {t}")

    def check_states(self, path: Path, tolerance: float) -> None:
        """It was called with the states of the plain inner loop."""
        for t, params, buffers in self.calls:
            for what, found, wanted in (
                ("parameters", params, path.states[t].params),
                ("buffers", buffers, path.states[t].buffers),
            ):
                _same(found, wanted, tolerance, f"along was called for step {t} with other {what} than those before it")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One adjoint on one setting; see ``check``."""

    adjoint: Adjoint
    setting: Setting
    tolerance: float
    trajectory: bool

    def solve(self) -> tuple[Solution, Along]:
        """Run the inner loop.

        Raises:
            UnsupportedError: the adjoint refuses it.
        """
        along = Along(self.setting)
        return self.adjoint.solve(self.setting.rollout, along if self.setting.terms else None), along

    def check(self, solution: Solution, along: Along) -> Leaves:
        """One way there and back: values, form, what must stay as it was, and agreement with ``Unrolled()``."""
        setting, rollout = self.setting, self.setting.rollout
        path = plain_path(rollout)
        self._check_values(solution, path)
        before = _everything(rollout)
        cotangent = setting.cotangent(rollout.steps)
        given = copies(cotangent)
        found = _own(solution.pullback(cotangent))
        require(same_bits(cotangent, given), "the pullback has changed the cotangent that it was given")
        require(same_bits(_everything(rollout), before), "the rollout's leaves or buffers have been changed")
        self._check_form(found)
        if setting.terms:
            along.check(rollout.steps)
        if self.trajectory:
            along.check_states(path, self.tolerance)
        if self.adjoint.exact:
            _agree(found, unrolled(setting), self.tolerance, "Unrolled()")
        return found

    def check_again(self, solution: Solution, found: Leaves) -> None:
        """The same pullback again, and one of a second run, the same bits; and zeros for a cotangent of zeros."""
        cotangent = self.setting.cotangent(self.setting.rollout.steps)
        _agree(_own(solution.pullback(cotangent)), found, self.tolerance, "the first call of the same pullback")
        again = self.solve()[0]
        for group, a, b in zip(GROUPS, _own(again.pullback(cotangent)), found, strict=True):
            require(same_bits(a, b), f"two runs give other bits in the gradient of {group}")
        for group, grads in zip(GROUPS, again.pullback(trees.zeros_like(cotangent)), strict=True):
            for name, grad in grads.items():
                require(not bool(grad.any()), f"{group} {name}: no zeros for a cotangent of zeros")

    def _check_values(self, solution: Solution, path: Path) -> None:
        rollout, last = self.setting.rollout, path.states[-1]
        require(len(solution.losses) == rollout.steps, f"{len(solution.losses)} losses for {rollout.steps} inner steps")
        require(not any(loss.requires_grad for loss in solution.losses), "the losses have a graph: detach them")
        require(solution.params.keys() == last.params.keys(), "theta_T has other names than the adapted parameters")
        if not self.trajectory:
            return
        _same(solution.params, last.params, self.tolerance, "theta_T is not that of the plain inner loop")
        _same(solution.buffers, last.buffers, self.tolerance, "the buffers are not those after the last step")
        _same(_numbered(solution.losses), _numbered(path.losses), self.tolerance, "other losses than the plain loop's")

    def _check_form(self, found: Leaves) -> None:
        """A finite gradient of the leaf's shape and dtype for each leaf that requires grad, and for no other."""
        for group, grads, leaves in zip(GROUPS, found, self.setting.rollout.leaves, strict=True):
            wanted = set(trees.wanted(leaves))
            missing, extra = sorted(wanted - grads.keys()), sorted(grads.keys() - wanted)
            require(not missing, f"{group} {', '.join(missing)}: no gradient; zeros where nothing depends on a leaf")
            require(not extra, f"{group} {', '.join(extra)}: a gradient of what does not require grad")
            for name, grad in grads.items():
                leaf = leaves[name]
                fits = (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)
                form = f"{list(grad.shape)}, {grad.dtype}, {grad.device}"
                require(fits, f"{group} {name}: the gradient has the shape, dtype and device {form}")
                require(not grad.requires_grad, f"{group} {name}: the gradient has a graph")
                require(bool(grad.isfinite().all()), f"{group} {name}: the gradient is not finite")

    def check_differences(self, found: Leaves) -> None:
        """Agreement with central finite differences of the plain inner loop, one group of leaves at a time."""
        rollout = self.setting.rollout
        value = _outer_value(self.setting)
        for index, (group, grads) in enumerate(zip(GROUPS, found, strict=True)):
            if not grads:
                continue
            direction = random_like(grads, 99)

            def along_it(size: float, index: int = index, direction: Tensors = direction) -> float:
                changed = list(rollout.leaves)
                changed[index] = moved(changed[index], direction, size)
                return value(Leaves(*changed))

            measured, scale = central_difference(along_it), max(norm(grads), 1.0)
            gap = abs(slope(grads, direction) - measured) / scale
            # Rounding gives 1e-10 and truncation 1e-12 times the third derivative, some 1e5 with Adam's division.
            require(gap < 1e-6, f"{group}: relative error {gap:.1e} against central finite differences")


def _outer_value(setting: Setting) -> Callable[[Leaves], float]:
    """The sum of <cotangent, theta_t> over all t that have one, as a function of the leaves."""

    def value(leaves: Leaves) -> float:
        rollout = dataclasses.replace(setting.rollout, leaves=leaves)
        states = plain_path(rollout).states
        places = [*sorted(setting.terms), rollout.steps]
        return sum(slope(setting.cotangent(t), trees.detach(states[t].params)) for t in places)

    return value


def _everything(rollout: Rollout) -> Tensors:
    parts = [*zip(GROUPS, rollout.leaves, strict=True), ("buffer", rollout.buffers)]
    return {f"{what} {name}": leaf.detach().clone() for what, group in parts for name, leaf in group.items()}


def _own(leaves: Leaves) -> Leaves:
    """Copies, as a later call might write into the same memory; with their graph, which would be a fault."""
    return Leaves(*({name: grad.clone() for name, grad in group.items()} for group in leaves))


def _numbered(tensors: list[Tensor]) -> Tensors:
    return {str(t): tensor for t, tensor in enumerate(tensors)}


def _same(found: Tensors, wanted: Tensors, tolerance: float, fault: str) -> None:
    """Names, shapes and values, each to ``tolerance`` of its norm (or absolutely, where that is below 1)."""
    require(found.keys() == wanted.keys(), f"{fault}: other names, {sorted(found.keys() ^ wanted.keys())}")
    for name, leaf in found.items():
        other = wanted[name].detach()
        require(leaf.shape == other.shape, f"{fault}: {name} has shape {list(leaf.shape)}, not {list(other.shape)}")
        gap = float((leaf.detach().double() - other.double()).norm()) / max(float(other.double().norm()), 1.0)
        require(gap <= tolerance, f"{fault}: {name} differs by {gap:.1e}")


def _agree(found: Leaves, wanted: Leaves, tolerance: float, whom: str) -> None:
    """Each group to ``tolerance`` of its norm (of a thousandth of all, where it is smaller); names the worst leaf."""
    least = 1e-3 * sum(norm(group) ** 2 for group in wanted) ** 0.5
    for group, ours, theirs in zip(GROUPS, found, wanted, strict=True):
        if not theirs:
            continue
        scale = max(norm(theirs), least) or 1.0
        gaps = {name: float((ours[name] - theirs[name]).norm()) / scale for name in theirs}
        total, worst = sum(gap**2 for gap in gaps.values()) ** 0.5, max(gaps, key=lambda name: gaps[name])
        require(
            total <= tolerance,
            f"{group} {worst}: relative error {total:.1e} against {whom}, where {tolerance:.0e} is allowed",
        )
