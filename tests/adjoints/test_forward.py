"""Forward mode: every optimiser's numbers, problems and groups of leaves against Unrolled; its memory; its refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import OPTIMIZERS, PROBLEMS, Tree
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memmeta as mm
from memmeta.adjoints.tangents import Carrier

F64 = torch.float64
WEIGHTS = [0.1, 0.0, 0.3, 0.6]
START = torch.tensor([0.3, -0.4, 0.8], dtype=F64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def drawn(name: str, optimizer: mm.InnerOptimizer, adjoint: mm.Adjoint, **options: Any) -> mm.MetaLearner:
    """Learns the optimiser's tensors alone: the weights start anew in each task."""
    case = PROBLEMS[name]
    loss = mm.Supervised(case.loss)
    problem = mm.Problem(case.net(), loss, loss, redraw={"*": lambda p: p.detach() + 0.1 * torch.randn_like(p)})
    return mm.MetaLearner(problem, optimizer=optimizer, steps=4, adjoint=adjoint, step_weights=WEIGHTS, **options)


def both(make: Callable[[mm.Adjoint], mm.MetaLearner], tasks: list[Any], limit: int = 64, **options: Any) -> float:
    """The error of Forward against Unrolled."""
    found, wanted = (
        helpers.meta_gradient(make(adjoint), tasks, seed=3, **options) for adjoint in (mm.Forward(limit), mm.Unrolled())
    )
    assert any(grad.any() for grad in wanted.values())
    return helpers.error(found, wanted)


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the tangents are taken one by one."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("not batched")

    monkeypatch.setattr(Carrier, "_one_by_one", refuse)


@pytest.mark.usefixtures("batched")
@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "attention"])
def test_every_number_of_every_optimizer(name: str, rule: str) -> None:
    numbers = {key: number(value) for key, value in OPTIMIZERS[rule].numbers.items()}
    if len(numbers) == 1:
        numbers["weight_decay"] = number(0.01)  # a single tangent isn't batched
    tasks = PROBLEMS[name].tasks(1)
    assert both(lambda adjoint: drawn(name, OPTIMIZERS[rule].inner(**numbers), adjoint), tasks) < 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_number_on_every_problem(name: str) -> None:
    rate = number(PROBLEMS[name].rate)
    assert both(lambda adjoint: drawn(name, mm.SGD(lr=rate), adjoint), PROBLEMS[name].tasks(1)) < 1e-10


def forms(net: nn.Module) -> dict[str, mm.InnerOptimizer]:
    names = [name for name, _ in net.named_parameters()]
    return {
        "per step": mm.SGD(lr=torch.linspace(0.1, 0.2, 4, dtype=F64).requires_grad_(), momentum=number(0.5)),
        "per tensor": mm.Adam(lr={name: number(0.05 + 0.01 * i) for i, name in enumerate(names)}),
        "per tensor and step": mm.SGD(lr={name: torch.full((7,), 0.1, dtype=F64).requires_grad_() for name in names}),
        "per element": mm.SGD(
            lr={name: torch.full_like(p, 0.1).requires_grad_() for name, p in net.named_parameters()}, momentum=0.3
        ),
        "a float and a tensor": mm.SGD(lr={name: number(0.1) if i else 0.2 for i, name in enumerate(names)}),
    }


@pytest.mark.parametrize("form", forms(PROBLEMS["mlp"].net()))
def test_every_form_of_a_hyperparameter(form: str) -> None:
    rule = forms(PROBLEMS["mlp"].net())[form]
    assert both(lambda adjoint: drawn("mlp", rule, adjoint), PROBLEMS["mlp"].tasks(2)) < 1e-10


def weighted(params: Tree, meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Two terms and a penalty, with learned weights; one parameter is used in no step."""
    inputs, targets = batch
    prediction = torch.tanh(inputs @ params["w"]) + params["b"]
    errors = (prediction - targets) ** 2
    return meta["terms"][0].exp() * errors.mean() + meta["terms"][1] * errors.sqrt().sum() + _penalty(params, meta)


def _penalty(params: Tree, meta: dict[str, Tensor]) -> Tensor:
    return meta["decay"] * (params["w"] ** 2).sum() * params["b"].exp().sum()


def leaves() -> tuple[Tree, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    params = {"w": START.clone().requires_grad_(), "b": number(0.1), "unused": torch.ones(2, dtype=F64)}
    terms = torch.tensor([0.2, 0.3], dtype=F64, requires_grad=True)
    meta = {"terms": terms, "decay": number(0.05), "not learned": torch.ones((), dtype=F64)}
    batches = [(torch.randn(6, 3, generator=generator, dtype=F64), torch.ones(6, dtype=F64)) for _ in range(5)]
    return params, meta, batches


def through(adjoint: mm.Adjoint, optimizer: mm.InnerOptimizer, hyper: Tree) -> Tree:
    """The gradients of an outer loss with respect to initial parameters, meta and hyperparameters."""
    params, meta, batches = leaves()
    adapted = mm.adapt(weighted, params, batches, optimizer=optimizer, meta=meta, adjoint=adjoint)
    value = weighted(adapted.params, meta, batches[0])
    every = {**params, **meta, **hyper}
    every = {name: leaf for name, leaf in every.items() if leaf.requires_grad}
    found = torch.autograd.grad(value, list(every.values()), materialize_grads=True)
    return dict(zip(every, found, strict=True))


@pytest.mark.parametrize("rule", ["sgd", "sgd_decay", "sgd_nesterov", "adamw_amsgrad"])
@pytest.mark.parametrize("learned", [True, False])
def test_parameters_meta_and_hyperparameters_together(rule: str, learned: bool) -> None:
    """Without learned numbers plain SGD is affine, and its tangents need no graph."""
    hyper = {"lr": number(0.05)} if learned else {}
    optimizer = OPTIMIZERS[rule].inner(**(hyper or {"lr": 0.05}))
    wanted = through(mm.Unrolled(), optimizer, hyper)
    for adjoint in (mm.Forward(), mm.Forward(at_once=1), mm.Forward(at_once=4)):
        assert helpers.error(through(adjoint, optimizer, hyper), wanted) < 1e-10


def test_a_tensor_in_several_places() -> None:
    """A prior that is the start itself, and one rate under two names."""
    rate = number(0.1)

    def loss(params: Tree, meta: Tensor, batch: Any) -> Tensor:
        return (params["a"] ** 4).sum() + ((params["b"] - meta) ** 2 * params["a"]).sum()

    grads = []
    for adjoint in (mm.Forward(), mm.Unrolled()):
        w = START.clone().requires_grad_()
        optimizer = mm.SGD(lr={"a": rate, "b": rate})
        adapted = mm.adapt(loss, {"a": w, "b": w}, [0] * 3, optimizer=optimizer, meta=w, adjoint=adjoint)
        value = (adapted.params["a"] * adapted.params["b"] ** 2).sum()
        grads.append(dict(zip("wr", torch.autograd.grad(value, [w, rate]), strict=True)))
    assert helpers.error(*grads) < 1e-10


def test_gradients_that_are_one_tensor() -> None:
    """The gradients of a + b are one tensor, in every microbatch."""
    params = {name: START.clone().requires_grad_() for name in "ab"}

    def loss(p: Tree, meta: Any, batch: Tensor) -> Tensor:
        return (batch @ (p["a"] + p["b"])).pow(3).mean()

    batch = torch.linspace(-1, 1, 18, dtype=F64).view(6, 3)
    found = []
    for adjoint, microbatch in ((mm.Forward(), 2), (mm.Unrolled(), None)):
        options = {"optimizer": mm.SGD(lr=0.1), "adjoint": adjoint, "microbatch": microbatch}
        adapted = mm.adapt(loss, params, [batch] * 3, **options)
        value = (adapted.params["a"] * adapted.params["b"].exp()).sum()
        found.append(dict(zip("ab", torch.autograd.grad(value, list(params.values())), strict=True)))
    assert helpers.error(*found) < 1e-10


@pytest.mark.parametrize("rule", ["sgd_decay", "adam"])
def test_stacked_tasks(rule: str) -> None:
    """Each task's own tangents: initial values of the head, a body that is meta-learned, and hyperparameters."""
    case, tasks = PROBLEMS["mlp"], PROBLEMS["mlp"].tasks(4)
    numbers = {key: number(value) for key, value in OPTIMIZERS[rule].numbers.items()}
    options = {"loss": case.loss, "optimizer": OPTIMIZERS[rule].inner(**numbers), "steps": 4, "adapt": "2"}

    def make(adjoint: mm.Adjoint) -> mm.MetaLearner:
        return mm.maml(case.net(), adjoint=adjoint, step_weights=WEIGHTS, **options)

    assert both(make, tasks, limit=100) < 1e-10
    alone = helpers.meta_gradient(make(mm.Forward(100)), tasks)
    assert helpers.error(helpers.meta_gradient(make(mm.Forward(100)), tasks, chunk=3), alone) < 1e-12


def test_stacked_batch_norm_and_one_number() -> None:
    rate, tasks = number(0.1), PROBLEMS["conv_bn"].tasks(3)
    alone, stacked = (
        helpers.meta_gradient(drawn("conv_bn", mm.SGD(lr=rate), mm.Forward()), tasks, seed=0, chunk=chunk)
        for chunk in (1, 3)
    )
    assert helpers.error(stacked, alone) < 1e-12


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_microbatches(name: str, chunk: int) -> None:
    rule, tasks = mm.SGD(lr=number(0.1), momentum=number(0.5)), PROBLEMS[name].tasks(2)
    whole, pieces = (
        helpers.meta_gradient(drawn(name, rule, mm.Forward()), tasks, seed=0, chunk=chunk, microbatch=microbatch)
        for microbatch in (None, 2)
    )
    assert helpers.error(pieces, whole) < 1e-12


def test_dropout_and_checkpointed_layers() -> None:
    case, rule = PROBLEMS["mlp"], mm.Adam(lr=number(0.05), eps=number(1e-3))

    def loss(net: nn.Module, batch: Any) -> Tensor:
        assert isinstance(net, nn.Sequential)
        hidden = F.dropout(net[1](net[0](batch[0])), 0.4)
        return F.mse_loss(net[2](hidden), batch[1])

    def checkpointed(net: nn.Module, batch: Any) -> Tensor:
        prediction = checkpoint(net, batch[0], use_reentrant=False)
        assert isinstance(prediction, Tensor)
        return F.mse_loss(prediction, batch[1])

    def make(inner: Any, adjoint: mm.Adjoint) -> mm.MetaLearner:
        problem = mm.Problem(case.net(), inner, mm.Supervised(case.loss), redraw={"*": lambda p: p.detach()})
        return mm.MetaLearner(problem, optimizer=rule, steps=3, adjoint=adjoint)

    assert both(lambda adjoint: make(loss, adjoint), case.tasks(1)) < 1e-10
    found = helpers.meta_gradient(make(checkpointed, mm.Forward()), case.tasks(1))
    wanted = helpers.meta_gradient(make(mm.Supervised(case.loss), mm.Unrolled()), case.tasks(1))
    assert helpers.error(found, wanted) < 1e-10


class Cube(torch.autograd.Function):
    """x^3 with a backward that vmap can't batch: it looks at a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return _Slope.apply(x, grad_outputs[0])  # type: ignore[no-any-return]


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, g = ctx.saved_tensors
        (v,) = grad_outputs
        assert v.abs().sum().item() >= 0  # a batched tensor has no .item()
        return 6 * x * g * v, 3 * x**2 * v


def test_what_cannot_be_batched_is_taken_one_by_one() -> None:
    grads = []
    for cube, adjoint in ((Cube.apply, mm.Forward()), (lambda x: x**3, mm.Unrolled())):
        w, rate = START.clone().requires_grad_(), number(0.1)

        def loss(params: Tree, meta: Any, batch: Any, cube: Any = cube) -> Tensor:
            return cube(params["w"]).sum() + params["w"].prod() ** 2

        adapted = mm.adapt(loss, {"w": w}, [0] * 4, optimizer=mm.SGD(lr=rate, momentum=0.5), adjoint=adjoint)
        grads.append(dict(zip("wr", torch.autograd.grad(adapted.params["w"].exp().sum(), [w, rate]), strict=True)))
    assert helpers.error(*grads) < 1e-10


def test_operators_that_vmap_loops_over_bring_no_warning() -> None:
    """torch's GRU cell is not mapped, which torch warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rule = mm.SGD(lr=number(0.1), momentum=number(0.5))
        assert both(lambda adjoint: drawn("gru_cells", rule, adjoint), PROBLEMS["gru_cells"].tasks(1)) < 1e-10
    assert not caught


class Normalised(mm.SGD):
    """Not elementwise: the gradient's norm over a whole tensor."""

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tree, h: Any) -> tuple[Tensor, Tree]:
        return super().update(t, param, grad / grad.norm(), slots, h)


def test_a_rule_of_the_users_own() -> None:
    rule = Normalised(lr=number(0.1), momentum=number(0.5))
    assert both(lambda adjoint: drawn("mlp", rule, adjoint), PROBLEMS["mlp"].tasks(1)) < 1e-10


def test_linear_losses_and_nothing_to_learn() -> None:
    w, slope, rate = START.clone().requires_grad_(), number(2.0), number(0.1)

    def linear(params: Tree, meta: Tensor, batch: Any) -> Tensor:
        return (meta**2 * params["w"]).sum()

    adapted = mm.adapt(linear, {"w": w}, [0] * 3, optimizer=mm.SGD(lr=rate), meta=slope, adjoint=mm.Forward())
    grads = torch.autograd.grad(adapted.params["w"].sum(), [w, slope, rate])
    torch.testing.assert_close(grads[0], torch.ones(3, dtype=F64))
    torch.testing.assert_close([float(grad) for grad in grads[1:]], [-3.6, -36.0])
    plain = mm.adapt(linear, {"w": START}, [0] * 3, optimizer=mm.SGD(lr=0.1), meta=slope.detach(), adjoint=mm.Forward())
    assert not plain.params["w"].requires_grad
    torch.testing.assert_close(plain.params["w"], START - 1.2)


def test_a_loss_of_meta_alone_is_refused() -> None:
    rule = mm.SGD(lr=0.1)
    with pytest.raises(mm.InputError, match=r"does not depend on any adapted parameter \(w\)"):
        mm.adapt(lambda p, m, b: m**2, {"w": START}, [0], optimizer=rule, meta=number(1.0), adjoint=mm.Forward())


# Hybrid hyperoptimisation: the published figures, and the closed form.


def hypergradients(count: int) -> tuple[list[float], list[float], list[float]]:
    """Rates, final losses and hypergradients of (5a - 10)^2 from a = 1, 9 steps, rate <- rate - 1e-7 hypergradient."""
    rate, rates, losses, grads = number(0.001), [], [], []
    start = {"a": torch.ones((), dtype=F64)}

    def loss(params: Tree, meta: Any, batch: Any) -> Tensor:
        return (5 * params["a"] - 10) ** 2

    for _ in range(count):
        adapted = mm.adapt(loss, start, [None] * 9, optimizer=mm.SGD(lr=rate), adjoint=mm.Forward())
        value = loss(adapted.params, None, None)
        (grad,) = torch.autograd.grad(value, [rate])
        rates.append(float(rate.detach()))
        losses.append(float(value.detach()))
        grads.append(float(grad))
        with torch.no_grad():
            rate -= 1e-7 * grad
    return rates, losses, grads


def test_hybrid_hyperoptimisation() -> None:
    rates, losses, grads = hypergradients(20)
    printed = ".001000 .001941 .002338 .002610 .002818 .002989 .003132 .003257 .003366 .003464"
    assert [f"{rate:.6f}".removeprefix("0") for rate in rates[:10]] == printed.split()
    assert f"{rates[19]:.6f}" == "0.004108"
    printed = "9.930358 3.980942 2.668781 2.018368 1.623763 1.357499 1.165340 1.020016 .906236 .814736"
    assert [f"{loss:.6f}".removeprefix("0") for loss in losses[:10]] == printed.split()
    assert f"{grads[0]:.4f}" == "-9407.7075"
    rate = 0.001
    for found_rate, loss, grad in zip(rates, losses, grads, strict=True):
        assert found_rate == pytest.approx(rate, rel=1e-9)
        assert loss == pytest.approx(25 * (1 - 50 * rate) ** 18, rel=1e-9)
        assert grad == pytest.approx(-22500 * (1 - 50 * rate) ** 17, rel=1e-9)
        rate += 1e-7 * 22500 * (1 - 50 * rate) ** 17


# Memory and refusals.


def peak(steps: int) -> int:
    inputs = torch.linspace(-1, 1, 40_000, dtype=F64).view(2000, 20)
    params = {"w": torch.full((20, 20), 0.1, dtype=F64), "v": torch.ones(20, dtype=F64)}
    rule = mm.SGD(lr=number(0.01), momentum=number(0.5))

    def loss(p: Tree, meta: Any, batch: Any) -> Tensor:
        return (torch.tanh(inputs @ p["w"]) @ p["v"] - 1).square().mean()

    def run() -> None:
        mm.adapt(loss, params, [None] * steps, optimizer=rule, adjoint=mm.Forward(), seed=0)

    return mm.memory.peak_of(run)


def test_memory_does_not_depend_on_the_number_of_steps() -> None:
    assert peak(50) < 1.05 * peak(5)


@pytest.mark.slow
def test_memory_of_a_thousand_steps() -> None:
    assert peak(1000) < 1.05 * peak(10)


def test_too_many_elements_are_refused() -> None:
    case = PROBLEMS["mlp"]
    with pytest.raises(mm.UnsupportedError, match=r"Cannot carry 32 tangents .*Forward\(limit=31\): params requires"):
        mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(lr=0.1), steps=2, adjoint=mm.Forward(31))
    mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(lr=0.1), steps=2, adjoint=mm.Forward(32))
    weights = torch.ones(40, 50, dtype=F64, requires_grad=True)
    rule = mm.SGD(lr=number(0.1))
    with pytest.raises(mm.UnsupportedError, match=r"2,001 tangents .*: meta requires grad with 2,000 .*Use `Stepwise"):
        mm.adapt(lambda p, m, b: p["w"].sum(), {"w": START}, [0], optimizer=rule, meta=weights, adjoint=mm.Forward())
    rates = mm.SGD(lr=torch.ones(65, dtype=F64, requires_grad=True))
    with pytest.raises(mm.UnsupportedError, match="hyperparameters requires grad with 65 elements"):
        mm.adapt(lambda p, m, b: p["w"].sum(), {"w": START}, [0], optimizer=rates, adjoint=mm.Forward())


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_options_that_are_no_counts_are_refused(value: Any) -> None:
    with pytest.raises(mm.InputError, match=r"limit=.*the most tangents that may be carried, at least 1"):
        mm.Forward(limit=value)
    with pytest.raises(mm.InputError, match=r"at_once=.*how many tangents are differentiated together"):
        mm.Forward(at_once=value)


def test_operators_without_a_second_derivative_are_named() -> None:
    table = {"w": torch.ones(3, 2, dtype=F64)}

    def loss(params: Tree, meta: Any, batch: Tensor) -> Tensor:
        return F.embedding_bag(batch, params["w"], mode="mean").pow(2).sum()

    batch = torch.tensor([[0, 1], [1, 2]])
    rule = mm.SGD(lr=number(0.1), momentum=number(0.5))
    with pytest.raises(mm.UnsupportedError, match="which has no second derivative in torch"):
        mm.adapt(loss, table, [batch] * 3, optimizer=rule, adjoint=mm.Forward())


def test_a_frozen_exact_value() -> None:
    assert mm.Forward() == mm.Forward(64)
    assert hash(mm.Forward(3)) == hash(mm.Forward(3))
    assert mm.Forward().exact
