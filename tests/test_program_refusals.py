"""Programs and what they can't be: fallbacks with their reason, stop-gradients, random numbers, state, layers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from layered import BY_STEPS, FORWARD, STEPS, Layered, learner_of, net_of, pair, said, same_as_eager
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memmeta as mm
from memmeta import trees
from memmeta.problem import read
from memmeta.programs import Programs, disagreement

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


class Hidden:
    """A number in a slot, which is not looked for."""

    __slots__ = ("temperature",)

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature


@dataclasses.dataclass
class Config:
    scale: float = 1.0


class Scaled:
    """A loss with a number of its own, and a method."""

    def __init__(self) -> None:
        self.config = Config()

    def method(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * self.config.scale, target)

    __call__ = method


def smoothed() -> tuple[Any, Callable[[float], None]]:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return loss, lambda x: setattr(loss, "label_smoothing", x / 10)


def mapping() -> tuple[Any, Callable[[float], None]]:
    numbers = {"inside": [{"scale": 1.0}]}
    return lambda p, y: F.cross_entropy(p * numbers["inside"][0]["scale"], y), lambda x: numbers.update(
        inside=[{"scale": x}]
    )


def comprehension() -> tuple[Any, Callable[[float], None]]:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(p, y) + sum(GLOBAL["scale"] * row.square().sum() for row in p)

    return loss, lambda x: GLOBAL.update(scale=x)


def configured() -> tuple[Any, Callable[[float], None]]:
    loss = Scaled()
    return loss, lambda x: setattr(loss.config, "scale", x)


def bound() -> tuple[Any, Callable[[float], None]]:
    loss = Scaled()
    return loss.method, lambda x: setattr(loss.config, "scale", x)


def partial() -> tuple[Any, Callable[[float], None]]:
    config = Config()

    def scaled(prediction: Tensor, target: Tensor, config: Config) -> Tensor:
        return F.cross_entropy(prediction * config.scale, target)

    return functools.partial(scaled, config=config), lambda x: setattr(config, "scale", x)


GLOBAL = {"scale": 1.0}


@pytest.mark.parametrize("make", [smoothed, mapping, comprehension, configured, bound, partial])
def test_numbers_wherever_a_loss_may_read_them_are_part_of_a_program(make: Any) -> None:
    loss, change = make()
    learner = learner_of(net_of(), loss)
    for number in (1.0, 3.0, 1.0):
        change(number)
        assert same_as_eager(learner)


def test_an_object_that_a_module_holds_is_part_of_a_program() -> None:
    net = net_of(lambda module, h: h.tanh() * module.config.scale)
    net.config = Config()  # type: ignore[assignment]
    learner = learner_of(net)
    for number in (1.0, 3.0):
        vars(net)["config"].scale = number
        assert same_as_eager(learner)


def test_programs_that_are_never_used_twice_are_spoken_of() -> None:
    counter = {"calls": 0}

    def loss(p: Tensor, y: Tensor) -> Tensor:
        counter["calls"] += 1
        return F.cross_entropy(p, y)

    learner = learner_of(net_of(), loss)
    with said() as messages:
        for _ in range(16):
            learner.accumulate([pair()])
    assert len([m for m in messages if "seldom used twice" in m]) == 1


POWERS = [
    eval(f"lambda params, meta, batch: (params['w'] * batch).cos().sum() + params['w'].sin().sum() / {n}")
    for n in range(1, 41)
]


def adapted_by(losses: list[Callable[..., Tensor]]) -> list[str]:
    """What is said while each of these losses is used once."""
    with said() as messages:
        for loss in losses:
            params = {"w": torch.linspace(0.1, 1.0, 3, dtype=torch.float64).requires_grad_()}
            after = mm.adapt(loss, params, [1.0] * 2, optimizer=mm.SGD(lr=0.1), adjoint=FORWARD)
            after.params["w"].sum().backward()
    return [m for m in messages if "seldom used twice" in m]


def test_many_losses_of_one_process_are_not_one_that_is_traced_again_and_again() -> None:
    assert adapted_by(POWERS) == []

    def made(number: float) -> Callable[..., Tensor]:
        return lambda params, meta, batch: (params["w"] * batch).cos().sum() * number

    assert len(adapted_by([made(0.1 * n) for n in range(40)])) == 1


STOPPING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gumbel_softmax": lambda _, h: h * F.gumbel_softmax(h, hard=True),
    "detach_": lambda _, h: h * (h * 1.0).detach_(),
}


@pytest.mark.parametrize("name", STOPPING)
def test_what_can_not_be_marked_as_a_constant_is_refused_by_name(name: str) -> None:
    learner = learner_of(net_of(STOPPING[name]), adjoint=FORWARD, execution="eager")
    with said() as messages:
        assert same_as_eager(learner)
    assert len(messages) == 1
    assert name in messages[0]


@pytest.mark.parametrize("execution", ["eager", "trace"])
def test_a_gradient_inside_the_loss_is_a_constant(execution: Any) -> None:
    """With a small rate, so that a wrong product is small beside the loss."""

    def salient(_: Any, h: Tensor) -> Tensor:
        z = h.detach().requires_grad_()
        return h * torch.autograd.grad(z.tanh().square().sum(), z)[0]

    net = net_of(salient).float()
    (x, y), (a, b) = pair()
    task = ((x.float(), y), (a.float(), b))
    learner = learner_of(net, optimizer=mm.Adam(0.01), adjoint=FORWARD, execution=execution)
    wanted = learner_of(copy.deepcopy(net), optimizer=mm.Adam(0.01), adjoint=mm.Unrolled(), execution="eager")
    # float32: the first use is compared by relative differences of a thousandth.
    assert helpers.error(*(helpers.meta_gradient(one, [task]) for one in (learner, wanted))) < 1e-5


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), BY_STEPS], ids=["whole", "reverse"])
def test_a_number_of_a_closure_that_changes_later_is_found(adjoint: mm.Adjoint) -> None:
    numbers = Hidden(1.0)
    learner = learner_of(net_of(), lambda p, y: F.cross_entropy(p * numbers.temperature, y), adjoint=adjoint)
    assert same_as_eager(learner)
    numbers.temperature = 2.0
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
    assert disagreement([torch.tensor([float("nan")])], [torch.ones(1)]) == "not a number in one of them"
    small, large = torch.tensor([1e-2]), torch.tensor([100.0])
    assert disagreement([large, 0 * small], [large, small]) == ""
    assert disagreement([large, 0 * small], [large, small], groups=[1, 1]) == "relative error 0.99"


def test_numbers_that_a_loss_reads_elsewhere_are_part_of_a_program() -> None:
    """Through a closure, and through an object's attribute."""
    strength = [0.1]

    def make(scale: float) -> Any:
        def loss(net: nn.Module, batch: Any) -> Tensor:
            return scale * F.mse_loss(net(batch[0]), batch[1])

        return loss

    class Loss:
        def __init__(self) -> None:
            self.scale = 1.0

        def __call__(self, net: nn.Module, batch: Any) -> Tensor:
            return self.scale * strength[0] * F.mse_loss(net(batch[0]), batch[1])

    assert list(read(make(0.5))) != list(read(make(0.25)))
    inner, case = Loss(), helpers.PROBLEMS["mlp"]
    tasks = case.tasks(1)
    learners = [
        mm.MetaLearner(mm.Problem(case.net(), inner, make(1.0)), optimizer=mm.SGD(lr=0.5), steps=2, execution=execution)
        for execution in ("eager", "trace")
    ]
    for scale in (1.0, 2.0):
        inner.scale = scale
        wanted, found = (helpers.meta_gradient(learner, tasks) for learner in learners)
        assert helpers.error(found, wanted) < 1e-12


def test_group_norm_under_autocast_on_the_cpu_is_refused_by_name() -> None:
    case = helpers.PROBLEMS["groupnorm_silu"]
    tasks = trees.map_tensors(lambda x: x.float() if x.is_floating_point() else x, case.tasks(1))
    learner = mm.maml(case.net().float(), loss=case.loss, optimizer=mm.SGD(case.rate), steps=2, execution="trace")
    with said() as messages, torch.autocast("cpu", torch.bfloat16):
        learner.accumulate(tasks)
    assert len(messages) == 1
    assert re.search("native_group_norm.*bfloat16", messages[0])
