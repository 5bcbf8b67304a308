"""Programs of steps and tasks against eager execution: what is baked in, what is refused, what falls back and how."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import helpers
import pytest
import torch
from helpers import OPTIMIZERS, PROBLEMS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memmeta as mm
from memmeta import memory, trees
from memmeta.adjoints.linearised import Linearised, Programmed, linearised
from memmeta.episode import Episode
from memmeta.errors import FallbackWarning
from memmeta.programs import Programs, disagreement
from memmeta.task import Task

STEPS = 2
BY_STEPS = mm.Stepwise(window=STEPS)  # exact, and never one program of the whole task
FORWARD = mm.Stepwise(hvp="forward", window=STEPS)
Pair = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def learner_of(net: nn.Module, loss: Any = F.cross_entropy, **options: Any) -> mm.MetaLearner:
    given = {"optimizer": mm.SGD(lr=0.3), "steps": STEPS, "adjoint": BY_STEPS, "execution": "trace", **options}
    return mm.maml(net, loss=loss, **given)


def pair(seed: int = 0, n: int = 5, features: int = 3) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(n, features, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(2, (n,), generator=generator)

    return batch(), batch()


class Layered(nn.Module):
    """(n, 3) to (n, 2), with something in the middle: a function of the module and the hidden values."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor] = lambda _, h: h.tanh()) -> None:
        super().__init__()
        self.first, self.last, self.middle, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), middle, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, self.first(x)))


def net_of(middle: Any = None, seed: int = 0) -> Layered:
    torch.manual_seed(seed)
    return (Layered() if middle is None else Layered(middle)).double()


@contextmanager
def said() -> Iterator[list[str]]:
    """The messages of the FallbackWarnings inside."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        yield found
        found += [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]


def same_as_eager(learner: mm.MetaLearner, tasks: list[Any] | None = None, **options: Any) -> bool:
    """Whether a learner's meta-gradient is that of eager Stepwise, by an equal one."""
    tasks = [pair()] if tasks is None else tasks
    other = copy.deepcopy(learner)
    other.programs, other.adjoint = Programs(), mm.Stepwise()
    found, wanted = (helpers.meta_gradient(one, tasks, seed=5, **options) for one in (learner, other))
    return helpers.error(found, wanted) < 1e-9


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


def test_autocast() -> None:
    found = []
    for execution, adjoint in (
        ("eager", mm.Stepwise()),
        ("trace", BY_STEPS),
        ("trace", FORWARD),
        ("trace", mm.Stepwise()),
    ):
        learner = learner_of(net_of().float(), execution=execution, adjoint=adjoint)
        (x, y), query = pair()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(helpers.meta_gradient(learner, [((x.float(), y), (query[0].float(), query[1]))]))
    assert all(helpers.error(grads, found[0]) < 0.03 for grads in found)
    assert all(grad.dtype == torch.float32 for grad in found[1].values())


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


# Falling back, once, with the reason.


class Straight(torch.autograd.Function):
    """Signs forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0]


def branching(_: Any, h: Tensor) -> Tensor:
    return h.tanh() if h.sum() > 0 else h.sin()


FALLBACKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], mm.Adjoint, str]] = {
    "branch": (branching, BY_STEPS, "execution='trace'.*depend on the values of tensors.*eagerly"),
    "branch of a task": (branching, mm.Stepwise(), "execution='trace'.*depend on the values of tensors"),
    "branch forward": (branching, FORWARD, "hvp='forward'.*depend on the values of tensors.*hvp='reverse' is used"),
    "custom": (lambda _, h: Straight.apply(h) * h, FORWARD, "autograd function Straight.*hvp='reverse' is used"),
    "operator": (lambda _, h: F.rrelu(h, training=True), FORWARD, r"aten\.rrelu_with_noise_functional\.default"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_a_fallback_says_why_once_and_changes_nothing(name: str) -> None:
    middle, adjoint, message = FALLBACKS[name]
    learner = learner_of(net_of(middle), adjoint=adjoint)
    with said() as messages:
        assert same_as_eager(learner)
        assert same_as_eager(learner, [pair(1), pair(2)])
    assert len(messages) == len(set(messages))
    assert len([m for m in messages if re.search(message, m)]) == 1


@pytest.mark.parametrize("execution", ["eager", "trace"])
def test_a_straight_through_estimator_is_as_autograd_has_it(execution: Any) -> None:
    learner = learner_of(net_of(lambda _, h: Straight.apply(h) * h), adjoint=FORWARD, execution=execution)
    with said() as messages:
        found = helpers.meta_gradient(learner, [pair()])
    wanted = helpers.meta_gradient(learner_of(learner.net, adjoint=mm.Unrolled(), execution="eager"), [pair()])
    assert helpers.error(found, wanted) < 1e-10
    assert len(messages) == 1


def without_grad(_: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = h.sigmoid()
    return h * gate + h.detach().exp() * h.data.sum() * h


STOPPED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "detach": lambda _, h: h * (h.detach() ** 2).sum() + (h - h.mean().detach()).tanh(),
    "no_grad": without_grad,
    "item": lambda _, h: h * h.abs().max().item(),
    "normalised": lambda _, h: h / h.norm(dim=-1, keepdim=True).detach(),
}


@pytest.mark.parametrize("name", STOPPED)
def test_stop_gradients_inside_the_loss(name: str) -> None:
    net = net_of(STOPPED[name])
    wanted = helpers.meta_gradient(learner_of(net, adjoint=mm.Unrolled(), execution="eager"), [pair()])
    for execution, adjoint in (("eager", FORWARD), ("trace", BY_STEPS)):
        with said():
            found = helpers.meta_gradient(learner_of(net, adjoint=adjoint, execution=execution), [pair()])
        assert helpers.error(found, wanted) < 1e-10


def turned_dropout(self: Any, h: Tensor) -> Tensor:
    mask = F.dropout(torch.ones_like(h), 0.5, self.training)
    return F.dropout(h.t(), 0.3, self.training).t() * mask + torch.randn_like(h)


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), BY_STEPS, FORWARD], ids=["whole", "reverse", "forward"])
def test_random_numbers_are_those_of_eager_execution(adjoint: mm.Adjoint) -> None:
    learner = learner_of(net_of(turned_dropout), adjoint=adjoint)
    assert same_as_eager(learner, [pair(0), pair(1)])
    assert len(learner.programs) > 0


class Counting(Layered):
    """Its hidden values depend on how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x) * type(self).calls


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), BY_STEPS, FORWARD], ids=["whole", "reverse", "forward"])
def test_a_counter_in_the_loss_is_found(adjoint: mm.Adjoint) -> None:
    with said(), pytest.raises(mm.ReplayError):
        learner_of(Counting().double(), adjoint=adjoint).accumulate([pair()])


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), BY_STEPS], ids=["whole", "reverse"])
def test_a_number_of_a_closure_that_changes_later_is_found(adjoint: mm.Adjoint) -> None:
    numbers = {"temperature": 1.0}
    learner = learner_of(net_of(), lambda p, y: F.cross_entropy(p * numbers["temperature"], y), adjoint=adjoint)
    assert same_as_eager(learner)
    numbers["temperature"] = 2.0
    with pytest.raises(mm.ReplayError, match=r"depends on Python state that has changed since.*execution='eager'"):
        learner.accumulate([pair()] * 8)


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), BY_STEPS, FORWARD], ids=["whole", "reverse", "forward"])
def test_wrong_data_and_errors_of_the_loss_are_as_ever(adjoint: mm.Adjoint) -> None:
    net = net_of()
    learner, before = learner_of(net, adjoint=adjoint), copy.deepcopy(net.state_dict())
    (x, y), query = pair()

    def refusals() -> list[str]:
        found = []
        for support in ((x, y + 7), (x[:, :2], y), (x, y.double())):
            with pytest.raises(Exception, match=r".") as caught, said():
                learner.accumulate([(support, query)])
            found.append(f"{type(caught.value).__name__}: {caught.value}")
        return found

    traced = refusals()
    assert same_as_eager(learner)
    assert refusals()[0].splitlines()[0] == traced[0].splitlines()[0]
    learner.programs = Programs()
    assert [text.splitlines()[0] for text in refusals()] == [text.splitlines()[0] for text in traced]
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in net.parameters())


def test_what_is_detached_from_the_parameters_is_refused_as_ever() -> None:
    for adjoint in (mm.Stepwise(), BY_STEPS, FORWARD):
        with said(), pytest.raises(mm.InputError, match="does not depend on any adapted parameter"):
            learner_of(net_of(lambda _, h: h.detach()), lambda p, y: p.detach().sum(), adjoint=adjoint).accumulate(
                [pair()]
            )
        captured = torch.ones(4, dtype=torch.float64, requires_grad=True)
        with said(), pytest.raises(mm.CaptureError, match=r"shape \[4\]"):
            learner_of(net_of(lambda _, h, c=captured: h * c), adjoint=adjoint).accumulate([pair()])


# Activation checkpointing.


class Gate(nn.Module):
    """Dropout, batch norm and a stop-gradient in one layer."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.inner, self.norm, self.p = nn.Linear(4, 4), nn.BatchNorm1d(4), p

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(self.inner(h))
        return F.dropout(h * h.detach().sigmoid(), self.p).tanh()


def blocks(p: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Gate(p), Gate(p), nn.Linear(4, 2)).double()


@pytest.mark.parametrize(("execution", "hvp"), [("eager", "reverse"), ("eager", "forward"), ("trace", "reverse")])
def test_layers(execution: Any, hvp: Any) -> None:
    net = blocks()
    learner = learner_of(net, adjoint=mm.Stepwise(layers=("1", "2*"), hvp=hvp), execution=execution)
    seen: list[int] = []
    net.get_submodule("1").register_forward_hook(lambda *_: seen.append(1))
    before = [dict(vars(module)) for module in net.modules()]
    assert same_as_eager(learner, [pair(0, 6), pair(1, 6)])
    assert seen
    assert [vars(module).keys() for module in net.modules()] == [found.keys() for found in before]
    assert (len(learner.programs) > 0) is ((execution, hvp) != ("eager", "reverse"))


@pytest.mark.parametrize(("execution", "hvp"), [("eager", "reverse"), ("eager", "forward"), ("trace", "reverse")])
def test_layers_that_draw_random_numbers(execution: Any, hvp: Any) -> None:
    """A program would draw others when it computes a layer again: it is not used, and says so."""
    learner = learner_of(blocks(0.4), adjoint=mm.Stepwise(layers=("1", "2*"), hvp=hvp), execution=execution)
    with said() as messages:
        assert same_as_eager(learner, [pair(0, 6), pair(1, 6)])
    assert (len(messages) > 0) is ((execution, hvp) != ("eager", "reverse"))


def test_layers_that_are_none() -> None:
    learner = learner_of(blocks(), adjoint=mm.Stepwise(layers=("blocks.*",)))
    with (
        said(),
        pytest.raises(mm.InputError, match=r"layers= 'blocks\.\*' matches no submodule.*it has 0, 1"),
    ):
        learner.accumulate([pair(n=6)])
    assert all("forward" not in vars(module) for module in learner.net.modules())
    with pytest.raises(mm.UnsupportedError, match="stacked tasks can't be checkpointed: use chunk=1"):
        learner_of(blocks(), adjoint=mm.Stepwise(layers="1")).accumulate([pair(n=6), pair(n=6)], chunk=2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("hvp", ["reverse", "forward"])
def test_a_network_that_checkpoints_itself(hvp: Any) -> None:
    def middle(self: Any, h: Tensor) -> Tensor:
        return checkpoint(self.inner, h, use_reentrant=False)

    net = net_of(middle)
    net.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    assert same_as_eager(learner_of(net, adjoint=mm.Stepwise(window=STEPS, hvp=hvp)), [pair(0), pair(1)])


# Without a network.


def test_programs_of_adapt() -> None:
    def run(execution: Any, slope: float, lr: float) -> Any:
        params = {"w": torch.full((3,), slope, dtype=torch.float64, requires_grad=True)}
        meta = {"decay": torch.tensor(0.3, dtype=torch.float64, requires_grad=True), "power": 2}
        adapted = mm.adapt(
            loss, params, [pair(k) for k in range(2)], optimizer=mm.SGD(lr=lr), meta=meta, execution=execution
        )
        adapted.params["w"].square().sum().backward()
        return {"w": params["w"].grad, "decay": meta["decay"].grad}

    def loss(p: Any, meta: Any, batch: Any) -> Tensor:
        (x, y), _ = batch
        return ((x @ p["w"]).tanh() - y).square().mean() + meta["decay"] * p["w"].pow(meta["power"]).sum()

    for slope, lr in ((0.5, 0.1), (-0.2, 0.3)):
        assert helpers.error(run("trace", slope, lr), run("eager", slope, lr)) < 1e-10


def test_disagreement() -> None:
    a, b = torch.ones(3), torch.full((3,), 1e-9)
    assert disagreement([a, b], [a, -b]) == ""
    assert disagreement([a], [2 * a]) == "relative error 0.5"
    assert disagreement([a], [a, b]) == disagreement([a], [a[:2]]) == "other shapes"
    assert disagreement([torch.tensor([float("nan"), 1.0])], [torch.tensor([float("nan"), 1.0])]) == ""
