"""The meta-gradient of every kind of network, against batched MAML, the unrolled graph, and finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import EXACT, PROBLEMS, Rule, Tree
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

STEPS = 3


def learner_of(name: str, adjoint: mm.Adjoint | None = None, steps: int = STEPS, **options: Any) -> mm.MetaLearner:
    case = PROBLEMS[name]
    optimizer = options.pop("optimizer", mm.SGD(lr=case.rate))
    return mm.maml(case.net(), loss=case.loss, optimizer=optimizer, steps=steps, adjoint=adjoint, **options)


@pytest.mark.parametrize("count", [1, 2, 16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_accumulate_is_the_gradient_of_the_joint_mean_loss(name: str, count: int) -> None:
    case, tasks = PROBLEMS[name], PROBLEMS[name].tasks(count)
    found = helpers.meta_gradient(learner_of(name), tasks)
    batched = helpers.batched_learn2learn(case.net(), tasks, case.loss, case.rate, STEPS)
    unrolled = helpers.meta_gradient(learner_of(name, mm.Unrolled()), tasks)
    assert helpers.error(found, batched) < 1e-10
    assert helpers.error(found, unrolled) < 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_tasks_given_in_several_calls_or_by_an_iterator(name: str) -> None:
    tasks, learner = PROBLEMS[name].tasks(4), learner_of(name)
    whole = helpers.meta_gradient(learner, tasks)
    lazily = helpers.meta_gradient(learner, iter(tasks))  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(whole[key], lazily[key]) for key in whole)
    for half in (tasks[:2], tasks[2:]):
        learner.accumulate(half)
    sums = {key: p.grad / 2 for key, p in learner.named_parameters() if p.grad is not None}
    assert helpers.error(sums, whole) < 1e-13
    result = learner.meta_gradient(tasks)
    assert result.count == 4
    assert helpers.error({key: total / 4 for key, total in result.sums.items()}, whole) < 1e-13


def outer_value(net: nn.Module, name: str, optimizer: mm.InnerOptimizer, steps: int) -> float:
    case = PROBLEMS[name]
    learner = mm.maml(net, loss=case.loss, optimizer=optimizer, steps=steps)
    return learner.evaluate(case.tasks(2)).loss


@pytest.mark.parametrize("optimizer", [mm.SGD(lr=0.1, momentum=0.5), mm.Adam(lr=0.02, eps=1e-2)], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_equals_central_finite_differences(name: str, optimizer: mm.InnerOptimizer) -> None:
    """Along random directions of length about sqrt(parameters).

    Tolerance: with a step of 1e-6 rounding gives errors of 1e-16 * loss / 1e-6 = 1e-10, and truncation 1e-12 / 6 times
    the third derivative along the direction, which Adam's division brings up to some 1e5 here.
    """
    learner = learner_of(name, optimizer=optimizer)
    grads = helpers.meta_gradient(learner, PROBLEMS[name].tasks(2))
    norm = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    for seed in range(2):
        direction = helpers.random_like(grads, seed)
        slope = sum(float((grads[key] * direction[key]).sum()) for key in grads)
        plain = {key.removeprefix("net."): leaf for key, leaf in direction.items()}

        def value(size: float, plain: Tree = plain) -> float:
            return outer_value(helpers.shifted(PROBLEMS[name].net(), plain, size), name, optimizer, STEPS)

        measured = helpers.central_difference(value)
        assert abs(slope - measured) < 1e-6 * max(norm, 1.0)


@pytest.mark.parametrize("optimizer", ["sgd_nesterov_decay", "adamw_amsgrad", "rmsprop_centered_momentum"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_stateful_inner_optimisers_on_every_network(name: str, optimizer: str) -> None:
    def rule() -> mm.InnerOptimizer:
        numbers = helpers.OPTIMIZERS[optimizer].numbers
        learned = {
            key: torch.tensor(number, dtype=torch.float64, requires_grad=True) for key, number in numbers.items()
        }
        return helpers.OPTIMIZERS[optimizer].inner(**learned)

    tasks = PROBLEMS[name].tasks(2)
    found = helpers.meta_gradient(learner_of(name, optimizer=rule()), tasks)
    unrolled = helpers.meta_gradient(learner_of(name, mm.Unrolled(), optimizer=rule()), tasks)
    assert any(key.startswith("hyper.") for key in found)
    assert helpers.error(found, unrolled) < 1e-10


@pytest.mark.parametrize("adjoint", EXACT)
def test_the_value_is_that_of_real_sgd(adjoint: str) -> None:
    case = PROBLEMS["conv_bn"]
    tasks = case.tasks(3)
    report = learner_of("conv_bn", EXACT[adjoint]).accumulate(tasks, before=True)
    for score, (support, query) in zip(report.tasks, tasks, strict=True):
        rule = Rule(mm.SGD, torch.optim.SGD, {"lr": case.rate})
        trained = helpers.torch_steps(case.net(), support, case.loss, rule, STEPS)
        assert score.values["loss"] == pytest.approx(float(case.loss(trained(query[0]), query[1]).detach()), abs=1e-12)
        before = float(case.loss(case.net()(query[0]), query[1]).detach())
        assert score.values["loss_before"] == pytest.approx(before, abs=1e-12)
        correct = (trained(query[0]).argmax(-1) == query[1]).double().mean()
        assert score.values["accuracy"] == pytest.approx(float(correct))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["conv_bn", "transformer"])
def test_modes_are_used_as_they_are(name: str, mode: str) -> None:
    learner, reference = learner_of(name), learner_of(name, mm.Unrolled())
    tasks = PROBLEMS[name].tasks(2)
    for each in (learner, reference):
        each.train(mode == "train")
        for buffer_name, buffer in each.net.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.mul_(2.0)
    found = helpers.meta_gradient(learner, tasks)
    assert helpers.error(found, helpers.meta_gradient(reference, tasks)) < 1e-10
    assert learner.training == (mode == "train")
    evaluated = learner.evaluate(tasks)
    assert evaluated.loss == pytest.approx(learner.accumulate(tasks).loss, abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_step_and_many(name: str) -> None:
    tasks = PROBLEMS[name].tasks(1)
    for steps in (1, 2, 8):
        found = helpers.meta_gradient(learner_of(name, steps=steps), tasks)
        assert helpers.error(found, helpers.meta_gradient(learner_of(name, mm.Unrolled(), steps), tasks)) < 1e-10


def test_a_bias_before_batch_norm_has_no_gradient() -> None:
    grads = helpers.meta_gradient(learner_of("conv_bn"), PROBLEMS["conv_bn"].tasks(2))
    assert float(grads["net.0.bias"].abs().max()) < 1e-15
    assert float(grads["net.0.weight"].abs().max()) > 1e-3


def test_tied_weights_have_one_gradient_and_one_inner_update() -> None:
    case = PROBLEMS["tied"]
    learner = learner_of("tied")
    assert list(learner.meta_parameters()) == ["net.encoder.weight", "net.encoder.bias"]
    support, _ = case.task(0)
    adapted = learner.adapt(support)
    assert set(adapted.params) == {"encoder.weight", "encoder.bias"}
    trained = helpers.torch_steps(case.net(), support, case.loss, helpers.OPTIMIZERS["sgd"], STEPS)
    torch.testing.assert_close(adapted(support[0]), trained(support[0]), rtol=0, atol=1e-12)


def test_parametrised_weights() -> None:
    """Weight norm in torch's new form: the parameters are not where the layer reads its weight. Against differences of
    real steps: the double backward of torch's own kernel is wrong."""

    def build() -> nn.Module:
        net = PROBLEMS["mlp"].net()
        assert isinstance(net, nn.Sequential)
        nn.utils.parametrizations.weight_norm(net[0])
        return net

    (task,), case = PROBLEMS["mlp"].tasks(1), PROBLEMS["mlp"]
    direction = helpers.random_like(dict(build().named_parameters()), 3)

    def outer(size: float) -> float:
        moved = helpers.shifted(build(), direction, size)
        trained = helpers.torch_steps(moved, task[0], F.mse_loss, helpers.OPTIMIZERS["sgd"], 2)
        return float(F.mse_loss(trained(task[1][0]), task[1][1]).detach())

    wanted = helpers.central_difference(outer, 1e-5)
    for adjoint in (mm.Stepwise(), mm.Unrolled(), mm.Stepwise(hvp="forward")):
        learner = mm.maml(build(), loss=case.loss, optimizer=mm.SGD(lr=0.1), steps=2, adjoint=adjoint)
        found = helpers.meta_gradient(learner, [task])
        slope = sum(float((found[f"net.{name}"] * v).sum()) for name, v in direction.items())
        assert abs(slope - wanted) < 1e-8 * max(abs(wanted), 1.0)


class Fused(nn.Module):
    """torch's own GRU, which keeps a list of its weights beside its parameters; differentiable twice on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


def test_a_fused_gru_on_the_cpu_equals_its_cells() -> None:
    case = PROBLEMS["gru_cells"]
    cells = learner_of("gru_cells")
    fused = Fused().double()
    with torch.no_grad():
        for name, param in cells.net.named_parameters():
            place = name.replace("cell.", "gru.") + ("_l0" if name.startswith("cell.") else "")
            dict(fused.named_parameters())[place].copy_(param)
    learner = mm.maml(fused, loss=case.loss, optimizer=mm.SGD(lr=case.rate), steps=STEPS)
    tasks = case.tasks(2)
    assert learner.evaluate(tasks).loss == pytest.approx(cells.evaluate(tasks).loss, abs=1e-12)
    found = {
        name.replace("gru.", "cell.").replace("_l0", ""): grad
        for name, grad in helpers.meta_gradient(learner, tasks).items()
    }
    assert helpers.error(found, helpers.meta_gradient(cells, tasks)) < 1e-10
    again = copy.deepcopy(fused)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), fused.parameters(), strict=True))
    torch.testing.assert_close(again(tasks[0][0][0]), fused(tasks[0][0][0]), rtol=0, atol=0)


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, None, :] * x[:, :, None])[0][:, -1]


class Shared(nn.Module):
    """One layer, and one batch norm, used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm(torch.tanh(self.first(x)))
        return self.head(self.again(torch.tanh(self.second(inside))))


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net = helpers.mlp()
    assert isinstance(net, nn.Sequential)
    wrap(net[0])
    return net


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "lstm": Last,
    "shared modules": Shared,
    "spectral norm": lambda: wrapped(nn.utils.parametrizations.spectral_norm),
    "spectral norm by hooks": lambda: wrapped(nn.utils.spectral_norm),
    "orthogonal": lambda: wrapped(nn.utils.parametrizations.orthogonal),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_networks_that_keep_their_weights_in_unusual_places(name: str) -> None:
    """Each equals the unrolled graph, and its buffers stay as they were. (Finite differences only where torch's own
    derivative is that of the value: not where power iterations or signs are taken for constants.)"""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return UNUSUAL[name]().double()

    def learner(net: nn.Module, adjoint: mm.Adjoint | None = None) -> mm.MetaLearner:
        return mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=0.1), steps=STEPS, adjoint=adjoint)

    tasks, net = PROBLEMS["mlp"].tasks(2), build()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = helpers.meta_gradient(learner(net), tasks)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert helpers.error(found, helpers.meta_gradient(learner(build(), mm.Unrolled()), tasks)) < 1e-10
    if name not in ("lstm", "shared modules"):
        return
    direction = helpers.random_like(found, 0)
    plain = {key.removeprefix("net."): leaf for key, leaf in direction.items()}
    slope = sum(float((found[key] * direction[key]).sum()) for key in found)
    measured = helpers.central_difference(
        lambda size: learner(helpers.shifted(build(), plain, size)).evaluate(tasks).loss
    )
    assert abs(slope - measured) < 1e-6


@pytest.mark.parametrize("name", ["conv_bn", "groupnorm_silu"])
def test_a_gradient_penalty_inside_the_inner_loss(name: str) -> None:
    """The inner loss itself differentiates: three orders in all. Against finite differences, as torch's own third
    derivative of batch norm is wrong (2.13: it takes the statistics of the batch for constants)."""
    case = PROBLEMS[name]

    def penalised(net: nn.Module, batch: helpers.Batch) -> Tensor:
        inputs = batch[0] + 0 * next(net.parameters()).sum()  # no leaf of its own: that would count as captured
        value = case.loss(net(inputs), batch[1])
        (slope,) = torch.autograd.grad(value, inputs, create_graph=True)
        return value + 0.1 * slope.square().sum()

    def outer(net: nn.Module, batch: helpers.Batch) -> Tensor:
        return case.loss(net(batch[0]), batch[1])

    def learner(net: nn.Module) -> mm.MetaLearner:
        return mm.MetaLearner(mm.Problem(net, penalised, outer), optimizer=mm.SGD(lr=0.05), steps=2)

    tasks = case.tasks(2)
    grads = helpers.meta_gradient(learner(case.net()), tasks)
    direction = helpers.random_like(grads, 0)
    plain = {key.removeprefix("net."): leaf for key, leaf in direction.items()}
    slope = sum(float((grads[key] * direction[key]).sum()) for key in grads)
    measured = helpers.central_difference(
        lambda size: learner(helpers.shifted(case.net(), plain, size)).evaluate(tasks).loss
    )
    assert abs(slope - measured) < 1e-6


def test_single_precision_is_single_precisions_rounding_away() -> None:
    """float32 against float64 on the same numbers: some tens of epsilons."""
    case, tasks = PROBLEMS["mlp"], PROBLEMS["mlp"].tasks(2)
    exact = helpers.meta_gradient(learner_of("mlp"), tasks)
    single = mm.maml(case.net().float(), loss=case.loss, optimizer=mm.SGD(lr=case.rate), steps=STEPS)
    rounded = [tuple((x.float(), y.float()) for x, y in task) for task in tasks]
    found = helpers.meta_gradient(single, rounded)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert helpers.error({key: grad.double() for key, grad in found.items()}, exact) < 1e-5
