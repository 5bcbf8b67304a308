"""Implicit differentiation and iMAML: closed forms, the exact adjoints at a fixed point, the paper's equation."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from helpers import PROBLEMS, Tree
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.solvers import CG, Neumann

EXACT_CG = CG(200, tolerance=1e-13)
LAMBDA = 2.0


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def implicit(proximal: float | None = LAMBDA, solver: mm.Solver = EXACT_CG, strict: bool = False) -> mm.Implicit:
    return mm.Implicit(solver, proximal, strict)


def imaml(name: str, **options: Any) -> mm.MetaLearner:
    """iMAML on one of the problems; a fresh network of the same weights each time."""
    case = PROBLEMS[name]
    options = {"optimizer": mm.SGD(lr=case.rate), "steps": 4, "solver": EXACT_CG, **options}
    return mm.imaml(case.net(), loss=case.loss, **options)


# Closed forms, at a fixed point.

A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]], dtype=torch.float64)
B = torch.tensor([[1.0, -0.5], [0.2, 0.4], [0.0, 2.0]], dtype=torch.float64)


def quadratic(params: Tree, meta: Tensor, batch: Any) -> Tensor:
    """1/2 w^T A w - w^T B meta, with w in two tensors."""
    w = torch.cat([params["first"], params["last"][None]])
    return 0.5 * w @ A @ w - w @ B @ meta


@pytest.mark.parametrize("solver", [EXACT_CG, Neumann(0.3, 500, tolerance=1e-13)])
@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_a_quadratic_with_a_closed_form(solver: mm.Solver, decay: float) -> None:
    """theta* = (A + (lambda + decay) I)^-1 (B eta + lambda theta_0)."""
    first, last = numbers(2).requires_grad_(), numbers(seed=1).requires_grad_()
    eta, weights = numbers(2, seed=2).requires_grad_(), numbers(3, seed=3)
    inverse = torch.linalg.inv(A + (LAMBDA + decay) * torch.eye(3, dtype=torch.float64))
    adapted = mm.adapt(
        quadratic,
        {"first": first, "last": last},
        [None] * 100,
        optimizer=mm.SGD(lr=0.25, weight_decay=decay),
        meta=eta,
        adjoint=implicit(solver=solver),
    )
    end = torch.cat([adapted.params["first"], adapted.params["last"][None]])
    start = torch.cat([first, last[None]]).detach()
    torch.testing.assert_close(end.detach(), inverse @ (B @ eta.detach() + LAMBDA * start), rtol=1e-12, atol=1e-14)
    grads = torch.autograd.grad(weights @ end, [first, last, eta])
    wanted = LAMBDA * inverse @ weights
    torch.testing.assert_close(list(grads), [wanted[:2], wanted[2], B.T @ inverse @ weights], rtol=1e-11, atol=1e-12)
    assert adapted.status["gradient_norm"] < 1e-13


def regression(seed: int = 0, n: int = 12, d: int = 4) -> tuple[Tensor, Tensor]:
    return numbers(n, d, seed=seed), numbers(n, seed=seed + 1)


@pytest.mark.parametrize("detached", [True, False])
def test_ridge_regression_learns_its_regularisation(detached: bool) -> None:
    """One weight exp(eta_j) per feature, and weights of examples: d w* / d eta in closed form, by plain autograd."""
    (x, y), (x_val, y_val) = regression(), regression(7)

    def ridge(params: Tree, meta: Any, batch: Any) -> Tensor:
        errors = (x @ params["w"] - y).square()
        return (meta["example"].sigmoid() * errors).mean() + (meta["log"].exp() * params["w"].square()).sum()

    def solved(meta: Any) -> Tensor:
        weights = meta["example"].sigmoid() / len(x)
        return torch.linalg.solve(x.T @ (weights[:, None] * x) + meta["log"].exp().diag(), x.T @ (weights * y))

    meta = {"log": 0.3 * numbers(4, seed=5), "example": numbers(12, seed=6)}
    meta = {name: leaf.requires_grad_() for name, leaf in meta.items()}
    start = torch.zeros(4, dtype=torch.float64)
    adapted = mm.adapt(
        ridge, {"w": start}, [None] * 300, optimizer=mm.SGD(lr=0.15), meta=meta, adjoint=implicit(proximal=None)
    )
    found = torch.autograd.grad((x_val @ adapted.params["w"] - y_val).square().mean(), list(meta.values()))
    wanted = torch.autograd.grad((x_val @ solved(meta) - y_val).square().mean(), list(meta.values()))
    assert helpers.error(dict(zip(meta, found, strict=True)), dict(zip(meta, wanted, strict=True))) < 1e-11
    assert adapted.status["gradient_norm"] < 1e-12


def logistic(params: Tree, meta: Any, batch: Any) -> Tensor:
    """Logistic regression with learned regularisation, pulled to an anchor."""
    x, labels = regression(3, 20, 3)
    scores = F.binary_cross_entropy_with_logits(x @ params["w"] + params["b"], (labels > 0).double())
    pull = sum((params[name] - meta["anchor"][name]).square().sum() for name in params)
    return scores + 0.5 * (meta["log"].exp() * params["w"].square()).sum() + 0.5 * meta["pull"] * pull


OPTIMIZERS: dict[str, tuple[mm.InnerOptimizer, int]] = {
    "sgd": (mm.SGD(lr=0.8), 120),
    "momentum": (mm.SGD(lr=0.5, momentum=0.3, dampening=0.1), 120),
    "nesterov": (mm.SGD(lr=0.5, momentum=0.3, nesterov=True), 120),
    "decay": (mm.SGD(lr=0.5, weight_decay=0.2), 120),
    "decay by name": (mm.SGD(lr=0.5, weight_decay={"w": 0.3, "b": 0.0}), 120),
    # With so large an eps these are gradient descent near the minimum, and come to rest there.
    "adam": (mm.Adam(lr=0.5, betas=(0.5, 0.9), eps=1.0), 200),
    "adamw": (mm.AdamW(lr=0.5, betas=(0.5, 0.9), eps=1.0, weight_decay=0.0), 200),
    "rmsprop": (mm.RMSprop(lr=0.5, alpha=0.9, eps=1.0, weight_decay=0.1), 200),
}


@pytest.mark.parametrize(
    ("name", "reference"),
    [*((name, mm.Stepwise()) for name in OPTIMIZERS), ("sgd", mm.Unrolled()), ("decay", mm.Unrolled())],
)
def test_it_equals_the_exact_adjoints_at_a_fixed_point(name: str, reference: mm.Adjoint) -> None:
    """Its proximal term, and the same one written in the loss: the anchor gets what theta_0 gets."""
    optimizer, steps = OPTIMIZERS[name]
    start = {"w": numbers(3, seed=8), "b": numbers(seed=9)}
    log = numbers(3, seed=10).requires_grad_()

    def gradients(adjoint: mm.Adjoint, params: Tree, anchor: Tree, pull: float) -> list[Tensor]:
        meta = {"log": log, "anchor": anchor, "pull": pull}
        adapted = mm.adapt(logistic, params, [None] * steps, optimizer=optimizer, meta=meta, adjoint=adjoint)
        value = (adapted.params["w"] ** 3).sum() + adapted.params["b"].cos()
        tied = params if isinstance(adjoint, mm.Implicit) else anchor
        return list(torch.autograd.grad(value, [log, *tied.values()]))

    leaves = [{key: leaf.clone().requires_grad_() for key, leaf in start.items()} for _ in range(2)]
    found = gradients(implicit(0.7), leaves[0], start, 0.0)
    wanted = gradients(reference, start, leaves[1], 0.7)
    keys = ("log", "w", "b")
    assert helpers.error(dict(zip(keys, found, strict=True)), dict(zip(keys, wanted, strict=True))) < 1e-9


# The paper's equation, wherever the inner loop has come to.


def explicit(
    name: str, task: helpers.Pair, rate: float, proximal: float, steps: int, decay: float = 0.0
) -> tuple[Tree, float]:
    """(I + (H + decay I) / lambda)^-1 v with the explicit Hessian at theta_T, and the relative gradient there."""
    case = PROBLEMS[name]
    net = case.net()
    start = {key: p.detach() for key, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def loss(params: Tree, batch: helpers.Batch) -> Tensor:
        own = {key: buffer.clone() for key, buffer in buffers.items()}
        return case.loss(torch.func.functional_call(net, {**params, **own}, batch[0]), batch[1])

    def slope(params: Tree, batch: helpers.Batch) -> Tensor:
        leaves = [leaf.requires_grad_() for leaf in params.values()]
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(params, batch), leaves)])

    def unflat(vector: Tensor) -> Tree:
        parts = vector.split([leaf.numel() for leaf in start.values()])
        return {key: part.reshape(leaf.shape) for (key, leaf), part in zip(start.items(), parts, strict=True)}

    first = theta = torch.cat([leaf.reshape(-1) for leaf in start.values()])

    def whole(theta: Tensor) -> Tensor:
        return slope(unflat(theta), task[0]) + proximal * (theta - first) + decay * theta

    for _ in range(steps):
        theta = theta - rate * whole(theta)
    v = slope(unflat(theta), task[1])
    matrix = torch.autograd.functional.hessian(lambda at: loss(unflat(at), task[0]), theta)
    assert isinstance(matrix, Tensor)
    matrix = torch.eye(len(v), dtype=v.dtype) * (1 + decay / proximal) + matrix / proximal
    wanted = {f"net.{key}": leaf for key, leaf in unflat(torch.linalg.solve(matrix, v)).items()}
    return wanted, float(whole(theta).norm() / whole(first).norm())


@pytest.mark.parametrize(
    ("name", "rate", "proximal"),
    [
        ("mlp", 0.1, 2.0),
        ("tied", 0.1, 3.0),
        ("gru_cells", 0.1, 2.0),
        ("groupnorm_silu", 0.01, 30.0),
        ("conv_bn", 0.01, 60.0),
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_imaml_solves_the_papers_equation(name: str, rate: float, proximal: float, steps: int) -> None:
    """Where ``proximal`` makes the Hessian positive definite."""
    task = PROBLEMS[name].task(0)
    learner = imaml(name, optimizer=mm.SGD(lr=rate), steps=steps, proximal=proximal)
    report = learner.accumulate([task])
    found = {key: p.grad for key, p in learner.named_parameters() if p.grad is not None}
    wanted, slope = explicit(name, task, rate, proximal, steps)
    assert helpers.error(found, wanted) < 1e-9
    assert report.status()["unconverged"] == 0.0
    assert report.status()["gradient_norm"] == pytest.approx(slope, rel=1e-9)
    assert report.status()["gradient_norm"] > 0.01  # far from a fixed point: the equation holds all the same
    assert report.approximation == "implicit: exact at a fixed point of the inner loop"


def test_coupled_weight_decay_is_in_the_equation() -> None:
    task = PROBLEMS["mlp"].task(1)
    learner = imaml("mlp", optimizer=mm.SGD(lr=0.1, weight_decay=0.5), steps=3)
    wanted, slope = explicit("mlp", task, 0.1, LAMBDA, 3, decay=0.5)
    assert helpers.error(helpers.meta_gradient(learner, [task]), wanted) < 1e-9
    assert learner.accumulate([task]).status()["gradient_norm"] == pytest.approx(slope, rel=1e-9)


def test_losses_are_without_the_proximal_term() -> None:
    start = {"w": numbers(3)}

    def loss(params: Tree, meta: Any, batch: Any) -> Tensor:
        return params["w"].square().sum()

    adapted = mm.adapt(loss, start, [None] * 3, optimizer=mm.SGD(lr=0.1), adjoint=implicit())
    w, wanted = start["w"], []
    for _ in range(3):
        wanted.append(w.square().sum())
        w = w - 0.1 * (2 * w + LAMBDA * (w - start["w"]))
    torch.testing.assert_close(adapted.losses, wanted)
    torch.testing.assert_close(adapted.params["w"], w)


def test_the_body_gets_its_gradient_through_a_head_that_starts_anew() -> None:
    """Without a proximal term: only the head is adapted, from zeros, to the minimum of a ridge regression."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def ridge(net: nn.Module, batch: helpers.Batch) -> Tensor:
        assert isinstance(net, nn.Sequential)
        return F.mse_loss(net(batch[0]), batch[1]) + 0.2 * sum(p.square().sum() for p in net[2].parameters())

    def learner(adjoint: mm.Adjoint, steps: int) -> mm.MetaLearner:
        net = build()
        problem = mm.Problem(net, ridge, lambda n, b: F.mse_loss(n(b[0]), b[1]), "2", {"2": torch.zeros_like})
        return mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.8), steps=steps, adjoint=adjoint)

    tasks = PROBLEMS["mlp"].tasks(2)
    found = helpers.meta_gradient(learner(implicit(None), 150), tasks)
    assert set(found) == {"net.0.weight", "net.0.bias"}
    assert helpers.error(found, helpers.meta_gradient(learner(mm.Stepwise(), 150), tasks)) < 1e-9
    stacked = helpers.meta_gradient(learner(implicit(None), 150), tasks, chunk=2)
    assert helpers.error(stacked, found) < 1e-12


# One task or several, at once or in pieces.


@pytest.mark.parametrize("solver", [EXACT_CG, CG(3), Neumann(0.15, 5)])
def test_stacked_tasks_are_solved_each_by_its_own(solver: mm.Solver) -> None:
    tasks = PROBLEMS["mlp"].tasks(5)
    learner = imaml("mlp", solver=solver)
    single, stacked = (helpers.meta_gradient(learner, tasks, chunk=chunk) for chunk in (1, 3))
    assert helpers.error(stacked, single) < 1e-12
    worst = [learner.accumulate(tasks, chunk=chunk).status() for chunk in (1, 3)]
    assert worst[1] == pytest.approx(worst[0], rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("chunk", [1, 2])
def test_microbatches_give_the_same(chunk: int) -> None:
    tasks = PROBLEMS["mlp"].tasks(2)
    learner = imaml("mlp")
    whole = helpers.meta_gradient(learner, tasks, chunk=chunk)
    pieces = helpers.meta_gradient(learner, tasks, chunk=chunk, microbatch=3)
    assert helpers.error(pieces, whole) < 1e-12


def test_dropout_is_that_of_the_last_step() -> None:
    """The Hessian is of the very loss that the last step took: a quadratic's, with the mask of that step."""
    x, start = numbers(6, 3), numbers(3, seed=1).requires_grad_()
    masks: list[Tensor] = []

    def loss(params: Tree, meta: Any, batch: Any) -> Tensor:
        masks.append(F.dropout(torch.ones(6, 3, dtype=torch.float64), 0.4))
        return ((masks[-1] * x) @ params["w"]).square().sum() / 2

    adapted = mm.adapt(loss, {"w": start}, [None] * 3, optimizer=mm.SGD(lr=0.05), adjoint=implicit(), seed=4)
    weights = numbers(3, seed=2)
    (found,) = torch.autograd.grad(adapted.params["w"] @ weights, start)
    assert len(masks) == 4
    assert torch.equal(masks[3], masks[2])
    assert not torch.equal(masks[2], masks[1])
    kept = masks[2] * x
    wanted = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + kept.T @ kept / LAMBDA, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_the_hessian_is_that_of_the_last_batch() -> None:
    start, weights = numbers(3).requires_grad_(), numbers(3, seed=2)
    batches = [numbers(5, 3, seed=seed) for seed in (4, 5, 6)]

    def loss(params: Tree, meta: Any, batch: Tensor) -> Tensor:
        return (batch @ params["w"]).square().mean() / 2

    adapted = mm.adapt(loss, {"w": start}, batches, optimizer=mm.SGD(lr=0.1), adjoint=implicit())
    (found,) = torch.autograd.grad(adapted.params["w"] @ weights, start)
    hessian = batches[-1].T @ batches[-1] / 5
    wanted = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + hessian / LAMBDA, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """But for the losses that are reported, one number per step."""
    tasks = PROBLEMS["mlp"].tasks(1)
    few, many = (imaml("mlp", steps=T).accumulate(tasks, count_bytes=True).peak_bytes for T in (3, 30))
    assert few is not None
    assert many is not None
    assert many - few == 27 * 8


# Special shapes of the Hessian.


def test_linear_and_unused_parameters() -> None:
    """Where the Hessian is zero the proximal term alone is left, and d theta_T / d theta_0 is the identity."""
    start = {name: numbers(3, seed=i).requires_grad_() for i, name in enumerate(("linear", "quadratic", "unused"))}
    slope = numbers(3, seed=5).requires_grad_()

    def loss(params: Tree, meta: Tensor, batch: Any) -> Tensor:
        return (meta.square() * params["linear"]).sum() + 3 * params["quadratic"].square().sum() / 2

    adapted = mm.adapt(loss, start, [None] * 100, optimizer=mm.SGD(lr=0.2), meta=slope, adjoint=implicit())
    value = sum(p.sum() for p in adapted.params.values())
    assert isinstance(value, Tensor)
    grads = torch.autograd.grad(value, [*start.values(), slope])
    one = torch.ones(3, dtype=torch.float64)
    wanted = [one, one * LAMBDA / (3 + LAMBDA), one, -2 * slope.detach() / LAMBDA]
    torch.testing.assert_close(list(grads), wanted, rtol=1e-12, atol=1e-13)
    assert adapted.status["iterations"] == 2


def test_a_hessian_proportional_to_the_identity_takes_one_iteration() -> None:
    start = numbers(4).requires_grad_()

    def loss(params: Tree, meta: Any, batch: Any) -> Tensor:
        return 2 * params["w"].square().sum()

    adapted = mm.adapt(loss, {"w": start}, [None] * 2, optimizer=mm.SGD(lr=0.1), adjoint=implicit())
    (found,) = torch.autograd.grad(adapted.params["w"].sum(), start)
    torch.testing.assert_close(found, torch.full_like(start, LAMBDA / (4 + LAMBDA)), rtol=1e-14, atol=0)
    assert adapted.status["iterations"] == 1


def test_a_solver_of_ones_own_need_not_end_with_what_it_returns() -> None:
    class Own(mm.Solver):
        """The Neumann series, and a product with something else at the end."""

        def solve(self, matvec: Any, b: Tree, batched: bool = False) -> Any:
            result = Neumann(0.2, 500, tolerance=1e-13).solve(matvec, b, batched)
            matvec({name: torch.ones_like(leaf) for name, leaf in b.items()})
            return result

    eta, weights = numbers(2, seed=2).requires_grad_(), numbers(3, seed=3)
    start = {"first": numbers(2), "last": numbers(seed=1)}
    grads = []
    for solver in (Own(), EXACT_CG):
        adapted = mm.adapt(
            quadratic, start, [None] * 5, optimizer=mm.SGD(lr=0.2), meta=eta, adjoint=implicit(solver=solver)
        )
        end = torch.cat([adapted.params["first"], adapted.params["last"][None]])
        grads.append(torch.autograd.grad(weights @ end, eta)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-12)
