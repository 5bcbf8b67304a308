"""``mm.from_forward``: any module whose forward draws, adapts and returns the outer loss."""

from __future__ import annotations

import copy
import re
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memmeta as mm
from memmeta_workers import Experiment
from memmeta_workers.compute import Job, compute
from memmeta_workers.local import local
from memmeta_workers.shards import TreeSum, cut
from memmeta_workers.update import Layout, OuterUpdate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # higher's own
    import higher

PAGE = Path(__file__).resolve().parent.parent / "docs" / "higher.md"
LR, STEPS = 0.5, 3


def loss_of(X: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logistic regression: the second half of the points against the first."""
    target = torch.arange(len(X)).ge(len(X) // 2).to(X)
    return F.binary_cross_entropy_with_logits(F.linear(X, weight, bias)[:, 0], target)


def by_hand(X: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The outer loss after the inner loop, by autograd through all steps."""
    for _ in range(STEPS):
        dw, db = torch.autograd.grad(loss_of(X, weight, bias), (weight, bias), create_graph=True)
        weight, bias = weight - LR * dw, bias - LR * db
    return loss_of(X, weight, bias)


def adapted(params: dict[str, Tensor], X: Tensor, _: None) -> Tensor:
    return loss_of(X, params["weight"], params["bias"])


class Points(nn.Module):
    """Points that are learned; ``starts`` are the initial parameters that forwards drew, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.randn(12, 2, dtype=torch.float64))
        self.starts: list[tuple[Tensor, Tensor]] = []

    def drawn(self) -> nn.Linear:
        net = nn.Linear(2, 1, dtype=torch.float64)
        self.starts.append((net.weight.detach().clone(), net.bias.detach().clone()))
        return net


class ByHand(Points):
    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        return by_hand(self.X, *self.drawn().parameters()), {"norm": self.X.norm()}


class ByAdapt(Points):
    adjoint: mm.Adjoint = mm.Stepwise()

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        start = dict(self.drawn().named_parameters())
        rule = mm.SGD(lr=LR)
        end = mm.adapt(adapted, start, [None] * STEPS, optimizer=rule, meta=self.X, adjoint=self.adjoint).params
        return adapted(end, self.X, None), {"norm": self.X.norm()}


class Forwards(ByAdapt):
    adjoint = mm.Stepwise(snapshots="sqrt", hvp="forward")


class ByHigher(Points):
    """higher's default, copied initial weights, is right here: they are drawn, not learned."""

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        net = self.drawn()
        with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=LR)) as (fnet, diffopt):
            for _ in range(STEPS):
                diffopt.step(loss_of(self.X, *fnet.parameters()))
            return loss_of(self.X, *fnet.parameters()), {"norm": self.X.norm()}


class Copying(Points):
    """A prototype that no ``parameters()`` knows of, copied and drawn anew."""

    def __init__(self) -> None:
        super().__init__()
        self.prototype = [nn.Linear(2, 1, dtype=torch.float64)]

    def drawn(self) -> nn.Linear:
        net = copy.deepcopy(self.prototype[0])
        net.reset_parameters()
        self.starts.append((net.weight.detach().clone(), net.bias.detach().clone()))
        return net

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        return by_hand(self.X, *self.drawn().parameters()), {"norm": self.X.norm()}


KINDS = [ByHand, ByAdapt, pytest.param(Forwards, marks=pytest.mark.slow), ByHigher, Copying]


def losses_in(report: mm.Report) -> list[float]:
    return [score.values["loss"] for score in report.tasks]


def gradient(module: Points, draws: int = 1, step: int = 0) -> tuple[Tensor, mm.Report]:
    learner = mm.from_forward(module)
    learner.zero_grad()
    report = learner.accumulate(mm.tasks.Draws().batch(step, draws))
    assert module.X.grad is not None
    return module.X.grad, report


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_a_loop_over_the_same_draws(kind: Callable[[], Points]) -> None:
    module = kind()
    found, report = gradient(module, draws=5)
    assert len(module.starts) == 5  # each forward once, and no search repeated it
    X = module.X.detach().clone().requires_grad_()
    losses = torch.stack([by_hand(X, w.requires_grad_(), b.requires_grad_()) for w, b in module.starts])
    (wanted,) = torch.autograd.grad(losses.mean(), X)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert wanted.norm() > 1e-3
    assert losses_in(report) == pytest.approx(losses.tolist(), rel=1e-12)
    assert report.means()["norm"] == pytest.approx(X.norm().item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_comes_from_its_address(kind: Callable[[], Points]) -> None:
    module = kind()
    torch.manual_seed(1)
    first, _ = gradient(module, draws=2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, _ = gradient(module, draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    other, _ = gradient(module, draws=2, step=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    weights = [weight for weight, _ in module.starts]
    assert torch.equal(weights[0], weights[2])
    assert len({weight.sum().item() for weight in weights}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sees_the_same_draws_without_a_graph(kind: Callable[[], Points]) -> None:
    module = kind()
    batch = mm.tasks.Draws().batch(0, 3)
    learner = mm.from_forward(module)
    trained = learner.accumulate(batch)
    with torch.no_grad():
        assert losses_in(learner.evaluate(batch)) == losses_in(trained)


def test_shards_on_any_worker_add_up_to_the_same_bits() -> None:
    """G learners with a draw each, their sums along the fixed tree, are one process's outer step."""

    def made() -> Experiment:
        torch.manual_seed(0)
        tasks = mm.tasks.Draws()
        return Experiment(learner=mm.from_forward(ByAdapt()), train=tasks, steps=3, meta_batch=5, shard_size=1)

    alone = made()
    embedded = local(alone, OuterUpdate(alone.learner.meta_parameters(), alone.outer))
    server = made()
    update = OuterUpdate(server.learner.meta_parameters(), server.outer)
    workers = [made() for _ in range(5)]
    for step in range(3):
        embedded.run_step()
        total: TreeSum[Tensor] = TreeSum(5, update.sums_layout.add)
        for number, shard in reversed(list(enumerate(cut(0, step, 5, 1)))):
            job, parameters = Job(number, shard, "train", gradient=True), workers[number].learner.meta_parameters()
            Layout.of(parameters).write_to(parameters, update.weights())
            total.put(number, compute(workers[number], update.sums_layout, job).sums)
        update.apply(total.total(), 5)
    ends = [next(iter(e.learner.meta_parameters().values())).detach() for e in (alone, server)]
    assert torch.equal(*ends)


class Long(nn.Module):
    """Many inner steps of a wide layer, by ``mm.adapt`` with few snapshots."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.scale = steps, nn.Parameter(torch.ones(64))

    def forward(self) -> Tensor:
        def loss(params: dict[str, Tensor], scale: Tensor, _: None) -> Tensor:
            return torch.tanh(params["weight"] * scale).square().mean()

        start, rule = {"weight": nn.Linear(64, 64).weight}, mm.SGD(lr=0.1)
        steps, adjoint = [None] * self.steps, mm.Stepwise(snapshots=2)
        adapted = mm.adapt(loss, start, steps, optimizer=rule, meta=self.scale, adjoint=adjoint)
        return loss(adapted.params, self.scale, None)


def test_the_memory_of_an_inner_loop_by_adapt_does_not_grow_with_its_steps() -> None:
    """Not by the search for captured tensors either, which meets every step's parameters."""
    few, many = (
        mm.from_forward(Long(steps)).accumulate(mm.tasks.Draws().batch(0, 1), count_bytes=True).peak_bytes
        for steps in (8, 40)
    )
    assert few is not None
    assert many is not None
    assert many < few + 2 * 64 * 64 * 4  # two copies of what is adapted, not 32


class Normalised(nn.Module):
    """Batch norm, and a batch that is passed in."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        head = nn.Linear(4, 1, dtype=torch.float64)
        (grad,) = torch.autograd.grad((head(self.body(x)) - y).square().mean(), head.weight, create_graph=True)
        return (F.linear(self.body(x), head.weight - 0.1 * grad, head.bias) - y).square().mean()


@pytest.mark.parametrize("form", [tuple, list, lambda pair: dict(zip("xy", pair, strict=True))])
def test_a_batch_is_unpacked_and_buffers_are_as_before(form: Callable[[Any], Any]) -> None:
    module = Normalised()
    before = copy.deepcopy(dict(module.named_buffers()))
    data = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    learner = mm.from_forward(module)
    report = learner.accumulate(mm.tasks.Draws(form(data)).batch(0, 2))
    assert len(set(losses_in(report))) == 2
    assert all(p.grad is not None and p.grad.norm() > 0 for p in module.body.parameters())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])


class Attending(nn.Module):
    """Attention inside an inner loop: torch's fused kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(2, 4, 6, 8))

    def forward(self, ignored: Tensor) -> Tensor:
        scale = torch.ones((), requires_grad=True)

        def loss(scale: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(scale * self.x, self.x, self.x).square().mean()

        (grad,) = torch.autograd.grad(loss(scale), scale, create_graph=True)
        return loss(scale - grad)


def test_attention_is_differentiated_twice_and_a_batch_may_be_ignored() -> None:
    module = Attending()
    mm.from_forward(module).accumulate(mm.tasks.Draws(torch.zeros(1)).batch(0, 1))
    assert module.x.grad is not None
    found = module.x.grad.clone()
    way, step = torch.randn_like(module.x), 1e-2
    with torch.no_grad():
        start = module.x.clone()
        ends = []
        for sign in (1, -1):
            module.x.copy_(start + sign * step * way)
            ends.append(mm.from_forward(module).evaluate(mm.tasks.Draws(torch.zeros(1)).batch(0, 1)).means()["loss"])
    assert (found * way).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2)


class Failing(nn.Module):
    """Fails as its ``how`` says."""

    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(3))
        self.how = how

    def forward(self) -> Any:
        return self.how(self.p)


OUTSIDE = torch.ones(7, requires_grad=True)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        (lambda p: p, mm.InputError, r"loss that forward returns must be a scalar, got shape \[3\]"),
        (lambda p: 1.0, mm.InputError, "must be a scalar tensor, got float"),
        (lambda p: torch.ones(()), mm.InputError, "does not depend on any meta-parameter"),
        (lambda p: p.detach().sum(), mm.InputError, "does not depend on any meta-parameter"),
        (lambda p: nn.Linear(2, 1).weight.sum(), mm.InputError, "does not depend on any parameter of the module"),
        (lambda p: p.sum() + OUTSIDE.sum(), mm.CaptureError, r"shape \[7\] that requires grad reaches the loss that"),
        (lambda p: p.sum() / 0, mm.NonFiniteError, r"task\(seed=0, step=0, index=0\): its outer loss is inf"),
    ],
)
def test_what_is_wrong_is_said(how: Callable[[Tensor], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        mm.from_forward(Failing(how)).accumulate(mm.tasks.Draws().batch(0, 1))


def test_what_can_not_be_a_learner_is_refused() -> None:
    with pytest.raises(mm.InputError, match=r"takes an nn.Module whose forward returns the outer loss, got"):
        mm.from_forward(lambda: 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(mm.InputError, match="ReLU has no parameter that requires grad"):
        mm.from_forward(nn.ReLU())
    learner = mm.from_forward(ByHand())
    with pytest.raises(mm.InputError, match="ByHand has its inner loop in its forward: leave steps= alone"):
        learner.evaluate(mm.tasks.Draws().batch(0, 1), steps=2)
    with pytest.raises(mm.UnsupportedError, match="use chunk=1"):
        learner.accumulate(mm.tasks.Draws().batch(0, 2), chunk=2)
    with pytest.raises(mm.InputError, match="seed must be an integer of at least 0"):
        mm.tasks.Draws(seed=-1)


def test_the_page_for_those_who_come_from_higher_runs_as_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    with socket.socket() as free:  # what torchrun sets for one process
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "RANK": 0, "WORLD_SIZE": 1}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(programs) == PAGE.read_text().count("```") / 2
    namespace: dict[str, Any] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # higher's own
        for program in programs:
            exec(compile(program, "docs/higher.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.count("8 tasks: loss") == 3
    assert isinstance(namespace["experiment"](), Experiment)
