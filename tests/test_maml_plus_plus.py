"""MAML++: its formulas, per-step batch norm, exactness against an unrolled loop, statistics, ensembles, memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memmeta as mm

F64 = torch.float64
N, WAYS, FILTERS = 3, 3, 4


def tiny(**norm: Any) -> nn.Sequential:
    """Two blocks on images (n, 1, 6, 6), in float64."""
    return nn.Sequential(
        nn.Conv2d(1, FILTERS, 3, 2, 1),
        nn.BatchNorm2d(FILTERS, **norm),
        nn.LeakyReLU(0.01),
        nn.Conv2d(FILTERS, FILTERS, 3, 2, 1),
        nn.BatchNorm2d(FILTERS, **norm),
        nn.LeakyReLU(0.01),
        nn.Flatten(),
        nn.Linear(FILTERS * 4, WAYS),
    ).double()


def tasks(count: int = 2, dtype: torch.dtype = F64) -> list[mm.Task]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 2, 2 * WAYS, 1, 6, 6, generator=generator, dtype=F64).to(dtype)
    labels = torch.arange(WAYS).repeat(2)
    return [mm.Task((images[i, 0], labels), (images[i, 1], labels), mm.Address(0, 0, i)) for i in range(count)]


def learner_of(**options: Any) -> mm.MetaLearner:
    """A learner away from its start: rates of both signs, other gamma and beta at each step."""
    made = mm.maml_plus_plus(tiny(), loss=F.cross_entropy, **{"steps": N, "lr": 0.2, **options})
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.startswith("hyper.") or name.split(".")[1] in ("1", "4"):
                p.add_(torch.randn(p.shape, generator=generator, dtype=F64).to(p) * 0.3)
    return made


def gradients(learner: mm.MetaLearner, batch: Sequence[mm.Task], **options: Any) -> dict[str, Tensor]:
    learner.zero_grad()
    learner.accumulate(batch, **options)
    return {name: p.grad.clone() for name, p in learner.meta_parameters().items() if p.grad is not None}


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def forward(w: Mapping[str, Tensor], t: int, x: Tensor) -> Tensor:
    """``tiny`` by hand, with the scales and shifts of step t."""
    for conv, norm in (("0", "1"), ("3", "4")):
        x = F.conv2d(x, w[f"net.{conv}.weight"], w[f"net.{conv}.bias"], 2, 1)
        gamma, beta = w[f"net.{norm}.weight"], w[f"net.{norm}.bias"]
        row = (gamma[t], beta[t]) if gamma.dim() == 2 else (gamma, beta)
        x = F.leaky_relu(normalised(x, *row), 0.01)
    return F.linear(x.flatten(1), w["net.7.weight"], w["net.7.bias"])


def brute_force(learner: mm.MetaLearner, batch: Sequence[mm.Task], weights: Sequence[float]) -> dict[str, Tensor]:
    """The meta-gradient through the whole graph of an ordinary loop, all tasks and steps at once."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in learner.named_parameters()}
    adapted = [f"net.{name}" for name in learner.problem.adapted()]
    total = torch.zeros((), dtype=F64)
    for task in batch:
        w = dict(leaves)
        for t in range(learner.steps):
            loss = F.cross_entropy(forward(w, t, task.support[0]), task.support[1])
            grads = torch.autograd.grad(loss, [w[name] for name in adapted], create_graph=True)
            for name, grad in zip(adapted, grads, strict=True):
                rate = leaves.get(f"hyper.lr/{name.removeprefix('net.').replace('.', '/')}")
                w[name] = w[name] - (0.2 if rate is None else rate[t]) * grad
            total = total + weights[t] * F.cross_entropy(forward(w, t, task.query[0]), task.query[1])
    (total / len(batch)).backward()
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference over all tensors (a bias before batch norm has a gradient of 0)."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_multi_step_weights_are_the_published_ones() -> None:
    assert mm.multi_step_weights(0, 5, 15) == pytest.approx([0.2] * 5, abs=1e-12)
    assert mm.multi_step_weights(1, 5, 15) == pytest.approx([0.186667] * 4 + [0.253333], abs=5e-7)
    assert mm.multi_step_weights(14, 5, 15) == pytest.approx([0.013333] * 4 + [0.946667], abs=5e-7)
    assert mm.multi_step_weights(15, 5, 15) == [0, 0, 0, 0, 1] == mm.multi_step_weights(99, 5, 15)
    assert mm.multi_step_weights(0, 5, 0) == [0, 0, 0, 0, 1]
    assert mm.multi_step_weights(99, 5, 100) == pytest.approx([0.006] * 4 + [0.976], abs=1e-12)  # the floor .03/N
    assert all(sum(mm.multi_step_weights(e, 5, 15)) == pytest.approx(1) for e in range(20))


@pytest.mark.parametrize(
    ("ways", "filters", "channels", "size", "count"),
    [(5, 64, 1, 28, 114_369), (20, 64, 1, 28, 115_344), (5, 48, 3, 84, 71_681)],
    ids=["omniglot 5-way", "omniglot 20-way", "mini-imagenet"],
)
def test_as_many_meta_parameters_as_published(ways: int, filters: int, channels: int, size: int, count: int) -> None:
    layers: list[nn.Module] = []
    for inputs in (channels, filters, filters, filters):
        layers += [nn.Conv2d(inputs, filters, 3, 1, 1), nn.BatchNorm2d(filters), nn.LeakyReLU(0.01), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * (size // 16) ** 2, ways))
    learner = mm.maml_plus_plus(net, loss=F.cross_entropy)
    assert sum(p.numel() for p in learner.meta_parameters().values()) == count
    shapes = {name: tuple(p.shape) for name, p in learner.meta_parameters().items()}
    assert shapes["net.1.weight"] == shapes["net.13.bias"] == (5, filters)
    assert shapes["hyper.lr/0/weight"] == shapes["hyper.lr/17/bias"] == (6,)
    assert "hyper.lr/1/weight" not in shapes
    assert tuple(dict(learner.net.named_buffers())["1.running_var"].shape) == (5, filters)


def test_the_network_given_is_left_alone_and_switches_switch() -> None:
    net = tiny()
    before = copy.deepcopy(net.state_dict())
    plain = mm.maml_plus_plus(
        net, loss=F.cross_entropy, steps=N, learned_rates=False, per_step_statistics=False, per_step_weights=False
    )
    assert type(net[1]) is nn.BatchNorm2d
    assert before.keys() == net.state_dict().keys()
    shapes = {name: tuple(x.shape) for name, x in plain.net.state_dict().items()}
    assert shapes == {name: tuple(x.shape) for name, x in before.items() if "num_batches" not in name}
    assert not plain.hyper
    assert {name.split(".")[0] for name in plain.problem.adapted()} == {"0", "3", "7"}
    only = mm.maml_plus_plus(net, loss=F.cross_entropy, steps=N, per_step_weights=False)
    assert tuple(only.net.state_dict()["1.weight"].shape) == (FILTERS,)
    assert tuple(only.net.state_dict()["1.running_mean"].shape) == (N, FILTERS)
    head = mm.maml_plus_plus(net, loss=F.cross_entropy, steps=N, adapt="7")
    assert set(head.hyper) == {"lr/7/weight", "lr/7/bias"}


WEIGHTS = {"last": [0.0, 0.0, 1.0], "multi-step": [0.2, 0.3, 0.5]}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"learned_rates": False, "per_step_weights": False}], ids=["all", "shared"])
def test_the_meta_gradient_is_that_of_an_unrolled_loop(weights: str, options: dict[str, bool]) -> None:
    learner, batch = learner_of(**options), tasks()
    learner.step_weights = WEIGHTS[weights]
    expected = brute_force(learner, batch, WEIGHTS[weights])
    assert distance(gradients(learner, batch), expected) < 1e-9
    if not options:
        assert all(expected[f"net.{norm}.{name}"].abs().amin(1).min() > 1e-7 for norm in "14" for name in ("weight",))
        rates = torch.stack([g for name, g in expected.items() if name.startswith("hyper") and "bias" not in name])
        assert (rates[:, N] == 0).all()  # the last entry is never read
        assert rates[:, :N].abs().min() > 1e-6


FORWARD = pytest.param(mm.Stepwise(hvp="forward"), marks=pytest.mark.slow)


@pytest.mark.parametrize("adjoint", [mm.Unrolled(), mm.Stepwise(snapshots="sqrt"), FORWARD], ids=str)
def test_every_adjoint_knows_the_step(adjoint: mm.Adjoint) -> None:
    learner, batch, weights = learner_of(adjoint=adjoint), tasks(1), WEIGHTS["multi-step"]
    learner.step_weights = weights
    assert distance(gradients(learner, batch), brute_force(learner, batch, weights)) < 1e-9


@pytest.mark.parametrize(
    ("execution", "chunk"),
    [("eager", 2), pytest.param("trace", 1, marks=pytest.mark.slow), pytest.param("trace", 2, marks=pytest.mark.slow)],
)
def test_stacked_and_traced_tasks_know_the_step(execution: Literal["eager", "trace"], chunk: int) -> None:
    learner, batch, weights = learner_of(execution=execution, steps=2), tasks(), [0.4, 0.6]
    learner.step_weights = weights
    expected = brute_force(learner, batch, weights)
    for _ in range(2):  # the second time from a program
        assert distance(gradients(learner, batch, chunk=chunk), expected) < 1e-9


def test_a_program_knows_the_step() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, WAYS)).double()
    x, y = torch.randn(2, 6, 4, dtype=F64), torch.arange(WAYS).repeat(2)
    task, found = mm.Task((x[0], y), (x[1], y), mm.Address(0, 0, 0)), []
    for execution in ("eager", "trace"):
        learner = mm.maml_plus_plus(net, loss=F.cross_entropy, steps=2, execution=execution)
        with torch.no_grad():
            learner.get_parameter("net.1.weight")[1].mul_(2)
        learner.step_weights = [0.4, 0.6]
        found += [gradients(learner, [task]) for _ in range(2)]
    assert distance(found[0], found[3]) < 1e-12
    assert (found[0]["net.1.weight"].abs() > 1e-6).all()


def test_annealing_sets_weights_and_order_by_epoch() -> None:
    learner, batch = learner_of(), tasks(1)
    annealing = mm.Annealing(iterations=10, multi_step_epochs=4, first_order_to_second_order_epoch=1)
    seen = []
    for step in (0, 19, 20, 39, 40):
        annealing(learner, step)
        assert learner.step_weights == mm.multi_step_weights(step // 10, N, 4)
        seen.append(type(learner.adjoint).__name__)
    assert seen == ["FirstOrder", "FirstOrder", "Stepwise", "Stepwise", "Stepwise"]
    annealing.apply(learner, 0)
    first = gradients(learner, batch)
    weights = mm.multi_step_weights(0, N, 4)
    states: list[dict[str, Tensor]] = [dict(learner.named_parameters())]
    for t in range(1, N + 1):
        adapted = learner.adapt(batch[0].support, steps=t).params
        states.append({**states[0], **{f"net.{name}": p.detach().requires_grad_() for name, p in adapted.items()}})
    for name in (f"net.{name}" for name in learner.problem.adapted()):
        expected = sum(
            weights[t - 1]
            * torch.autograd.grad(F.cross_entropy(forward(w, t - 1, batch[0].query[0]), batch[0].query[1]), w[name])[0]
            for t, w in enumerate(states)
            if t
        )
        assert torch.allclose(first[name], torch.as_tensor(expected), atol=1e-12)
    mm.Annealing(multi_step_epochs=0).apply(learner, 0)
    assert learner.adjoint == mm.Stepwise()
    assert learner.step_weights == [0, 0, 1]
    with pytest.raises(mm.InputError, match=r"Annealing\(iterations=0\): write a whole number of at least 1"):
        mm.Annealing(iterations=0)
    with pytest.raises(mm.InputError, match=r"Annealing\(exact=.*write an adjoint, mm.Stepwise\(\)"):
        mm.Annealing(exact=mm.Stepwise)  # pyright: ignore[reportArgumentType]


def test_cosine_by_epoch_is_torchs_schedule() -> None:
    weight = nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.Adam([weight], lr=1e-3) for _ in range(2))
    schedule = mm.cosine_by_epoch(ours, epochs=7, iterations=3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 7, eta_min=1e-5)
    rates = []
    for _ in range(7):
        for _ in range(3):
            assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
            ours.step()
            schedule.step()
        rates.append(theirs.param_groups[0]["lr"])
        theirs.step()
        reference.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert rates == sorted(rates, reverse=True)


def test_cosine_by_epoch_with_a_tensor_rate_and_from_a_loaded_state() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(1e-3, dtype=F64))
    schedule = mm.cosine_by_epoch(optimizer, epochs=3, iterations=1)
    rates = []
    for _ in range(4):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * e / 3)) for e in range(4)])
    later = torch.optim.Adam([weight], lr=1.0)
    first = torch.optim.Adam([weight], lr=1e-3)
    halfway = mm.cosine_by_epoch(first, epochs=3, iterations=1)
    first.step()
    halfway.step()
    later.load_state_dict(first.state_dict())
    resumed = mm.cosine_by_epoch(later, epochs=3, iterations=1)
    resumed.load_state_dict({**halfway.state_dict(), "lr_lambdas": [None]})
    for _ in range(2):
        later.step()
        resumed.step()
    assert float(later.param_groups[0]["lr"]) == pytest.approx(1e-5)


def test_evaluation_mode_normalises_by_the_statistics_of_the_step() -> None:
    net = tiny()
    norm = mm.PerStepBatchNorm(net[1], N).double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = torch.randn(8, FILTERS, 3, 3, dtype=F64)
    norm(x)  # outside of an inner loop: the last step's
    plain = nn.BatchNorm2d(FILTERS).double()
    plain(x)
    assert torch.equal(norm.running_mean[:-1], torch.zeros(N - 1, FILTERS, dtype=F64))
    for name, rows in (("running_mean", norm.running_mean), ("running_var", norm.running_var)):
        assert torch.equal(rows[-1], plain.state_dict()[name])
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    assert "steps=3, weight=[3, 4]" in repr(norm)
    untracked = mm.PerStepBatchNorm(nn.BatchNorm1d(4, affine=False, track_running_stats=False), N).eval()
    assert torch.allclose(untracked(torch.randn(50, 4)).var(0, unbiased=False), torch.ones(4), atol=1e-3)


def test_a_norm_in_two_places_stays_one() -> None:
    shared = nn.BatchNorm1d(WAYS)
    learner = mm.maml_plus_plus(
        nn.Sequential(nn.Linear(4, 3), shared, nn.Tanh(), nn.Linear(3, 3), shared), loss=F.cross_entropy, steps=N
    )
    net = learner.net
    assert isinstance(net, nn.Sequential)
    assert net[1] is net[4]
    assert isinstance(net[1], mm.PerStepBatchNorm)


@pytest.mark.parametrize(
    ("module", "steps", "message"),
    [
        (nn.BatchNorm2d(3, momentum=None), 2, "has momentum=None: write"),
        (nn.LayerNorm(3), 2, "got LayerNorm"),
        (nn.BatchNorm2d(3), 0, r"PerStepBatchNorm\(steps=0\)"),
        (nn.BatchNorm2d(3), True, r"PerStepBatchNorm\(steps=True\)"),
    ],
)
def test_what_can_t_be_a_per_step_norm_is_refused(module: nn.Module, steps: int, message: str) -> None:
    with pytest.raises(mm.InputError, match=message):
        mm.PerStepBatchNorm(module, steps)


class Renamed(nn.BatchNorm2d):
    """A batch norm that may do something else in its forward."""


@pytest.mark.parametrize("norm", [Renamed(3), nn.SyncBatchNorm(3)], ids=["subclass", "sync"])
def test_other_batch_norms_are_refused(norm: nn.Module) -> None:
    with pytest.raises(mm.InputError, match=f"the network has a {type(norm).__name__}, which has no norm per step"):
        mm.maml_plus_plus(nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.Flatten()), loss=F.cross_entropy, steps=N)


@pytest.mark.parametrize(("epoch", "steps"), [(0, 0), (-1, 5)])
def test_weights_of_no_epoch_are_refused(epoch: int, steps: int) -> None:
    with pytest.raises(mm.InputError, match="write epoch >= 0 and steps >= 1"):
        mm.multi_step_weights(epoch, steps, 15)


def test_statistics_move_step_by_step_in_order() -> None:
    learner, batch = learner_of(), tasks()
    learner.net.eval()
    expected = {
        f"{n}.{k}": x.clone() for n in "14" for k in ("running_mean",) for x in [torch.zeros(N, FILTERS).to(F64)]
    }
    weights = dict(learner.named_parameters())

    def move(w: Mapping[str, Tensor], t: int, x: Tensor) -> None:
        for conv, norm in (("0", "1"), ("3", "4")):
            x = F.conv2d(x, w[f"net.{conv}.weight"], w[f"net.{conv}.bias"], 2, 1)
            row = expected[f"{norm}.running_mean"][t]
            row += 0.1 * (x.mean((0, 2, 3)) - row)
            x = F.leaky_relu(normalised(x, weights[f"net.{norm}.weight"][t], weights[f"net.{norm}.bias"][t]), 0.01)

    with torch.no_grad():
        learner.net.train()
        for task in batch:
            for t in range(N + 1):
                adapted = {f"net.{name}": p for name, p in learner.adapt(task.support, steps=t).params.items()}
                move({**weights, **adapted}, min(t, N - 1), (task.support if t < N else task.query)[0])
        learner.net.eval()
    mm.update_statistics(learner, batch)
    assert not any(module.training for module in learner.net.modules())
    state = learner.net.state_dict()
    for name, mean in expected.items():
        assert torch.allclose(state[name], mean, atol=1e-12)
        assert (mean[0] - mean[1]).abs().max() > 1e-4
    before = copy.deepcopy(state)
    learner.net.train()
    learner.accumulate(batch)  # which changes no buffer
    assert all(torch.equal(before[name], x) for name, x in learner.net.state_dict().items())
    with pytest.raises(mm.InputError, match="needs a network with PerStepBatchNorm"):
        mm.update_statistics(mm.maml(tiny(), loss=F.cross_entropy, optimizer=mm.SGD(lr=0.1), steps=1), batch)


def test_evaluation_by_running_statistics_differs_and_does_not_look_at_other_queries() -> None:
    learner, batch = learner_of(), tasks(1)
    mm.update_statistics(learner, tasks(4))
    transductive = learner.adapt(batch[0].support)
    learner.net.eval()
    inductive, query = learner.adapt(batch[0].support), batch[0].query[0]
    with torch.no_grad():
        assert torch.allclose(inductive(query)[:2], inductive(query[:2]), atol=1e-12)
        learner.net.train()
        assert not torch.allclose(transductive(query)[:2], transductive(query[:2]), atol=1e-3)


def test_an_ensemble_averages_the_logits_of_its_best_states() -> None:
    learner, batch = learner_of(), tasks()
    ensemble = mm.Ensemble(learner, size=2)
    with pytest.raises(mm.InputError, match="has no members"):
        ensemble.evaluate(batch)
    states = []
    for score in (0.3, 0.9, 0.1, 0.5, 0.5):
        with torch.no_grad():
            for p in learner.parameters():
                p.add_(0.05 * torch.randn_like(p))
        states.append((score, copy.deepcopy(learner.state_dict())))
        assert ensemble.offer(score) == (score != 0.1 and len(states) < 5)
    assert ensemble.scores == [0.9, 0.5]
    present = copy.deepcopy(learner.state_dict())
    report = ensemble.evaluate(batch)
    stacked = ensemble.evaluate(batch, chunk=2)
    assert stacked.mean("loss") == pytest.approx(report.mean("loss"), abs=1e-9)
    assert all(torch.equal(present[name], x) for name, x in learner.state_dict().items())
    for task, score in zip(batch, report.tasks, strict=True):
        logits = []
        for _, state in (states[1], states[3]):
            learner.load_state_dict(state)
            logits.append(learner.adapt(task.support)(task.query[0]).detach())
        mean = (logits[0] + logits[1]) / 2
        assert score.values["loss"] == pytest.approx(F.cross_entropy(mean, task.query[1]).item(), abs=1e-12)
        assert score.values["accuracy"] == (mean.argmax(1) == task.query[1]).double().mean().item()
        assert score.address == task.address
    assert not math.isnan(report.interval("accuracy")[1])
    alone = ensemble.best(1).evaluate(batch).mean("loss")
    learner.load_state_dict(states[1][1])
    assert alone == pytest.approx(learner.evaluate(batch).mean("loss"), abs=1e-12)
    with pytest.raises(mm.InputError, match="there are no tasks"):
        ensemble.evaluate([])


def test_an_ensembles_members_are_copies_and_have_scores() -> None:
    learner, batch = learner_of(), tasks()
    ensemble = mm.Ensemble(learner, size=2, states=[(0.5, learner.state_dict())])
    before = ensemble.evaluate(batch).mean("loss")
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.1)
    assert ensemble.evaluate(iter(batch)).mean("loss") == before
    assert not ensemble.offer(math.nan)
    assert [ensemble.offer(score) for score in (0.1, math.nan, 0.6, 0.2)] == [True, False, True, False]
    assert ensemble.scores == [0.6, 0.5]
    with pytest.raises(mm.InputError, match="score is NaN; leave it out"):
        mm.Ensemble(learner, states=[(math.nan, learner.state_dict())])


@pytest.mark.parametrize("size", [0, 2.5, "3", True])
def test_an_ensembles_size_is_a_number_of_members(size: Any) -> None:
    with pytest.raises(mm.InputError, match="write the number of members, at least 1"):
        mm.Ensemble(learner_of(), size=size)


def test_an_ensemble_needs_predictions() -> None:

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).square().mean()

    learner = mm.MetaLearner(mm.Problem(tiny(), loss, loss), optimizer=mm.SGD(lr=0.1), steps=1)
    with pytest.raises(mm.InputError, match="averages predictions"):
        mm.Ensemble(learner)


def test_a_multi_step_loss_takes_no_more_memory() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.01), nn.Flatten(), nn.Linear(288, WAYS)
    )
    learner = mm.maml_plus_plus(net, loss=F.cross_entropy, steps=6)
    images, labels = torch.randn(60, 1, 6, 6), torch.arange(WAYS).repeat(20)
    task = mm.Task((images, labels), (images, labels))
    peaks = []
    for weights in (mm.multi_step_weights(9, 6, 0), mm.multi_step_weights(0, 6, 10)):
        learner.step_weights = weights
        learner.accumulate([task])
        peak = learner.accumulate([task], count_bytes=True).peak_bytes
        assert peak is not None
        peaks.append(peak)
    assert peaks[1] <= 1.02 * peaks[0]
