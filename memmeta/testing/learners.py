"""An adjoint through the public calls: what a network is left like, also when its loss raises; ``mm.adapt``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import adapt
from ..adjoints import Adjoint, Unrolled
from ..errors import UnsupportedError
from ..learner import MetaLearner
from ..optimizers import InnerOptimizer
from ..problem import NetLoss, Outcome, Problem
from ..trees import Tensors
from .conformance import named, require
from .measures import central_difference, copies, error, moved, norm, random_like, slope
from .problems import STEPS, Case, inner_optimizers


def check_learner(
    adjoint: Adjoint, case: Case, optimizers: Mapping[str, InnerOptimizer], tolerance: float
) -> str | None:
    """Check ``MetaLearner.accumulate`` under the last inner optimiser that is not refused; gives its name."""
    for name, rule in reversed(list(optimizers.items())):
        problem, counter = _counted(case.make())
        try:
            learner = MetaLearner(problem, optimizer=rule, steps=STEPS, adjoint=adjoint)
            before = _Surroundings(learner)
            found, loss = _accumulated(learner, case)
        except UnsupportedError:
            continue
        before.check("accumulate")
        if adjoint.exact:
            reference = MetaLearner(case.make(), optimizer=rule, steps=STEPS, adjoint=Unrolled())
            wanted, other = _accumulated(reference, case)
            require(abs(loss - other) <= tolerance * max(1.0, abs(other)), f"{name}: the loss {loss} is not {other}")
            gap = error(found, wanted)
            require(gap <= tolerance, f"{name}: relative error {gap:.1e} of .grad against Unrolled()")
        counter.calls = 0
        learner.meta_gradient([case.task(0)], seed=0)
        for call in range(counter.calls):
            _check_raising(learner, case, counter, call)
        return name
    return None


class _Raised(Exception):
    """What a loss raises in a check."""


class _Counter:
    """Losses that count their calls, and raise at one of them."""

    __slots__ = ("bad", "calls")  # not among what names a loss's programs

    def __init__(self) -> None:
        self.calls, self.bad = 0, -1

    def wrap(self, loss: NetLoss) -> NetLoss:
        def counted(net: nn.Module, batch: Any) -> Outcome:
            self.calls += 1
            if self.calls - 1 == self.bad:
                raise _Raised
            return loss(net, batch)

        return counted


def _counted(problem: Problem) -> tuple[Problem, _Counter]:
    counter = _Counter()
    inner, outer = counter.wrap(problem.inner_loss), counter.wrap(problem.outer_loss)
    return dataclasses.replace(problem, inner_loss=inner, outer_loss=outer), counter


def _check_raising(learner: MetaLearner, case: Case, counter: _Counter, call: int) -> None:
    """The loss raises at one call, on the way there or back: its error passes, and everything is as it was."""
    before = _Surroundings(learner)
    counter.calls, counter.bad = 0, call
    try:
        learner.accumulate([case.task(0)], seed=0)
    except _Raised:
        pass
    else:
        # Programs are compared with the loss now and then: a run may make fewer calls than the one that was counted.
        require(counter.calls <= call, f"the loss's own error at its call {call + 1} did not pass through")
        learner.zero_grad(set_to_none=True)
    finally:
        counter.bad = -1
    before.check(f"a loss that raised at its call {call + 1}")
    for name, param in learner.named_parameters():
        require(param.grad is None, f"{name} has a .grad after a loss that raised at its call {call + 1}")


def _accumulated(learner: MetaLearner, case: Case) -> tuple[Tensors, float]:
    """``.grad`` by name, cleared again, and the reported loss."""
    report = learner.accumulate([case.task(0), case.task(1)], seed=0)
    wanted = learner.meta_parameters()
    grads = {name: param.grad for name, param in learner.named_parameters() if param.grad is not None}
    missing, extra = sorted(wanted.keys() - grads.keys()), sorted(grads.keys() - wanted.keys())
    require(not missing, f"{', '.join(missing)}: no .grad")
    require(not extra, f"{', '.join(extra)}: a .grad of what is not meta-learned")
    learner.zero_grad(set_to_none=True)
    return grads, report.loss


class _Surroundings:
    """What must be as before: the network's tensors, their places and modes, random numbers, autograd's mode."""

    def __init__(self, learner: MetaLearner) -> None:
        self._learner = learner
        self._values = copies(learner.state_dict())
        self._rest = self._look()
        self._random = torch.random.get_rng_state()

    def _look(self) -> dict[str, Any]:
        modules = list(self._learner.modules())
        return {
            "the modules' parameters": [id(p) for m in modules for p in m._parameters.values()],
            "the modules' buffers": [id(b) for m in modules for b in m._buffers.values()],
            "the modules' modes": [m.training for m in modules],
            "requires_grad": [p.requires_grad for p in self._learner.parameters()],
            "autograd's mode": torch.is_grad_enabled(),
        }

    def check(self, what: str) -> None:
        for name, value in self._learner.state_dict().items():
            require(torch.equal(value, self._values[name]), f"{name} is not as it was before {what}")
        for name, value in self._look().items():
            require(value == self._rest[name], f"{name}: not as before {what}")
        require(torch.equal(torch.random.get_rng_state(), self._random), f"random numbers were drawn by {what}")


def check_adapt(adjoint: Adjoint, tolerance: float) -> list[str]:
    """Check ``mm.adapt`` under every inner optimiser that is not refused; gives what passed.

    Other batches at every step; a nested tree of meta tensors, one of which has no influence and one no gradient;
    initial parameters that are learned, and others that are not.
    """
    passed: list[str] = []
    for name, rule in inner_optimizers().items():
        for learned in (True, False):
            place = f"mm.adapt with {name}" + ", fixed start" * (not learned)
            with named(place):
                try:
                    _check_adapt(adjoint, rule, learned, tolerance)
                except UnsupportedError:
                    continue
            passed.append(place)
    return passed


def _check_adapt(adjoint: Adjoint, rule: InnerOptimizer, learned: bool, tolerance: float) -> None:
    leaves = _leaves(rule, learned)
    found = _gradients(_validation(adjoint, rule, leaves), leaves)
    require(not bool(found["meta unused"].any()), "meta unused: no zeros")
    if not adjoint.exact:
        return
    wanted = _gradients(_validation(Unrolled(), rule, leaves), leaves)
    gap = error(found, wanted)
    require(gap <= tolerance, f"relative error {gap:.1e} against Unrolled()")
    direction = random_like(found, 5)

    def along_it(size: float) -> float:
        with torch.no_grad():
            return float(_validation(Unrolled(), rule, moved(leaves, direction, size)))

    gap = abs(slope(found, direction) - central_difference(along_it)) / max(norm(found), 1.0)
    require(gap < 1e-6, f"relative error {gap:.1e} against central finite differences")


def _leaves(rule: InnerOptimizer, learned: bool) -> Tensors:
    """Fresh leaves: parameters, meta tensors, and the rule's own tensors."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    start = {"param w": drawn(3, 2, grad=learned), "param b": drawn(2, grad=learned)}
    meta = {"meta decay": drawn(2), "meta unused": drawn(2), "meta fixed": drawn(2, grad=False)}
    hyper = {
        f"hyper {n}": t.detach().clone().requires_grad_(t.requires_grad) for n, t in rule.hyperparameters().items()
    }
    return {**start, **meta, **hyper}


def _part(leaves: Tensors, kind: str) -> Tensors:
    return {name.split(" ")[1]: leaf for name, leaf in leaves.items() if name.startswith(kind)}


def _validation(adjoint: Adjoint, rule: InnerOptimizer, leaves: Tensors) -> Tensor:
    meta = _part(leaves, "meta")
    tree = {"penalties": [meta["decay"], (meta["unused"],)], "fixed": meta["fixed"]}
    data = torch.linspace(-1.0, 1.0, 4 * 6 * 3, dtype=torch.float64).sin().view(4, 6, 3)
    rule = rule.replaced(_part(leaves, "hyper"))
    adapted = adapt(_inner, _part(leaves, "param"), list(data), optimizer=rule, meta=tree, adjoint=adjoint, seed=0)
    return (adapted.params["w"] ** 3).sum() + torch.cos(adapted.params["b"]).sum() + meta["decay"].square().sum()


def _inner(params: Tensors, meta: Any, batch: Tensor) -> Tensor:
    """Convex, with a penalty for each column that is learned."""
    misfit = (batch @ params["w"] + params["b"] - meta["fixed"]).square().mean()
    return misfit + (torch.exp(meta["penalties"][0]) * params["w"].square()).mean()


def _gradients(value: Tensor, leaves: Tensors) -> Tensors:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True)
    return dict(zip(wanted, found, strict=True))
