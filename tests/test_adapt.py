"""``mm.adapt``: what its result can be differentiated by, how often, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import helpers
import pytest
import torch
from helpers import ADJOINTS, EXACT, Tree
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.trees import flatten

BATCHES = [0.3, -0.1, 0.2]


class Weights(NamedTuple):
    first: Tensor
    rest: list[Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def params_at(seed: int = 0) -> Tree:
    return {"w": numbers(2, 3, seed=seed).requires_grad_(), "b": numbers(2, seed=seed + 1).requires_grad_()}


def nested(seed: int = 0) -> Any:
    """A tree of every kind of node, with constants and an integer tensor in it."""
    return {
        "data": [numbers(4, 3, seed=seed), (numbers(4, 2, seed=seed + 1), torch.tensor([0, 1, 1, 0]))],
        "weights": Weights(numbers(4, seed=seed + 2), [numbers(seed=seed + 3), numbers(1, seed=seed + 4)]),
        "name": "a constant",
        "power": 2,
        "nothing": None,
    }


def loss(params: Tree, meta: Any, batch: float) -> Tensor:
    (x, (y, labels)), weights = meta["data"], meta["weights"]
    out = torch.tanh(x) @ params["w"].T + params["b"]
    error = ((out - y) ** meta["power"]).sum(1)
    decay = sum(w.exp().sum() for w in weights.rest) * sum((p**2).sum() for p in params.values())
    return (torch.sigmoid(weights.first) * error).mean() + 0.05 * decay + batch * out[labels == 1].sum() / 10


def outer(params: Tree) -> Tensor:
    return (params["w"] ** 3).sum() + params["b"].cos().sum()


def floats(tree: Any) -> Tree:
    """The floating leaves of a nested tree, by path."""
    found, _ = flatten(tree)
    return {name: leaf for name, leaf in found.items() if leaf.is_floating_point()}


def every_leaf() -> Tree:
    """Initial parameters, meta tensors and hyperparameters, under one roof."""
    return {
        **{f"params.{name}": value.detach() for name, value in params_at().items()},
        **{f"meta.{name}": value for name, value in floats(nested()).items()},
        "lr": torch.tensor(0.1, dtype=torch.float64),
        "momentum": torch.tensor(0.6, dtype=torch.float64),
    }


def run(leaves: Tree, adjoint: mm.Adjoint) -> mm.Adapted:
    found, rebuild = flatten(nested())
    meta = rebuild({name: leaves.get(f"meta.{name}", leaf) for name, leaf in found.items()})
    params = {name: leaves[f"params.{name}"] for name in ("w", "b")}
    optimizer = mm.SGD(lr=leaves["lr"], momentum=leaves["momentum"])
    return mm.adapt(loss, params, BATCHES, optimizer=optimizer, meta=meta, adjoint=adjoint)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.filterwarnings("ignore::memmeta.FallbackWarning")  # what can not be traced is run eagerly
def test_data_weights_rates_and_initial_values_get_exact_gradients(adjoint: str) -> None:
    leaves = {name: leaf.requires_grad_() for name, leaf in every_leaf().items()}
    outer(run(leaves, EXACT[adjoint]).params).backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert found.keys() == leaves.keys()
    assert all(grad.any() for grad in found.values())

    def value(name: str, point: Tensor) -> float:
        return float(outer(run({**every_leaf(), name: point}, mm.Stepwise()).params).detach())

    measured = {
        name: helpers.central_gradient(lambda point, name=name: value(name, point), leaf)
        for name, leaf in every_leaf().items()
    }
    assert helpers.error(found, measured) < 1e-8


@pytest.mark.parametrize("adjoint", EXACT)
def test_only_what_requires_grad_gets_a_gradient(adjoint: str) -> None:
    for wanted in ("lr", "meta.data.0", "params.b"):
        leaves = every_leaf()
        leaves[wanted].requires_grad_()
        result = run(leaves, EXACT[adjoint])
        outer(result.params).backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        everything = {name: leaf.requires_grad_() for name, leaf in every_leaf().items()}
        outer(run(everything, mm.Unrolled()).params).backward()
        grad, reference = leaves[wanted].grad, everything[wanted].grad
        assert grad is not None
        assert reference is not None
        torch.testing.assert_close(grad, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_nothing_requires_grad(adjoint: str) -> None:
    result = run(every_leaf(), ADJOINTS[adjoint])
    assert not any(value.requires_grad for value in result.params.values())
    assert not all(torch.equal(result.params[name], every_leaf()[f"params.{name}"]) for name in result.params)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_without_grad_plain_tensors_come_back(adjoint: str) -> None:
    leaves = {name: leaf.requires_grad_() for name, leaf in every_leaf().items()}
    wanted = run(leaves, ADJOINTS[adjoint])
    with torch.no_grad():
        result = run(leaves, ADJOINTS[adjoint])
    assert not any(value.requires_grad for value in result.params.values())
    assert all(torch.equal(result.params[name], wanted.params[name].detach()) for name in result.params)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_no_batches_at_all(adjoint: str) -> None:
    params = params_at()
    result = mm.adapt(loss, params, [], optimizer=mm.Adam(), meta=nested(), adjoint=ADJOINTS[adjoint])
    assert result.losses == []
    outer(result.params).backward()
    assert params["w"].grad is not None
    torch.testing.assert_close(params["w"].grad, 3 * params["w"].detach() ** 2)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_several_backward_calls(adjoint: str) -> None:
    """As of any graph: with ``retain_graph``, in any order, with the same result."""
    leaves = {name: leaf.requires_grad_() for name, leaf in every_leaf().items()}
    inputs, result = list(leaves.values()), run(leaves, ADJOINTS[adjoint])
    values = [outer(result.params), result.params["w"].sum(), result.params["b"].square().sum()]

    def pull(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)

    first, again = [pull(value) for value in values], [pull(value) for value in values[::-1]][::-1]
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    together = torch.autograd.grad(values[0] + 2 * values[1] - values[2], inputs, materialize_grads=True)
    for index, grad in enumerate(together):
        torch.testing.assert_close(grad, first[0][index] + 2 * first[1][index] - first[2][index])


@pytest.mark.parametrize("changed", ["params.w", "meta.data.0", "lr"])
def test_a_change_in_place_before_the_backward_is_refused(changed: str) -> None:
    leaves = {name: leaf.requires_grad_() for name, leaf in every_leaf().items()}
    value = outer(run(leaves, mm.Stepwise()).params)
    with torch.no_grad():
        leaves[changed].add_(0.1)
    with pytest.raises(mm.InputError, match=r"changed in place between adapt\(\) and backward\(\)"):
        value.backward()
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_arguments_are_left_as_they_are(adjoint: str) -> None:
    leaves = {name: leaf.requires_grad_() for name, leaf in every_leaf().items()}
    outer(run(leaves, ADJOINTS[adjoint]).params).backward()
    assert all(torch.equal(leaves[name].detach(), leaf) for name, leaf in every_leaf().items())
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves.values())


def test_a_hessian_vector_product_through_unrolled() -> None:
    """A second derivative through the inner loop, against torch's own on the loop written out."""
    vector = numbers(6, seed=9)

    def by_hand(w: Tensor) -> Tensor:
        params: Tree = {"w": w.view(2, 3), "b": params_at()["b"]}
        for batch in BATCHES:
            grads = torch.autograd.grad(loss(params, nested(), batch), list(params.values()), create_graph=True)
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return outer(params)

    def by_adapt(w: Tensor) -> Tensor:
        params = {"w": w.view(2, 3), "b": params_at()["b"].detach()}
        result = mm.adapt(loss, params, BATCHES, optimizer=mm.SGD(lr=0.1), meta=nested(), adjoint=mm.Unrolled())
        return outer(result.params)

    start = params_at()["w"].detach().flatten()
    value, product = torch.autograd.functional.hvp(by_adapt, start, vector)
    reference, wanted = torch.autograd.functional.hvp(by_hand, start, vector)
    torch.testing.assert_close(value, reference, rtol=0, atol=1e-12)
    torch.testing.assert_close(product, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["curved", "linear", "beside another term"])
@pytest.mark.parametrize("adjoint", ["stepwise", "first_order"])
def test_a_second_derivative_through_the_others_is_refused_and_never_left_out(adjoint: str, form: str) -> None:
    params = params_at()
    result = mm.adapt(loss, params, BATCHES, optimizer=mm.SGD(lr=0.1), meta=nested(), adjoint=ADJOINTS[adjoint])
    value = {
        "curved": lambda: outer(result.params),
        "linear": lambda: result.params["w"].sum(),
        "beside another term": lambda: result.params["w"].sum() + (params["w"] ** 3).sum(),
    }[form]()
    (grad,) = torch.autograd.grad(value, params["w"], create_graph=True)
    with pytest.raises(mm.UnsupportedError, match=r"can't be differentiated twice .* use adjoint=Unrolled\(\)"):
        torch.autograd.grad(grad.sum(), params["w"], retain_graph=True)
    with pytest.raises(mm.UnsupportedError, match="differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("adjoint", EXACT)
def test_parameters_made_by_another_network(adjoint: str) -> None:
    maker = nn.Linear(4, 8, dtype=torch.float64)
    grads = []
    for each in (EXACT[adjoint], mm.Unrolled()):
        maker.zero_grad()
        made = maker(numbers(4, seed=3))
        params = {"w": made[:6].view(2, 3), "b": made[6:]}
        outer(
            mm.adapt(loss, params, BATCHES, optimizer=mm.Adam(lr=0.05), meta=nested(), adjoint=each).params
        ).backward()
        grads.append({name: p.grad.clone() for name, p in maker.named_parameters() if p.grad is not None})
    assert helpers.error(grads[0], grads[1]) < 1e-10
    assert grads[0].keys() == {"weight", "bias"}


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_prior_that_is_the_start_itself(adjoint: str) -> None:
    """iMAML's penalty: the same tensor is a parameter and a constant of the inner loss."""
    prior = numbers(3).requires_grad_()
    lr, target = 0.1, numbers(3, seed=1)

    def penalised(params: Tree, meta: Tensor, batch: float) -> Tensor:
        return (params["w"] - target).pow(4).sum() / 4 + 0.5 * (params["w"] - meta).square().sum()

    def steps(start: Tensor) -> Tensor:
        w = start
        for _ in range(3):
            w = w - lr * ((w - target) ** 3 + (w - start))
        return w

    result = mm.adapt(
        penalised, {"w": prior}, [0.0] * 3, optimizer=mm.SGD(lr=lr), meta=prior, adjoint=ADJOINTS[adjoint]
    )
    torch.testing.assert_close(result.params["w"].detach(), steps(prior.detach()), rtol=0, atol=1e-14)
    if ADJOINTS[adjoint].exact:
        (found,) = torch.autograd.grad(result.params["w"].pow(3).sum(), prior)
        (wanted,) = torch.autograd.grad(steps(prior).pow(3).sum(), prior)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_one_tensor_under_two_names_starts_two_parameters(adjoint: str) -> None:
    """Each name takes its own steps from the same start; the start gets both gradients."""
    start = numbers(3).requires_grad_()

    def apart(params: Tree, meta: Any, batch: Any) -> Tensor:
        return (params["a"] ** 4).sum() / 4 + (params["b"] ** 2 * params["a"]).sum()

    def result_of(a: Tensor, b: Tensor, each: mm.Adjoint) -> mm.Adapted:
        return mm.adapt(apart, {"a": a, "b": b}, [0] * 2, optimizer=mm.SGD(lr=0.1), adjoint=each)

    a, b = start.detach().clone().requires_grad_(), start.detach().clone().requires_grad_()
    separate, shared = result_of(a, b, mm.Unrolled()), result_of(start, start, ADJOINTS[adjoint])
    assert helpers.error(shared.params, separate.params) < 1e-15
    if ADJOINTS[adjoint].exact:
        (found,) = torch.autograd.grad((shared.params["a"] * shared.params["b"]).sum(), start)
        wanted = torch.autograd.grad((separate.params["a"] * separate.params["b"]).sum(), [a, b])
        torch.testing.assert_close(found, wanted[0] + wanted[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_tensors_that_reach_the_loss_by_closure_are_refused(adjoint: str) -> None:
    hidden = torch.ones(7, 2, dtype=torch.float64, requires_grad=True)
    params, rate = params_at(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def adapt(extra: Callable[[Tree, Any], Tensor], batch: Any = 0.1) -> mm.Adapted:
        return mm.adapt(
            lambda p, m, b: loss(p, nested(), 0.1) + extra(p, b),
            params,
            [batch] * 2,
            optimizer=mm.SGD(lr=rate),
            adjoint=ADJOINTS[adjoint],
        )

    with pytest.raises(mm.CaptureError, match=r"shape \[7, 2\] that requires grad reaches the inner loss by closure"):
        adapt(lambda p, b: (hidden[0] * p["b"]).sum())
    with pytest.raises(mm.CaptureError, match=r"shape \[7, 2\]"):
        adapt(lambda p, b: b.sum() * p["b"].sum(), hidden)
    with pytest.raises(mm.CaptureError, match=r"shape \[\]"):
        adapt(lambda p, b: rate * p["b"].sum())
    with pytest.raises(mm.CaptureError, match=r"shape \[2, 3\]"):
        adapt(lambda p, b: (p["w"] - params["w"]).square().sum())
    assert adapt(lambda p, b: (hidden.detach()[0] * p["b"]).sum()).params.keys() == params.keys()


def test_a_new_batch_at_every_step_is_looked_at() -> None:
    hidden = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(mm.CaptureError, match=r"shape \[2\]"):
        mm.adapt(
            lambda p, m, b: (p["b"] ** 2 * b).sum(),
            params_at(),
            [torch.ones(2, dtype=torch.float64), hidden],
            optimizer=mm.SGD(lr=0.1),
        )


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([torch.ones(2)], "params must be a dict of tensors with at least one entry"),
    "integers": ({"w": torch.ones(2, dtype=torch.int64)}, r"params\['w'\] must be a floating-point tensor"),
    "a number": ({"w": 0.1}, r"params\['w'\] must be a floating-point tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_are_none_are_refused(name: str) -> None:
    params, message = REFUSED[name]
    with pytest.raises(mm.InputError, match=message):
        mm.adapt(lambda p, m, b: p["w"].sum(), params, [0], optimizer=mm.SGD(lr=0.1))


class Broken(Exception):
    """Of the user's own."""


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_exceptions_of_the_loss_pass_through(adjoint: str) -> None:
    state = torch.get_rng_state()

    def breaking(params: Tree, meta: Any, batch: int) -> Tensor:
        torch.rand(3)
        if batch == 2:
            raise Broken("here")
        return params["w"].square().sum()

    with pytest.raises(Broken, match="here"):
        mm.adapt(breaking, params_at(), [0, 1, 2], optimizer=mm.SGD(lr=0.1), adjoint=ADJOINTS[adjoint], seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.filterwarnings("ignore::memmeta.FallbackWarning")  # what can not be traced is run eagerly
def test_an_inner_loop_inside_an_inner_loop(adjoint: str) -> None:
    """The inner one must be ``Unrolled``, as it is differentiated twice; any other is refused."""
    start = numbers(2).requires_grad_()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def run_nested(x: Tensor, lr: Tensor, within: mm.Adjoint) -> Tensor:
        def deepest(params: Tree, meta: Tensor, batch: Any) -> Tensor:
            return ((params["y"] - meta) ** 4).sum()

        def middle(params: Tree, meta: Any, batch: Any) -> Tensor:
            first = {"y": 2 * params["x"]}
            inside = mm.adapt(deepest, first, [0] * 2, optimizer=mm.SGD(lr=0.1), meta=params["x"], adjoint=within)
            return inside.params["y"].square().sum()

        result = mm.adapt(middle, {"x": x}, [0] * 2, optimizer=mm.SGD(lr=lr), adjoint=EXACT[adjoint])
        return result.params["x"].pow(3).sum()

    run_nested(start, rate, mm.Unrolled()).backward()
    assert start.grad is not None
    assert rate.grad is not None
    at, eta = start.detach(), rate.detach()
    by_start = helpers.central_gradient(lambda x: float(run_nested(x, eta, mm.Unrolled())), at)
    by_rate = helpers.central_gradient(lambda lr: float(run_nested(at, lr, mm.Unrolled())), eta)
    torch.testing.assert_close(start.grad, by_start, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(rate.grad, by_rate, rtol=1e-8, atol=1e-8)
    with pytest.raises(mm.UnsupportedError, match="can't be differentiated twice"):
        run_nested(start, rate, mm.Stepwise()).backward()


def test_data_distillation() -> None:
    """Inputs and labels are learned so that three steps on them fit other data."""
    inputs = numbers(20, 3, seed=5)
    targets = inputs @ numbers(3, 2, seed=6)
    learned = {"x": numbers(3, 3, seed=7).requires_grad_(), "y": numbers(3, 2, seed=8).requires_grad_()}
    outer_optimizer = torch.optim.Adam(learned.values(), lr=0.05)

    def fit(params: Tree, meta: Tree, batch: Any) -> Tensor:
        return F.mse_loss(meta["x"] @ params["w"], meta["y"])

    values = []
    for _ in range(60):
        start = {"w": torch.zeros(3, 2, dtype=torch.float64)}
        result = mm.adapt(fit, start, [None] * 3, optimizer=mm.SGD(lr=0.5), meta=learned)
        value = F.mse_loss(inputs @ result.params["w"], targets)
        outer_optimizer.zero_grad()
        value.backward()
        outer_optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.2 * values[0]
