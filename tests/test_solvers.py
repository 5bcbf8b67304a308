"""Linear solvers: exactness, true residuals, stacked systems, and failures that are reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import Tree
from torch import Tensor

import memmeta as mm
from memmeta.solvers import CG, Neumann, Solver, SolverResult

SHAPES = {"a": (2, 3), "b": (4,)}
N = 10
SOLVERS: dict[str, Solver] = {"cg": CG(200, tolerance=1e-12), "neumann": Neumann(0.3, 2000, tolerance=1e-12)}


def symmetric(eigenvalues: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(values) @ basis.T


def positive(seed: int = 0) -> Tensor:
    return symmetric(torch.linspace(0.5, 6.0, N), seed)


def right(seed: int = 0, count: int | None = None) -> Tree:
    lead = () if count is None else (count,)
    return helpers.random_like({name: torch.zeros(*lead, *shape).double() for name, shape in SHAPES.items()}, seed)


def flat(tree: Tree, batched: bool = False) -> Tensor:
    """All of a tree as one vector (N,), or (C, N)."""
    lead = len(next(iter(tree.values()))) if batched else 1
    vector = torch.cat([leaf.reshape(lead, -1) for leaf in tree.values()], 1)
    return vector if batched else vector[0]


def tree_of(vector: Tensor) -> Tree:
    parts = vector.split([math.prod(shape) for shape in SHAPES.values()], -1)
    lead = vector.shape[:-1]
    return {name: part.reshape(*lead, *shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def product_with(matrix: Tensor) -> Callable[[Tree], Tree]:
    """The product with one matrix (N, N), or with C of them, (C, N, N), on stacked trees."""
    batched = matrix.dim() == 3

    def matvec(v: Tree) -> Tree:
        return tree_of((matrix @ flat(v, batched)[..., None])[..., 0])

    return matvec


def exact(matrix: Tensor, b: Tree) -> Tree:
    return tree_of(torch.linalg.solve(matrix, flat(b, matrix.dim() == 3)))


def residual(matrix: Tensor, result: SolverResult, b: Tree) -> float:
    return helpers.error(product_with(matrix)(result.x), b)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solution_of_a_positive_definite_system(name: str) -> None:
    matrix, b = positive(), right()
    result = SOLVERS[name].solve(product_with(matrix), b)
    assert helpers.error(result.x, exact(matrix, b)) < 1e-11
    assert result.converged
    assert result.failure == ""
    assert result.residual == pytest.approx(residual(matrix, result, b), rel=1e-6, abs=1e-15)
    assert result.residual <= 1e-12


@pytest.mark.parametrize("factor", [1.0, 3.7, 1e-8, 1e8])
def test_cg_is_exact_in_one_iteration_on_a_multiple_of_the_identity(factor: float) -> None:
    b = right()
    result = CG().solve(product_with(factor * torch.eye(N, dtype=torch.float64)), b)
    assert result.iterations == 1
    assert result.converged
    assert helpers.error(result.x, tree_of(flat(b) / factor)) < 1e-15


@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_cg_with_damping_solves_the_damped_system(damping: float) -> None:
    matrix, b = positive(), right()
    result = CG(tolerance=1e-13, damping=damping).solve(product_with(matrix), b)
    assert helpers.error(result.x, exact(matrix + damping * torch.eye(N, dtype=torch.float64), b)) < 1e-12
    assert result.converged
    assert CG(damping=damping).approximation == f"CG damped by {damping:g}"
    assert CG().approximation == ""


def test_cg_takes_as_many_iterations_as_there_are_eigenvalues() -> None:
    matrix, b = symmetric([1.0] * 4 + [2.0] * 3 + [5.0] * 3), right()
    result = CG(tolerance=1e-10).solve(product_with(matrix), b)
    assert (result.iterations, result.converged) == (3, True)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("count", [None, 3])
def test_a_right_hand_side_of_zeros(name: str, count: int | None) -> None:
    b = {key: torch.zeros_like(leaf) for key, leaf in right(count=count).items()}
    matrix = positive() if count is None else torch.stack([positive(i) for i in range(count)])
    result = SOLVERS[name].solve(product_with(matrix), b, count is not None)
    assert all(not leaf.any() for leaf in result.x.values())
    assert (result.residual, result.iterations, result.converged) == (0.0, 0, True)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_what_was_not_reached_is_reported_with_the_true_residual(k: int) -> None:
    matrix, b = positive(), right()
    result = CG(iterations=k).solve(product_with(matrix), b)
    assert (result.iterations, result.converged) == (k, False)
    assert result.residual > 1e-3
    assert result.residual == pytest.approx(residual(matrix, result, b), rel=1e-10)
    assert f"after {k} iterations, tolerance 1e-05" in result.failure


def test_the_residual_is_the_true_one_where_the_recurrence_is_wrong() -> None:
    """In single precision the recurrence goes on falling where the true residual can't."""
    matrix, b = symmetric(torch.logspace(-6, 0, N)), right()
    single = {name: leaf.float() for name, leaf in b.items()}
    result = CG(500, tolerance=1e-7).solve(product_with(matrix.float()), single)
    assert all(leaf.dtype == torch.float32 for leaf in result.x.values())
    x = {name: leaf.double() for name, leaf in result.x.items()}
    measured = helpers.error(product_with(matrix.float().double())(x), {n: leaf.double() for n, leaf in single.items()})
    assert measured > 1e-6
    assert result.residual == pytest.approx(measured, rel=0.5)
    assert not result.converged


def test_cg_minimises_over_the_krylov_space() -> None:
    """k iterations give the x of K_k that is nearest in the norm of A."""
    matrix, b = positive(), flat(right())
    for k in (1, 3):
        basis = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(matrix, i) @ b for i in range(k)], 1))[0]
        wanted = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
        found = CG(k, tolerance=0.0).solve(product_with(matrix), tree_of(b)).x
        assert helpers.error(found, tree_of(wanted)) < 1e-12


@pytest.mark.parametrize("k", [1, 3, 8])
def test_neumann_is_the_partial_sum(k: int) -> None:
    matrix, b, rate = positive(), flat(right()), 0.2
    step = torch.eye(N, dtype=torch.float64) - rate * matrix
    wanted = rate * sum(torch.linalg.matrix_power(step, i) @ b for i in range(k))
    result = Neumann(rate, k).solve(product_with(matrix), tree_of(b))
    assert isinstance(wanted, Tensor)
    assert helpers.error(result.x, tree_of(wanted)) < 1e-13
    assert (result.iterations, result.converged) == (k, False)
    assert result.residual == pytest.approx(residual(matrix, result, tree_of(b)), rel=1e-10)
    assert f"after {k} iterations, tolerance 1e-05" in result.failure


# Failures are data.


def test_cg_reports_negative_curvature_and_stops() -> None:
    calls: list[int] = []

    def matvec(v: Tree) -> Tree:
        calls.append(1)
        return product_with(symmetric([-1.0] + [2.0] * (N - 1)))(v)

    result = CG(tolerance=1e-12).solve(matvec, right())
    assert not result.converged
    assert "negative curvature" in result.failure
    assert result.iterations <= 2
    assert len(calls) == result.iterations + 2  # the step that was refused, and the residual
    negative = CG().solve(product_with(-torch.eye(N, dtype=torch.float64)), right())
    assert (negative.residual, negative.iterations, negative.converged) == (1.0, 0, False)
    assert all(not leaf.any() for leaf in negative.x.values())
    cured = CG(tolerance=1e-12, damping=1.5).solve(matvec, right())
    assert cured.converged


def test_cg_on_a_singular_matrix() -> None:
    """Solvable where b is in its range, else reported."""
    matrix = symmetric([0.0, 0.0] + [1.0, 2.0, 3.0, 4.0] * 2)
    inside = tree_of(matrix @ flat(right()))
    assert CG(tolerance=1e-10).solve(product_with(matrix), inside).converged
    outside = CG(tolerance=1e-10).solve(product_with(matrix), right())
    assert not outside.converged
    assert outside.residual > 1e-2
    zero = CG().solve(product_with(0 * matrix), right())
    assert (zero.residual, zero.converged) == (1.0, False)


@pytest.mark.parametrize("matrix", [positive(), symmetric([-1.0] + [2.0] * (N - 1))], ids=["too fast", "indefinite"])
def test_neumann_reports_divergence_and_stops(matrix: Tensor) -> None:
    result = Neumann(0.5, 1000).solve(product_with(matrix), right())
    assert not result.converged
    assert result.iterations < 50
    assert result.residual > 1
    assert "diverges" in result.failure
    assert "rate=0.5 is not below 2 / the largest eigenvalue" in result.failure
    assert residual(matrix, result, right()) == pytest.approx(result.residual, rel=1e-10)


def test_neumann_at_the_limit_of_precision_does_not_diverge() -> None:
    matrix, b = positive(), right()
    result = Neumann(0.3, 2000, tolerance=0.0).solve(product_with(matrix), b)
    assert "diverges" not in result.failure
    assert result.residual < 1e-14


@pytest.mark.parametrize("solver", [CG(), Neumann(0.1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_and_right_hand_sides_that_are_not_finite(solver: Solver, bad: float) -> None:
    matrix = positive()
    broken = solver.solve(lambda v: {name: leaf * bad for name, leaf in v.items()}, right())
    assert not broken.converged
    assert not broken.residual <= 1e-3
    assert broken.failure
    b = right()
    b["a"][0, 0] = bad
    result = solver.solve(product_with(matrix), b)
    assert not result.converged
    assert math.isnan(result.residual)


# Stacked systems.


def stacked() -> tuple[Tensor, Tree]:
    """Three systems which need one, two and ten iterations of CG."""
    easy = symmetric([2.0] * N)
    medium = symmetric([1.0] * 5 + [4.0] * 5, 1)
    return torch.stack([easy, medium, positive(2)]), right(5, 3)


@pytest.mark.parametrize("name", SOLVERS)
def test_stacked_systems_are_solved_each_by_its_own(name: str) -> None:
    matrices, b = stacked()
    together = SOLVERS[name].solve(product_with(matrices), b, True)
    singles = [
        SOLVERS[name].solve(product_with(matrices[i]), {key: leaf[i] for key, leaf in b.items()}) for i in range(3)
    ]
    for i, single in enumerate(singles):
        assert helpers.error({key: leaf[i] for key, leaf in together.x.items()}, single.x) < 1e-14
    assert helpers.error(together.x, exact(matrices, b)) < 1e-11
    assert together.converged
    assert together.iterations == max(single.iterations for single in singles)
    assert together.residual == pytest.approx(max(single.residual for single in singles), rel=1e-1)


def test_a_stack_of_one() -> None:
    matrix, b = positive(), right()
    one = CG().solve(product_with(matrix[None]), {name: leaf[None] for name, leaf in b.items()}, True)
    assert helpers.error({name: leaf[0] for name, leaf in one.x.items()}, CG().solve(product_with(matrix), b).x) < 1e-14


def test_a_system_that_is_done_stays_as_it_is_while_others_go_on() -> None:
    matrices, b = stacked()
    short, long = (CG(k, tolerance=1e-12).solve(product_with(matrices), b, True) for k in (1, 10))
    assert torch.equal(short.x["a"][0], long.x["a"][0])
    assert not torch.equal(short.x["a"][2], long.x["a"][2])
    assert not short.converged
    assert long.converged


@pytest.mark.parametrize("solver", [CG(tolerance=1e-12), Neumann(0.3, 2000, tolerance=1e-12)])
@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_system_that_fails_leaves_its_neighbours_alone(solver: Solver, bad: float) -> None:
    matrices, b = stacked()
    matrices[1] *= bad
    result = solver.solve(product_with(matrices), b, True)
    assert not result.converged
    assert result.failure
    assert not result.residual < 1
    for i in (0, 2):
        wanted = exact(matrices[i], {key: leaf[i] for key, leaf in b.items()})
        assert helpers.error({key: leaf[i] for key, leaf in result.x.items()}, wanted) < 1e-11


@pytest.mark.parametrize("solver", [CG(), CG(damping=0.1), CG(2), Neumann(0.1), Neumann(0.1, 2)])
@pytest.mark.parametrize("size", [1.0, 0.0])
def test_the_last_product_is_with_what_is_returned(solver: Solver, size: float) -> None:
    seen: list[Tree] = []

    def matvec(v: Tree) -> Tree:
        seen.append(v)
        return product_with(positive())(v)

    result = solver.solve(matvec, {name: size * leaf for name, leaf in right().items()})
    assert seen[-1] is result.x


def test_the_right_hand_side_is_not_changed_and_low_precision_is_kept() -> None:
    for solver in (CG(), Neumann(0.1)):
        b = right()
        before = {name: leaf.clone() for name, leaf in b.items()}
        solver.solve(product_with(positive()), b)
        assert all(torch.equal(b[name], before[name]) for name in b)
        mixed = {"a": b["a"].bfloat16(), "b": b["b"].float()}
        doubled = solver.solve(lambda v: {name: 2 * leaf for name, leaf in v.items()}, mixed)
        assert [leaf.dtype for leaf in doubled.x.values()] == [torch.bfloat16, torch.float32]
        torch.testing.assert_close(doubled.x["b"].double(), b["b"] / 2, rtol=1e-2, atol=1e-3)


# Options.


def test_solvers_are_frozen_values() -> None:
    assert CG() == CG(50, 1e-5, 0.0)
    assert {CG(), CG(5), CG()} == {CG(5), CG()}
    assert Neumann(0.1) == Neumann(rate=0.1, iterations=100)
    assert Neumann(0.1) != Neumann(0.2)
    assert isinstance(CG(), mm.Solver)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CG(0), r"iterations=0: write the largest number of iterations, at least 1"),
        (lambda: CG(2.0), r"iterations=2\.0: write"),  # pyright: ignore[reportArgumentType]
        (lambda: CG(True), r"iterations=True: write"),
        (lambda: CG(tolerance=-1e-3), r"tolerance=-0\.001: write a finite number of at least 0"),
        (lambda: CG(tolerance=math.nan), r"tolerance=nan: write a finite number"),
        (lambda: CG(damping=math.inf), r"damping=inf: write a finite number"),
        (lambda: CG(damping="0.1"), r"damping='0\.1': write a finite number"),  # pyright: ignore[reportArgumentType]
        (lambda: Neumann(0.0), r"rate=0\.0: write a finite number above 0"),
        (lambda: Neumann(0.1, 0), r"iterations=0: write"),
        (lambda: Neumann(0.1, tolerance=-1), r"tolerance=-1: write"),
    ],
)
def test_options_that_can_not_be_used(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(mm.InputError, match=message):
        make()
