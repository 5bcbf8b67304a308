"""What is adapted, drawn anew, meta-learned directly, or left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import EXACT, PROBLEMS, Batch, Tied
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

STEPS = 3


class Parts(nn.Module):
    """A body, a head and a context input, (n, 3) to (n, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.full((2,), 0.3))
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([x, self.context.expand(len(x), 2)], 1)
        return self.head(self.body(joined)) * self.scale


def parts(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    return Parts().double()


ALL = ["context", "body.0.weight", "body.0.bias", "head.weight", "head.bias"]
TASKS = PROBLEMS["mlp"].tasks(3)


def inner(net: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1])


def problem_of(net: nn.Module | None = None, **options: Any) -> mm.Problem:
    return mm.Problem(parts() if net is None else net, inner, inner, **options)


def learner_of(adjoint: mm.Adjoint | None = None, net: nn.Module | None = None, **options: Any) -> mm.MetaLearner:
    return mm.MetaLearner(problem_of(net, **options), optimizer=mm.SGD(lr=0.2), steps=STEPS, adjoint=adjoint)


SELECTIONS: dict[str, tuple[Any, list[str]]] = {
    "all": ("all", ALL),
    "a submodule": ("head", ["head.weight", "head.bias"]),
    "one parameter": ("body.0.bias", ["body.0.bias"]),
    "a pattern": ("*.bias", ["body.0.bias", "head.bias"]),
    "a list": (["context", "head.*"], ["context", "head.weight", "head.bias"]),
    "a tuple that overlaps": (("head", "*.weight"), ["body.0.weight", "head.weight", "head.bias"]),
    "by name": (lambda name, p: "body" in name, ["body.0.weight", "body.0.bias"]),
    "by shape": (lambda name, p: p.dim() == 2, ["body.0.weight", "head.weight"]),
    "a pattern over modules": ("b*", ["body.0.weight", "body.0.bias"]),
    "one character": ("head.[b]ias", ["head.bias"]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_what_is_adapted(name: str) -> None:
    selection, wanted = SELECTIONS[name]
    problem = problem_of(adapt=selection)
    assert list(problem.adapted()) == wanted
    assert set(problem.bind().meta) == set(ALL) - set(wanted)
    learner = learner_of(adapt=selection)
    assert set(learner.adapt(TASKS[0][0]).params) == set(wanted)
    assert set(learner.meta_parameters()) == {f"net.{key}" for key in ALL}


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("name", SELECTIONS)
def test_meta_gradients_of_every_selection(name: str, adjoint: str) -> None:
    """Adapted ones through their initial values, others directly and through the inner loop; frozen ones get none."""
    selection, chosen = SELECTIONS[name]
    found = helpers.meta_gradient(learner_of(EXACT[adjoint], adapt=selection), TASKS)
    net = parts()
    losses = []
    for support, query in TASKS:
        params: helpers.Tree = dict(net.named_parameters())
        for _ in range(STEPS):
            value = F.mse_loss(torch.func.functional_call(net, params, support[0]), support[1])
            grads = torch.autograd.grad(value, [params[key] for key in chosen], create_graph=True)
            params = {**params, **{key: params[key] - 0.2 * g for key, g in zip(chosen, grads, strict=True)}}
        losses.append(F.mse_loss(torch.func.functional_call(net, params, query[0]), query[1]))
    torch.stack(losses).mean().backward()
    wanted = {f"net.{key}": p.grad for key, p in net.named_parameters() if p.grad is not None}
    assert "net.scale" not in wanted
    assert helpers.error(found, wanted) < 1e-12


def test_the_bodys_gradient_comes_through_the_inner_loop_too() -> None:
    exact = helpers.meta_gradient(learner_of(adapt="head"), TASKS)
    direct = helpers.meta_gradient(learner_of(mm.FirstOrder(), adapt="head"), TASKS)
    assert helpers.error({"b": direct["net.body.0.weight"]}, {"b": exact["net.body.0.weight"]}) > 1e-2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing matched": (
        {"adapt": "tail"},
        r"adapt= 'tail' matches no parameter of the network: its parameters",
    ),
    "one of several": ({"adapt": ["head", "tail"]}, "adapt= 'tail' matches no parameter"),
    "frozen only": ({"adapt": "scale"}, r"adapt= 'scale' matches only frozen parameters \(requires_grad=False\)"),
    "nothing chosen": ({"adapt": lambda name, p: False}, "nothing to adapt"),
    "nothing at all": ({"adapt": []}, "nothing to adapt"),
    "nothing redrawn": ({"redraw": {"tail": torch.zeros_like}}, "redraw= 'tail' matches no parameter"),
    "frozen redrawn": ({"redraw": {"scale": torch.zeros_like}}, "redraw= 'scale' matches only frozen"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_selections_that_come_to_nothing_are_refused(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(mm.InputError, match=message) as caught:
        problem_of(**options)
    assert "\n" not in str(caught.value)


def test_a_frozen_network_is_refused() -> None:
    net = parts()
    net.requires_grad_(False)
    with pytest.raises(mm.InputError, match="nothing to adapt: adapt= selects no parameter that requires grad"):
        problem_of(net)


def test_a_network_frozen_later_is_refused_too() -> None:
    learner = learner_of()
    learner.net.requires_grad_(False)
    with pytest.raises(mm.InputError, match="nothing to adapt"):
        learner.accumulate(TASKS)


@pytest.mark.parametrize("alias", ["encoder.weight", "decoder.weight", "decoder", "*coder.weight"])
def test_a_tied_weight_under_any_of_its_names(alias: str) -> None:
    net = PROBLEMS["tied"].net()
    assert isinstance(net, Tied)
    problem = mm.Problem(net, inner, inner, adapt=alias)
    assert list(problem.adapted()) == ["encoder.weight"]
    by_predicate = mm.Problem(net, inner, inner, adapt=lambda name, p: name == "decoder.weight")
    assert list(by_predicate.adapted()) == ["encoder.weight"]
    tasks = PROBLEMS["tied"].tasks(2)
    found, wanted = (
        helpers.meta_gradient(mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.1), steps=2, adjoint=adjoint), tasks)
        for adjoint in (mm.Stepwise(), mm.Unrolled())
    )
    assert found.keys() == {"net.encoder.weight", "net.encoder.bias"}
    assert helpers.error(found, wanted) < 1e-12


@pytest.mark.parametrize("adjoint", EXACT)
def test_context_inputs_that_start_from_zero(adjoint: str) -> None:
    """CAVIA: the context is adapted from zeros; what it was initialised with has no effect, and gets no gradient."""
    options: dict[str, Any] = {"adapt": "context", "redraw": {"context": torch.zeros_like}}
    learner = learner_of(EXACT[adjoint], **options)
    found = helpers.meta_gradient(learner, TASKS)
    assert found.keys() == {f"net.{name}" for name in ALL[1:]}
    assert "net.context" not in learner.meta_parameters()
    zeroed = parts()
    with torch.no_grad():
        zeroed.context.zero_()
    wanted = helpers.meta_gradient(learner_of(mm.Unrolled(), zeroed, adapt="context"), TASKS)
    assert wanted.pop("net.context").any()
    assert helpers.error(found, wanted) < 1e-12
    assert torch.equal(learner.net.get_parameter("context").detach(), torch.full((2,), 0.3).double())


def test_redrawn_parameters_are_adapted_without_being_named_twice() -> None:
    problem = problem_of(adapt="head", redraw={"context": torch.zeros_like})
    assert list(problem.adapted()) == ["context", "head.weight", "head.bias"]


def random_head(p: Tensor) -> Tensor:
    return 0.3 * torch.randn_like(p)


@pytest.mark.parametrize("adjoint", EXACT)
def test_a_random_head_is_seeded_per_task(adjoint: str) -> None:
    learner = learner_of(EXACT[adjoint], redraw={"head": random_head})
    addressed = [mm.Task(*task, mm.Address(0, 0, index)) for index, task in enumerate(TASKS)]
    first, again = helpers.meta_gradient(learner, addressed), helpers.meta_gradient(learner, addressed)
    assert first.keys() == {"net.context", "net.body.0.weight", "net.body.0.bias"}
    assert all(torch.equal(first[key], again[key]) for key in first)
    shuffled = helpers.meta_gradient(learner, addressed[::-1])
    assert helpers.error(shuffled, first) < 1e-13
    assert helpers.error(helpers.meta_gradient(learner, addressed, seed=1), first) > 1e-3
    plain = [helpers.meta_gradient(learner, TASKS, seed=seed) for seed in (5, 5, 6)]
    assert all(torch.equal(plain[0][key], plain[1][key]) for key in first)
    assert helpers.error(plain[2], plain[0]) > 1e-3


def test_a_random_heads_gradient_is_exact() -> None:
    options: dict[str, Any] = {"redraw": {"head": random_head}}
    found, wanted = (
        helpers.meta_gradient(learner_of(each, **options), TASKS, seed=3) for each in (mm.Stepwise(), mm.Unrolled())
    )
    assert helpers.error(found, wanted) < 1e-12
    direction = helpers.random_like(found, 0)
    plain = {key.removeprefix("net."): leaf for key, leaf in direction.items()}

    def value(size: float) -> float:
        return learner_of(net=helpers.shifted(parts(), plain, size), **options).evaluate(TASKS, seed=3).loss

    slope = sum(float((found[key] * direction[key]).sum()) for key in found)
    assert abs(slope - helpers.central_difference(value)) < 1e-8


def test_draws_come_from_the_global_generator_only_where_nothing_else_seeds_them() -> None:
    learner = learner_of(redraw={"head": random_head})
    torch.manual_seed(11)
    first = learner.evaluate(TASKS).loss
    second = learner.evaluate(TASKS).loss
    torch.manual_seed(11)
    assert learner.evaluate(TASKS).loss == first
    assert second != first
    state = torch.get_rng_state()
    learner.accumulate(TASKS, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_of_another_shape_is_refused() -> None:
    learner = learner_of(redraw={"head.bias": lambda p: torch.zeros(3)})
    with pytest.raises(mm.InputError, match=r"redraw= gave head.bias the shape \[3\]: it must be \[2\]"):
        learner.accumulate(TASKS)


def test_a_draw_is_cast_and_copied() -> None:
    shared = torch.zeros(2)
    learner = learner_of(redraw={"context": lambda p: shared})
    adapted = learner.adapt(TASKS[0][0])
    assert adapted.params["context"].dtype == torch.float64
    assert not shared.any()
    same = learner_of(redraw={"context": lambda p: p})  # starts from the value, without a gradient
    assert "net.context" not in helpers.meta_gradient(same, TASKS)
    assert same.evaluate(TASKS).loss == pytest.approx(learner_of().evaluate(TASKS).loss, abs=1e-14)


def outer_with_metrics(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    prediction = net(batch[0])
    return F.mse_loss(prediction, batch[1]), {"size": prediction.abs().mean()}


def test_metrics_of_a_problem() -> None:
    problem = mm.Problem(parts(), inner, outer_with_metrics)
    report = mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.1), steps=1).accumulate(TASKS)
    assert report.names() == ["loss", "size"]
    assert report.loss == pytest.approx(learner_of_rate(0.1).accumulate(TASKS).loss)


def learner_of_rate(rate: float) -> mm.MetaLearner:
    return mm.MetaLearner(problem_of(), optimizer=mm.SGD(lr=rate), steps=1)


def test_an_inner_loss_with_metrics_is_its_first_value() -> None:
    problem = mm.Problem(parts(), outer_with_metrics, inner)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.1), steps=1)
    assert helpers.error(helpers.meta_gradient(learner, TASKS), helpers.meta_gradient(learner_of_rate(0.1), TASKS)) == 0


def test_losses_may_use_any_part_of_the_network() -> None:
    """The weights of the moment are in place in submodules, too, and wherever a parameter is read."""

    def by_parts(net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(net, Parts)
        joined = torch.cat([batch[0], net.context.expand(len(batch[0]), 2)], 1)
        out = F.linear(net.body(joined), net.head.weight, net.head.bias) * net.scale
        return F.mse_loss(out, batch[1])

    problem = mm.Problem(parts(), by_parts, by_parts)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.2), steps=STEPS)
    assert helpers.error(helpers.meta_gradient(learner, TASKS), helpers.meta_gradient(learner_of(), TASKS)) < 1e-14


OUTER: dict[str, tuple[Callable[[nn.Module, Batch], Any], str]] = {
    "no scalar": (lambda net, batch: net(batch[0]), r"outer loss must be a scalar, got shape \[5, 2\]"),
    "a number": (lambda net, batch: 1.0, "outer loss must be a scalar tensor, got float"),
    "detached": (lambda net, batch: net(batch[0]).detach().mean(), "outer loss does not depend on any meta-parameter"),
}


@pytest.mark.parametrize("name", OUTER)
def test_outer_losses_that_are_none_are_refused(name: str) -> None:
    loss, message = OUTER[name]
    learner = mm.MetaLearner(mm.Problem(parts(), inner, loss), optimizer=mm.SGD(lr=0.1), steps=1)
    with pytest.raises(mm.InputError, match=message):
        learner.accumulate(TASKS)
    assert all(p.grad is None for p in learner.parameters())


def test_a_tensor_captured_by_an_outer_or_inner_loss_is_refused() -> None:
    hidden = torch.ones(7, dtype=torch.float64, requires_grad=True)
    plain, capturing = inner, lambda net, batch: inner(net, batch) * hidden.mean()
    for losses, where in (((capturing, plain), "inner loss"), ((plain, capturing), "outer loss")):
        learner = mm.MetaLearner(mm.Problem(parts(), *losses), optimizer=mm.SGD(lr=0.1), steps=2)
        with pytest.raises(mm.CaptureError, match=rf"shape \[7\] that requires grad reaches the {where} by closure"):
            learner.accumulate(TASKS)


def test_supervised_batches_and_labels_that_do_not_fit() -> None:
    learner = mm.maml(PROBLEMS["conv_bn"].net(), loss=F.cross_entropy, optimizer=mm.SGD(lr=0.1), steps=1)
    (inputs, labels), query = PROBLEMS["conv_bn"].task(0)
    with pytest.raises(mm.InputError, match="labels must be 0 to 2"):
        learner.accumulate([((inputs, labels + 1000), query)])
    with pytest.raises(mm.InputError, match=r"a batch must be a pair \(inputs, targets\), got Tensor"):
        learner.accumulate([(inputs, query)])
    with pytest.raises(mm.InputError, match=r"a batch must be a pair"):
        learner.accumulate([((inputs, labels, labels), query)])


def test_problems_can_be_copied() -> None:
    problem = problem_of(adapt="head")
    other = copy.deepcopy(problem)
    assert other.net is not problem.net
    assert list(other.adapted()) == list(problem.adapted())


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}], ids=["max_norm", "sparse"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_no_step_can_be_replayed_with(kind: Any, options: dict[str, Any]) -> None:
    net = nn.Sequential(kind(10, 4, **options), nn.Linear(4, 2))
    with pytest.raises(mm.UnsupportedError, match=f"^0 .*set {next(iter(options))}="):
        mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(0.1), steps=1)
