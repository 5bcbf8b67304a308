"""learn2learn's loop on ``mm.l2l``: its own gradients to rounding, in the memory of one inner step, and its traps."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.closures import frozen
from memmeta.tasks.learn2learn import import_learn2learn

try:
    l2l: Any = import_learn2learn()
except mm.InputError:
    l2l = None

needs_learn2learn = pytest.mark.skipif(l2l is None, reason="learn2learn is not installed")
RATE = 0.1


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def convolutional() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 2))


class Tied(nn.Module):
    """One matrix there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "batch_norm": normed, "conv": convolutional, "tied": Tied}


def data(task: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support and query of a task, eight examples each."""
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (16,), generator=generator)
    return x[:8], y[:8], x[8:], y[8:]


def made(net: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return net()


def theirs(maml: Any, steps: int, tasks: int = 2) -> list[Tensor]:
    """The gradients of learn2learn's loop."""
    for task in range(tasks):
        x, y, xq, yq = data(task)
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(x), y))
        F.cross_entropy(learner(xq), yq).backward()
    return gradients(maml)


def ours(maml: Any, steps: int, tasks: int = 2) -> list[Tensor]:
    """Those of the same loop with two lines changed."""
    for task in range(tasks):
        x, y, xq, yq = data(task)
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(lambda: F.cross_entropy(learner(x), y))  # noqa: B023 the values of now are kept
        F.cross_entropy(learner(xq), yq).backward()
    return gradients(maml)


def gradients(maml: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in maml.parameters()]


def same(found: list[Tensor], wanted: list[Tensor], digits: float = 1e-9) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=digits)


@needs_learn2learn
@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first_order"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("net", NETS)
def test_maml_is_learn2learns(net: str, steps: int, first_order: bool) -> None:
    wanted = theirs(l2l.algorithms.MAML(made(NETS[net]), lr=RATE, first_order=first_order), steps)
    found = ours(mm.l2l.MAML(made(NETS[net]), lr=RATE, first_order=first_order), steps)
    same(found, wanted)
    assert max(float(grad.abs().max()) for grad in found) > 1e-3


@needs_learn2learn
@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first_order"])
@pytest.mark.parametrize("net", ["mlp", "batch_norm", "conv"])
def test_meta_sgd_is_learn2learns(net: str, first_order: bool) -> None:
    wanted = theirs(l2l.algorithms.MetaSGD(made(NETS[net]), lr=RATE, first_order=first_order), 3)
    found = ours(mm.l2l.MetaSGD(made(NETS[net]), lr=RATE, first_order=first_order), 3)
    same(found, wanted)
    assert max(float(grad.abs().max()) for grad in found[len(found) // 2 :]) > 1e-4  # of the rates


@needs_learn2learn
@pytest.mark.parametrize("kind", ["MAML", "MetaSGD"])
def test_a_state_of_learn2learns_is_one_of_ours(kind: str) -> None:
    wanted = getattr(l2l.algorithms, kind)(made(normed), lr=RATE)
    found = getattr(mm.l2l, kind)(normed(), lr=1.0)
    found.load_state_dict(wanted.state_dict())
    same([p.detach() for p in found.parameters()], [p.detach() for p in wanted.parameters()], 0.0)


def through_adapt(net: nn.Module, steps: int, adapt: str, rates: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by a learner whose graph is kept."""
    loss = mm.Supervised(F.cross_entropy)
    problem = mm.Problem(net, loss, loss, adapt=adapt)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(lr=dict(rates)), steps=steps, adjoint=mm.Unrolled())
    x, y, xq, yq = data(0)
    learner.accumulate([((x, y), (xq, yq))])
    return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


def test_tied_rates_stay_tied() -> None:
    """learn2learn's MetaSGD unties them."""
    net = made(Tied)
    rates = {name: torch.full_like(p, RATE, requires_grad=True) for name, p in net.named_parameters()}
    wanted = through_adapt(net, 3, "all", rates)
    found = mm.l2l.MetaSGD(made(Tied), lr=RATE)
    ours(found, 3, tasks=1)
    same([p.grad for p in found.module.parameters() if p.grad is not None], list(wanted.values())[: len(rates)])
    same([p.grad for p in found.lrs if p.grad is not None], [wanted[f"hyper.lr/{n.replace('.', '/')}"] for n in rates])


def test_a_part_is_adapted_and_the_rest_learned() -> None:
    net = made(normed)
    net[0].bias.requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    wanted = through_adapt(net, 3, "3", {f"3.{n}": torch.tensor(RATE) for n in ("weight", "bias")})
    partly = made(normed)
    partly[0].bias.requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    maml = mm.l2l.MAML(partly, lr=RATE, adapt="3")
    ours(maml, 3, tasks=1)
    found = {f"net.{name}": p.grad for name, p in maml.module.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    same(list(found.values()), list(wanted.values()))
    assert maml.module[0].bias.grad is None  # pyright: ignore


@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first_order"])
def test_a_learned_rate(first_order: bool) -> None:
    """Against central differences; with first order, those of an inner loop whose gradients are fixed."""
    maml = mm.l2l.MAML(made(mlp), lr=nn.Parameter(torch.tensor(RATE)), first_order=first_order)
    x, y, xq, yq = data(0)
    ours(maml, 1, tasks=1)
    rate = maml.lr
    assert isinstance(rate, nn.Parameter)
    assert rate.grad is not None
    values = []
    for step in (1e-5, -1e-5):
        learner = mm.l2l.MAML(made(mlp), lr=RATE + step).clone()
        learner.adapt(lambda: F.cross_entropy(learner(x), y))  # noqa: B023 the values of now are kept
        values.append(F.cross_entropy(learner(xq), yq).item())
    assert float(rate.grad) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_dropout_is_replayed() -> None:
    maml = mm.l2l.MAML(made(Noisy), lr=RATE)
    weight = maml.module.net[0].weight  # pyright: ignore

    def value(seed: int = 5) -> Tensor:
        torch.manual_seed(seed)
        x, y, xq, yq = data(0)
        learner = maml.clone()
        for _ in range(3):
            learner.adapt(lambda: F.cross_entropy(learner(x), y))
        return F.cross_entropy(learner(xq), yq)

    loss = value()
    torch.manual_seed(77)  # the backward does not read the state of now
    loss.backward()
    found = float(weight.grad[1, 2])
    differences = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight[1, 2] += step
            differences.append(float(value()))
    assert found == pytest.approx((differences[0] - differences[1]) / 2e-5, abs=1e-8)
    assert value(6).item() != value(5).item()


def test_statistics_and_modes_of_the_original_stay() -> None:
    maml = mm.l2l.MAML(made(normed), lr=RATE)
    before = {name: buffer.clone() for name, buffer in maml.named_buffers()}
    x, y, xq, yq = data(0)
    learner = maml.clone()
    for _ in range(2):
        learner.adapt(lambda: F.cross_entropy(learner(x), y))
    training = learner(xq)
    evaluated = learner.eval()(xq)
    assert (training - evaluated).abs().max() > 1e-3
    assert maml.training
    assert all(module.training for module in maml.modules())
    F.cross_entropy(evaluated, yq).backward()
    for name, buffer in maml.named_buffers():
        assert torch.equal(buffer, before[name]), name
    # Its own went on: the statistics that it evaluates with are those of its own forwards.
    assert (learner(xq) - maml.clone().eval()(xq)).abs().max() > 1e-3
    other = maml.clone()
    other.adapt(lambda: F.cross_entropy(other(x), y))
    mode = other.eval()  # after the step: the backward plays it as it was
    F.cross_entropy(mode(xq), yq).backward()


def test_variables_of_a_loop_are_those_of_the_call() -> None:
    """One backward after all tasks and steps, each with a batch of its own, by lambdas that share their variables."""
    maml = mm.l2l.MAML(made(mlp), lr=RATE)
    nn.init.zeros_(maml.module[2].weight)  # pyright: ignore # all first losses are equal: none would be missed
    total = torch.zeros(())
    wanted = mm.l2l.MAML(made(mlp), lr=RATE)
    nn.init.zeros_(wanted.module[2].weight)  # pyright: ignore
    for task in range(3):
        x, y, xq, yq = data(task)
        learner = maml.clone()
        for half in (slice(0, 4), slice(4, 8)):
            learner.adapt(lambda: F.cross_entropy(learner(x[half]), y[half]))  # noqa: B023
        total = total + F.cross_entropy(learner(xq), yq)
        alone = wanted.clone()
        alone.adapt(lambda x=x, y=y, alone=alone: F.cross_entropy(alone(x[:4]), y[:4]))
        alone.adapt(functools.partial(part_loss, alone, x[4:], y[4:]))
        F.cross_entropy(alone(xq), yq).backward()
    total.backward()
    same(gradients(maml), gradients(wanted), 1e-12)


def part_loss(learner: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(learner(x), y)


def test_globals_of_a_script_are_those_of_the_call() -> None:
    script = """
for task in range(2):
    x, y, xq, yq = data(task)
    learner = maml.clone()
    learner.adapt(lambda: F.cross_entropy(learner(x), y))
    errors.append(F.cross_entropy(learner(xq), yq))
sum(errors).backward()
"""
    maml = mm.l2l.MAML(made(mlp), lr=RATE)
    exec(script, {"data": data, "maml": maml, "F": F, "errors": []})
    same(gradients(maml), ours(mm.l2l.MAML(made(mlp), lr=RATE), 1), 1e-12)


def test_a_local_variable_named_like_an_attribute_leaves_globals_kept() -> None:
    """``weight`` is a variable of the closure that its generator reads, and the name of an attribute."""
    script = """
for task in range(2):
    x, y, xq, yq = data(task)
    learner = maml.clone()
    def closure():
        weight = 0.0
        return F.cross_entropy(learner(x), y) + sum(weight * v for v in [net[0].weight.detach().sum()])
    learner.adapt(closure)
    errors.append(F.cross_entropy(learner(xq), yq))
sum(errors).backward()
"""
    maml = mm.l2l.MAML(made(mlp), lr=RATE)
    exec(script, {"data": data, "maml": maml, "net": made(mlp), "F": F, "errors": []})
    same(gradients(maml), ours(mm.l2l.MAML(made(mlp), lr=RATE), 1), 1e-12)


def test_what_a_closure_assigns_arrives() -> None:
    learner, last = mm.l2l.MAML(made(mlp), lr=RATE).clone(), torch.zeros(())
    x, y, _, _ = data(0)

    def closure() -> Tensor:
        nonlocal last
        last = F.cross_entropy(learner(x), y)
        return last

    assert learner.adapt(closure).item() == last.item() > 0


@pytest.mark.parametrize("through", ["closure", "helper", "partial", "script"])
def test_nothing_of_a_clone_stays(through: str) -> None:
    """Also without a backward, and without a collector: no cycle of a clone, its closures and its graph."""
    maml = mm.l2l.MAML(made(normed), lr=RATE)
    x, y, _, _ = data(0)

    def task() -> weakref.ref[Any]:
        learner = maml.clone()

        def error() -> Tensor:
            return F.cross_entropy(learner(x), y)

        given: dict[str, Any] = {
            "closure": error,
            "helper": lambda: 2 * error(),
            "partial": functools.partial(part_loss, learner, x, y),
            "script": eval("lambda: F.cross_entropy(learner(x), y)", {"learner": learner, "F": F, "x": x, "y": y}),
        }
        chosen = given.pop(through)
        given.clear()
        for _ in range(2):
            learner.adapt(chosen)
        return weakref.ref(next(iter(learner._params.values())))

    task()
    with mm.memory.count() as meter:
        alive = task()
        gc.collect()  # of this function's own cells
    assert alive() is None
    assert meter.live == 0


def peak(maml: Any, steps: int, loop: Callable[..., Any]) -> int:
    loop(maml, 1, 1)  # gradients are there
    return mm.memory.peak_of(lambda: loop(maml, steps, 1))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2))


@needs_learn2learn
def test_memory_is_one_step_and_a_copy_for_each() -> None:
    def states(maml: Any) -> int:
        return sum(p.nbytes for p in maml.module.parameters())

    maml = mm.l2l.MAML(made(wide), lr=RATE)
    few, many = peak(maml, 2, ours), peak(maml, 12, ours)
    assert many - few <= 10 * (states(maml) + 64)  # and the loss of each step
    graph = (peak(l2l.algorithms.MAML(made(wide), lr=RATE), 12, theirs) - few) / 10
    assert graph > 3 * states(maml)


@needs_learn2learn
def test_memory_of_a_convolutional_network_with_five_steps() -> None:
    """Activations outweigh parameters: a fifth of learn2learn's, but for what does not grow."""
    images = torch.randn(10, 1, 16, 16)
    labels = torch.arange(10) % 5

    def net() -> nn.Module:
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 5))

    def task(learner: Any, closure: bool) -> None:
        for _ in range(5):
            learner.adapt(
                (lambda: F.cross_entropy(learner(images), labels))
                if closure
                else F.cross_entropy(learner(images), labels)
            )
        F.cross_entropy(learner(images), labels).backward()

    peaks = {}
    for name, maml in (("l2l", l2l.algorithms.MAML(net(), lr=0.1)), ("mm", mm.l2l.MAML(net(), lr=0.1))):
        task(maml.clone(), name == "mm")
        peaks[name] = mm.memory.peak_of(lambda maml=maml, name=name: task(maml.clone(), name == "mm"))
    assert peaks["mm"] < 0.3 * peaks["l2l"]


def test_no_grad_keeps_nothing_and_steps_all_the_same() -> None:
    maml = mm.l2l.MAML(made(normed), lr=RATE)
    x, y, xq, _ = data(0)

    def adapted() -> Tensor:
        learner = maml.clone()
        for _ in range(3):
            learner.adapt(lambda: F.cross_entropy(learner(x), y))
        return learner(xq)

    with torch.no_grad():
        found = adapted()
    assert not found.requires_grad
    assert torch.equal(found, adapted())
    assert (found - maml.clone()(xq)).abs().max() > 1e-3


@needs_learn2learn
def test_a_clone_of_a_clone_goes_on_by_itself() -> None:
    def branched(maml: Any, step: Callable[[Any, Tensor, Tensor], Any]) -> list[Tensor]:
        x, y, xq, yq = data(0)
        trunk = maml.clone()
        step(trunk, x, y)
        branches = [trunk.clone(), trunk.clone()]
        step(branches[0], xq, yq)
        step(trunk, x[:4], y[:4])
        torch.stack([F.cross_entropy(one(xq), yq) for one in (trunk, *branches)]).sum().backward()
        return gradients(maml)

    wanted = branched(l2l.algorithms.MAML(made(mlp), lr=RATE), lambda one, x, y: one.adapt(F.cross_entropy(one(x), y)))
    found = branched(mm.l2l.MAML(made(mlp), lr=RATE), lambda one, x, y: one.adapt(lambda: F.cross_entropy(one(x), y)))
    same(found, wanted)


class Holder:
    """What hides a clone from those who look at a closure's variables."""

    def __init__(self, clone: mm.l2l.Clone) -> None:
        self.clone = clone


@pytest.mark.parametrize("kind", ["MAML", "learned rate", "MetaSGD"])
def test_parameters_in_the_closure_are_the_clones(kind: str) -> None:
    """By name, without the learned rates, and the same as when the clone is reached through an object."""
    x, y, xq, yq = data(0)
    losses = []
    for hidden in (False, True):
        if kind == "MetaSGD":
            maml: Any = mm.l2l.MetaSGD(made(mlp), lr=RATE)
        else:
            maml = mm.l2l.MAML(made(mlp), lr=nn.Parameter(torch.tensor(RATE)) if kind == "learned rate" else RATE)
        learner = maml.clone()
        first, _ = next(maml.module.named_parameters())

        def penalty(clone: mm.l2l.Clone, first: str = first) -> Any:
            named = [p.square().sum() for name, p in clone.named_parameters() if name == first]
            return 2 * sum(named) + sum(p.square().sum() for p in clone.parameters())

        if hidden:
            held = Holder(learner)
            learner.adapt(lambda: F.cross_entropy(held.clone(x), y) + penalty(held.clone))  # noqa: B023
        else:
            learner.adapt(lambda: F.cross_entropy(learner(x), y) + penalty(learner))  # noqa: B023
        losses.append(F.cross_entropy(learner(xq), yq))
        losses[-1].backward()
        losses.append(next(maml.module.parameters()).grad)
    same(losses[:2], losses[2:], 1e-14)
    plain = mm.l2l.MAML(made(mlp), lr=RATE).clone()
    plain.adapt(lambda: F.cross_entropy(plain(x), y))
    assert abs(F.cross_entropy(plain(xq), yq).item() - losses[0].item()) > 1e-3


@pytest.mark.parametrize("name", ["adapt", "clone", "train", "eval"])
def test_what_a_clone_can_not_do_in_its_own_closure(name: str) -> None:
    learner = mm.l2l.MAML(made(mlp), lr=RATE).clone()
    x, y, _, _ = data(0)
    with pytest.raises(mm.InputError, match=f"in the closure of a clone's step .* needs .{name} before or after"):
        learner.adapt(lambda: F.cross_entropy(learner(x), y) + getattr(learner, name)(None))


def test_learned_rates_by_name_are_parameters() -> None:
    net = made(mlp)
    rates = {name: nn.Parameter(torch.tensor(RATE)) for name, _ in net.named_parameters()}
    maml = mm.l2l.MAML(net, lr=rates)
    outer = torch.optim.SGD(maml.parameters(), lr=1.0)
    ours(maml, 1, tasks=1)
    outer.step()
    assert {id(rate) for rate in rates.values()} <= {id(p) for p in maml.parameters()}
    assert any(rate.item() != RATE for rate in rates.values())
    again = {name: nn.Parameter(torch.zeros(())) for name in rates}
    mm.l2l.MAML(made(mlp), lr=again).load_state_dict(maml.state_dict())
    assert [rate.item() for rate in again.values()] == [rate.item() for rate in rates.values()]


def test_parameters_are_those_of_the_moment() -> None:
    """Outside of a step, and inside, where a penalty on them is part of the loss."""
    maml = mm.l2l.MAML(made(mlp), lr=RATE)
    x, y, xq, yq = data(0)
    learner = maml.clone()
    start = [p.detach().clone() for p in learner.parameters()]
    for _ in range(2):
        learner.adapt(lambda: F.cross_entropy(learner(x), y) + sum(p.square().sum() for p in learner.parameters()))
    decayed = mm.l2l.MAML(made(mlp), lr=RATE).clone()
    for _ in range(2):
        decayed.adapt(lambda: F.cross_entropy(decayed(x), y))
    assert sum(p.square().sum() for p in learner.parameters()) < sum(p.square().sum() for p in decayed.parameters())
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(learner.parameters(), start, strict=True))
    assert [name for name, _ in learner.named_parameters()] == [name for name, _ in maml.module.named_parameters()]
    F.cross_entropy(learner(xq), yq).backward()


def refusals() -> dict[str, tuple[type[Exception], str, Callable[[Any, Tensor, Tensor], Any]]]:
    captured, features = torch.ones(8, 3, requires_grad=True), nn.Linear(3, 3)
    return {
        "a loss": (
            mm.InputError,
            r"got a Tensor: write learner.adapt\(lambda: loss\(learner\(x\), y\)\)",
            lambda one, x, y: one.adapt(F.cross_entropy(one(x), y)),
        ),
        "no scalar": (mm.InputError, "must be a scalar, got shape", lambda one, x, y: one.adapt(lambda: one(x))),
        "a captured tensor": (
            mm.CaptureError,
            r"a tensor of shape \[8, 3\]",
            lambda one, x, y: one.adapt(lambda: F.cross_entropy(one(x * captured), y)),
        ),
        "a captured network": (
            mm.CaptureError,
            "by closure",
            lambda one, x, y: one.adapt(functools.partial(part_loss, one, features(x), y)),
        ),
        "no dependence": (
            mm.InputError,
            "does not depend on any adapted parameter",
            lambda one, x, y: one.adapt(lambda: x.sum()),
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals(name: str) -> None:
    error, message, act = refusals()[name]
    maml = mm.l2l.MAML(made(mlp), lr=RATE)
    before = [id(p) for p in maml.module.parameters()]
    x, y, _, _ = data(0)
    with pytest.raises(error, match=message):
        act(maml.clone(), x, y)
    assert [id(p) for p in maml.module.parameters()] == before


def test_an_error_in_the_loss_leaves_the_network_as_it_was() -> None:
    maml = mm.l2l.MAML(made(normed), lr=RATE)
    before = [id(tensor) for tensor in (*maml.module.parameters(), *maml.module.buffers())]
    learner = maml.clone().eval()

    def closure() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        learner.adapt(closure)
    assert [id(tensor) for tensor in (*maml.module.parameters(), *maml.module.buffers())] == before
    assert maml.module.training
    learner.adapt(lambda: learner(data(0)[0]).square().sum())


def test_changes_before_the_backward_are_refused() -> None:
    maml = mm.l2l.MAML(made(mlp), lr=RATE)
    x, y, xq, yq = data(0)
    learner = maml.clone()
    learner.adapt(lambda: F.cross_entropy(learner(x), y))
    x.add_(1.0)
    with pytest.raises(mm.ReplayError, match="the closure of an inner step gave another loss"):
        F.cross_entropy(learner(xq), yq).backward()
    with torch.no_grad():
        next(maml.parameters()).add_(1.0)
    with pytest.raises(mm.InputError, match="changed in place"):
        F.cross_entropy(learner(xq), yq).backward()


def test_what_cannot_be_made() -> None:
    with pytest.raises(mm.InputError, match=r"lr= has shape \[3\]"):
        mm.l2l.MAML(mlp(), lr=torch.ones(3))
    with pytest.raises(mm.InputError, match="lrs= have the shapes"):
        mm.l2l.MetaSGD(mlp(), lrs=[nn.Parameter(torch.ones(1))])
    with pytest.raises(mm.InputError, match="matches no parameter"):
        mm.l2l.MAML(mlp(), lr=RATE, adapt="tail")
    bias = mm.l2l.MetaSGD(mlp(), lr=RATE, adapt="2.bias")  # a rate per element, though a vector
    assert len(ours(bias, 2, tasks=1)) == 5
    assert bias.lrs[0].grad is not None


def test_local_functions_keep_their_variables_too() -> None:
    """One that calls itself, and one that counts, among those that a closure calls."""
    kept, count = [], 0
    for number in range(3):

        def again(n: int = 2) -> int:
            return number if n < 0 else again(n - 1)  # noqa: B023

        def counted() -> int:
            nonlocal count
            count += 1
            return again()

        kept.append(frozen(lambda: [counted() for _ in range(2)], {}))
    assert [function() for function in kept] == [[0, 0], [1, 1], [2, 2]]
    assert count == 6
