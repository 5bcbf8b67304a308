"""Stacked tasks: the same meta-gradients, scores and refusals as one task at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import PROBLEMS, error, meta_gradient, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

F64 = torch.float64
TASKS = 8
CHUNKS = [2, 3, 8]  # 3 leaves an uneven last one
RULES: dict[str, mm.InnerOptimizer] = {
    "sgd": mm.SGD(0.1, weight_decay=0.01),
    "momentum": mm.SGD(0.1, momentum=0.9, dampening=0.2),
    "nesterov": mm.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": mm.Adam(0.05),
    "amsgrad": mm.AdamW(0.05, amsgrad=True),
    "rmsprop": mm.RMSprop(0.02, centered=True, momentum=0.5, eps=1e-3),
}


def addressed(pairs: list[Any]) -> list[mm.Task]:
    return [mm.Task(pair[0], pair[1], mm.Address(0, 0, index)) for index, pair in enumerate(pairs)]


def agree(learner: mm.MetaLearner, tasks: list[mm.Task], chunk: int, tolerance: float = 1e-12, **options: Any) -> None:
    """Gradients and reports of stacked tasks are those of single ones."""
    alone, stacked = (learner.meta_gradient(tasks, size, before=True, **options) for size in (1, chunk))
    assert stacked.count == alone.count == len(tasks)
    assert error(stacked.sums, alone.sums) < tolerance
    assert math.sqrt(sum(float(x.square().sum()) for x in alone.sums.values())) > 1e-6
    same_values(stacked.report, alone.report)
    if "microbatch" not in options:
        same_values(learner.evaluate(tasks, chunk=chunk, curve=True), learner.evaluate(tasks, curve=True))


def same_values(report: mm.Report, other: mm.Report) -> None:
    assert len(report.tasks) == len(other.tasks)
    for score, wanted in zip(report.tasks, other.tasks, strict=True):
        assert score.address == wanted.address
        assert score.values == pytest.approx(wanted.values, rel=1e-10, abs=1e-12)


# torch says that a GRU cell is not mapped but looped over; the result is right all the same.
@pytest.mark.filterwarnings("ignore:There is a performance drop.*gru_cell")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_networks(name: str, training: bool, chunk: int) -> None:
    case = PROBLEMS[name]
    net = case.net().train(training)
    for buffer_name, buffer in net.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.copy_(torch.linspace(0.5, 2.0, len(buffer)))
    learner = mm.maml(net, loss=case.loss, optimizer=mm.SGD(case.rate), steps=2)
    agree(learner, addressed(case.tasks(TASKS)), chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_inner_optimizers(adjoint: mm.Adjoint, rule: str, chunk: int) -> None:
    case = PROBLEMS["mlp"]
    learner = mm.maml(case.net(), loss=case.loss, optimizer=RULES[rule], steps=3, adjoint=adjoint)
    agree(learner, addressed(case.tasks(TASKS)), chunk)


def rates(net: nn.Module, form: str) -> Any:
    if form == "scalar":
        return torch.tensor(0.1, dtype=F64, requires_grad=True)
    if form == "per step":
        return torch.linspace(0.05, 0.2, 3, dtype=F64).requires_grad_()
    shapes = {name: p.shape if form == "per element" else () for name, p in net.named_parameters()}
    if form == "per tensor and step":
        shapes = dict.fromkeys(shapes, (4,))
    return {name: torch.full(shape, 0.1, dtype=F64, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("form", ["scalar", "per step", "per tensor", "per tensor and step", "per element"])
@pytest.mark.parametrize("rule", [mm.SGD, mm.Adam], ids=["sgd", "adam"])
def test_learned_rates(rule: Callable[..., mm.InnerOptimizer], form: str, chunk: int) -> None:
    case = PROBLEMS["mlp"]
    net = case.net()
    learner = mm.maml(net, loss=case.loss, optimizer=rule(lr=rates(net, form)), steps=3)
    grads = meta_gradient(learner, case.tasks(3), chunk=chunk)
    assert all(float(grad.norm()) > 0 for name, grad in grads.items() if name.startswith("hyper"))
    agree(learner, addressed(case.tasks(TASKS)), chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("selection", ["2", "0", ["*.bias"]], ids=["head", "body", "biases"])
def test_meta_parameters_shared_by_the_tasks(selection: Any, chunk: int) -> None:
    case = PROBLEMS["mlp"]
    learner = mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(0.1), steps=2, adapt=selection)
    agree(learner, addressed(case.tasks(TASKS)), chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_redrawn_parameters(chunk: int) -> None:
    # The draws depend on the task alone, so stacking must not change them.
    case = PROBLEMS["mlp"]
    draw = {"2.weight": lambda p: torch.randn_like(p), "2.bias": torch.zeros_like}
    losses = mm.Supervised(case.loss), mm.Supervised(case.loss)
    problem = mm.Problem(case.net(), *losses, adapt="2", redraw=draw)
    agree(mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2), addressed(case.tasks(TASKS)), chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_losses_at_every_step(name: str, adjoint: mm.Adjoint, chunk: int) -> None:
    case = PROBLEMS[name]
    options: dict[str, Any] = {"steps": 3, "step_weights": [0.2, 0.0, 0.8], "adjoint": adjoint, "adapt": "*.weight"}
    agree(mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(0.1), **options), addressed(case.tasks(TASKS)), chunk)


class Counting(nn.Module):
    """Counts its calls in a buffer that it replaces, and scales by the count."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.body(x) * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_buffers_that_change(chunk: int) -> None:
    case = PROBLEMS["mlp"]
    net = Counting().double()
    agree(mm.maml(net, loss=case.loss, optimizer=mm.SGD(0.1), steps=3), addressed(case.tasks(TASKS)), chunk)
    assert float(net.calls) == 0


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2)).double()


def test_dropout_is_refused() -> None:
    tasks = PROBLEMS["mlp"].tasks(3)
    learner = mm.maml(noisy(), loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=2)
    for call in (learner.accumulate, learner.evaluate):
        with pytest.raises(mm.UnsupportedError, match=r"random numbers.*chunk=1"):
            call(tasks, chunk=2)
    assert all(p.grad is None for p in learner.parameters())
    learner.net.eval()
    agree(learner, addressed(tasks), 2)


def test_looking_at_values_is_refused() -> None:
    def by_item(net: nn.Module, batch: Any) -> Tensor:
        loss = F.mse_loss(net(batch[0]), batch[1])
        return loss * (1.0 + loss.item())

    def by_branch(net: nn.Module, batch: Any) -> Tensor:
        loss = F.mse_loss(net(batch[0]), batch[1])
        return loss if loss > 0 else -loss

    tasks, plain = PROBLEMS["mlp"].tasks(3), mm.Supervised(F.mse_loss)
    for looking in (by_item, by_branch):
        for problem in (mm.Problem(mlp().double(), looking, plain), mm.Problem(mlp().double(), plain, looking)):
            learner = mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2)
            with pytest.raises(mm.UnsupportedError, match=r"looks at values.*chunk=1"):
                learner.accumulate(tasks, chunk=3)
            learner.accumulate(tasks)


def test_cumulative_batch_norm_is_refused() -> None:
    # momentum=None makes torch read the number of batches as a Python number.
    case = PROBLEMS["mlp"]
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)).double()
    learner = mm.maml(net, loss=case.loss, optimizer=mm.SGD(0.1), steps=2)
    with pytest.raises(mm.UnsupportedError, match="chunk=1"):
        learner.accumulate(case.tasks(2), chunk=2)
    learner.net.eval()
    agree(learner, addressed(case.tasks(4)), 2)


def test_tasks_that_do_not_stack() -> None:
    case = PROBLEMS["mlp"]
    learner = mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(0.1), steps=1)
    first = case.task(0)
    for other in (case.task(1, support=3), case.task(1, query=2)):
        with pytest.raises(mm.InputError, match=r"one shape.*chunk=1"):
            learner.accumulate([first, other], chunk=2)
        with pytest.raises(mm.InputError, match=r"one shape.*chunk=1"):
            learner.evaluate([first, other], chunk=2)
        assert learner.accumulate([first, other]).loss > 0
    single = (first[0][0].float(), first[0][1].float())
    with pytest.raises(mm.InputError, match="chunk=1"):
        learner.accumulate([first, (single, single)], chunk=2)


def scaled(net: nn.Module, batch: dict[str, Any]) -> Tensor:
    return batch["scale"] * F.mse_loss(net(batch["x"]), batch["y"])


def as_dict(batch: tuple[Tensor, Tensor], scale: Any) -> dict[str, Any]:
    return {"x": batch[0], "y": batch[1], "scale": scale}


def test_constants_of_tasks() -> None:
    # A number beside the tensors is one for all stacked tasks: where tasks have other ones, that is refused.
    case = PROBLEMS["mlp"]
    learner = mm.MetaLearner(mm.Problem(case.net(), scaled, scaled), optimizer=mm.SGD(0.1), steps=2)

    def tasks(make: Callable[[int], Any]) -> list[mm.Task]:
        sets = [[as_dict(batch, make(index)) for batch in case.task(index)] for index in range(4)]
        return addressed(sets)

    agree(learner, tasks(lambda i: 2.0), 2)
    agree(learner, tasks(lambda i: torch.tensor(float(i))), 2)
    with pytest.raises(mm.InputError, match="constants"):
        learner.accumulate(tasks(lambda i: float(i)), chunk=2)
    other = tasks(lambda i: 2.0)
    swapped = {"x": other[1].support["x"], "target": other[1].support["y"], "scale": 2.0}
    with pytest.raises(mm.InputError, match="keys"):
        learner.accumulate([other[0], mm.Task(swapped, other[1].query)], chunk=2)


def spoiled(tasks: list[mm.Task], index: int, part: str) -> list[mm.Task]:
    """The same tasks; one has an infinite target in its support or query set."""
    task, found = tasks[index], list(tasks)
    x, y = getattr(task, part)
    y = y.clone()
    y[0] = math.inf
    found[index] = replace(task, **{part: (x, y)})
    return found


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_task_that_is_not_finite(chunk: int, index: int, part: str) -> None:
    case = PROBLEMS["mlp"]
    tasks = addressed(case.tasks(TASKS))
    learner = mm.maml(case.net(), loss=case.loss, optimizer=mm.Adam(0.1), steps=2)
    bad, good = spoiled(tasks, index, part), [task for i, task in enumerate(tasks) if i != index]
    found, wanted = learner.meta_gradient(bad, chunk, on_nonfinite="skip"), learner.meta_gradient(good, chunk)
    assert found.count == wanted.count == TASKS - 1
    assert error(found.sums, wanted.sums) < 1e-12
    assert [score.address for score in found.report.skipped] == [tasks[index].address]
    assert [score.address for score in found.report.tasks] == [task.address for task in good]
    same_values(found.report, wanted.report)
    with pytest.raises(mm.NonFiniteError, match=rf"task\(seed=0, step=0, index={index}\)") as caught:
        learner.accumulate(bad, chunk)
    assert (caught.value.address, caught.value.index) == (tasks[index].address, index)
    assert all(p.grad is None for p in learner.parameters())


def test_chunk_larger_than_the_meta_batch() -> None:
    case = PROBLEMS["mlp"]
    learner = mm.maml(case.net(), loss=case.loss, optimizer=mm.SGD(0.1), steps=2)
    agree(learner, addressed(case.tasks(3)), 100)
    agree(learner, addressed(case.tasks(1)), 100)


def test_transformer_layer_in_evaluation_mode() -> None:
    # Without a graph torch takes a fused kernel for the whole layer, which knows nothing of vmap.
    case = PROBLEMS["transformer"]
    learner = mm.maml(case.net().eval(), loss=case.loss, optimizer=mm.SGD(0.1), steps=2)
    same_values(learner.evaluate(case.tasks(4), chunk=4), learner.evaluate(case.tasks(4)))


class Padded(nn.Module):
    """Token indices (n, 5) to (n, 3); as a module, or by the function."""

    def __init__(self, padding: int | None, function: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(10, 4, padding_idx=None if function else padding), nn.Linear(4, 3)
        self.function = function

    def forward(self, tokens: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.table.weight, padding_idx=0) if self.function else self.table(tokens)
        return self.last(rows.tanh().mean(1))


def sentences() -> list[Any]:
    tokens, labels = torch.arange(60).reshape(12, 5) % 10, torch.arange(12) % 3
    tokens[:, 3:] = 0
    return [((tokens, labels), (tokens.flip(0), labels)), ((tokens.roll(1, 0), labels), (tokens, labels))]


@pytest.mark.parametrize("padding", [0, -10, 7, None])
@pytest.mark.parametrize("execution", ["eager", "trace"])
def test_the_padding_row_of_every_stacked_table_has_no_gradient(padding: int | None, execution: Any) -> None:
    net = Padded(padding).double()
    learner = mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(0.5), steps=3, execution=execution)
    one, two = (meta_gradient(learner, sentences(), chunk=chunk) for chunk in (1, 2))
    assert error(two, one) < 1e-12
    if padding is not None:
        assert two["net.table.weight"][padding].abs().max() == 0


def test_a_padding_row_that_only_the_function_knows_is_refused() -> None:
    learner = mm.maml(Padded(None, True).double(), loss=F.cross_entropy, optimizer=mm.SGD(0.5), steps=3)
    with pytest.raises(mm.UnsupportedError, match=r"F\.embedding\(padding_idx=\): use chunk=1"):
        learner.accumulate(sentences(), chunk=2)
