"""Programs of steps and tasks against eager execution: products, whole tasks, what names another program."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import helpers
import pytest
import torch
from helpers import OPTIMIZERS, PROBLEMS
from layered import BY_STEPS, FORWARD, STEPS, learner_of, net_of, pair, said, same_as_eager
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta import memory, steps, trees
from memmeta.adjoints.linearised import Linearised, Programmed, linearised
from memmeta.dual.rules import RULES
from memmeta.episode import Episode
from memmeta.programs import Execution, Programs
from memmeta.task import Task

# The product, forward and reverse.


def step_of(name: str, count: int) -> tuple[Any, Any]:
    case = PROBLEMS[name]
    learner = mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(lr=case.rate), steps=2)
    tasks = [Task(*task) for task in case.tasks(count)]
    episode = Episode(learner.problem.bind(), learner.optimizer, 2, tasks, [1] * count, None, False, Programs("trace"))
    rollout = episode.rollout
    return rollout, rollout.start()._replace(params=trees.detach(rollout.leaves.params))


# torch maps a recurrent cell task by task. Large ones take seconds to trace.
PRODUCTS = [(name, count) for name in PROBLEMS for count in (1, 2) if (name, count) != ("gru_cells", 2)]
LARGE = [
    ("gru_cells", 1),
    ("transformer", 1),
    ("transformer", 2),
    ("conv_bn", 2),
    ("groupnorm_silu", 2),
    ("attention", 2),
]


@pytest.mark.parametrize(
    ("name", "count"), [pytest.param(*p, marks=[pytest.mark.slow] if p in LARGE else []) for p in PRODUCTS]
)
def test_products_of_one_step(name: str, count: int) -> None:
    rollout, state = step_of(name, count)
    with rollout.session():
        v = helpers.random_like(state.params, 3)
        eager = Linearised(rollout, 0, state)
        wanted = eager.product(v)
        for hvp in ("forward", "reverse"):
            step = linearised(rollout, 0, state, hvp)
            assert isinstance(step, Programmed)
            found = step.product(v, grads=True)
            assert helpers.error(found.params, wanted.params) < 1e-10
            assert helpers.error(step.grads, eager.grads) < 1e-10
            assert torch.allclose(step.loss, eager.loss, rtol=1e-12)
            # A program is a function of its inputs: elsewhere, in another direction, as well.
            moved = state._replace(params=trees.axpy(0.1, v, state.params))
            other = linearised(rollout, 1, moved, hvp).product(trees.axpy(1.0, v, v), grads=True)
            elsewhere = Linearised(rollout, 1, moved).product(trees.axpy(1.0, v, v))
            assert helpers.error(other.params, elsewhere.params) < 1e-10
    assert rollout.programs is not None
    assert len(rollout.programs) == 2


@pytest.mark.parametrize("hvp", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov_decay", "adam"])
def test_learned_rates(name: str, hvp: Any) -> None:
    """The way back of a linear rule takes the gradient from the product's program."""
    numbers = OPTIMIZERS[name].numbers
    rule = OPTIMIZERS[name].inner(**{k: torch.tensor(v, requires_grad=True) for k, v in numbers.items()})
    adjoint = mm.Stepwise(hvp=hvp, window=STEPS)
    learner = learner_of(net_of(), optimizer=rule, adjoint=adjoint, step_weights=[0.2, 0.8])
    assert same_as_eager(learner, [pair(0), pair(1)])
    assert any(name.startswith("hyper") for name in helpers.meta_gradient(learner, [pair()]))


@pytest.mark.parametrize("adjoint", [BY_STEPS, FORWARD], ids=["reverse", "forward"])
def test_what_is_not_adapted_and_rates_per_step(adjoint: mm.Adjoint) -> None:
    rates = torch.tensor([0.1, 0.5], requires_grad=True)
    assert same_as_eager(learner_of(net_of(), adapt="last", adjoint=adjoint, optimizer=mm.SGD(lr=rates)))


@pytest.mark.parametrize("adjoint", [BY_STEPS, FORWARD], ids=["reverse", "forward"])
def test_microbatches(adjoint: mm.Adjoint) -> None:
    learner = learner_of(net_of(), adjoint=adjoint)
    assert same_as_eager(learner, [pair(n=5)], microbatch=2)
    assert same_as_eager(learner, [pair(0), pair(1)], chunk=2, microbatch=3)


@pytest.mark.parametrize("name", ["mlp", "transformer", pytest.param("conv_bn", marks=pytest.mark.slow)])
def test_autocast(name: str) -> None:
    """No program is refused (that would be a warning, and so an error), and each is the eager one but for rounding."""
    case, found = PROBLEMS[name], []
    net, tasks = case.net().float(), case.tasks(1)
    tasks = trees.map_tensors(lambda x: x.float() if x.is_floating_point() else x, tasks)
    ways: list[tuple[Execution, mm.Adjoint]] = [
        ("eager", mm.Stepwise()),
        ("trace", BY_STEPS),
        ("trace", FORWARD),
        ("trace", mm.Stepwise()),
    ]
    for execution, adjoint in ways:
        learner = mm.maml(
            net, loss=case.loss, optimizer=mm.SGD(case.rate), steps=2, adjoint=adjoint, execution=execution
        )
        with torch.autocast("cpu", torch.bfloat16):
            found.append(helpers.meta_gradient(learner, tasks))
    assert all(helpers.error(grads, found[0]) < 0.03 for grads in found)
    assert all(grad.dtype == torch.float32 for grad in found[1].values())


class Rectified(nn.Module):
    """Many kinks: central differences step over some of them, and are no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_differences_over_kinks_are_followed_by_a_comparison_on_few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, task = Rectified().float(), ([torch.randn(60, 3), torch.arange(60) % 2],) * 2
    kinks = []
    monkeypatch.setattr(steps, "_on_few", lambda *given, one=steps._on_few: kinks.append(one(*given)) or kinks[-1])
    learner = learner_of(net, adjoint=FORWARD, execution="eager")
    learner.programs.check = "difference"
    reverse = learner_of(net, adjoint=BY_STEPS, execution="eager")
    found, wanted = (helpers.meta_gradient(one, [task]) for one in (learner, reverse))
    assert kinks == [""]
    # float32: two ways that round differently, through two steps.
    assert helpers.error(found, wanted) < 1e-5


def test_a_wrong_rule_is_found_on_few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = torch.ops.aten._log_softmax.default
    monkeypatch.setitem(RULES, softmax, lambda args, tangents, out: None)
    torch.manual_seed(0)
    net, task = Rectified().float(), ([torch.randn(60, 3), torch.arange(60) % 2],) * 2
    learner = learner_of(net, adjoint=FORWARD, execution="eager")
    learner.programs.check = "difference"
    with said() as messages:
        learner.accumulate([task])
    assert len(messages) == 1
    assert "disagrees with eager execution" in messages[0]


def test_forward_products_need_less_memory_than_a_double_backward() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *[part for _ in range(6) for part in (nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())], nn.Linear(8, 2)
    )
    peaks = []
    for adjoint in (mm.Stepwise(snapshots=1), mm.Stepwise(snapshots=1, hvp="forward")):
        learner = learner_of(net.double(), adjoint=adjoint, execution="eager")
        tasks = [pair(n=400, features=8)]
        learner.accumulate(tasks)  # checked against the double backward at its first use
        peaks.append(memory.peak_of(lambda learner=learner, tasks=tasks: learner.accumulate(tasks)))
    assert peaks[1] < 0.75 * peaks[0]


# Whole tasks.


def weighted_problem(net: nn.Module) -> mm.Problem:
    def outer(net: nn.Module, batch: Any) -> Any:
        prediction = net(batch[0])
        hits = (prediction.argmax(-1) == batch[1]).double()
        return F.cross_entropy(prediction, batch[1]), {"accuracy": hits.mean(), "size": prediction.square().mean()}

    return mm.Problem(net, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), outer)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    "adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=["stepwise", "unrolled", "first"]
)
def test_whole_tasks(adjoint: mm.Adjoint, chunk: int) -> None:
    tasks, reports, grads = [pair(0), pair(1)], [], []
    for execution in ("eager", "trace"):
        optimizer = mm.SGD(lr=torch.tensor(0.3, requires_grad=True), momentum=0.5)
        learner = mm.MetaLearner(
            weighted_problem(net_of()),
            optimizer=optimizer,
            steps=STEPS,
            adjoint=adjoint,
            step_weights=[0.3, 0.7],
            execution=execution,
        )
        reports.append([learner.accumulate(tasks, chunk) for _ in range(2)][-1])
        grads.append({name: p.grad for name, p in learner.named_parameters() if p.grad is not None})
        assert len(learner.programs) == (1 if execution == "trace" else 0)
    assert helpers.error(grads[1], grads[0]) < 1e-12
    for found, wanted in zip(reports[1].tasks, reports[0].tasks, strict=True):
        assert found.values == pytest.approx(wanted.values, rel=1e-12)


# What is baked in names another program.


@pytest.mark.parametrize("chunk", [1, 2])
def test_annealed_step_weights_need_no_further_program(chunk: int) -> None:
    """MAML++'s multi-step loss has other weights in every epoch."""
    case = PROBLEMS["mlp"]
    tasks = case.tasks(2)

    def gradient(learner: mm.MetaLearner, weights: list[float] | None) -> dict[str, Tensor]:
        learner.step_weights = weights
        learner.zero_grad()
        learner.accumulate(tasks, chunk)
        return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}

    options: dict[str, Any] = {"loss": case.loss, "optimizer": mm.SGD(lr=case.rate), "steps": 3}
    traced, eager = mm.maml(case.net(), execution="trace", **options), mm.maml(case.net(), **options)
    counts = []
    for weights in ([0.2, 0.3, 0.5], [0.1, 0.2, 0.7], [0.0, 0.3, 0.7], None):
        assert helpers.error(gradient(traced, weights), gradient(eager, weights)) < 1e-12
        counts.append(len(traced.programs))
    assert counts == [1, 1, 2, 3]


def test_learners_that_take_turns_have_programs_of_their_own() -> None:
    learners = [learner_of(net_of(seed=seed)) for seed in (0, 1)]
    learners += [learner_of(net_of(lambda _, h: h.relu(), seed=2)), learner_of(net_of(seed=3), adjoint=FORWARD)]
    for turn in range(2):
        for learner in learners:
            assert same_as_eager(learner, [pair(turn)])
    assert same_as_eager(learners[0], [pair(5, n=7)])


def test_a_changed_attribute_or_mode_is_another_program() -> None:
    net = net_of(lambda self, h: F.dropout(h, 0.4, self.training) * self.scale)
    learner = learner_of(net)
    for scale, training in ((1.0, False), (2.0, False), (2.0, True), (1.0, False)):
        net.scale = scale
        net.train(training)
        assert same_as_eager(learner)


def test_frozen_parameters_changed_replaced_and_thawed() -> None:
    net = net_of()
    net.first.requires_grad_(False)
    learner = learner_of(net)
    assert same_as_eager(learner)
    with torch.no_grad():
        net.first.weight.mul_(-1.5)
    assert same_as_eager(learner)
    net.first.weight = nn.Parameter(torch.randn_like(net.first.weight), requires_grad=False)
    assert same_as_eager(learner)
    net.first.requires_grad_(True)
    assert same_as_eager(learner)
    assert "net.first.weight" in helpers.meta_gradient(learner, [pair()])


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), BY_STEPS, FORWARD], ids=["whole", "reverse", "forward"])
def test_batch_norm_in_both_modes(adjoint: mm.Adjoint) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    learner = learner_of(net, adjoint=adjoint)
    before = {name: b.clone() for name, b in net.named_buffers()}
    for training in (True, False, True):
        net.train(training)
        assert same_as_eager(learner)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


def powers(net: nn.Module, batch: Any) -> Tensor:
    """A loss that reads a batch with numbers in it."""
    return F.cross_entropy(net(batch["x"]).tanh() ** batch["power"], batch["y"])


def test_numbers_in_a_batch_and_changing_shapes() -> None:
    problem = mm.Problem(net_of(), powers, powers)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.3), steps=2, execution="trace")
    (x, y), _ = pair()
    for power, n in ((1, 5), (3, 5), (3, 4), (1, 5)):
        assert same_as_eager(learner, [({"x": x[:n], "y": y[:n], "power": power}, {"x": x, "y": y, "power": 1})])
    assert len(learner.programs) == 3
    unlike = {"x": x, "y": y, "power": 1, "names": {"a", "b"}}
    with said() as messages:
        assert same_as_eager(learner, [(unlike, unlike)])
    assert messages
    assert all("a batch holds a set" in message for message in messages)


def test_the_number_of_programs_is_bounded() -> None:
    learner = learner_of(net_of())
    learner.programs.capacity = 3
    for n in (3, 4, 5, 6, 3, 4):
        assert same_as_eager(learner, [pair(n=n)])
        assert len(learner.programs) <= 3


def test_copies_start_without_programs() -> None:
    learner = learner_of(nn.Sequential(nn.Linear(3, 2)).double())
    helpers.meta_gradient(learner, [pair()])
    assert len(learner.programs) > 0
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert (len(other.programs), other.programs.execution) == (0, "trace")
        assert same_as_eager(other)


def test_bad_options() -> None:
    with pytest.raises(mm.InputError, match="write 'eager', 'trace' or 'compile'"):
        learner_of(net_of(), execution="fast")
    with pytest.raises(mm.InputError, match="write 'reverse' or 'forward'"):
        mm.Stepwise(hvp="both")  # pyright: ignore[reportArgumentType]
