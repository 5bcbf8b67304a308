"""What implicit differentiation reports of itself, what it refuses, and the factory of iMAML."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import PROBLEMS, Tree
from torch import Tensor
from torch.nn import functional as F

import memmeta as mm
from memmeta.solvers import CG, Neumann

EXACT_CG = CG(200, tolerance=1e-13)
LAMBDA = 2.0
A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]], dtype=torch.float64)


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


def quadratic(params: Tree, meta: Any, batch: Any) -> Tensor:
    return 0.5 * params["w"] @ A @ params["w"]


def quartic(params: Tree, meta: Any, batch: Any) -> Tensor:
    return (params["w"] ** 4).sum()


# What is reported.


def saddle(params: Tree, meta: Any, batch: Any) -> Tensor:
    x, y = params["w"]
    return x.square() / 2 - 5 * y.square() / 2


@pytest.mark.parametrize("solver", [CG(), Neumann(0.2, 200)])
def test_an_indefinite_hessian_is_reported(solver: mm.Solver) -> None:
    start = numbers(2).requires_grad_()

    def gradient(adjoint: mm.Adjoint) -> mm.Adapted:
        adapted = mm.adapt(saddle, {"w": start}, [None] * 2, optimizer=mm.SGD(lr=0.1), adjoint=adjoint)
        adapted.params["w"].sum().backward()
        return adapted

    status = gradient(implicit(solver=solver)).status
    assert status["unconverged"] == 1.0
    assert status["residual"] > 0.1
    with pytest.raises(mm.ConvergenceError, match=r"negative curvature|diverges"):
        gradient(implicit(solver=solver, strict=True))
    assert gradient(implicit(6.0, CG(tolerance=1e-12))).status["unconverged"] == 0.0


def test_the_status_is_filled_by_the_backward() -> None:
    start = numbers(2).requires_grad_()
    adapted = mm.adapt(quartic, {"w": start}, [None] * 5, optimizer=mm.SGD(lr=0.05), adjoint=implicit())
    assert not adapted.status
    adapted.params["w"].sum().backward()
    assert set(adapted.status) == {"residual", "iterations", "unconverged", "gradient_norm"}
    assert adapted.status["iterations"] == 2.0
    assert adapted.status["unconverged"] == 0.0
    assert adapted.status["residual"] < 1e-13
    assert 0 < adapted.status["gradient_norm"] < 1


def test_the_status_of_an_adapted_model_and_of_every_task() -> None:
    tasks = PROBLEMS["mlp"].tasks(3)
    learner = imaml("mlp", solver=CG(1))
    model = learner.adapt(tasks[0][0])
    F.mse_loss(model(tasks[0][1][0]), tasks[0][1][1]).backward()
    report = learner.accumulate(tasks)
    assert model.status == pytest.approx(dict(report.tasks[0].status), rel=1e-9)
    residuals = [task.status["residual"] for task in report.tasks]
    assert len(set(residuals)) == 3
    assert report.status()["residual"] == max(residuals)
    with torch.no_grad():
        assert not learner.adapt(tasks[0][0]).status


def test_one_iteration_is_reported_as_such() -> None:
    """And one task that fails shows in the whole."""
    task = PROBLEMS["mlp"].task(0)
    report = imaml("mlp", steps=3, solver=CG(1)).accumulate([task])
    status = report.status()
    assert status["unconverged"] == 1.0
    assert status["iterations"] == 1.0
    assert status["residual"] > 1e-2
    better = imaml("mlp", steps=3, solver=CG(3)).accumulate([task]).status()
    assert better["residual"] < status["residual"]
    good = mm.TaskScore(None, {"loss": 0.0}, {**status, "unconverged": 0.0})
    assert mm.Report((good, *report.tasks, good)).status()["unconverged"] == 1.0


def test_the_reported_residual_is_that_of_the_equation() -> None:
    """From the meta-gradient that comes out: ||v - (I + H / lambda) d theta_0|| / ||v||."""
    start, weights = numbers(3).requires_grad_(), numbers(3, seed=1)
    adapted = mm.adapt(
        quadratic, {"w": start}, [None] * 4, optimizer=mm.SGD(lr=0.1), adjoint=implicit(0.2, CG(2)), meta=None
    )
    (found,) = torch.autograd.grad(adapted.params["w"] @ weights, start)
    left = weights - (torch.eye(3, dtype=torch.float64) + A / 0.2) @ found
    assert adapted.status["residual"] == pytest.approx(float(left.norm() / weights.norm()), rel=1e-9)
    assert adapted.status["unconverged"] == 1.0


def test_strict_raises_and_names_the_way_out() -> None:
    tasks = PROBLEMS["mlp"].tasks(1)
    learner = imaml("mlp", solver=CG(1), strict=True)
    with pytest.raises(mm.ConvergenceError, match=r"after 1 iterations, tolerance 1e-05; give the solver more"):
        learner.accumulate(tasks)
    assert all(p.grad is None for p in learner.parameters())
    assert imaml("mlp", strict=True).accumulate(tasks).status()["unconverged"] == 0.0


def test_damping_is_named_in_the_report() -> None:
    report = imaml("mlp", solver=CG(damping=0.1)).accumulate(PROBLEMS["mlp"].tasks(1))
    assert report.approximation == "implicit: exact at a fixed point of the inner loop, CG damped by 0.1"
    assert not implicit().exact


def test_a_backward_may_be_run_again_but_not_differentiated() -> None:
    start = numbers(2).requires_grad_()
    adapted = mm.adapt(quartic, {"w": start}, [None] * 3, optimizer=mm.SGD(lr=0.05), adjoint=implicit())
    value = adapted.params["w"].sum()
    first, again = (torch.autograd.grad(value, start, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (grad,) = torch.autograd.grad(value, start, create_graph=True)
    with pytest.raises(mm.UnsupportedError, match="can't be differentiated twice"):
        torch.autograd.grad(grad.sum(), start)


# Refusals.


def by_adapt(adjoint: mm.Adjoint, optimizer: mm.InnerOptimizer) -> None:
    start = {"w": numbers(3).requires_grad_()}
    mm.adapt(quadratic, start, [None] * 2, optimizer=optimizer, adjoint=adjoint)


def by_learner(adjoint: mm.Adjoint, optimizer: mm.InnerOptimizer) -> None:
    case = PROBLEMS["mlp"]
    mm.maml(case.net(), loss=case.loss, optimizer=optimizer, steps=2, adjoint=adjoint)


LEARNED = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("call", [by_adapt, by_learner])
@pytest.mark.parametrize(
    ("adjoint", "optimizer", "message"),
    [
        (implicit(), mm.SGD(lr=LEARNED), r"inner optimiser's lr: a fixed point .* use adjoint=Stepwise\(\)"),
        (implicit(), mm.SGD(lr=0.1, momentum=LEARNED), r"inner optimiser's momentum: a fixed point"),
        (implicit(None), mm.SGD(lr=0.1), r"initial parameters .*w.*Implicit\(proximal=2\.0\) \(iMAML\), detach them"),
        (implicit(), mm.AdamW(lr=0.1), r"AdamW's weight decay: decoupled .* write Adam\(weight_decay=\.\.\.\)"),
        (implicit(), mm.SGD(lr=0.1, weight_decay=LEARNED.detach()), r"weight_decay .* as a number: write a float"),
        (implicit(), mm.SGD(lr=0.1, weight_decay=LEARNED), r"weight_decay .* add the decay to the inner loss"),
    ],
)
def test_compositions_are_refused(
    call: Callable[[mm.Adjoint, mm.InnerOptimizer], None],
    adjoint: mm.Adjoint,
    optimizer: mm.InnerOptimizer,
    message: str,
) -> None:
    with pytest.raises(mm.UnsupportedError, match=message):
        call(adjoint, optimizer)


def test_rates_that_are_not_learned_may_be_tensors() -> None:
    by_adapt(implicit(), mm.SGD(lr=LEARNED.detach()))
    by_learner(implicit(), mm.SGD(lr=LEARNED.detach()))


def test_outer_losses_before_the_last_step_are_refused() -> None:
    case = PROBLEMS["mlp"]
    options: dict[str, Any] = {"loss": case.loss, "optimizer": mm.SGD(lr=0.1), "steps": 2, "adjoint": implicit()}
    with pytest.raises(mm.UnsupportedError, match=r"step_weights has outer losses before it: leave step_weights out"):
        mm.maml(case.net(), step_weights=[0.5, 0.5], **options)
    learner = mm.maml(case.net(), step_weights=[0.0, 1.0], **options)
    learner.step_weights = [0.5, 0.5]
    with pytest.raises(mm.UnsupportedError, match="step_weights"):
        learner.accumulate(case.tasks(1))


def test_no_step_can_not_be_differentiated() -> None:
    learner = imaml("mlp")
    model = learner.adapt(PROBLEMS["mlp"].task(0)[0], steps=0)
    with pytest.raises(mm.UnsupportedError, match="give at least one"):
        sum(p.sum() for p in model.params.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_loss_without_a_second_derivative_is_refused_by_name() -> None:
    bags = {"bags": numbers(5, 2).requires_grad_()}

    def loss(params: Tree, meta: Any, batch: Any) -> Tensor:
        rows = torch.tensor([[0, 1], [2, 3]])
        return F.embedding_bag(rows, params["bags"], mode="sum").square().sum()

    adapted = mm.adapt(loss, bags, [None], optimizer=mm.SGD(lr=0.1), adjoint=implicit())
    with pytest.raises(mm.UnsupportedError, match="embedding_bag"):
        adapted.params["bags"].sum().backward()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mm.Implicit(CG), r"write a solver, CG\(iterations=50\) or Neumann\(rate=0\.1\)"),  # pyright: ignore[reportArgumentType]
        (lambda: mm.Implicit(proximal=0.0), r"proximal=0\.0: write a finite number above 0"),
        (lambda: mm.Implicit(proximal=-1), r"proximal=-1: write a finite number above 0"),
        (lambda: mm.Implicit(proximal=float("nan")), r"proximal=nan: write"),
        (lambda: mm.Implicit(proximal=torch.ones(())), r"proximal=tensor\(1\.\): write"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_options_that_can_not_be_used(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(mm.InputError, match=message):
        make()


# The factory.


def test_imaml_is_maml_with_an_implicit_adjoint() -> None:
    case, tasks = PROBLEMS["groupnorm_silu"], PROBLEMS["groupnorm_silu"].tasks(2)
    found = mm.imaml(case.net(), loss=case.loss, optimizer=mm.SGD(lr=0.1))
    assert found.adjoint == mm.Implicit(CG(iterations=5), proximal=2.0)
    assert found.steps == 16
    wanted = mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(lr=0.1), steps=16, adjoint=found.adjoint)
    assert helpers.error(helpers.meta_gradient(found, tasks), helpers.meta_gradient(wanted, tasks)) == 0.0
    assert "accuracy" in found.accumulate(tasks).names()


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize("chunk", [1, 2])
def test_evaluation_adapts_as_training_does(curve: bool, chunk: int) -> None:
    """With the proximal term."""
    tasks = PROBLEMS["mlp"].tasks(2)
    learner = imaml("mlp", proximal=5.0)
    trained = learner.accumulate(tasks, chunk=chunk)
    assert learner.evaluate(tasks, chunk=chunk, curve=curve).loss == pytest.approx(trained.loss, rel=1e-12)
    if curve:
        with torch.no_grad():
            model = learner.adapt(tasks[0][0], steps=2)
        wanted = F.mse_loss(model(tasks[0][1][0]), tasks[0][1][1])
        found = learner.evaluate(tasks[:1], curve=True).mean("loss@2")
        assert found == pytest.approx(float(wanted), rel=1e-12)


def test_learning_with_imaml() -> None:
    """Adam on the meta-gradient brings the outer loss down."""
    tasks = PROBLEMS["mlp"].tasks(4)
    learner = imaml("mlp", solver=CG(5), steps=8)
    outer, losses = torch.optim.Adam(learner.parameters(), lr=0.02), []
    for _ in range(15):
        outer.zero_grad()
        losses.append(learner.accumulate(tasks, chunk=4).loss)
        outer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_the_learner_survives_a_deepcopy() -> None:
    learner, tasks = imaml("mlp"), PROBLEMS["mlp"].tasks(1)
    twin = copy.deepcopy(learner)
    assert helpers.error(helpers.meta_gradient(twin, tasks), helpers.meta_gradient(learner, tasks)) == 0.0
