"""The same promises on a GPU: bounded memory by the allocator's own peak, replayed random numbers, fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import PROBLEMS, error, meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

WIDTH = 64


def on_gpu(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.cuda()
    return tuple(on_gpu(item) for item in tree)


def conv4() -> nn.Module:
    """(n, 1, 28, 28) to (n, 5)."""
    layers: list[nn.Module] = []
    for block in range(4):
        layers += [nn.Conv2d(WIDTH if block else 1, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTH, 5)).cuda()


def images(count: int) -> Iterator[mm.Task]:
    """Tasks made when they are asked for."""
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        sets = [
            (torch.randn(n, 1, 28, 28, generator=generator).cuda(), torch.randint(5, (n,), generator=generator).cuda())
            for n in (5, 75)
        ]
        yield mm.Task(sets[0], sets[1], mm.Address(0, 0, index))


def learner_of(steps: int, adjoint: mm.Adjoint | None = None, **options: Any) -> mm.MetaLearner:
    options.setdefault("optimizer", mm.SGD(0.01))
    return mm.maml(conv4(), loss=F.cross_entropy, steps=steps, adjoint=adjoint, **options)


def peak(learner: mm.MetaLearner, count: int) -> int:
    """The allocator's peak of one accumulation, after one that has made workspaces and chosen kernels."""
    learner.accumulate(images(count))
    learner.zero_grad(set_to_none=True)
    found = learner.accumulate(images(count)).peak_bytes
    assert found is not None
    return found


def state_bytes(learner: mm.MetaLearner, tensors: int) -> int:
    return tensors * sum(p.nbytes for p in learner.problem.adapted().values())


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_peak_does_not_depend_on_the_number_of_tasks(adjoint: mm.Adjoint) -> None:
    learner = learner_of(3, adjoint)
    assert peak(learner, 64) == pytest.approx(peak(learner, 1), rel=0.01)


@pytest.mark.parametrize(
    ("rule", "tensors"),
    [(mm.SGD(0.01), 1), (mm.SGD(0.01, momentum=0.9), 2), (mm.Adam(0.01), 3)],
    ids=["sgd", "sgd_momentum", "adam"],
)
def test_stepwise_keeps_one_state_per_step(rule: mm.InnerOptimizer, tensors: int) -> None:
    low, high = (learner_of(steps, optimizer=rule) for steps in (1, 50))
    growth = (peak(high, 1) - peak(low, 1)) / 49
    assert growth <= 1.05 * state_bytes(low, tensors)


def test_unrolled_keeps_a_graph_per_step() -> None:
    low, high = (learner_of(steps, mm.Unrolled()) for steps in (1, 20))
    growth = (peak(high, 1) - peak(low, 1)) / 19
    assert growth > 3 * state_bytes(low, 1)


def test_only_gradients_are_left() -> None:
    learner = learner_of(3)
    tasks = list(images(2))
    learner.accumulate(tasks)
    learner.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    learner.accumulate(tasks)
    grads = sum(p.grad.nbytes for p in learner.parameters() if p.grad is not None)
    # The allocator rounds every block up to 512 bytes.
    assert torch.cuda.memory_allocated() - before <= grads + 512 * len(list(learner.parameters()))


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_are_those_of_the_cpu(name: str, chunk: int) -> None:
    case = PROBLEMS[name]
    grads = []
    for place in (lambda tree: tree, on_gpu):
        net = case.net()
        net = net.cuda() if place is on_gpu else net
        learner = mm.maml(net, loss=case.loss, optimizer=mm.SGD(case.rate), steps=2)
        found = meta_gradient(learner, [place(pair) for pair in case.tasks(2)], chunk=chunk)
        grads.append({key: grad.cpu() for key, grad in found.items()})
    assert error(*grads) < 1e-9


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 2)).double().cuda()


def test_dropout_and_other_randomness() -> None:
    case, net = PROBLEMS["mlp"], noisy()
    sets = [on_gpu(case.task(index)) for index in range(2)]
    tasks = [mm.Task(support, query, mm.Address(0, 0, index)) for index, (support, query) in enumerate(sets)]
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    adjoints = (mm.Stepwise(), mm.Unrolled())
    by = [mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=3, adjoint=adjoint) for adjoint in adjoints]
    grads = [meta_gradient(learner, tasks) for learner in by]
    assert error(*grads) < 1e-12
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(), before[1])
    torch.cuda.manual_seed(99)
    again = meta_gradient(by[0], tasks)
    assert error(again, grads[0]) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_dot_product_attention(dtype: torch.dtype) -> None:
    case = PROBLEMS["attention"]
    net = case.net().to("cuda", torch.float32)
    tasks = [tuple((x.float(), y.float()) for x, y in on_gpu(case.task(index))) for index in range(2)]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        grads = [
            meta_gradient(mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=2, adjoint=adjoint), tasks)
            for adjoint in (mm.Stepwise(), mm.Unrolled())
        ]
    assert error(*grads) < (1e-4 if dtype == torch.float32 else 0.05)


class LastOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


def test_fused_rnn() -> None:
    net = LastOutput().cuda()
    x, y = torch.randn(4, 3, 2).cuda(), torch.randn(4, 2).cuda()
    learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=2)
    with pytest.raises(mm.UnsupportedError, match=r"_cudnn_rnn.*RNN cell"):
        learner.accumulate([((x, y), (x, y))])
    with torch.backends.cudnn.flags(enabled=False):
        learner.accumulate([((x, y), (x, y))])
    assert all(p.grad is not None for p in net.parameters())


def test_memory_under_autocast_does_not_depend_on_the_number_of_tasks() -> None:
    learner = learner_of(2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert peak(learner, 16) == pytest.approx(peak(learner, 1), rel=0.01)
