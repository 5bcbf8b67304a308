"""Adjoints: the contract, outer losses along the way, what each refuses, and batch norm's own second derivative."""

from __future__ import annotations

import copy
from typing import Any

import helpers
import pytest
import torch
from helpers import ADJOINTS, EXACT, OPTIMIZERS, PROBLEMS, Tree
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.double_backward import LeanDoubleBackward

STEPS = 4
WEIGHTS = [0.1, 0.0, 0.3, 0.6]
START = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64)


def learner_of(name: str, adjoint: mm.Adjoint, **options: Any) -> mm.MetaLearner:
    case = PROBLEMS[name]
    optimizer = options.pop("optimizer", mm.SGD(lr=case.rate))
    steps = options.pop("steps", STEPS)
    return mm.maml(case.net(), loss=case.loss, optimizer=optimizer, steps=steps, adjoint=adjoint, **options)


def explicit_sum(name: str, rule: mm.InnerOptimizer, weights: list[float], tasks: list[Any]) -> Tree:
    """Autograd through the explicit sum of weighted outer losses, with the inner loop's steps taken by plain torch."""
    case = PROBLEMS[name]
    net, bound = case.net(), rule.bind(dict(case.net().named_parameters()), len(weights))
    start: Tree = dict(net.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for support, query in tasks:
        params, slots, buffers = start, bound.start(start), dict(net.named_buffers())
        for t, weight in enumerate(weights):
            own = {key: buffer.clone() for key, buffer in buffers.items()}
            value = case.loss(torch.func.functional_call(net, {**params, **own}, support[0]), support[1])
            grads = torch.autograd.grad(value, list(params.values()), create_graph=True, materialize_grads=True)
            params, slots = bound(t, params, dict(zip(params, grads, strict=True)), slots, {})
            prediction = torch.func.functional_call(net, {**params, **own}, query[0])
            total = total + weight * case.loss(prediction, query[1])
    found = torch.autograd.grad(total / len(tasks), list(start.values()), materialize_grads=True)
    return {f"net.{key}": grad for key, grad in zip(start, found, strict=True)}


@pytest.mark.parametrize("optimizer", ["sgd", "sgd_nesterov", "adam"])
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "tied"])
def test_outer_losses_at_every_step(name: str, optimizer: str) -> None:
    tasks, rule = PROBLEMS[name].tasks(2), OPTIMIZERS[optimizer].inner()
    wanted = explicit_sum(name, rule, WEIGHTS, tasks)
    for adjoint in EXACT.values():
        learner = learner_of(name, adjoint, optimizer=rule, step_weights=WEIGHTS)
        assert helpers.error(helpers.meta_gradient(learner, tasks), wanted) < 1e-10


def test_the_weighted_loss_is_reported_with_the_last_steps_metrics() -> None:
    tasks = PROBLEMS["conv_bn"].tasks(2)
    learner = learner_of("conv_bn", mm.Stepwise(), step_weights=WEIGHTS)
    curve = learner.evaluate(tasks, curve=True)
    report = learner.accumulate(tasks)
    wanted = sum(weight * curve.mean(f"loss@{t + 1}") for t, weight in enumerate(WEIGHTS))
    assert report.loss == pytest.approx(wanted, abs=1e-12)
    assert report.mean("accuracy") == pytest.approx(curve.mean("accuracy"))


def test_first_order_with_weights_is_the_sum_of_first_order_terms() -> None:
    case, tasks = PROBLEMS["mlp"], PROBLEMS["mlp"].tasks(2)
    found = helpers.meta_gradient(learner_of("mlp", mm.FirstOrder(), step_weights=WEIGHTS), tasks)
    total: Tree = {}
    for support, query in tasks:
        for t, weight in enumerate(WEIGHTS):
            trained = helpers.torch_steps(case.net(), support, case.loss, OPTIMIZERS["sgd"], t + 1)
            trained.zero_grad()
            case.loss(trained(query[0]), query[1]).backward()
            for name, p in trained.named_parameters():
                assert p.grad is not None
                total[f"net.{name}"] = total.get(f"net.{name}", torch.zeros_like(p)) + weight / len(tasks) * p.grad
    assert helpers.error(found, total) < 1e-12


def test_weights_may_be_assigned_between_calls() -> None:
    tasks, learner = PROBLEMS["mlp"].tasks(1), learner_of("mlp", mm.Stepwise())
    last_only = helpers.meta_gradient(learner, tasks)
    learner.step_weights = WEIGHTS
    weighted = helpers.meta_gradient(learner, tasks)
    wanted = helpers.meta_gradient(learner_of("mlp", mm.Unrolled(), step_weights=WEIGHTS), tasks)
    assert helpers.error(weighted, wanted) < 1e-10
    assert helpers.error(weighted, last_only) > 1e-3
    learner.step_weights = [0.0, 0.0, 0.0, 1.0]
    assert helpers.error(helpers.meta_gradient(learner, tasks), last_only) < 1e-14
    learner.step_weights = [0.0, 0.0, 0.0, 0.0]
    assert all(not grad.any() for grad in helpers.meta_gradient(learner, tasks).values())
    learner.step_weights = [1.0]
    with pytest.raises(mm.InputError, match="1 weights for 4 inner steps"):
        learner.accumulate(tasks)
    with pytest.raises(mm.InputError, match="3 weights for 4 inner steps"):
        learner_of("mlp", mm.Stepwise(), step_weights=[0.5, 0.5, 0.5])


def test_weights_with_meta_parameters_that_are_not_adapted() -> None:
    """The body gets the outer losses' own gradients of every step, and what comes through the inner loop."""
    tasks = PROBLEMS["conv_bn"].tasks(2)
    found, wanted = (
        helpers.meta_gradient(learner_of("conv_bn", adjoint, adapt="8", step_weights=WEIGHTS), tasks)
        for adjoint in (mm.Stepwise(), mm.Unrolled())
    )
    assert helpers.error(found, wanted) < 1e-10

    def value(net: nn.Module) -> float:
        learner = mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(lr=0.1), steps=STEPS, adapt="8")
        curve = learner.evaluate(tasks, curve=True)
        return sum(weight * curve.mean(f"loss@{t + 1}") for t, weight in enumerate(WEIGHTS))

    direction = helpers.random_like(found, 0)
    slope = sum(float((found[key] * direction[key]).sum()) for key in found)
    plain = {key.removeprefix("net."): leaf for key, leaf in direction.items()}
    net = PROBLEMS["conv_bn"].net()
    measured = helpers.central_difference(lambda size: value(helpers.shifted(net, plain, size)))
    assert abs(slope - measured) < 1e-7


def test_first_order_tells_rates_and_the_body_nothing_about_the_inner_loop() -> None:
    tasks = PROBLEMS["mlp"].tasks(1)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    learner = learner_of("mlp", mm.FirstOrder(), optimizer=mm.SGD(lr=rate), adapt="2")
    grads = helpers.meta_gradient(learner, tasks)
    assert float(grads["hyper.lr"]) == 0.0
    adapted = learner.adapt(tasks[0][0])
    plain = copy.deepcopy(learner.net)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name in adapted.params:
                p.copy_(adapted.params[name])
    plain.zero_grad()
    F.mse_loss(plain(tasks[0][1][0]), tasks[0][1][1]).backward()
    wanted = {f"net.{name}": p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert helpers.error({key: grads[key] for key in wanted}, wanted) < 1e-14


# The free function under every adjoint.


def quartic(params: Tree, meta: Any, batch: float) -> Tensor:
    return (params["w"] ** 4).sum() / 4 + batch * params["w"].prod()


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_contract(adjoint: str) -> None:
    """Values, losses without a graph, a gradient of every leaf, zeros where nothing depends on one."""
    w, unused = START.clone().requires_grad_(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    params = {"w": w, "unused": unused}
    adapted = mm.adapt(quartic, params, [0.1, 0.2, 0.3], optimizer=mm.SGD(lr=0.1), adjoint=ADJOINTS[adjoint])
    assert list(adapted.params) == ["w", "unused"]
    assert torch.equal(adapted.params["unused"], unused)
    assert [loss.shape for loss in adapted.losses] == [()] * 3
    assert not any(loss.requires_grad for loss in adapted.losses)
    assert float(adapted.losses[0]) == pytest.approx(float(quartic(params, None, 0.1).detach()))
    grads = torch.autograd.grad(adapted.params["w"].sum(), [w, unused], materialize_grads=True)
    assert grads[0].abs().sum() > 0
    assert not grads[1].any()


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_linear_inner_loss_has_no_hessian(adjoint: str) -> None:
    """Its gradient depends on meta alone."""
    w = START.clone().requires_grad_()
    slope = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)

    def linear(params: Tree, meta: Tensor, batch: Any) -> Tensor:
        return (meta.square() * params["w"]).sum()

    for plain in (True, False):
        meta = slope.detach() if plain else slope
        adapted = mm.adapt(linear, {"w": w}, [0] * 3, optimizer=mm.SGD(lr=0.1), meta=meta, adjoint=ADJOINTS[adjoint])
        torch.testing.assert_close(adapted.params["w"].detach(), START - 0.3 * slope.detach().square())
        w.grad = slope.grad = None
        (adapted.params["w"] ** 2).sum().backward()
        assert w.grad is not None
        torch.testing.assert_close(w.grad, 2 * adapted.params["w"].detach())
        if not plain and EXACT.get(adjoint):
            assert slope.grad is not None
            torch.testing.assert_close(slope.grad, -0.3 * 2 * slope.detach() * w.grad)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adam"])
def test_partly_linear_inner_losses(adjoint: str, optimizer: str) -> None:
    """One parameter's gradient has no graph, another's has."""
    a, b = START.clone().requires_grad_(), START.clone().requires_grad_()

    def loss(params: Tree, meta: Any, batch: Any) -> Tensor:
        return params["a"].sum() + (params["b"] ** 4).sum()

    rule = OPTIMIZERS[optimizer].inner()
    adapted = mm.adapt(loss, {"a": a, "b": b}, [0] * 3, optimizer=rule, adjoint=ADJOINTS[adjoint])
    (adapted.params["a"] * adapted.params["b"]).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.isfinite(a.grad).all()
    if EXACT.get(adjoint):
        reference = mm.adapt(loss, {"a": a, "b": b}, [0] * 3, optimizer=rule, adjoint=mm.Unrolled())
        wanted = torch.autograd.grad((reference.params["a"] * reference.params["b"]).sum(), [a, b])
        torch.testing.assert_close([a.grad, b.grad], list(wanted), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_loss_without_a_parameter_is_refused(adjoint: str) -> None:
    params = {"w": START.clone().requires_grad_()}
    for loss in (lambda p, m, b: torch.ones(()), lambda p, m, b: p["w"].detach().sum()):
        with pytest.raises(mm.InputError, match=r"inner loss of step 0 does not depend on any adapted parameter \(w\)"):
            mm.adapt(loss, params, [0], optimizer=mm.SGD(lr=0.1), adjoint=ADJOINTS[adjoint])


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_loss_that_is_no_scalar_is_refused(adjoint: str) -> None:
    params = {"w": START.clone().requires_grad_()}
    with pytest.raises(mm.InputError, match=r"must be a scalar, got shape \[3\]"):
        mm.adapt(lambda p, m, b: p["w"] ** 2, params, [0], optimizer=mm.SGD(lr=0.1), adjoint=ADJOINTS[adjoint])
    with pytest.raises(mm.InputError, match="must be a scalar tensor, got float"):
        mm.adapt(lambda p, m, b: 1.0, params, [0], optimizer=mm.SGD(lr=0.1))  # pyright: ignore[reportArgumentType]
    one = mm.adapt(lambda p, m, b: p["w"].sum()[None, None], params, [0], optimizer=mm.SGD(lr=0.1))
    torch.testing.assert_close(one.params["w"].detach(), START - 0.1)


def test_adjoints_are_frozen_values() -> None:
    assert mm.Stepwise() == mm.Stepwise()
    assert {mm.Unrolled(), mm.Unrolled(), mm.FirstOrder()} == {mm.Unrolled(), mm.FirstOrder()}
    assert [ADJOINTS[name].exact for name in ("stepwise", "unrolled", "first_order")] == [True, True, False]


class Nothing(mm.Adjoint):
    """The smallest adjoint of a user's own: forgets that the inner loop was there."""

    @property
    def approximation(self) -> str:
        return "the inner loop is left out"

    def run(self, rollout: Any, along: Any) -> mm.Solution:
        state = rollout.start()
        return mm.Solution(state.params, state.buffers, [], lambda cotangent: self._back(rollout, cotangent))

    @staticmethod
    def _back(rollout: Any, cotangent: Tree) -> Any:
        grads = rollout.leaves.zeros()
        for name in grads.params:
            grads.params[name].add_(cotangent[name])
        return grads


def test_a_users_own_adjoint() -> None:
    case, (task,) = PROBLEMS["mlp"], PROBLEMS["mlp"].tasks(1)
    found = helpers.meta_gradient(learner_of("mlp", Nothing()), [task])
    net = case.net()
    case.loss(net(task[1][0]), task[1][1]).backward()
    wanted = {f"net.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert helpers.error(found, wanted) < 1e-14


# Batch norm's own double backward.


def lean(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    with LeanDoubleBackward():
        return F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)


def arguments(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = 0.5 + torch.rand(shape[1], generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("shape", [(5, 2), (4, 2, 3), (3, 2, 2, 2), (2, 2, 2, 1, 2)])
def test_lean_batch_norm_passes_gradcheck(shape: tuple[int, ...]) -> None:
    x, weight, bias = arguments(shape)
    assert torch.autograd.gradcheck(lean, (x, weight, bias))
    assert torch.autograd.gradgradcheck(lean, (x, weight, bias))


@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2, 2)])
def test_lean_batch_norm_has_a_right_third_derivative(shape: tuple[int, ...]) -> None:
    x, weight, bias = arguments(shape)
    g = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def slopes(x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(lean(x, weight, bias), (x, weight), g, create_graph=True)

    assert torch.autograd.gradgradcheck(slopes, (x, weight, g))


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_lean_batch_norm_where_some_inputs_are_fixed(needed: tuple[bool, bool, bool]) -> None:
    fixed = [tensor.detach().requires_grad_(flag) for tensor, flag in zip(arguments((4, 2, 3)), needed, strict=True)]
    assert torch.autograd.gradgradcheck(lean, (fixed[0], fixed[1], fixed[2]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lean_batch_norm_equals_torchs(layout: torch.memory_format) -> None:
    """Values, both derivatives and the running statistics."""
    x, weight, bias = arguments((4, 3, 5, 5))
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    results = []
    for function in (lean, lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, True, 0.1, 1e-5)):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        out = function(x, weight, bias, mean, var)
        grads = torch.autograd.grad(out.pow(3).sum(), [x, weight, bias], create_graph=True)
        second = torch.autograd.grad(torch.stack([g.sin().sum() for g in grads]).sum(), [x, weight, bias])
        results.append([out.detach(), mean, var, *(g.detach() for g in grads), *second])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    assert torch.equal(results[0][1], results[1][1])


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "plain": nn.BatchNorm2d(3),
        "cumulative": nn.BatchNorm2d(3, momentum=None),
        "without statistics": nn.BatchNorm2d(3, track_running_stats=False),
        "without weights": nn.BatchNorm2d(3, affine=False),
        "in evaluation": nn.BatchNorm2d(3).eval(),
        "wide eps": nn.BatchNorm2d(3, eps=0.3, momentum=0.7),
    }


@pytest.mark.filterwarnings("ignore::memmeta.FallbackWarning")  # a cumulative average reads a counter's value
@pytest.mark.parametrize("name", layers())
def test_every_kind_of_batch_norm_layer(name: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(1, 3, 3), layers()[name], nn.Flatten(), nn.Linear(48, 3)).double()

    tasks = PROBLEMS["conv_bn"].tasks(2)
    grads = [
        helpers.meta_gradient(
            mm.maml(build(), loss=F.cross_entropy, optimizer=mm.SGD(lr=0.1), steps=2, adjoint=adjoint), tasks
        )
        for adjoint in EXACT.values()
    ]
    assert helpers.error(grads[0], grads[1]) < 1e-10


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on its first jvp
def test_torch_func_inside_an_inner_loss_with_batch_norm() -> None:
    """functorch's transforms know nothing of the lean functions: torch's own batch norm is used under them."""

    def build() -> nn.Module:
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(3, track_running_stats=False)
        return nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.Flatten(), nn.Linear(48, 3)).double()

    def transformed(net: nn.Module, batch: helpers.Batch) -> Tensor:
        result: tuple[Tensor, Any] = torch.func.vjp(net, batch[0])  # pyright: ignore[reportAssignmentType]
        return F.cross_entropy(result[0], batch[1])

    def plain(net: nn.Module, batch: helpers.Batch) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    def learner(inner: Any) -> mm.MetaLearner:
        problem = mm.Problem(build(), inner, plain)
        return mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.05), steps=2)

    tasks = PROBLEMS["conv_bn"].tasks(2)
    found = helpers.meta_gradient(learner(transformed), tasks)
    assert helpers.error(found, helpers.meta_gradient(learner(plain), tasks)) < 1e-10
