"""Hyperparameters learned on the way: real time against the definition of Z, restarts, hypergradient descent."""

from __future__ import annotations

import math
from typing import Any

import helpers
import pytest
import torch
from helpers import PROBLEMS, Tree
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import memmeta as mm

F64 = torch.float64
STEPS = 12
Batch = tuple[Tensor, Tensor]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def problem(terms: bool = False) -> tuple[Tree, Any, list[Batch]]:
    """The initial parameters, loss and batches of a small network; with a learned weight of a penalty."""
    case = PROBLEMS["mlp"]
    net = case.net()

    def loss(params: Tree, meta: Any, batch: Batch) -> Tensor:
        value = F.mse_loss(functional_call(net, params, batch[0]), batch[1])
        if terms:
            value = value + meta["decay"] * torch.stack([p.square().sum() for p in params.values()]).sum()
        return value

    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    return start, loss, [case.task(index)[0] for index in range(STEPS + 1)]


def online(every: int, restart: bool, rule: str = "adam", rate: float = 0.05) -> tuple[mm.Online, Tree, Tree]:
    start, loss, _ = problem(terms=True)
    numbers = {key: number(value) for key, value in helpers.OPTIMIZERS[rule].numbers.items()}
    meta = {"decay": number(0.01)}
    outer = torch.optim.SGD([*numbers.values(), *meta.values()], lr=rate)
    optimizer = helpers.OPTIMIZERS[rule].inner(**numbers)
    options: dict[str, Any] = {"outer_loss": loss, "meta": meta, "every": every, "restart": restart, "seed": 0}
    return mm.Online(loss, start, optimizer=optimizer, outer_optimizer=outer, **options), numbers, meta


@pytest.mark.parametrize("rule", ["sgd_nesterov_decay", "adam", "rmsprop_centered_momentum"])
def test_without_updates_it_is_forward_mode(rule: str) -> None:
    """The hypergradients at each t are those of an inner loop of t steps."""
    running, numbers, meta = online(every=4, restart=False, rule=rule, rate=0.0)
    start, loss, batches = problem(terms=True)
    for t, batch in enumerate(batches[:STEPS]):
        report = running.step(batch, batches[-1])
        assert running.steps == t + 1
        assert bool(report.hypergradients) == ((t + 1) % 4 == 0)
        if not report.hypergradients:
            assert report.outer_loss is None
            continue
        optimizer = helpers.OPTIMIZERS[rule].inner(**numbers)
        adapted = mm.adapt(loss, start, batches[: t + 1], optimizer=optimizer, meta=meta, adjoint=mm.Unrolled())
        value = loss(adapted.params, meta, batches[-1])
        learned = {**numbers, "meta.decay": meta["decay"]}
        grads = torch.autograd.grad(value, list(learned.values()), materialize_grads=True)
        assert helpers.error(dict(report.hypergradients), dict(zip(learned, grads, strict=True))) < 1e-10
        assert float(report.loss) == pytest.approx(float(adapted.losses[-1]), rel=1e-12)
        assert report.outer_loss is not None
        assert float(report.outer_loss) == pytest.approx(float(value.detach()), rel=1e-12)
        assert helpers.error(running.params, adapted.params) < 1e-12
        for name, tensor in learned.items():
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, report.hypergradients[name])


def test_a_restart_forgets_the_tangents_and_keeps_the_state() -> None:
    """Every hypergradient is that of the last steps alone; moments and the bias correction's count go on."""
    running, numbers, meta = online(every=3, restart=True)
    start, loss, batches = problem(terms=True)
    rule = helpers.OPTIMIZERS["adam"].inner(**numbers).bind(start, STEPS)
    params, slots = start, rule.start(start)
    for first in range(0, STEPS, 3):
        hyper = {name: tensor.detach().requires_grad_() for name, tensor in numbers.items()}
        decay = meta["decay"].detach().requires_grad_()
        for t in range(first, first + 3):
            params = {name: p if p.requires_grad else p.requires_grad_() for name, p in params.items()}
            value = loss(params, {"decay": decay}, batches[t])
            grads = dict(zip(params, torch.autograd.grad(value, list(params.values()), create_graph=True), strict=True))
            params, slots = rule(t, params, grads, slots, hyper)
        inputs = [*hyper.values(), decay]
        wanted = torch.autograd.grad(loss(params, {"decay": decay}, batches[-1]), inputs, materialize_grads=True)
        params = {name: p.detach() for name, p in params.items()}
        slots = {name: {key: slot.detach() for key, slot in group.items()} for name, group in slots.items()}
        reports = [running.step(batch, batches[-1]) for batch in batches[first : first + 3]]
        names = [*hyper, "meta.decay"]
        found = dict(reports[-1].hypergradients)
        assert helpers.error(found, dict(zip(names, wanted, strict=True))) < 1e-10
        assert helpers.error(running.params, params) < 1e-12


def test_in_real_time_the_tangents_go_on() -> None:
    """Z_{t+1} = A_t Z_t + B_t at the rate of the moment, for a quadratic in one dimension."""
    rate, beta, curvature = number(0.1), 0.01, 1.7
    start, target = {"w": torch.ones((), dtype=F64)}, 0.5

    def loss(params: Tree, meta: Any, batch: Any) -> Tensor:
        return curvature * params["w"] ** 2 / 2

    def outer(params: Tree, meta: Any, batch: Any) -> Tensor:
        return (params["w"] - target) ** 2 / 2

    running = mm.Online(
        loss, start, optimizer=mm.SGD(lr=rate), outer_optimizer=torch.optim.SGD([rate], lr=beta), outer_loss=outer
    )
    w, z, alpha = 1.0, 0.0, 0.1
    for _ in range(10):
        report = running.step(None)
        z = (1 - alpha * curvature) * z - curvature * w
        w = w - alpha * curvature * w
        hypergradient = z * (w - target)
        alpha = alpha - beta * hypergradient
        assert float(report.hypergradients["lr"]) == pytest.approx(hypergradient, rel=1e-12)
        assert float(running.params["w"]) == pytest.approx(w, rel=1e-12)
        assert float(rate.detach()) == pytest.approx(alpha, rel=1e-12)


def flat(tree: Tree) -> Tensor:
    return torch.cat([leaf.detach().flatten() for leaf in tree.values()])


def gradient(loss: Any, params: Tree, batch: Batch) -> Tree:
    own = {name: p.detach().requires_grad_() for name, p in params.items()}
    return dict(zip(own, torch.autograd.grad(loss(own, None, batch), list(own.values())), strict=True))


@pytest.mark.parametrize("momentum", [None, 0.9], ids=["SGD-HD", "SGDN-HD"])
def test_hypergradient_descent_of_sgd(momentum: float | None) -> None:
    """alpha_t = alpha_{t-1} + beta g_t . u_{t-1}, then the step with alpha_t (Baydin et al. 2018)."""
    start, loss, batches = problem()
    rate, beta = number(0.05), 0.01
    rule = mm.SGD(lr=rate) if momentum is None else mm.SGD(lr=rate, momentum=momentum, nesterov=True)
    running = mm.hypergradient_descent(loss, start, optimizer=rule, rate=beta, seed=0)
    params, alpha, before, velocity = start, 0.05, None, torch.zeros(0)
    for t, batch in enumerate(batches):
        report = running.step(batch)
        g = gradient(loss, params, batch)
        direction = flat(g)
        if momentum is not None:
            velocity = flat(g) if t == 0 else momentum * velocity + flat(g)
            direction = flat(g) + momentum * velocity
        if before is not None:
            alpha += beta * float(flat(g) @ before)
            assert float(report.hypergradients["lr"]) == pytest.approx(-float(flat(g) @ before), rel=1e-12)
            assert report.outer_loss is not None
            assert torch.equal(report.outer_loss, report.loss)
        else:
            assert not report.hypergradients
        moved = flat(params) - alpha * direction
        parts = moved.split([p.numel() for p in params.values()])
        params = {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}
        before = direction
        assert float(rate.detach()) == pytest.approx(alpha, rel=1e-12)
        assert helpers.error(running.params, params) < 1e-12
    assert alpha > 0.051


def test_hypergradient_descent_of_adam() -> None:
    """alpha_t = alpha_{t-1} + beta g_t . (m / c1) / (sqrt(v / c2) + eps), with the moments of the step before."""
    start, loss, batches = problem()
    rate, beta, b1, b2, eps = number(0.01), 1e-3, 0.9, 0.99, 1e-6
    rule = mm.Adam(lr=rate, betas=(b1, b2), eps=eps)
    running = mm.hypergradient_descent(loss, start, optimizer=rule, rate=beta, seed=0)
    sizes = [p.numel() for p in start.values()]
    theta, alpha = flat(start), 0.01
    m, v, direction = torch.zeros_like(theta), torch.zeros_like(theta), None
    for t, batch in enumerate(batches):
        running.step(batch)
        parts = zip(start.items(), theta.split(sizes), strict=True)
        g = flat(gradient(loss, {name: part.view_as(p) for (name, p), part in parts}, batch))
        if direction is not None:
            alpha += beta * float(g @ direction)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        direction = m / (1 - b1 ** (t + 1)) / ((v / (1 - b2 ** (t + 1))).sqrt() + eps)
        theta = theta - alpha * direction
        assert float(rate.detach()) == pytest.approx(alpha, rel=1e-12)
        assert helpers.error({"all": flat(running.params)}, {"all": theta}) < 1e-12
    assert alpha != 0.01


def test_hypergradient_descent_takes_one_gradient_per_step() -> None:
    start, loss, batches = problem()
    calls = []

    def counted(params: Tree, meta: Any, batch: Batch) -> Tensor:
        calls.append(batch)
        return loss(params, meta, batch)

    running = mm.hypergradient_descent(counted, start, optimizer=mm.SGD(lr=number(0.05)), rate=0.01)
    for batch in batches:
        running.step(batch)
    # Each step's loss is computed by the update and not again: the gradient serves both.
    assert len(calls) == len(batches)


def test_hypergradient_descent_of_the_losses_own_numbers() -> None:
    """d theta_t / d decay = -alpha d g / d decay, and the next loss's own derivative."""
    start, loss, batches = problem(terms=True)
    decay, rate = number(0.1), number(0.05)
    rule = mm.SGD(lr=rate)
    running = mm.hypergradient_descent(loss, start, optimizer=rule, rate=0.01, meta={"decay": decay}, seed=0)
    running.step(batches[0])
    before = running.params
    report = running.step(batches[1])
    own = {name: p.detach().requires_grad_() for name, p in before.items()}
    value = loss(own, {"decay": number(0.1)}, batches[1])
    g = flat(dict(zip(own, torch.autograd.grad(value, list(own.values())), strict=True)))
    wanted = -0.05 * float(g @ (2 * flat(start))) + float(flat(before).square().sum())
    assert float(report.hypergradients["meta.decay"]) == pytest.approx(wanted, rel=1e-12)
    assert float(decay.detach()) == pytest.approx(0.1 - 0.01 * wanted, rel=1e-12)
    # The step after the update is taken with the new numbers.
    moved = {name: p.detach().requires_grad_() for name, p in before.items()}
    value = loss(moved, {"decay": decay.detach()}, batches[1])
    assert float(report.loss) == pytest.approx(float(value.detach()), rel=1e-12)


def test_it_trains_and_finds_a_larger_rate() -> None:
    """A rate that is far too small grows, and the loss falls below that of the fixed rate."""
    start, loss, batches = problem()
    fixed = mm.adapt(loss, start, [batches[0]] * 60, optimizer=mm.SGD(lr=0.001), seed=0).losses[-1]
    rate = number(0.001)
    outer = torch.optim.Adam([rate], lr=0.005)
    rule = mm.SGD(lr=rate, momentum=0.5)
    running = mm.Online(loss, start, optimizer=rule, outer_optimizer=outer, outer_loss=loss, every=5)
    losses = [float(running.step(batches[0], batches[0]).loss) for _ in range(60)]
    assert float(rate.detach()) > 0.01
    assert losses[-1] < 0.8 * float(fixed)


def test_random_losses_draw_the_same_for_the_same_seed() -> None:
    net = nn.Linear(3, 2).double()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(params: Tree, meta: Any, batch: Batch) -> Tensor:
        return F.mse_loss(functional_call(net, params, F.dropout(batch[0], 0.5)), batch[1])

    def run(seed: int) -> Tensor:
        rate = number(0.1)
        running = mm.hypergradient_descent(loss, start, optimizer=mm.SGD(lr=rate), rate=0.01, seed=seed)
        for batch in problem()[2]:
            report = running.step(batch)
            if report.outer_loss is not None:
                assert torch.equal(report.outer_loss, report.loss)
        return rate.detach()

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_does_not_depend_on_the_number_of_steps() -> None:
    start, loss, batches = problem()

    def run(steps: int) -> None:
        rate = number(0.01)
        outer = torch.optim.SGD([rate], lr=1e-3)
        rule = mm.SGD(lr=rate, momentum=0.5)
        running = mm.Online(loss, start, optimizer=rule, outer_optimizer=outer, outer_loss=loss, every=4, seed=0)
        for _ in range(steps):
            running.step(batches[0], batches[1])

    assert mm.memory.peak_of(lambda: run(80)) == mm.memory.peak_of(lambda: run(16))


# Refusals.


def make(**options: Any) -> mm.Online:
    rate = number(0.1)
    chosen: dict[str, Any] = {
        "params": {"w": torch.ones(3, dtype=F64)},
        "optimizer": mm.SGD(lr=rate),
        "outer_optimizer": torch.optim.SGD([rate], lr=0.1),
        "outer_loss": square,
    }
    chosen.update(options)
    return mm.Online(square, chosen.pop("params"), **chosen)


def square(params: Tree, meta: Any, batch: Any) -> Tensor:
    return params["w"].square().sum()


def owned(**rates: Any) -> dict[str, Any]:
    tensors = [x for rate in rates.values() for x in (rate.values() if isinstance(rate, dict) else [rate])]
    return {"optimizer": mm.SGD(**rates), "outer_optimizer": torch.optim.SGD(tensors, lr=0.1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0: write the number of inner steps per update, at least 1"),
        ({"limit": True}, "limit=True: write the most tangents"),
        ({"params": {}}, "params must be a dict of tensors with at least one entry"),
        ({"params": {"w": torch.ones(3, dtype=torch.int64)}}, r"params\['w'\] must be a floating-point tensor"),
        ({"optimizer": mm.SGD(lr=0.1)}, "there is nothing to learn"),
        ({"optimizer": mm.SGD(lr=number(0.1))}, "lr requires grad and is not in outer_optimizer"),
        ({"optimizer": mm.SGD(lr=number(0.1).exp())}, "lr was computed from other tensors"),
        (owned(lr=torch.ones(9, dtype=F64, requires_grad=True)), "lr= has one value per inner step, and online"),
        (owned(lr={"w": torch.ones(9, dtype=F64, requires_grad=True)}), "lr/w= has one value per inner step"),
        (owned(lr={"v": torch.ones((), dtype=F64, requires_grad=True)}), "missing \\['w'\\], unknown \\['v'\\]"),
    ],
)
def test_refused_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mm.InputError, match=message):
        make(**options)


def test_a_rate_per_element_is_no_rate_per_step() -> None:
    running = make(**owned(lr={"w": torch.full((3,), 0.1, dtype=F64, requires_grad=True)}))
    assert running.step(None).hypergradients["lr/w"].shape == (3,)
    with pytest.raises(mm.UnsupportedError, match=r"3 tangents when using mm.Online\(limit=2\): hyperparameters"):
        make(limit=2, **owned(lr={"w": torch.full((3,), 0.1, dtype=F64, requires_grad=True)}))


def test_hypergradient_descent_without_anything_to_learn() -> None:
    with pytest.raises(mm.InputError, match="there is nothing to learn"):
        mm.hypergradient_descent(square, {"w": torch.ones(3)}, optimizer=mm.SGD(lr=0.1), rate=0.1)


def test_outer_losses_that_cannot_be_used() -> None:
    hidden = number(1.0)
    with pytest.raises(mm.CaptureError, match="reaches the outer loss by closure"):
        make(outer_loss=lambda p, m, b: p["w"].sum() * hidden).step(None)
    with pytest.raises(mm.InputError, match="the outer loss does not depend on the parameters or meta"):
        make(outer_loss=lambda p, m, b: p["w"].detach().sum()).step(None)
    with pytest.raises(mm.InputError, match=r"the outer loss must be a scalar, got shape \[3\]"):
        make(outer_loss=lambda p, m, b: p["w"]).step(None)


def test_a_hypergradient_that_is_not_finite_updates_nothing() -> None:
    options = owned(lr=number(0.1))
    running = make(outer_loss=lambda p, m, b: p["w"].sum() * math.inf, **options)
    with pytest.raises(mm.NonFiniteError, match="the hypergradient of lr after inner step 1 is not finite"):
        running.step(None)
    rate = options["optimizer"].lr
    assert float(rate.detach()) == 0.1
    assert rate.grad is None


def test_a_step_that_fails_leaves_the_state_as_it_was() -> None:
    start, loss, batches = problem()
    running = mm.hypergradient_descent(loss, start, optimizer=mm.SGD(lr=number(0.1)), rate=0.0)
    running.step(batches[0])
    before = running.params
    with pytest.raises(RuntimeError, match="shape"):
        running.step((batches[0][0][:, :2], batches[0][1]))
    assert running.steps == 1
    assert helpers.error(running.params, before) == 0.0
    running.step(batches[1])
    assert running.steps == 2
