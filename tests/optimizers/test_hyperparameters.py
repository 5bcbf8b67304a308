"""Hyperparameters in all their forms: numbers, per step, per tensor, per element; read, refused, and learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import EXACT, PROBLEMS
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta import trees

STEPS = 3
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
SHAPES = {name: tuple(p.shape) for name, p in PROBLEMS["mlp"].net().named_parameters()}


def drawn(*shape: int, low: float = 0.05, high: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


FORMS: dict[str, Callable[[], Any]] = {
    "scalar": lambda: drawn(),
    "per step": lambda: drawn(STEPS),
    "per step and one more": lambda: drawn(STEPS + 1),
    "per tensor": lambda: {name: drawn(seed=i) for i, name in enumerate(NAMES)},
    "per tensor, one of them": lambda: {name: drawn() if name == "0.bias" else 0.1 for name in NAMES},
    "per tensor and step": lambda: {name: drawn(STEPS, seed=i) for i, name in enumerate(NAMES)},
    "per tensor and step and one more": lambda: {name: drawn(STEPS + 1, seed=i) for i, name in enumerate(NAMES)},
    "per element": lambda: {name: drawn(*SHAPES[name], seed=i) for i, name in enumerate(NAMES)},
    "per element, but one": lambda: {
        name: 0.1 if name == "2.bias" else drawn(*SHAPES[name], seed=i) for i, name in enumerate(NAMES)
    },
}
RULES: dict[str, tuple[str, Callable[[Any], mm.InnerOptimizer]]] = {
    "lr": ("lr", lambda value: mm.SGD(lr=value, momentum=0.5)),
    "plain lr": ("lr", lambda value: mm.SGD(lr=value)),
    "momentum": ("momentum", lambda value: mm.SGD(lr=0.1, momentum=value, weight_decay=0.1)),
    "dampening": ("dampening", lambda value: mm.SGD(lr=0.1, momentum=0.6, dampening=value)),
    "weight_decay": ("weight_decay", lambda value: mm.SGD(lr=0.1, weight_decay=value)),
    "beta1": ("beta1", lambda value: mm.Adam(lr=0.1, betas=(value, 0.9), eps=1e-2)),
    "beta2": ("beta2", lambda value: mm.AdamW(lr=0.1, betas=(0.8, value), eps=1e-2)),
    "alpha": ("alpha", lambda value: mm.RMSprop(lr=0.05, alpha=value, eps=1e-2)),
}


def learned(tree: Any) -> Any:
    return trees.map_tensors(lambda leaf: leaf.clone().requires_grad_(), tree)


def learner_of(optimizer: mm.InnerOptimizer, steps: int = STEPS, adjoint: mm.Adjoint | None = None) -> mm.MetaLearner:
    return mm.maml(PROBLEMS["mlp"].net(), loss=F.mse_loss, optimizer=optimizer, steps=steps, adjoint=adjoint)


def value_of(optimizer: mm.InnerOptimizer) -> float:
    return learner_of(optimizer).evaluate(PROBLEMS["mlp"].tasks(2)).loss


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_form_equal_finite_differences(form: str, rule: str) -> None:
    """To 1e-8 of the norm of the gradient, or absolutely where it is below 1."""
    field, make = RULES[rule]
    tree = FORMS[form]()
    found = helpers.meta_gradient(learner_of(make(learned(tree))), PROBLEMS["mlp"].tasks(2))
    leaves, rebuild = trees.flatten(tree)
    keys = {name: f"hyper.{field}" + (f"/{name}".replace(".", "/") if name else "") for name in leaves}
    assert {key for key in found if key.startswith("hyper.")} == set(keys.values())
    direction = helpers.random_like(leaves, 0)
    slope = sum(float((found[keys[name]] * direction[name]).sum()) for name in leaves)

    def value(size: float) -> float:
        return value_of(make(rebuild({name: leaf + size * direction[name] for name, leaf in leaves.items()})))

    norm = sum(float(found[key].square().sum()) for key in keys.values()) ** 0.5
    assert norm > 1e-6
    assert abs(slope - helpers.central_difference(value)) < 1e-8 * max(norm, 1.0)
    for name, leaf in leaves.items():
        if leaf.dim() == 1 and len(leaf) == STEPS + 1 and form.endswith("one more"):
            assert float(found[keys[name]][-1]) == 0.0  # the entry that no step reads


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike_by_exact_adjoints(form: str, adjoint: str) -> None:
    tasks = PROBLEMS["mlp"].tasks(2)
    found = helpers.meta_gradient(learner_of(mm.SGD(lr=learned(FORMS[form]())), adjoint=EXACT[adjoint]), tasks)
    wanted = helpers.meta_gradient(learner_of(mm.SGD(lr=learned(FORMS[form]())), adjoint=mm.Unrolled()), tasks)
    assert helpers.error(found, wanted) < 1e-12


def test_forms_that_say_the_same_give_the_same() -> None:
    rate = 0.1
    scalar = torch.tensor(rate, dtype=torch.float64)
    same: list[Any] = [
        scalar,
        scalar.repeat(STEPS),
        dict.fromkeys(NAMES, rate),
        dict.fromkeys(NAMES, scalar),
        {name: torch.full((STEPS,), rate, dtype=torch.float64) for name in NAMES},
        {name: torch.full(SHAPES[name], rate, dtype=torch.float64) for name in NAMES},
    ]
    wanted = value_of(mm.SGD(lr=rate))
    assert [value_of(mm.SGD(lr=form)) for form in same] == pytest.approx([wanted] * len(same), abs=1e-14)


def test_per_step_rates_are_those_of_a_schedule() -> None:
    rates, case = [0.1, 0.02, 0.3], PROBLEMS["mlp"]
    support, _ = case.task(0)
    trained = case.net()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        case.loss(trained(support[0]), support[1]).backward()
        optimizer.step()
    adapted = learner_of(mm.SGD(lr=torch.tensor(rates, dtype=torch.float64))).adapt(support)
    assert helpers.error(adapted.params, dict(trained.named_parameters())) < 1e-14


def refusals() -> dict[str, tuple[Any, int, str]]:
    full = {name: drawn(*SHAPES[name]) for name in NAMES}
    return {
        "too short": (drawn(2), STEPS, r"shape \[2\]: write a scalar, a 1-d tensor with one value for each of the 3"),
        "a matrix": (drawn(3, 3), STEPS, r"shape \[3, 3\]"),
        "name missing": (dict.fromkeys(NAMES[1:], 0.1), STEPS, r"missing \['0.weight'\], unknown \[\]"),
        "name unknown": ({**dict.fromkeys(NAMES, 0.1), "head": 0.1}, STEPS, r"missing \[\], unknown \['head'\]"),
        "wrong shape": (
            {**full, "0.weight": drawn(3, 5)},
            STEPS,
            r"lr= for 0.weight has shape \[3, 5\]: write a scalar",
        ),
        "one too short": ({**{n: drawn(4) for n in NAMES}, "0.bias": drawn(2)}, 4, r"has shape \["),
        "mixed": ({**full, "0.weight": drawn(STEPS)}, STEPS, r"lr= for 0.weight has shape \[3\]"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_fits_no_reading_is_refused(name: str) -> None:
    value, steps, message = refusals()[name]
    with pytest.raises(mm.InputError, match=message) as caught:
        learner_of(mm.SGD(lr=value), steps)
    assert "\n" not in str(caught.value)
    params = dict(PROBLEMS["mlp"].net().named_parameters())
    with pytest.raises(mm.InputError, match=message):
        mm.adapt(lambda p, m, b: p["0.bias"].sum(), params, [None] * steps, optimizer=mm.SGD(lr=value))


def test_the_ambiguous_case_is_refused_and_a_longer_vector_resolves_it() -> None:
    """Biases of length T: per step, or per element?"""
    net = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 4, dtype=torch.float64))
    problem = mm.Problem(net, lambda n, b: n(b[0]).square().mean(), lambda n, b: n(b[0]).sum(), adapt="*.bias")
    with pytest.raises(mm.InputError, match="one per step or as one per element"):
        mm.MetaLearner(problem, optimizer=mm.SGD(lr={"0.bias": drawn(4), "2.bias": drawn(4)}), steps=4)
    for values, steps, per_step in ((drawn(5), 4, True), (drawn(4), 5, False)):
        rates = {"0.bias": values, "2.bias": values}
        assert mm.SGD(lr=rates).bind(problem.adapted(), steps).forms["lr"].per_step is per_step


def test_evaluating_with_more_steps_than_rates_is_refused() -> None:
    learner = learner_of(mm.SGD(lr=drawn(STEPS)))
    assert learner.evaluate(PROBLEMS["mlp"].tasks(1), steps=2).loss > 0
    with pytest.raises(mm.InputError, match="one value for each of the 4 steps"):
        learner.evaluate(PROBLEMS["mlp"].tasks(1), steps=4)


def test_the_learner_owns_parameters_that_share_memory() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    momentum = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    fixed = torch.tensor(0.01, dtype=torch.float64)
    learner = learner_of(mm.SGD(lr=lr, momentum=momentum, weight_decay=fixed))
    assert learner.hyper["momentum"] is momentum
    assert any(p is momentum for p in learner.parameters())
    assert set(learner.hyper) == {"lr", "momentum", "weight_decay"}
    assert "hyper.weight_decay" not in learner.meta_parameters()
    learner.accumulate(PROBLEMS["mlp"].tasks(1))
    assert momentum.grad is not None
    assert learner.hyper["lr"].grad is not None
    assert learner.hyper["weight_decay"].grad is None
    with torch.no_grad():
        lr.fill_(0.2)
    assert float(learner.hyper["lr"].detach()) == 0.2


def test_an_outer_optimiser_moves_what_the_inner_loop_uses() -> None:
    tasks = PROBLEMS["mlp"].tasks(2)
    learner = learner_of(mm.SGD(lr=torch.tensor(0.05, dtype=torch.float64, requires_grad=True)))
    outer = torch.optim.SGD([learner.hyper["lr"]], lr=0.01)
    losses = []
    for _ in range(3):
        outer.zero_grad()
        losses.append(learner.accumulate(tasks).loss)
        outer.step()
    rate = float(learner.hyper["lr"].detach())
    assert rate != 0.05
    assert losses[2] < losses[1] < losses[0]
    assert learner.accumulate(tasks).loss == pytest.approx(value_of(mm.SGD(lr=rate)), abs=1e-14)


def test_state_dicts_go_round() -> None:
    def build(seed: int) -> mm.MetaLearner:
        rates = {name: drawn(*SHAPES[name], seed=seed).requires_grad_() for name in NAMES}
        net = PROBLEMS["mlp"].net(seed)
        return mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=rates), steps=STEPS)

    tasks, first, second = PROBLEMS["mlp"].tasks(2), build(1), build(2)
    assert first.evaluate(tasks).loss != second.evaluate(tasks).loss
    missing = second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    wanted, found = helpers.meta_gradient(first, tasks), helpers.meta_gradient(second, tasks)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_deep_copies_keep_the_link() -> None:
    tasks, lr = PROBLEMS["mlp"].tasks(1), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    learner = learner_of(mm.SGD(lr=lr))
    other = copy.deepcopy(learner)
    assert other.net is other.problem.net
    assert other.net is not learner.net
    before = learner.evaluate(tasks).loss
    with torch.no_grad():
        other.hyper["lr"].fill_(0.3)
        next(other.net.parameters()).zero_()
    assert learner.evaluate(tasks).loss == before
    assert float(lr.detach()) == 0.1
    changed = PROBLEMS["mlp"].net()
    with torch.no_grad():
        next(changed.parameters()).zero_()
    wanted = mm.maml(changed, loss=F.mse_loss, optimizer=mm.SGD(lr=0.3), steps=STEPS).evaluate(tasks).loss
    assert other.evaluate(tasks).loss == pytest.approx(wanted, abs=1e-14)
    other.accumulate(tasks)
    assert learner.hyper["lr"].grad is None
    assert other.hyper["lr"].grad is not None


def test_a_change_of_precision_reaches_the_rates() -> None:
    learner = learner_of(mm.SGD(lr=torch.tensor(0.1, requires_grad=True)))
    learner.double()
    assert learner.hyper["lr"].dtype == torch.float64
    grads = helpers.meta_gradient(learner, PROBLEMS["mlp"].tasks(1))
    assert grads["hyper.lr"].dtype == torch.float64


@pytest.mark.parametrize("adjoint", EXACT)
def test_one_tensor_under_two_names_is_one_meta_parameter(adjoint: str) -> None:
    """A rate for the body, another for the head: each shared by several tensors."""
    tasks = PROBLEMS["mlp"].tasks(2)

    def build(parameter: bool) -> mm.MetaLearner:
        body = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        head = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        if parameter:
            body, head = nn.Parameter(body.detach()), nn.Parameter(head.detach())
        rates = {name: body if name.startswith("0") else head for name in NAMES}
        return learner_of(mm.SGD(lr=rates), adjoint=EXACT[adjoint])

    apart = {name: torch.tensor(0.1 if name.startswith("0") else 0.2, dtype=torch.float64) for name in NAMES}
    separate = helpers.meta_gradient(learner_of(mm.SGD(lr=learned(apart))), tasks)
    wanted = [
        sum(separate["hyper.lr/" + name.replace(".", "/")] for name in NAMES if name.startswith(part)) for part in "02"
    ]
    for parameter in (True, False):
        learner = build(parameter)
        assert len({id(p) for p in learner.hyper.values()}) == 2
        assert len(list(learner.meta_parameters())) == 4 + 2
        found = [grad for key, grad in helpers.meta_gradient(learner, tasks).items() if key.startswith("hyper.")]
        torch.testing.assert_close(torch.stack(found), torch.stack([torch.as_tensor(w) for w in wanted]))


@pytest.mark.parametrize("adjoint", EXACT)
def test_a_rate_that_is_a_parameter_of_the_network(adjoint: str) -> None:
    """It is one meta-parameter, under the network's name for it, and stays one in copies."""

    class Rated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = PROBLEMS["mlp"].net()
            self.rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    net, tasks = Rated(), PROBLEMS["mlp"].tasks(2)
    learner = mm.maml(
        net, loss=F.mse_loss, optimizer=mm.SGD(lr=net.rate), steps=STEPS, adapt="body", adjoint=EXACT[adjoint]
    )
    found = helpers.meta_gradient(learner, tasks)
    apart = learner_of(mm.SGD(lr=torch.tensor(0.1, dtype=torch.float64, requires_grad=True)))
    wanted = {name.replace("net.", "net.body."): grad for name, grad in helpers.meta_gradient(apart, tasks).items()}
    wanted["net.rate"] = wanted.pop("hyper.lr")
    assert helpers.error(found, wanted) < 1e-12
    other = copy.deepcopy(learner)
    assert other.hyper["lr"] is other.net.get_parameter("rate")


def test_rates_of_a_wider_dtype_are_refused_where_they_would_widen_the_parameters() -> None:
    net = PROBLEMS["mlp"].net().float()
    wide = {name: torch.full(p.shape, 0.1, dtype=torch.float64) for name, p in net.named_parameters()}
    with pytest.raises(mm.InputError, match=r"lr= for 0.weight is torch.float64, which would turn the parameter"):
        mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=wide), steps=1)
    steps = dict.fromkeys(wide, torch.full((STEPS,), 0.1, dtype=torch.float64))
    learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=steps), steps=STEPS)
    inputs, targets = PROBLEMS["mlp"].task(0)[0]
    adapted = learner.adapt((inputs.float(), targets.float()))
    assert all(value.dtype == torch.float32 for value in adapted.params.values())


def test_a_rate_that_was_computed_is_refused_by_the_learner() -> None:
    """The learner takes the tensors over as parameters: what one was computed from would silently get no gradient."""
    logarithm = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(mm.InputError, match="lr was computed from other tensors"):
        learner_of(mm.SGD(lr=logarithm.exp()))


def test_a_rate_that_was_computed_works_in_adapt() -> None:
    logarithm = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

    def outer(exponent: Tensor) -> Tensor:
        params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        optimizer = mm.SGD(lr=exponent.exp())
        adapted = mm.adapt(lambda p, m, b: (p["w"] ** 4).sum() / 50, params, [0] * 3, optimizer=optimizer)
        return adapted.params["w"].sum()

    outer(logarithm).backward()
    assert logarithm.grad is not None
    measured = helpers.central_difference(lambda x: float(outer(logarithm.detach() + x)))
    assert abs(float(logarithm.grad) - measured) < 1e-8
