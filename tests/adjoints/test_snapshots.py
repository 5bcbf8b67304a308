"""Where ``Stepwise`` keeps snapshots, and how far it walks back: the same gradient, less memory."""

from __future__ import annotations

import contextlib
from typing import Any

import helpers
import pytest
import torch
from helpers import OPTIMIZERS, PROBLEMS, Tree
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta import storage, trees
from memmeta.rollout import State
from memmeta.schedules import Policy, most_alive, recomputed

POLICIES: tuple[Policy, ...] = ("all", "sqrt", "host", "disk", 1, 2, 3)
WEIGHTS = [0.1, 0.0, 0.3, 0.0, 0.2, 0.4]


def learner_of(
    name: str, adjoint: mm.Adjoint, optimizer: str = "sgd", steps: int = 6, **options: Any
) -> mm.MetaLearner:
    case = PROBLEMS[name]
    rule = OPTIMIZERS[optimizer].inner()
    return mm.maml(case.net(), loss=case.loss, optimizer=rule, steps=steps, adjoint=adjoint, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd_momentum", "adam"])
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "tied"])
def test_every_policy_gives_the_same_gradient(name: str, optimizer: str) -> None:
    tasks = PROBLEMS[name].tasks(1)
    wanted = helpers.meta_gradient(learner_of(name, mm.Unrolled(), optimizer, step_weights=WEIGHTS), tasks)
    for policy in POLICIES:
        learner = learner_of(name, mm.Stepwise(policy), optimizer, step_weights=WEIGHTS)
        assert helpers.error(helpers.meta_gradient(learner, tasks), wanted) < 1e-10


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(policy: Policy, steps: int) -> None:
    tasks = PROBLEMS["gru_cells"].tasks(1)
    found, wanted = (
        helpers.meta_gradient(learner_of("gru_cells", adjoint, "adam", steps), tasks)
        for adjoint in (mm.Stepwise(policy), mm.Unrolled())
    )
    assert helpers.error(found, wanted) < 1e-10


@pytest.mark.parametrize("policy", POLICIES)
def test_no_steps_at_all(policy: Policy) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    adapted = mm.adapt(cubic, {"w": w}, [], optimizer=mm.SGD(0.1), adjoint=mm.Stepwise(policy, window=2))
    (grad,) = torch.autograd.grad((3 * adapted.params["w"]).sum(), w)
    assert grad.tolist() == [3, 3]


@pytest.mark.parametrize("policy", ["sqrt", "host", "disk", 2])
def test_with_stacked_tasks_and_with_microbatches(policy: Policy) -> None:
    tasks = PROBLEMS["mlp"].tasks(3)
    wanted = helpers.meta_gradient(learner_of("mlp", mm.Unrolled(), "adam", step_weights=WEIGHTS), tasks)
    learner = learner_of("mlp", mm.Stepwise(policy), "adam", step_weights=WEIGHTS)
    assert helpers.error(helpers.meta_gradient(learner, tasks, chunk=3), wanted) < 1e-10
    assert helpers.error(helpers.meta_gradient(learner, tasks, microbatch=2), wanted) < 1e-10


@pytest.mark.parametrize("policy", ["all", "sqrt", "host", "disk", 1, 2])
def test_dropout_is_replayed_however_often_a_step_is_run(policy: Policy) -> None:
    def learner(adjoint: mm.Adjoint) -> mm.MetaLearner:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
        return mm.maml(net, loss=F.mse_loss, optimizer=mm.Adam(0.01), steps=6, adjoint=adjoint)

    source = mm.Address(0, 0, 1)
    tasks = [mm.Task(*PROBLEMS["mlp"].task(0), source)]
    wanted = helpers.meta_gradient(learner(mm.Unrolled()), tasks)
    assert helpers.error(helpers.meta_gradient(learner(mm.Stepwise(policy)), tasks), wanted) < 1e-10


# The free function: pulled back once, twice, never; hidden state.


def cubic(params: Tree, meta: Any, batch: Any) -> Tensor:
    return ((1 if meta is None else meta) * params["w"] ** 3).sum() / 3


class Counted:
    """A cubic loss that counts its calls, and fails at one of them if told."""

    def __init__(self) -> None:
        self.calls, self.fails_at = 0, -1

    def __call__(self, params: Tree, meta: Any, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise ArithmeticError("told to")
        return cubic(params, meta, batch)


START = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64)
STEPS = 9


def inputs() -> tuple[Tensor, Tensor]:
    return START.clone().requires_grad_(), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)


def gradients(adapted: mm.Adapted, *leaves: Tensor) -> Tree:
    found = torch.autograd.grad((adapted.params["w"] ** 2).sum(), leaves, retain_graph=True)
    return {str(index): grad for index, grad in enumerate(found)}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_steps_are_run_as_often_as_foretold_and_pulled_back_again(policy: Policy, window: int | None) -> None:
    loss, leaves = Counted(), inputs()
    adjoint = mm.Stepwise(policy, window)
    adapted = mm.adapt(loss, {"w": leaves[0]}, [0] * STEPS, optimizer=mm.Adam(0.1), meta=leaves[1], adjoint=adjoint)
    assert loss.calls == STEPS
    first = gradients(adapted, *leaves)
    assert loss.calls == STEPS + recomputed(policy, STEPS, window)
    before = loss.calls
    assert helpers.error(gradients(adapted, *leaves), first) < 1e-14
    walked = window or STEPS
    if most_alive(policy, STEPS, window) >= walked - 1:  # nothing was dropped: one step leads to the last state
        assert loss.calls - before == walked + (walked > 1)
    else:
        assert loss.calls - before == walked + recomputed(policy, STEPS, window)
    unrolled = mm.adapt(
        cubic, {"w": leaves[0]}, [0] * STEPS, optimizer=mm.Adam(0.1), meta=leaves[1], adjoint=mm.Unrolled()
    )
    if window is None:
        assert helpers.error(first, gradients(unrolled, *leaves)) < 1e-10


@pytest.mark.parametrize("fails_at", [STEPS - 1, STEPS + 1, STEPS + 2, STEPS + 6])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_walk_that_was_broken_off_can_be_done_again(policy: Policy, fails_at: int) -> None:
    loss, leaves = Counted(), inputs()
    loss.fails_at = fails_at

    def adapted() -> mm.Adapted:
        return mm.adapt(
            loss, {"w": leaves[0]}, [0] * STEPS, optimizer=mm.SGD(0.1), meta=leaves[1], adjoint=mm.Stepwise(policy)
        )

    if fails_at < STEPS:
        with pytest.raises(ArithmeticError):
            adapted()
    result = adapted()
    if fails_at > STEPS:
        with pytest.raises(ArithmeticError):
            gradients(result, *leaves)
    wanted = mm.adapt(
        cubic, {"w": leaves[0]}, [0] * STEPS, optimizer=mm.SGD(0.1), meta=leaves[1], adjoint=mm.Unrolled()
    )
    assert helpers.error(gradients(result, *leaves), gradients(wanted, *leaves)) < 1e-10


@pytest.mark.parametrize("policy", POLICIES)
def test_hidden_state_is_found_out(policy: Policy) -> None:
    calls = 0

    def counting(params: Tree, meta: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return cubic(params, None, batch) * (1 + calls * 1e-3)

    w = START.clone().requires_grad_()
    adapted = mm.adapt(counting, {"w": w}, [0] * 7, optimizer=mm.SGD(0.1), adjoint=mm.Stepwise(policy))
    with pytest.raises(mm.ReplayError, match=r"inner step 0 gave the loss"):
        adapted.params["w"].sum().backward()


def test_steps_that_are_run_again_without_a_graph_are_compared_too() -> None:
    """What is added to the loss of step 2 in its second run alone reaches no gradient and no other step's loss."""
    seen: list[int] = []  # step 2: on the way there, again towards step 3, and with its graph

    def loss(params: Tree, meta: Any, batch: int) -> Tensor:
        seen.append(batch)
        return cubic(params, None, batch) + (batch == 2 and seen.count(2) == 2)

    w = START.clone().requires_grad_()
    adapted = mm.adapt(loss, {"w": w}, range(5), optimizer=mm.SGD(0.1), adjoint=mm.Stepwise(2))
    with pytest.raises(mm.ReplayError, match=r"inner step 2 gave the loss"):
        adapted.params["w"].sum().backward()
    assert seen.count(2) == 3


# Counted snapshots and bytes.


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("policy", [1, 2, 3, "sqrt", "all"])
def test_never_more_snapshots_alive_than_asked_for(
    policy: Policy, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: set[int] = set() if window else {0}  # the start
    counts = [1]

    class Watched(storage.DeviceStore):
        def put(self, t: int, state: State) -> None:
            super().put(t, state)
            alive.add(t)
            counts.append(len(alive))

        def drop(self, t: int) -> None:
            super().drop(t)
            alive.discard(t)

    monkeypatch.setattr("memmeta.adjoints.stepwise.store_for", lambda policy, rollout: Watched(rollout))
    loss, leaves = Counted(), inputs()
    loss.fails_at = 30
    adapted = mm.adapt(
        *(loss, {"w": leaves[0]}, [0] * 12), optimizer=mm.SGD(0.1), meta=leaves[1], adjoint=mm.Stepwise(policy, window)
    )
    for _ in range(3):  # one of which is broken off
        with contextlib.suppress(ArithmeticError):
            gradients(adapted, *leaves)
    assert max(counts) <= most_alive(policy, 12, window)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 1))


def peak(adjoint: mm.Adjoint, steps: int) -> tuple[int, int]:
    """Counted peak bytes of one meta-gradient, and the bytes of one state."""
    rule = mm.SGD(1e-3, momentum=0.9)
    learner = mm.maml(wide(), loss=F.mse_loss, optimizer=rule, steps=steps, adjoint=adjoint)
    x, y = torch.randn(4, 4), torch.randn(4, 1)
    found = learner.accumulate([mm.Task((x, y), (x, y))], count_bytes=True).peak_bytes
    assert found is not None
    params = dict(learner.problem.adapted())
    slots = rule.bind(params, steps).start(params)
    return found, trees.nbytes(params) + sum(trees.nbytes(group) for group in slots.values())


def test_peaks_by_policy() -> None:
    """T = 28: snapshots of all steps, of the square root, of three, of none."""
    (base, state), (every, _) = peak(mm.Stepwise(), 1), peak(mm.Stepwise(), 28)
    assert 25 * state < every - base < 30 * state
    few: tuple[tuple[Policy, int], ...] = (("sqrt", 6), (3, 3), ("disk", 0))
    for policy, states in few:
        found, _ = peak(mm.Stepwise(policy), 28)  # beside the snapshots: the state at hand, and the one to come
        assert found - base < (states + 2) * state


@pytest.mark.slow
def test_the_square_root_against_the_graph_of_all_steps() -> None:
    """A transformer and 64 steps: a twelfth at most."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True) for _ in range(2)]
    net = nn.Sequential(*layers)
    x, y = torch.randn(4, 64, 128), torch.randn(4, 64, 128)

    def peak_of(adjoint: mm.Adjoint) -> int:
        learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(1e-3), steps=64, adjoint=adjoint)
        found = learner.accumulate([mm.Task((x, y), (x, y))], count_bytes=True).peak_bytes
        assert found is not None
        return found

    assert 12 * peak_of(mm.Stepwise("sqrt")) <= peak_of(mm.Unrolled())


@pytest.mark.parametrize("adjoint", [mm.Stepwise("disk"), mm.Stepwise(1), mm.Stepwise(window=1), mm.Stepwise(3)])
def test_peaks_that_do_not_depend_on_the_number_of_steps(adjoint: mm.Stepwise) -> None:
    assert peak(adjoint, 24)[0] - peak(adjoint, 10)[0] < 14 * 100  # losses


def test_peak_of_a_window_is_that_of_its_steps() -> None:
    state = peak(mm.Stepwise(window=5), 5)[1]
    assert peak(mm.Stepwise(window=5), 30)[0] - peak(mm.Stepwise(window=5), 8)[0] < 22 * 100
    assert peak(mm.Stepwise(window=5), 30)[0] - peak(mm.Stepwise(), 5)[0] < 2 * state


# The window.


def truncated(w: Tensor, meta: Tensor, steps: int, window: int, weights: list[float]) -> Tree:
    """By autograd alone: what comes before the last ``window`` steps is detached, and taken for the identity."""
    params, total, first = w, torch.zeros((), dtype=torch.float64), max(0, steps - window)
    for t in range(steps):
        (grad,) = torch.autograd.grad(cubic({"w": params}, meta, None), params, create_graph=True)
        params = params - 0.1 * grad
        if t < first:
            params = params.detach() + (w - w.detach())
        total = total + weights[t] * (params**2).sum()
    return dict(zip("01", torch.autograd.grad(total, [w, meta]), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [1, 2, 4, STEPS - 1, STEPS, STEPS + 5])
def test_a_window_is_autograd_with_what_was_before_detached(policy: Policy, window: int) -> None:
    leaves = inputs()
    adapted = mm.adapt(
        *(cubic, {"w": leaves[0]}, [0] * STEPS),
        **{"optimizer": mm.SGD(0.1), "meta": leaves[1], "adjoint": mm.Stepwise(policy, window=window)},
    )
    wanted = truncated(*leaves, STEPS, window, [0.0] * (STEPS - 1) + [1.0])
    for _ in range(2):
        assert helpers.error(gradients(adapted, *leaves), wanted) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
@pytest.mark.parametrize("policy", ["all", 2, "disk"])
def test_a_window_over_all_steps_is_exact(name: str, policy: Policy) -> None:
    tasks = PROBLEMS[name].tasks(2)
    wanted = helpers.meta_gradient(learner_of(name, mm.Unrolled(), "adam", step_weights=WEIGHTS), tasks)
    learner = learner_of(name, mm.Stepwise(policy, window=6), "adam", step_weights=WEIGHTS)
    assert helpers.error(helpers.meta_gradient(learner, tasks), wanted) < 1e-10


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_outer_losses_before_the_window_are_of_first_order(window: int, chunk: int) -> None:
    """Linear in the weights: those up to the window's begin as ``FirstOrder`` has them, the others by the window."""
    tasks, first = PROBLEMS["mlp"].tasks(2), 6 - window
    early = [weight if t < first else 0.0 for t, weight in enumerate(WEIGHTS)]
    late = [0.0 if t < first else weight for t, weight in enumerate(WEIGHTS)]

    def found(adjoint: mm.Adjoint, weights: list[float]) -> Tree:
        learner = learner_of("mlp", adjoint, step_weights=weights)
        return helpers.meta_gradient(learner, tasks, chunk=chunk)

    whole = found(mm.Stepwise(window=window), WEIGHTS)
    parts = found(mm.FirstOrder(), early), found(mm.Stepwise(window=window), late)
    assert helpers.error(whole, trees.axpy(1.0, *parts)) < 1e-12
    assert helpers.error(whole, found(mm.Stepwise(), WEIGHTS)) > 1e-4


def test_a_longer_window_is_closer() -> None:
    tasks = PROBLEMS["mlp"].tasks(1)
    exact = helpers.meta_gradient(learner_of("mlp", mm.Stepwise(), steps=8), tasks)
    errors = [
        helpers.error(helpers.meta_gradient(learner_of("mlp", adjoint, steps=8), tasks), exact)
        for adjoint in (mm.FirstOrder(), *(mm.Stepwise(window=window) for window in (2, 4, 6, 8)))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_a_window_is_named_in_reports() -> None:
    assert mm.Stepwise("sqrt").exact
    assert mm.Stepwise("disk").approximation == ""
    adjoint = mm.Stepwise(window=3)
    assert not adjoint.exact
    assert adjoint.approximation.startswith("truncated at 3 steps")
    report = learner_of("mlp", adjoint).accumulate(PROBLEMS["mlp"].tasks(1))
    assert report.approximation == adjoint.approximation


def test_values() -> None:
    assert mm.Stepwise() == mm.Stepwise("all", None) != mm.Stepwise("sqrt")
    assert len({mm.Stepwise(2), mm.Stepwise(2), mm.Stepwise(2, window=1)}) == 2


# CUDA: copies beside the computation.

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_gpu(steps: int, adjoint: mm.Adjoint, width: int = 512) -> tuple[mm.MetaLearner, list[mm.Task]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).cuda()
    x, y = torch.randn(16, 8).cuda(), torch.randn(16, 1).cuda()
    learner = mm.maml(net.double(), loss=F.mse_loss, optimizer=mm.Adam(1e-3), steps=steps, adjoint=adjoint)
    return learner, [mm.Task((x.double(), y.double()), (x.double(), y.double()))]


@cuda
@pytest.mark.parametrize("policy", ["sqrt", "host", "disk", 3])
def test_on_cuda_every_policy_gives_the_same_gradient(policy: Policy) -> None:
    learner, tasks = on_gpu(20, mm.Stepwise())
    wanted = helpers.meta_gradient(learner, tasks)
    for _ in range(3):  # the second time from memory that was used before
        learner, tasks = on_gpu(20, mm.Stepwise(policy))
        assert helpers.error(helpers.meta_gradient(learner, tasks), wanted) < 1e-10


@cuda
def test_on_cuda_a_walk_that_is_broken_off_leaves_no_copy_under_way() -> None:
    loss, leaves = Counted(), [torch.full((1 << 22,), 0.1).cuda().requires_grad_()]
    for fails_at in (12, 14):
        loss.calls, loss.fails_at = 0, fails_at
        adapted = mm.adapt(loss, {"w": leaves[0]}, [0] * 10, optimizer=mm.Adam(0.1), adjoint=mm.Stepwise("host"))
        with pytest.raises(ArithmeticError):
            adapted.params["w"].sum().backward()
        del adapted
        ones = [torch.ones(1 << 22).cuda() for _ in range(8)]
        torch.cuda.synchronize()
        assert all(bool((tensor == 1).all()) for tensor in ones)


@cuda
@pytest.mark.parametrize("policy", ["host", "disk"])
def test_on_cuda_the_device_holds_a_few_states_whatever_the_steps(policy: Policy) -> None:
    def most(steps: int) -> int:
        learner, tasks = on_gpu(steps, mm.Stepwise(policy))
        learner.accumulate(tasks)
        found = learner.accumulate(tasks).peak_bytes
        assert found is not None
        return found

    assert most(60) - most(10) < 60 * 10_000  # losses, in blocks of the allocator
