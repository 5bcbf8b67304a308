"""Implicit differentiation at the end of the inner loop, taken for a fixed point of it; iMAML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import trees
from ..errors import ConvergenceError, InputError, UnsupportedError
from ..optimizers import AdamW, BoundRule
from ..rollout import Leaves, Rollout, State
from ..solvers import CG, Solver
from ..solvers.base import check_number, dots, relative
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .linearised import Linearised

_CG = CG()


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiates the equation that a fixed point of the inner loop solves, instead of the steps that led there.

    Where the inner loop has come to rest, the gradient of L(theta, eta) + proximal / 2 ||theta - theta_0||^2 is zero.
    With its Hessian H + proximal I at theta_T, a cotangent v is pulled back through one linear system:

        (H + proximal I) u = v;    d theta_0 = proximal u;    d eta = - d/d eta <dL/dtheta, u>

    which is iMAML (Rajeswaran, Finn, Kakade, Levine 2019, https://arxiv.org/abs/1909.04630): d theta_0 solves
    (I + H / proximal) d theta_0 = v. (The paper's released code solves (1 + damping) I + H / (proximal + 10) instead;
    here it is the paper's equation.) With ``proximal`` the inner loop itself minimises L plus that term, which is added
    to the inner gradient; the losses that are reported are L. A coupled ``weight_decay`` of the inner optimiser is in
    the Hessian too. The Hessian is that of the last step's batch, with its random numbers: where batches differ, make
    the last one the whole set.

    Memory: one inner step's graph and the solver's vectors, whatever T; no snapshots. Time: T plain gradients, one with
    its graph, and one product with H for each of the solver's iterations and one more.

    Exact at a fixed point alone, and as far as the linear system is solved. Both are reported, not assumed, in
    ``status`` (``Report.status()``, ``Adapted.status``), which is filled when the meta-gradient is computed; of stacked
    tasks it has the worst:

    - ``residual``, ``iterations``: of the solver, the true relative residual;
    - ``unconverged``: 1.0 if that is not within the solver's tolerance, else 0.0. Where H + proximal I is not positive
      definite, theta_T is near no minimum and the solvers give up: a larger ``proximal`` makes it so;
    - ``gradient_norm``: the norm of the inner objective's gradient at theta_T, relative to that at theta_0: how far the
      inner loop is from a fixed point.

    Refuses what a fixed point knows nothing of: gradients of the inner optimiser's hyperparameters, and without
    ``proximal`` of the initial parameters; also outer losses before the last step, and decoupled weight decay.

    Attributes:
        solver: of the linear system; ``CG()`` or ``Neumann(rate=...)``.
        proximal: strength lambda of the pull to the initial parameters; none if None.
        strict: raise ``ConvergenceError`` where the solver has not converged, instead of reporting it.
    """

    solver: Solver = _CG
    proximal: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise InputError(f"solver={self.solver!r}: write a solver, CG(iterations=50) or Neumann(rate=0.1)")
        if self.proximal is not None:
            check_number("proximal", self.proximal, positive=True)

    @property
    def approximation(self) -> str:
        extra = f", {self.solver.approximation}" if self.solver.approximation else ""
        return f"implicit: exact at a fixed point of the inner loop{extra}"

    def check(self, leaves: Leaves, rule: BoundRule, terms: bool) -> None:
        _decay(rule, leaves.params)  # first: a learned decay does move the fixed point
        start, hyper = trees.wanted(leaves.params), trees.wanted(leaves.hyper)
        if hyper:
            raise UnsupportedError(
                f"Implicit() has no gradient for the inner optimiser's {_some(hyper)}: a fixed point of the inner loop "
                "does not depend on how it was reached; give numbers or detached tensors, or use adjoint=Stepwise()"
            )
        if start and self.proximal is None:
            raise UnsupportedError(
                f"Implicit() has no gradient for the initial parameters {_some(start)}: a fixed point of the inner "
                "loop does not depend on where it started; tie it to them with Implicit(proximal=2.0) (iMAML), detach "
                "them (mm.adapt) or draw them anew (redraw=), or use adjoint=Stepwise()"
            )
        if terms:
            raise UnsupportedError(
                "Implicit() differentiates the end of the inner loop alone, and step_weights has outer losses before "
                "it: leave step_weights out, or use adjoint=Stepwise()"
            )

    def advance(self, rollout: Rollout, t: int, state: State) -> tuple[Tensor, State]:
        """One inner step without a graph, with the proximal term: the inner loop is the same wherever it is run."""
        loss, _, after = _Objective(rollout, self.proximal or 0.0).step(t, state)
        return loss, after

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        state, losses = rollout.start(), []
        objective = _Objective(rollout, self.proximal or 0.0)
        first: Tensor | None = None
        for t in range(rollout.steps):
            loss, grads, after = objective.step(t, state)
            first = objective.norm(grads, state.params) if first is None else first
            losses.append(loss)
            state = after
        state = state._replace(slots={})  # they have nothing to say of a fixed point
        status: dict[str, float] = {}

        def pullback(cotangent: Tensors) -> Leaves:
            if first is None:
                raise UnsupportedError(
                    "Implicit() differentiates where the last inner step ends, and there is none: give at least one, "
                    "or use adjoint=Stepwise()"
                )
            return self._pull(objective, state, first, trees.detach(cotangent), status)

        return Solution(trees.detach(state.params), state.buffers, losses, pullback, status)

    def _pull(
        self, objective: _Objective, state: State, first: Tensor, cotangent: Tensors, status: dict[str, float]
    ) -> Leaves:
        rollout = objective.rollout
        system = _System(Linearised(rollout, rollout.steps - 1, state), objective.shifts)
        result = self.solver.solve(system, cotangent, rollout.microbatch.stacked)
        last = objective.norm(objective.gradient(system.step.grads, state.params), state.params)
        status.update(
            residual=result.residual,
            iterations=float(result.iterations),
            unconverged=float(not result.converged),
            gradient_norm=relative(last.square(), first.square()),
        )
        if self.strict and not result.converged:
            raise ConvergenceError(
                f"Implicit(strict=True) could not solve its linear system: {result.failure}; give the solver more "
                "iterations or a larger tolerance, a larger proximal= or weight_decay, or strict=False"
            )
        grads = rollout.leaves.zeros()
        for name, grad in grads.params.items():
            grad.add_(result.x[name], alpha=objective.proximal)
        for name, mixed in system.mixed(result.x).items():
            grads.meta[name].sub_(mixed)
        return grads


class _Objective:
    """What the inner loop minimises: L + proximal / 2 ||theta - theta_0||^2 + decay / 2 ||theta||^2."""

    def __init__(self, rollout: Rollout, proximal: float) -> None:
        self.rollout, self.proximal = rollout, proximal
        self.start = trees.detach(rollout.leaves.params)
        self.decay = _decay(rollout.rule, rollout.leaves.params)
        self.shifts = {name: proximal + decay for name, decay in self.decay.items()}

    def step(self, t: int, state: State) -> tuple[Tensor, Tensors, State]:
        """One inner step without a graph: L and the gradient before it, and the state after it."""
        rollout = self.rollout
        loss, grads, buffers = rollout.gradient(t, trees.leaves(state.params), rollout.leaves.meta, state.buffers)
        grads = self.gradient(grads, state.params)
        return loss, grads, rollout.updated(t, state, grads, buffers)

    def gradient(self, grads: Tensors, params: Tensors) -> Tensors:
        """The gradient at ``params`` from that of L, without the decay's part: the update rule adds that."""
        if not self.proximal:
            return grads
        with torch.no_grad():
            return {n: torch.add(g, params[n] - self.start[n], alpha=self.proximal) for n, g in grads.items()}

    def norm(self, grads: Tensors, params: Tensors) -> Tensor:
        """The norm of the whole gradient, shape () or (C,), from what ``gradient`` gives."""
        with torch.no_grad():
            whole = {n: torch.add(g, params[n], alpha=self.decay[n]) if self.decay[n] else g for n, g in grads.items()}
            return dots(whole, whole, self.rollout.microbatch.stacked).sqrt()


class _System:
    """The Hessian of the inner objective at theta_T, as a product for a solver."""

    def __init__(self, step: Linearised, shifts: dict[str, float]) -> None:
        self.step, self._shifts = step, shifts
        self._last: tuple[Tensors, Tensors] | None = None

    def __call__(self, v: Tensors) -> Tensors:
        product = self.step.product(v, again=True)
        self._last = v, product.meta
        return {name: torch.add(found, v[name], alpha=self._shifts[name]) for name, found in product.params.items()}

    def mixed(self, v: Tensors) -> Tensors:
        """The derivative of <dL/dtheta, v> with respect to meta; at hand where the solver's last product was with v."""
        if self._last is not None and self._last[0] is v:
            return self._last[1]
        return self.step.product(v, again=True).meta


def _decay(rule: BoundRule, names: Iterable[str]) -> dict[str, float]:
    """The coupled weight decay of each parameter: of ``L + decay / 2 ||theta||^2`` the rule makes a fixed point.

    Raises:
        UnsupportedError: the decay is decoupled from the gradient, or given by tensors.
    """
    form = rule.forms.get("weight_decay")
    if form is None:
        return dict.fromkeys(names, 0.0)
    decay = {name: form.constant if form.named is None else form.named[name] for name in names}
    if any(value is None for value in decay.values()):
        raise UnsupportedError(
            "Implicit() needs the weight_decay of the inner optimiser as a number: write a float, or add the decay to "
            "the inner loss with its coefficients in `meta` (mm.adapt) or as parameters of the network"
        )
    if isinstance(rule.rule, AdamW) and any(decay.values()):
        raise UnsupportedError(
            "Implicit() can't use AdamW's weight decay: decoupled from the gradient, it moves the fixed point to no "
            "minimum of a known loss; write Adam(weight_decay=...), AdamW(weight_decay=0.0), or use adjoint=Stepwise()"
        )
    return {name: value or 0.0 for name, value in decay.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
