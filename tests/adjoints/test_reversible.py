"""Reversible(): the inner loop run backwards, bit for bit, and the gradients that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import PROBLEMS, Tree
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.fixed_point import fractions

F64 = torch.float64
STEPS = 5
WEIGHTS = [0.1, 0.0, 0.3, 0.2, 0.4]
REVERSIBLE = mm.Reversible()


def learner_of(adjoint: mm.Adjoint, name: str = "mlp", **options: Any) -> mm.MetaLearner:
    case = PROBLEMS[name]
    rule = mm.SGD(case.rate, momentum=0.9, dampening=0.3, weight_decay=0.05)
    return mm.maml(case.net(), loss=case.loss, **{"optimizer": rule, "steps": STEPS, "adjoint": adjoint, **options})


def agree(tolerance: float = 1e-11, name: str = "mlp", count: int = 2, call: Any = None, **options: Any) -> None:
    """The meta-gradient is that of the whole graph."""
    tasks = PROBLEMS[name].tasks(count)
    found = helpers.meta_gradient(learner_of(REVERSIBLE, name, **options), tasks, **(call or {}))
    wanted = helpers.meta_gradient(learner_of(mm.Unrolled(), name, **options), tasks)
    assert helpers.error(found, wanted) < tolerance


def quartic(params: Tree, meta: Any, batch: float) -> Tensor:
    """Several minima, so that the loop depends on where it begins."""
    return (params["w"] ** 4).sum() / 4 - (params["w"] ** 2).sum() / 2 + batch * params["w"].prod()


def start(dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor([0.3, -0.4, 0.8], dtype=dtype, requires_grad=True)


# The gradient.


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str) -> None:
    agree(name=name)
    agree(name=name, count=1, step_weights=WEIGHTS, optimizer=mm.SGD(PROBLEMS[name].rate, momentum=0.5))


@pytest.mark.parametrize("call", [{"chunk": 3}, {"microbatch": 2}, {"chunk": 2, "microbatch": 3}], ids=str)
@pytest.mark.parametrize("name", ["mlp", "groupnorm_silu"])
def test_stacked_tasks_and_microbatches(name: str, call: dict[str, int]) -> None:
    agree(name=name, count=3, call=call, step_weights=WEIGHTS)


def test_one_step_and_none() -> None:
    agree(steps=1)
    for steps in (0, 1):
        w = start()
        adapted = mm.adapt(quartic, {"w": w}, [0.1] * steps, optimizer=mm.SGD(0.1, momentum=0.9), adjoint=REVERSIBLE)
        (grad,) = torch.autograd.grad(adapted.params["w"].sum(), w)
        reference = mm.adapt(quartic, {"w": w}, [0.1] * steps, optimizer=mm.SGD(0.1, momentum=0.9))
        torch.testing.assert_close(grad, torch.autograd.grad(reference.params["w"].sum(), w)[0], rtol=0, atol=1e-14)


def forms(value: float) -> dict[str, Callable[[nn.Module], Any]]:
    """Every form of a hyperparameter, around ``value``; momenta in it are fractions with small denominators."""

    def spread(*shape: int) -> Tensor:
        return (value * torch.linspace(80, 100, math.prod(shape) + 1, dtype=F64)[1:].round() / 100).view(shape)

    def scalar() -> Tensor:
        return torch.tensor(value, dtype=F64)

    def each(net: nn.Module, make: Callable[[Tensor], Any]) -> Any:
        return {name: make(p) for name, p in net.named_parameters()}

    return {
        "scalar": lambda net: scalar(),
        "per step": lambda net: spread(STEPS),
        "per step and tensor": lambda net: each(net, lambda p: spread(STEPS + 2)),
        "per tensor": lambda net: {name: x for (name, _), x in zip(net.named_parameters(), spread(4), strict=True)},
        "per element": lambda net: each(net, lambda p: spread(*p.shape)),
        "mixed": lambda net: {n: value if "0" in n else scalar() for n, _ in net.named_parameters()},
    }


@pytest.mark.parametrize("form", forms(0.0))
@pytest.mark.parametrize("field", ["lr", "momentum", "dampening", "weight_decay"])
def test_learned_hyperparameters(field: str, form: str) -> None:
    values: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}
    case, found = PROBLEMS["mlp"], []
    for adjoint in (REVERSIBLE, mm.Unrolled()):
        net = case.net()
        value = forms(values[field])[form](net)
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, Tensor):
                tensor.requires_grad_()
        rule = mm.SGD(**{**values, field: value})
        problem = mm.maml(net, loss=case.loss, optimizer=rule, steps=STEPS, adjoint=adjoint, step_weights=WEIGHTS)
        found.append(helpers.meta_gradient(problem, case.tasks(2)))
    hyper = [{key: grad for key, grad in tree.items() if key.startswith("hyper.")} for tree in found]
    assert hyper[0]
    assert helpers.error(found[0], found[1]) < 1e-11
    assert helpers.error(hyper[0], hyper[1]) < 1e-11


@pytest.mark.parametrize("elementwise", [False, True])
def test_any_momentum_is_run_and_differentiated_as_the_fraction_near_it(elementwise: bool) -> None:
    x = 0.5 + 0.49 * torch.rand(3 if elementwise else (), generator=torch.Generator().manual_seed(1), dtype=F64)
    n, d = (part.double() for part in fractions(x))
    found = []
    for value, adjoint in ((x, REVERSIBLE), (n / d, mm.Unrolled())):
        w, momentum = start(), value.clone().requires_grad_()
        rule = mm.SGD(0.05, momentum={"w": momentum} if elementwise else momentum)
        adapted = mm.adapt(quartic, {"w": w}, [0.1] * 20, optimizer=rule, adjoint=adjoint)
        found.append([*torch.autograd.grad(adapted.params["w"].square().sum(), [w, momentum]), adapted.params["w"]])
        if adjoint is REVERSIBLE:
            assert adapted.status["momentum_rounding"] == float((x - n / d).abs().max()) < 1 / 2**16
            assert adapted.status.get("momentum") == (None if elementwise else float(n / d))
    # A product is off by up to d 2^-52.
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_meta_tensors_and_finite_differences() -> None:
    """Data, a rate and a momentum at once, against the loop itself run from elsewhere."""
    direction = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def run(size: float, adjoint: mm.Adjoint) -> tuple[Tensor, list[Tensor]]:
        w = (start().detach() + size * direction).requires_grad_()
        data = (torch.ones(3, dtype=F64) + size * direction).requires_grad_()
        lr = torch.tensor(0.05 + size, dtype=F64, requires_grad=True)

        def loss(params: Tree, meta: Tensor, batch: float) -> Tensor:
            return quartic(params, None, batch) + (params["w"] * meta).sin().sum()

        rule = mm.SGD(lr, momentum=0.9)
        adapted = mm.adapt(loss, {"w": w}, [0.1] * 12, optimizer=rule, meta=data, adjoint=adjoint)
        return adapted.params["w"].square().sum(), [w, data, lr]

    value, leaves = run(0.0, REVERSIBLE)
    grads = torch.autograd.grad(value, leaves)
    slope = float((grads[0] * direction).sum() + (grads[1] * direction).sum() + grads[2])
    measured = helpers.central_difference(lambda size: run(size, mm.FirstOrder())[0].item())
    assert slope == pytest.approx(measured, rel=1e-8)


# The way back, bit for bit.


def walked(momentum: Any, steps: int, dtype: torch.dtype, **options: Any) -> tuple[mm.Adapted, list[Tensor]]:
    """The parameters that the loss was given, forth and back."""
    seen: list[Tensor] = []

    def loss(params: Tree, meta: Any, batch: float) -> Tensor:
        seen.append(params["w"].detach().clone())
        return quartic(params, None, batch)

    batches = [0.1 * math.sin(t) for t in range(steps)]
    rule = mm.SGD(0.05, momentum=momentum, **options)
    adapted = mm.adapt(loss, {"w": start(dtype)}, batches, optimizer=rule, adjoint=REVERSIBLE)
    adapted.params["w"].sum().backward()
    return adapted, seen


def recovered(momentum: Any, steps: int, dtype: torch.dtype, **options: Any) -> mm.Adapted:
    adapted, seen = walked(momentum, steps, dtype, **options)
    assert len(seen) == 2 * steps
    forth, back = torch.stack(seen[:steps]), torch.stack(seen[steps:])
    assert torch.equal(forth, back.flip(0))
    assert torch.equal(forth[0], start(dtype).detach()) or dtype == F64
    torch.testing.assert_close(forth[0], start(dtype).detach(), rtol=0, atol=2**-53)
    return adapted


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.98, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_every_state_is_recovered(dtype: torch.dtype, momentum: float) -> None:
    status = recovered(momentum, 200, dtype).status
    assert status["bits_per_step_and_element"] < math.log2(1 / momentum) + 8 / 200


def test_every_state_is_recovered_with_another_momentum_at_every_step() -> None:
    momenta = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=F64).mul_(0.7).add_(0.29)
    adapted = recovered(momenta, 300, F64, weight_decay=0.01, dampening=0.5)
    used = torch.stack(fractions(momenta)).double()
    wanted = float((used[1] / used[0])[1:].log2().mean())
    assert adapted.status["bits_per_step_and_element"] == pytest.approx(wanted, rel=0.01)
    assert "momentum" not in adapted.status


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.98, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_every_state_of_ten_thousand_steps_is_recovered(dtype: torch.dtype, momentum: float) -> None:
    status = recovered(momentum, 10_000, dtype, weight_decay=0.01).status
    assert status["bits_per_step_and_element"] == pytest.approx(math.log2(1 / momentum), abs=8 / 10_000)


def test_the_pullback_may_be_called_again() -> None:
    w = start()
    adapted = mm.adapt(quartic, {"w": w}, [0.1] * 90, optimizer=mm.SGD(0.02, momentum=0.5), adjoint=REVERSIBLE)
    value = adapted.params["w"].square().sum()
    first, second = (torch.autograd.grad(value, w, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_float32_follows_float64() -> None:
    """The state has more bits than float32: only the gradients are rounded to it."""
    found = []
    for dtype in (torch.float32, F64):
        w = start(dtype)
        adapted = mm.adapt(quartic, {"w": w}, [0.1] * 30, optimizer=mm.SGD(0.05, momentum=0.9), adjoint=REVERSIBLE)
        assert adapted.params["w"].dtype == dtype
        found.append(torch.autograd.grad(adapted.params["w"].square().sum(), w)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-5, atol=1e-6)


class ReadsItsStatistics(nn.Module):
    """The inner loss depends on buffers that every step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert self.norm.running_mean is not None
        before = self.norm.running_mean.clone()
        return self.head(self.norm(x) * before.add(1).exp() + before)


def test_buffers_that_are_read_are_replayed() -> None:
    def learner(adjoint: mm.Adjoint) -> mm.MetaLearner:
        torch.manual_seed(0)
        net = ReadsItsStatistics().double()
        return mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.05, momentum=0.8), steps=STEPS, adjoint=adjoint)

    tasks = PROBLEMS["mlp"].tasks(2)
    found, wanted = (helpers.meta_gradient(learner(adjoint), tasks) for adjoint in (REVERSIBLE, mm.Unrolled()))
    assert helpers.error(found, wanted) < 1e-11
    adapted, reference = (learner(adjoint).adapt(tasks[0][0]).buffers for adjoint in (REVERSIBLE, mm.Stepwise()))
    assert adapted is not None
    assert reference is not None
    assert helpers.error(adapted, reference) < 1e-12


# Memory.


def peak(steps: int, momentum: float, examples: int) -> int:
    """Counted bytes of a meta-gradient where the activations of the examples outweigh 25 parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    batch = (torch.randn(examples, 1, dtype=F64), torch.randn(examples, 1, dtype=F64))
    rule = mm.SGD(0.01, momentum=momentum)
    learner = mm.maml(net, loss=F.mse_loss, optimizer=rule, steps=steps, adjoint=REVERSIBLE, metrics={})
    return mm.memory.peak_of(lambda: learner.accumulate([(batch, batch)]))


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_memory_grows_by_the_lost_bits_alone(momentum: float) -> None:
    """Beyond them there are the inner losses of both ways, 16 bytes a step."""
    few, many = peak(5, momentum, 50), peak(55, momentum, 50)
    assert many - few <= 50 * 16 + 25 * 55 * math.log2(1 / momentum) / 8


@pytest.mark.slow
def test_memory_of_a_thousand_steps() -> None:
    assert peak(1000, 0.98, 4000) < 1.05 * peak(10, 0.98, 4000)


# Refusals.


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (mm.Adam(0.1), r"needs optimizer=mm.SGD\(lr, momentum=...\), got Adam.*use Stepwise\(\)"),
        (mm.RMSprop(0.1, momentum=0.9), r"needs optimizer=mm.SGD.*got RMSprop"),
        (mm.SGD(0.1), r"momentum is 0: write one between 1.5e-05 and 0.99997, or use Stepwise\(\)"),
        (mm.SGD(0.1, momentum=1.0), "momentum is 1:"),
        (mm.SGD(0.1, momentum=1e-6), "momentum is 1e-06:"),
        (mm.SGD(0.1, momentum={"w": 0.0}), "momentum/w is 0:"),
        (mm.SGD(0.1, momentum=0.9, nesterov=True), "can't undo nesterov=True"),
    ],
)
def test_rules_that_cannot_be_undone_are_refused(rule: mm.InnerOptimizer, message: str) -> None:
    with pytest.raises(mm.UnsupportedError, match=message):
        mm.adapt(quartic, {"w": start()}, [0.1], optimizer=rule, adjoint=REVERSIBLE)


def test_a_learner_is_refused_at_construction() -> None:
    with pytest.raises(mm.UnsupportedError, match=r"Reversible\(\) needs optimizer=mm.SGD"):
        learner_of(REVERSIBLE, optimizer=mm.Adam(0.1))
    with pytest.raises(
        mm.UnsupportedError, match=r"needs parameters in float32 or float64, got torch.bfloat16 for 0.w"
    ):
        mm.maml(
            PROBLEMS["mlp"].net().bfloat16(),
            loss=F.mse_loss,
            optimizer=mm.SGD(0.1, momentum=0.9),
            steps=1,
            adjoint=REVERSIBLE,
        )
    with pytest.raises(mm.InputError, match="fraction_bits=8: write the number of bits"):
        mm.Reversible(fraction_bits=8)


@pytest.mark.parametrize("value", [[0.5, 0.9, 1.0], [0.5, 0.0, 0.5], [-0.5, 0.5, 0.5], [0.5, math.nan, 0.5]])
def test_momenta_that_were_learned_too_far_are_refused(value: list[float]) -> None:
    rule = mm.SGD(0.1, momentum=torch.tensor(value, dtype=F64, requires_grad=True))
    with pytest.raises(mm.UnsupportedError, match="undoes a step by dividing by the momentum, and momentum is"):
        mm.adapt(quartic, {"w": start()}, [0.1] * 3, optimizer=rule, adjoint=REVERSIBLE)


@pytest.mark.parametrize(
    ("scale", "first", "where"),
    [
        (1.0, 2e3, "reached 2000 at the start"),
        (1e6, 0.3, "reached .* at inner step 0"),
        (100.0, 0.3, "at inner step 1"),
    ],
)
def test_numbers_out_of_reach_are_refused(scale: float, first: float, where: str) -> None:
    def loss(params: Tree, meta: Any, batch: float) -> Tensor:
        return scale * (params["w"] ** 2).sum() * 2

    def run(adjoint: mm.Adjoint) -> Tensor:
        w = torch.full((1,), first, dtype=F64, requires_grad=True)
        return mm.adapt(loss, {"w": w}, [0] * 2, optimizer=mm.SGD(0.1, momentum=0.5), adjoint=adjoint).params["w"]

    with pytest.raises(mm.UnsupportedError, match=f"holds numbers below 1024, and w, .*{where}.*fewer fraction_bits"):
        run(REVERSIBLE)
    if scale < 1e3:
        torch.testing.assert_close(run(mm.Reversible(fraction_bits=40)), run(mm.Stepwise()), rtol=1e-9, atol=1e-9)


def test_what_is_not_finite_is_data() -> None:
    """As with other adjoints: a task that has no finite gradient is skipped, and named otherwise."""
    good, bad = PROBLEMS["mlp"].tasks(2)
    bad = ((bad[0][0] * math.nan, bad[0][1]), bad[1])
    learner = learner_of(REVERSIBLE, steps=66, step_weights=[1.0] * 66)
    for chunk in (1, 2):
        report = learner.accumulate([good, bad], chunk=chunk, on_nonfinite="skip")
        assert (len(report.tasks), len(report.skipped)) == (1, 1)
    with pytest.raises(mm.NonFiniteError, match="task 1 of the meta-batch: its inner loss is nan at inner step 0"):
        learner.accumulate([good, bad])
    w = start()
    batches = [0.1] * 3 + [math.inf] + [0.1] * 3
    adapted = mm.adapt(quartic, {"w": w}, batches, optimizer=mm.SGD(0.1, momentum=0.5), adjoint=REVERSIBLE)
    assert [math.isfinite(loss) for loss in adapted.losses] == [True] * 3 + [False] * 4
    assert adapted.params["w"].isnan().all()
    assert torch.autograd.grad(adapted.params["w"].sum(), w)[0].isnan().all()


def test_hidden_state_is_found() -> None:
    """In the loss, and where it shows in the last bits of a gradient alone."""
    calls: list[int] = []

    def noisy(scale: float) -> Callable[[Tree, Any, float], Tensor]:
        def loss(params: Tree, meta: Any, batch: float) -> Tensor:
            calls.append(1)
            hidden = scale * len(calls)
            return quartic(params, None, batch) + (hidden * (params["w"] - params["w"].detach())).sum()

        return loss

    def run(scale: float, steps: int) -> None:
        calls.clear()
        rule = mm.SGD(0.05, momentum=0.9)
        adapted = mm.adapt(noisy(scale), {"w": start()}, [0.1] * steps, optimizer=rule, adjoint=REVERSIBLE)
        adapted.params["w"].sum().backward()

    run(0.0, 4)
    with pytest.raises(mm.ReplayError, match="run again"):
        run(0.1, 4)
    for steps in (1, 4):
        with pytest.raises(mm.ReplayError, match=r"did not lead back to the initial value of w.*deterministic"):
            run(1e-14, steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_recovery_on_a_gpu(momentum: float) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 169, 5)]
    net = nn.Sequential(*layers).cuda()
    batch = torch.randn(20, 1, 28, 28).cuda(), torch.arange(5).repeat(4).cuda()
    found = []
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for adjoint in (REVERSIBLE, mm.Stepwise()):
            rule = mm.SGD(0.01, momentum=momentum)
            learner = mm.maml(net, loss=F.cross_entropy, optimizer=rule, steps=100, adjoint=adjoint)
            found.append(helpers.meta_gradient(learner, [(batch, batch)]))
    assert helpers.error(found[0], found[1]) < 1e-2
