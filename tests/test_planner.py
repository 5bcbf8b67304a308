"""A plan for a memory budget: its arithmetic, its predictions against what is counted, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memmeta as mm
from memmeta import costs, schedules
from memmeta.costs import Cost, affine, extra_states, parse_bytes, policies
from memmeta.probing import Prober, Way, blocks
from helpers import error, meta_gradient

COST = Cost(
    peaks={1: 900.0, 2: 1000.0}, seconds={1: 5.0, 2: 8.0}, state=100.0, gradient=1.0, storing=0.25
)  # a step is a gradient and a product, 3 s; a snapshot 100 bytes


class Block(nn.Module):
    """A residual layer; (n, width) to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outside(torch.tanh(self.inside(x)))


def network(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), Block(width), Block(width), nn.Linear(width, 2)).double()


def task(examples: int = 16, query: int | None = None) -> mm.Task:
    generator = torch.Generator().manual_seed(1)

    def pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (3, 2))  # type: ignore

    return mm.Task(pair(examples), pair(examples if query is None else query))


def learner(steps: int = 5, net: nn.Module | None = None, **options: Any) -> mm.MetaLearner:
    options.setdefault("optimizer", mm.SGD(lr=0.05))
    return mm.maml(network() if net is None else net, loss=F.mse_loss, steps=steps, **options)


def peak(of: mm.MetaLearner, one: mm.Candidate, tasks: list[Any]) -> int:
    """Counted bytes of the first meta-gradient taken as a candidate says."""
    other = copy.deepcopy(of)
    found = other.accumulate(tasks, **one.apply(other), seed=0, count_bytes=True).peak_bytes
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [
        ("8GiB", 8 * 2**30), ("512 MiB", 2**29), ("1.5kib", 1536), ("2e9", 2 * 10**9), ("8GB", 8 * 10**9),
        ("100", 100), ("100 B", 100), (4096, 4096), (1e6, 10**6), ("2E3", 2000),
    ],
)  # fmt: skip
def test_bytes(given: object, bytes_: int) -> None:
    assert parse_bytes(given) == bytes_


@pytest.mark.parametrize("given", ["", "8 gigs", "8Gi", "GiB", "-1", "0", 0, -5, True, None, "nan", "1e99", [8]])
def test_what_is_no_number_of_bytes_is_refused(given: object) -> None:
    with pytest.raises(mm.InputError, match=r"memory=.*: write a number of bytes such as '8GiB', '512MiB' or '2e9'"):
        parse_bytes(given)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 100])
@pytest.mark.parametrize("policy", ["all", "sqrt", 1, 3])
def test_the_peak_is_that_of_two_steps_and_the_other_snapshots(policy: Any, steps: int) -> None:
    expected = 900 if steps == 1 else 1000 + 100 * (schedules.most_alive(policy, steps) - 1)
    assert COST.stepwise_bytes(policy, steps, "cpu") == expected


def test_snapshots_elsewhere_take_no_memory_here() -> None:
    assert [extra_states("disk", steps, "cpu") for steps in (1, 2, 50)] == [0, 0, 0]
    assert [extra_states("host", steps, "cuda") for steps in (1, 2, 3, 4, 50)] == [0, 0, 1, 2, 2]
    assert extra_states("host", 50, "cpu") == extra_states("all", 50, "cpu") == 48


@pytest.mark.parametrize("steps", [2, 3, 4, 9, 100])
@pytest.mark.parametrize("policy", ["all", "sqrt", 1, 3])
def test_each_gradient_taken_again_costs_its_time(policy: Any, steps: int) -> None:
    again = schedules.recomputed(policy, steps) - (steps - 1)
    assert COST.stepwise_seconds(policy, steps) == 5 + 3 * (steps - 1) + again
    assert COST.stepwise_seconds(policy, 1) == 5


def test_the_disk_costs_its_writes_and_reads() -> None:
    assert COST.stepwise_seconds("disk", 10) == COST.stepwise_seconds("all", 10) + 8 * 0.25


def test_a_step_costs_at_least_its_gradient() -> None:
    """However the clock was disturbed."""
    noisy = dataclasses.replace(COST, seconds={1: 5.0, 2: 4.0})
    assert noisy.stepwise_seconds("all", 11) == 5 + 10


def test_what_grows_by_as_much_with_each_step() -> None:
    cost = Cost({2: 30.0, 3: 50.0}, {2: 4.0, 3: 5.0})
    assert [cost.affine_bytes(steps) for steps in (2, 3, 10)] == [30, 50, 190]
    assert [cost.affine_seconds(steps) for steps in (2, 3, 10)] == [4, 5, 12]
    assert Cost({7: 30.0}, {7: 1.0}).affine_bytes(7) == 30


def test_widths_lie_on_lines_between_those_measured() -> None:
    points = [(m, Cost({2: peak}, {1: m, 2: 2.0 * m})) for m, peak in ((1, 10.0), (2, 12.0), (8, 30.0))]
    assert [affine(points, m).peaks[2] for m in (1, 2, 4, 8, 16)] == [10, 12, 18, 30, 54]
    assert affine(points, 4).seconds == {1: 4.0, 2: 8.0}
    assert affine(points[:1], 4) is points[0][1]


def test_more_pieces_take_more_time_and_no_more_memory() -> None:
    """Of 5 s, 3 are the one step's and 2 the outer loss's."""
    cost = COST.pieces(inner=4.0, outer=2.0)
    assert cost.seconds == {1: 4 * 3 + 2 * 2, 2: 4 * 6 + 2 * 2}
    assert (cost.peaks, cost.state, cost.gradient) == (COST.peaks, COST.state, 4.0)


def test_policies_are_listed_once() -> None:
    assert policies(1, "cpu") == policies(2, "cuda") == ["all"]
    assert policies(20, "cpu") == ["all", "sqrt", 1, 2, 4, 8, 16, "disk"]
    assert policies(20, "cuda")[-2:] == ["host", "disk"]
    for steps in range(3, 30):
        numbers = [schedules.most_alive(policy, steps) for policy in policies(steps, "cpu") if policy != "disk"]
        assert len(numbers) == len(set(numbers))


def test_blocks_are_what_repeats() -> None:
    assert blocks(network()) == ("1", "2")
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ()
    inner = nn.ModuleDict({"body": nn.ModuleList([Block(2), Block(2), nn.ReLU()]), "head": nn.Linear(2, 2)})
    assert blocks(inner) == ("body.0", "body.1")
    assert blocks(nn.ModuleDict({"a": Block(2), "b": nn.Sequential(nn.Linear(2, 2))})) == ("a", "b")


@pytest.mark.parametrize("optimizer", [mm.SGD(lr=0.05), mm.Adam(lr=0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_predictions_are_what_is_counted(optimizer: mm.InnerOptimizer, steps: int) -> None:
    ours = learner(steps, optimizer=optimizer)
    plan = mm.plan(ours, task(), "1GiB", tasks=2)
    eager = [c for c in plan.candidates if not (isinstance(c.adjoint, mm.Stepwise) and c.adjoint.hvp == "forward")]
    for one in [*eager, *(c for c in plan.candidates if c not in eager and c.chunk == 1)][:14]:
        measured = peak(ours, one, [task(), task()])
        assert abs(one.bytes - measured) <= 0.15 * measured, one


@pytest.mark.parametrize("execution", ["eager", "trace"])
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_what_is_chosen_fits_when_it_is_measured(execution: Any, share: float) -> None:
    ours = learner(6, network(24), execution=execution)
    roomy = mm.plan(ours, task(), "1GiB")
    least = min(c.bytes for c in roomy.candidates)
    budget = round(least + share * (roomy.best.bytes - least)) + 1
    plan = mm.plan(ours, task(), budget)
    assert plan.fits(plan.best)
    assert plan.best.seconds <= min(c.seconds for c in plan.candidates if plan.fits(c))
    assert peak(ours, plan.best, [task()]) <= 1.15 * budget
    assert f"budget {costs.in_bytes(budget)}: {plan.best}" in str(plan)


def test_a_small_budget_is_met_in_microbatches() -> None:
    ours, one = learner(3, network(4)), task(256)
    whole = [c for c in mm.plan(ours, one, "1GiB").candidates if c.microbatch is None]
    budget = 0.5 * min(c.bytes for c in whole)
    plan = mm.plan(ours, one, budget)
    assert plan.best.microbatch is not None
    assert peak(ours, plan.best, [one]) <= 1.15 * budget
    for candidate in [c for c in plan.candidates if c.microbatch is not None and c.check == "reverse"][:6]:
        measured = peak(ours, candidate, [one])
        assert measured * 0.85 <= candidate.bytes, candidate


def test_batch_statistics_are_never_cut() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    ours = learner(3, net)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    least = min(c.bytes for c in mm.plan(ours, task(64), "1GiB").candidates)
    with pytest.raises(mm.Infeasible, match="the least possible is"):
        mm.plan(ours, task(64), 0.5 * least)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())


def test_a_budget_that_nothing_meets_says_what_would_do() -> None:
    with pytest.raises(mm.Infeasible, match=r"memory=64 B is not enough .* least possible is .* KiB, with .*chunk=1") as e:
        mm.plan(learner(), task(), 64)
    least = e.value.least
    copied = pickle.loads(pickle.dumps(e.value))
    assert (str(copied), copied.least) == (str(e.value), least)
    assert isinstance(e.value, mm.InputError)
    plan = mm.plan(learner(), task(), 1.2 * least.bytes)
    assert plan.best.bytes <= 1.2 * least.bytes


def test_it_leaves_everything_as_it_was_and_the_gradient_is_the_same() -> None:
    ours = learner(4, optimizer=mm.SGD(lr=torch.tensor(0.05, dtype=torch.float64, requires_grad=True), momentum=0.5))
    tasks = [task(), task()]
    before = meta_gradient(ours, tasks, seed=0)
    weights = {name: p.detach().clone() for name, p in ours.named_parameters()}
    programs, state = ours.programs, torch.random.get_rng_state()
    plan = mm.plan(ours, tasks[0], "1GiB", tasks=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (ours.adjoint, ours.steps, ours.programs) == (mm.Stepwise(), 4, programs)
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in ours.named_parameters())
    for one in (plan.best, plan.candidates[-1]):
        options = one.apply(ours)
        assert ours.adjoint == one.adjoint
        assert error(meta_gradient(ours, tasks, seed=0, **options), before) < 1e-9


def test_only_exact_adjoints_are_candidates() -> None:
    found = {type(c.adjoint) for c in mm.plan(learner(), task(), "1GiB").candidates}
    assert found == {mm.Stepwise, mm.Unrolled}
    assert all(c.adjoint.exact for c in mm.plan(learner(), task(), "1GiB").candidates)
    assert mm.Unrolled() not in {c.adjoint for c in mm.plan(learner(17), task(4), "1GiB").candidates}


@pytest.mark.parametrize("adjoint", [mm.FirstOrder(), mm.Stepwise(window=2, snapshots=1), mm.Reversible()], ids=str)
def test_other_adjoints_are_kept(adjoint: mm.Adjoint) -> None:
    ours = learner(5, adjoint=adjoint, optimizer=mm.SGD(lr=0.05, momentum=0.9))
    plan = mm.plan(ours, task(), "1GiB", tasks=4)
    assert {c.adjoint for c in plan.candidates} == {adjoint}
    assert {c.chunk for c in plan.candidates} >= {1, 2}
    for one in plan.candidates:
        measured = peak(ours, one, [task()] * 4)
        assert abs(one.bytes - measured) <= 0.15 * measured


def test_outer_losses_of_all_steps_are_in_the_prediction() -> None:
    ours = learner(6, step_weights=[0.1] * 5 + [0.5])
    for one in [c for c in mm.plan(ours, task(), "1GiB").candidates if c.check == "reverse" and c.chunk == 1][:6]:
        measured = peak(ours, one, [task()])
        assert abs(one.bytes - measured) <= 0.15 * measured


def test_chunks_are_at_most_the_meta_batch() -> None:
    plan = mm.plan(learner(2, network(2)), task(4), "1GiB", tasks=3)
    assert max(c.chunk for c in plan.candidates) <= 3


def test_sets_that_cant_be_cut_or_stacked() -> None:
    """A batch with a number for a tensor has no examples; one that looks at values can't be stacked."""

    def inner(net: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets, scale = batch
        return F.mse_loss(net(inputs), targets) * float(scale)

    one = task()
    scale = torch.tensor(1.0)
    both = mm.Task((*one.support, scale), (*one.query, scale))
    problem = mm.Problem(network(), inner, inner)
    ours = mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.05), steps=3)
    assert Prober(ours, both).examples is None
    found = mm.plan(ours, both, "1GiB", tasks=4).candidates
    assert {(c.chunk, c.microbatch) for c in found} == {(1, None)}


def test_what_can_not_be_run_is_no_candidate() -> None:
    prober = Prober(learner(3), task())
    assert prober.cost(Way(mm.Stepwise(layers=("nothing",)), "eager"), (2,), (1, 2)) is None
    assert prober.allows(1)
    assert not prober.allows(16)


def test_what_is_wrong_with_the_task_is_said() -> None:
    wrong = mm.Task((torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)), task().query)
    with pytest.raises(RuntimeError, match="shapes"):
        mm.plan(learner(), wrong, "1GiB")
    with pytest.raises(mm.InputError, match="expected a mm.Task or a pair"):
        mm.plan(learner(), 3, "1GiB")  # type: ignore
    with pytest.raises(mm.InputError, match="tasks=0: write the number of tasks"):
        mm.plan(learner(), task(), "1GiB", tasks=0)
    with pytest.raises(mm.InputError, match="execution='fast': write 'eager'"):
        mm.plan(learner(), task(), "1GiB", execution="fast")  # type: ignore


def test_the_first_step_is_compared_with_the_prediction() -> None:
    plan = mm.plan(learner(), task(), "1MiB")
    assert plan.outcome(plan.best.bytes) == "memory: predicted {0}, measured {0}".format(costs.in_bytes(plan.best.bytes))
    assert "over the budget of 1.0 MiB: plan anew with a budget of 512.0 KiB" in plan.outcome(2 * 2**20)
