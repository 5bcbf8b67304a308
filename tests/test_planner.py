"""A plan for a memory budget: its arithmetic, its predictions against what is counted, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from helpers import error, meta_gradient
from torch import nn
from torch.nn import functional as F

import memmeta as mm
from memmeta import memory, schedules
from memmeta.costs import Cost, affine, extra_states, parse_bytes, policies
from memmeta.probing import Prober, Way, blocks

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


def deep(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), Block(width), Block(width), nn.Linear(width, 2)).double()


def network(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    ).double()


def task(examples: int = 16, query: int | None = None) -> mm.Task:
    generator = torch.Generator().manual_seed(1)

    def pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (3, 2))  # type: ignore

    return mm.Task(pair(examples), pair(examples if query is None else query))


def learner(steps: int = 5, net: nn.Module | None = None, **options: Any) -> mm.MetaLearner:
    options.setdefault("optimizer", mm.SGD(lr=0.05))
    return mm.maml(network() if net is None else net, loss=F.mse_loss, steps=steps, **options)


def forward(one: mm.Candidate) -> bool:
    return isinstance(one.adjoint, mm.Stepwise) and one.adjoint.hvp == "forward"


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
    assert blocks(deep()) == ("1", "2")
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ()
    inner = nn.ModuleDict({"body": nn.ModuleList([Block(2), Block(2), nn.ReLU()]), "head": nn.Linear(2, 2)})
    assert blocks(inner) == ("body.0", "body.1")
    assert blocks(nn.ModuleDict({"a": Block(2), "b": nn.Sequential(nn.Linear(2, 2))})) == ("a", "b")


@pytest.fixture(scope="module")
def roomy() -> mm.Plan:
    """The plan of five steps where memory is no matter."""
    return mm.plan(learner(), task(), "1GiB", tasks=2)


def within(candidate: mm.Candidate, measured: int) -> bool:
    return abs(candidate.bytes - measured) <= 0.15 * measured


def test_predictions_are_what_is_counted(roomy: mm.Plan) -> None:
    ours = learner()
    eager = [c for c in roomy.candidates if not forward(c)]
    traced = [c for c in roomy.candidates if forward(c) and c.chunk == 1]
    assert len(eager) >= 8
    for one in [*eager, *traced[:2]]:
        assert within(one, peak(ours, one, [task(), task()])), one


@pytest.mark.parametrize("optimizer", [mm.SGD(lr=0.05, momentum=0.9), mm.Adam(lr=0.01)], ids=["momentum", "adam"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_so_they_are_for_other_states_and_lengths(optimizer: mm.InnerOptimizer, steps: int) -> None:
    """From the probes of one way alone."""
    ours = learner(steps, optimizer=optimizer)
    short = min(steps, 2)
    cost = Prober(ours, task()).cost(Way(mm.Stepwise(), "eager"), (short,), range(1, short + 1))
    assert cost is not None
    for policy in policies(steps, "cpu"):
        one = mm.Candidate(mm.Stepwise(snapshots=policy), "eager", "reverse", 1, None, 0, 0.0)
        measured = peak(ours, one, [task()])
        assert abs(cost.stepwise_bytes(policy, steps, "cpu") - measured) <= 0.1 * measured, policy


@pytest.mark.parametrize("place", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_what_is_chosen_fits_when_it_is_measured(roomy: mm.Plan, place: float) -> None:
    ours, sizes = learner(), sorted(c.bytes for c in roomy.candidates)
    budget = sizes[round(place * len(sizes))] + 1
    plan = mm.plan(ours, task(), budget, tasks=2)
    assert plan.best.seconds == min(c.seconds for c in plan.candidates if plan.fits(c))
    assert peak(ours, plan.best, [task(), task()]) <= 1.15 * budget
    assert f"budget {memory.in_bytes(budget)}: {plan.best}" in str(plan)


def test_layers_are_predicted_too() -> None:
    ours = learner(5, deep())
    way = Way(mm.Stepwise(layers=blocks(ours.net)), "eager")
    cost = Prober(ours, task()).cost(way, (2,), (1, 2))
    assert cost is not None
    for policy in policies(5, "cpu"):
        adjoint = mm.Stepwise(layers=("1", "2"), snapshots=policy)
        one = mm.Candidate(adjoint, "eager", "reverse", 1, None, round(cost.stepwise_bytes(policy, 5, "cpu")), 0.0)
        assert within(one, peak(ours, one, [task()])), policy


@pytest.mark.slow
def test_programs_of_whole_tasks_are_predicted_too() -> None:
    ours = learner(4, execution="trace")
    for one in mm.plan(ours, task(), "1GiB").candidates:
        assert within(one, peak(ours, one, [task()])), one


def test_a_small_budget_is_met_in_microbatches() -> None:
    ours, one = learner(2, network(4)), task(32)
    least = Prober(ours, one).cost(Way(mm.Stepwise(), "eager"), (2,), ())
    assert least is not None
    budget = 0.5 * least.peaks[2]
    plan = mm.plan(ours, one, budget)
    assert plan.best.microbatch is not None
    assert peak(ours, plan.best, [one]) <= 1.15 * budget
    for candidate in [c for c in plan.candidates if c.microbatch is not None and not forward(c)]:
        assert within(candidate, peak(ours, candidate, [one])), candidate


def test_batch_statistics_are_never_cut() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(mm.Infeasible, match="the least possible is") as error:
        mm.plan(learner(2, net), task(64), "8KiB")
    assert error.value.least.microbatch is None
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())


def test_a_budget_that_nothing_meets_says_what_would_do() -> None:
    pattern = r"^memory=64 B is not enough for a meta-gradient: the least possible is .* B, with .*chunk=1"
    with pytest.raises(mm.Infeasible, match=pattern) as found:
        mm.plan(learner(1, network(2)), task(2), 64)
    least, copied = found.value.least, pickle.loads(pickle.dumps(found.value))
    assert (str(copied), copied.least) == (str(found.value), least)
    assert mm.plan(learner(1, network(2)), task(2), 1.1 * least.bytes).best.bytes <= 1.1 * least.bytes


def test_it_leaves_everything_as_it_was_and_the_gradient_is_the_same() -> None:
    ours = learner(2, optimizer=mm.SGD(lr=torch.tensor(0.05, dtype=torch.float64, requires_grad=True), momentum=0.5))
    tasks = [task(), task()]
    before = meta_gradient(ours, tasks, seed=0)
    weights = {name: p.detach().clone() for name, p in ours.named_parameters()}
    programs, state = ours.programs, torch.random.get_rng_state()
    plan = mm.plan(ours, tasks[0], "1GiB", tasks=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (ours.adjoint, ours.steps, ours.programs) == (mm.Stepwise(), 2, programs)
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in ours.named_parameters())
    for one in (plan.best, plan.candidates[-1]):
        options = one.apply(ours)
        assert ours.adjoint == one.adjoint
        assert error(meta_gradient(ours, tasks, seed=0, **options), before) < 1e-9


def test_only_exact_adjoints_are_candidates(roomy: mm.Plan) -> None:
    assert {type(c.adjoint) for c in roomy.candidates} == {mm.Stepwise, mm.Unrolled}
    assert all(c.adjoint.exact for c in roomy.candidates)


@pytest.mark.parametrize("adjoint", [mm.FirstOrder(), mm.Stepwise(window=2, snapshots=1), mm.Reversible()], ids=str)
def test_other_adjoints_are_kept(adjoint: mm.Adjoint) -> None:
    ours = learner(5, adjoint=adjoint, optimizer=mm.SGD(lr=0.05, momentum=0.9))
    plan = mm.plan(ours, task(4), "1GiB", tasks=4)
    assert {c.adjoint for c in plan.candidates} == {adjoint}
    assert {c.chunk for c in plan.candidates} >= {1, 2}
    for one in plan.candidates:
        assert within(one, peak(ours, one, [task(4)] * 4)), one


def test_outer_losses_of_all_steps_are_in_the_prediction() -> None:
    ours = learner(6, step_weights=[0.1] * 5 + [0.5])
    cost = Prober(ours, task()).cost(Way(mm.Stepwise(), "eager"), (2,), (1, 2))
    assert cost is not None
    measured = ours.meta_gradient([task()], seed=0, count_bytes=True).report.peak_bytes
    assert measured is not None
    assert abs(cost.stepwise_bytes("all", 6, "cpu") - measured) <= 0.05 * measured


def test_chunks_are_at_most_the_meta_batch() -> None:
    plan = mm.plan(learner(1, network(2)), task(4), "1GiB", tasks=3)
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
    ours = mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.05), steps=1)
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
    with pytest.raises(mm.InputError, match=r"expected a mm\.Task or a pair"):
        mm.plan(learner(), 3, "1GiB")  # type: ignore
    with pytest.raises(mm.InputError, match="tasks=0: write the number of tasks"):
        mm.plan(learner(), task(), "1GiB", tasks=0)
    with pytest.raises(mm.InputError, match="execution='fast': write 'eager'"):
        mm.plan(learner(), task(), "1GiB", execution="fast")  # type: ignore


def test_the_first_step_is_compared_with_the_prediction(roomy: mm.Plan) -> None:
    plan = dataclasses.replace(roomy, memory=2**20)
    size = memory.in_bytes(plan.best.bytes)
    assert plan.outcome(plan.best.bytes) == f"memory: predicted {size}, measured {size}"
    assert "over the budget of 1.0 MiB: plan anew with a budget of 512.0 KiB" in plan.outcome(2 * 2**20)
