"""The traps that meta-learning libraries fall into: one test for each, named after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import PROBLEMS, error, meta_gradient, mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import memmeta as mm
from memmeta.adjoints.operators import named_operators

F64 = torch.float64


def pairs(count: int, inputs: tuple[int, ...] = (3,), outputs: tuple[int, ...] = (2,), n: int = 6) -> list[mm.Task]:
    """Regression tasks with addresses: n support and n query examples each."""
    generator = torch.Generator().manual_seed(5)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(n, *inputs, generator=generator, dtype=F64)
        return x, torch.randn(n, *outputs, generator=generator, dtype=F64)

    return [mm.Task(batch(), batch(), mm.Address(0, 0, index)) for index in range(count)]


def squared(net: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1])


def learner_of(net: nn.Module, steps: int = 2, loss: Any = squared, **options: Any) -> mm.MetaLearner:
    adjoint, optimizer = options.pop("adjoint", None), options.pop("optimizer", mm.SGD(0.1))
    return mm.MetaLearner(mm.Problem(net, loss, loss, **options), optimizer=optimizer, steps=steps, adjoint=adjoint)


def finite_differences(learner: mm.MetaLearner, tasks: list[mm.Task], step: float = 1e-5) -> dict[str, Tensor]:
    """Central finite differences of the mean outer loss, element by element."""
    found = {}
    for name, param in learner.meta_parameters().items():
        flat, grad = param.data.view(-1), torch.zeros(param.numel(), dtype=F64)
        for i in range(param.numel()):
            value = float(flat[i])
            flat[i] = value + step
            above = learner.evaluate(tasks).loss
            flat[i] = value - step
            below = learner.evaluate(tasks).loss
            flat[i] = value
            grad[i] = (above - below) / (2 * step)
        found[name] = grad.view_as(param)
    return found


def exact(learner: mm.MetaLearner, tasks: list[mm.Task], tolerance: float = 1e-7) -> dict[str, Tensor]:
    """The meta-gradient, once it has been seen to equal finite differences."""
    found = meta_gradient(learner, tasks)
    assert error(found, finite_differences(learner, tasks)) < tolerance
    return found


def test_tied_weights_over_two_steps() -> None:
    case = PROBLEMS["tied"]
    net: Any = case.net()
    learner = mm.maml(net, loss=case.loss, optimizer=mm.SGD(0.2), steps=3)
    tasks = [mm.Task(*case.task(i)) for i in range(2)]
    grads = exact(learner, tasks)
    assert sorted(grads) == ["net.encoder.bias", "net.encoder.weight"]
    adapted = learner.adapt(tasks[0].support)
    assert sorted(adapted.params) == ["encoder.bias", "encoder.weight"]
    x = tasks[0].query[0]
    weight, bias = adapted.params["encoder.weight"], adapted.params["encoder.bias"]
    torch.testing.assert_close(adapted(x), torch.tanh(F.linear(x, weight, bias)) @ weight, rtol=1e-12, atol=0)
    assert net.decoder.weight is net.encoder.weight


def test_frozen_parameters() -> None:
    net = mlp().double()
    first: Any = net.get_submodule("0")
    first.weight.requires_grad_(False)
    before = first.weight.clone()
    learner = learner_of(net)
    grads = exact(learner, pairs(2))
    assert sorted(grads) == ["net.0.bias", "net.2.bias", "net.2.weight"]
    assert first.weight.grad is None
    assert not first.weight.requires_grad
    assert torch.equal(first.weight, before)
    first.weight.data.mul_(2)  # still used in the forward
    assert error(meta_gradient(learner, pairs(2)), grads) > 1e-3


class WithSpare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.spare = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("adapt", ["all", "used"])
@pytest.mark.parametrize("rule", [mm.SGD(0.1), mm.Adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_unused_parameter_gets_zero(adjoint: mm.Adjoint, rule: mm.InnerOptimizer, adapt: str, chunk: int) -> None:
    learner = learner_of(WithSpare().double(), adjoint=adjoint, optimizer=rule, adapt=adapt)
    grads = meta_gradient(learner, pairs(3), chunk=chunk)
    assert torch.equal(grads["net.spare.weight"], torch.zeros(5, 4, dtype=F64))
    assert torch.equal(grads["net.spare.bias"], torch.zeros(5, dtype=F64))
    assert float(grads["net.used.weight"].norm()) > 0


def dead_net() -> nn.Module:
    """A ReLU network half of whose units never fire, whatever the input."""
    first = nn.Linear(3, 4)
    first.bias.data[:2] = -100.0
    first.bias.data[2:] = 2.0
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize(
    "rule",
    [
        mm.Adam(0.05),
        mm.Adam(0.05, amsgrad=True),
        mm.AdamW(0.05),
        mm.RMSprop(0.05),
        mm.RMSprop(0.05, centered=True, momentum=0.5),
    ],
    ids=["adam", "amsgrad", "adamw", "rmsprop", "rmsprop_centered"],
)
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled()], ids=["stepwise", "unrolled"])
def test_dead_relu_with_adam_or_rmsprop(adjoint: mm.Adjoint, rule: mm.InnerOptimizer) -> None:
    learner = learner_of(dead_net(), steps=3, optimizer=rule, adjoint=adjoint)
    grads = exact(learner, pairs(1), 1e-6)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())


def test_momentum_with_dampening_second_task() -> None:
    rule = mm.SGD(0.1, momentum=0.9, dampening=0.3)
    learner = learner_of(mlp().double(), steps=3, optimizer=rule)
    first, second = pairs(2)
    alone = learner.meta_gradient([second]).sums
    both, before = learner.meta_gradient([first, second]).sums, learner.meta_gradient([first]).sums
    after_first = {name: both[name] - before[name] for name in both}
    assert error(after_first, alone) < 1e-13
    exact(learner, [first, second])


def test_bn_running_statistics_after_a_task() -> None:
    case = PROBLEMS["conv_bn"]
    net = case.net()
    learner = mm.maml(net, loss=case.loss, optimizer=mm.SGD(0.1), steps=2)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    adapted = learner.adapt(case.task(0)[0])
    adapted(case.task(0)[1][0])
    learner.accumulate(case.tasks(2))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert net.training


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_copy_initial_weights_false_is_impossible(adjoint: mm.Adjoint) -> None:
    # There is no way to adapt a detached copy: every way to a loss reaches the initial weights.
    task = pairs(1)[0]
    learner = learner_of(mlp().double(), adjoint=adjoint)
    adapted = learner.adapt(task.support)
    F.mse_loss(adapted(task.query[0]), task.query[1]).backward()
    by_adapt = {f"net.{name}": p.grad.clone() for name, p in learner.net.named_parameters() if p.grad is not None}
    assert all(float(grad.norm()) > 0 for grad in by_adapt.values())
    assert error(by_adapt, meta_gradient(learner, [task])) < 1e-13


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled()], ids=["stepwise", "unrolled"])
def test_gradient_wrt_initial_parameters(adjoint: mm.Adjoint) -> None:
    # L(w) = h w^2 / 2 shrinks w by (1 - lr h) at each step.
    w, h = torch.tensor(1.5, dtype=F64, requires_grad=True), torch.tensor(2.0, dtype=F64, requires_grad=True)
    adapted = mm.adapt(
        lambda p, m, b: 0.5 * m * p["w"] ** 2, {"w": w}, [None] * 4, optimizer=mm.SGD(0.1), meta=h, adjoint=adjoint
    )
    adapted.params["w"].backward()
    assert w.grad is not None
    assert h.grad is not None
    torch.testing.assert_close(w.grad, torch.tensor(0.8**4, dtype=F64), rtol=1e-14, atol=0)
    torch.testing.assert_close(h.grad, torch.tensor(-0.1 * 4 * 0.8**3 * 1.5, dtype=F64), rtol=1e-14, atol=0)


def test_wrong_number_of_gradients_or_parameters() -> None:
    net = mlp().double()
    rates = {name: torch.tensor(0.1, dtype=F64) for name, _ in net.named_parameters()}
    missing = {name: rate for name, rate in rates.items() if name != "2.bias"}
    with pytest.raises(mm.InputError, match=r"missing \['2\.bias'\]"):
        learner_of(net, optimizer=mm.SGD(missing))
    with pytest.raises(mm.InputError, match=r"unknown \['3\.bias'\]"):
        learner_of(net, optimizer=mm.SGD({**rates, "3.bias": 0.1}))
    with pytest.raises(mm.InputError, match="3 weights for 2 inner steps"):
        mm.MetaLearner(mm.Problem(net, squared, squared), optimizer=mm.SGD(0.1), steps=2, step_weights=[0.2, 0.3, 0.5])
    with pytest.raises(mm.InputError, match="5 steps"):
        learner_of(net, steps=5, optimizer=mm.SGD(torch.full((4,), 0.1)))
    with pytest.raises(mm.InputError, match="has shape"):
        learner_of(net, optimizer=mm.SGD({name: torch.full((7, 7), 0.1) for name in rates}))


@pytest.mark.parametrize("chunk", [1, 2])
def test_exception_inside_the_loss(chunk: int) -> None:
    class Broken(Exception):
        pass

    def breaks(net: nn.Module, batch: Any) -> Tensor:
        net(batch[0])
        raise Broken("user's own")

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    places = dict(net.named_parameters())
    state = copy.deepcopy(net.state_dict())
    problems = [mm.Problem(net, breaks, squared), mm.Problem(net, squared, breaks)]
    for problem in problems:
        learner = mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2)
        with pytest.raises(Broken, match="user's own"):
            learner.accumulate(pairs(2), chunk=chunk)
        assert all(param is places[name] for name, param in net.named_parameters())
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("name", ["attention", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_scaled_dot_product_attention(name: str, training: bool) -> None:
    # The fused kernels of both CPU and GPU have no double backward; the inner loss must not need to know.
    case = PROBLEMS[name]
    learner = mm.maml(case.net().train(training), loss=case.loss, optimizer=mm.SGD(0.1), steps=2)
    tasks = [mm.Task(*case.task(0, 2, 2))]
    exact(learner, tasks)
    by_unrolled = mm.maml(learner.net, loss=case.loss, optimizer=mm.SGD(0.1), steps=2, adjoint=mm.Unrolled())
    assert error(meta_gradient(learner, tasks), meta_gradient(by_unrolled, tasks)) < 1e-13


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * grad_outputs[0]


def norm_of_w(held: Any, batch: Any) -> Tensor:
    return held["w"].square().sum()


INDICES = torch.tensor([[0, 2, 1], [1, 1, 2]])
WITHOUT_DOUBLE_BACKWARD = {
    "OnceOnly": lambda p, b: OnceOnly.apply((b @ p["w"]).tanh()).square().mean(),
    "_embedding_bag_backward": lambda p, b: F.embedding_bag(INDICES, p["w"], mode="mean").square().sum(),
    "_cdist_backward": lambda p, b: torch.cdist(b, p["w"].T, p=3.0).square().mean(),
    "multi_margin_loss_backward": lambda p, b: F.multi_margin_loss((b @ p["w"]) ** 2, torch.tensor([0, 1, 0, 1])),
    "_ctc_loss_backward": lambda p, b: F.ctc_loss(
        (b @ p["w"]).log_softmax(-1).view(-1, 1, 2),
        torch.ones(1, 1, dtype=torch.long),
        torch.tensor([len(b)]),
        torch.tensor([1]),
    ),
}


@pytest.mark.parametrize("operator", WITHOUT_DOUBLE_BACKWARD)
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled()], ids=["stepwise", "unrolled"])
def test_embedding_bag_and_fused_rnn(operator: str, adjoint: mm.Adjoint) -> None:
    # cuDNN's recurrent networks say "Double backwards is not supported" in tests/test_cuda.py.
    loss: Any = WITHOUT_DOUBLE_BACKWARD[operator]
    task, net = pairs(1, n=4)[0], nn.ParameterDict({"w": torch.randn(3, 2, dtype=F64)})
    problem = mm.Problem(net, lambda held, b: loss(held, b[0]), norm_of_w)
    with pytest.raises(mm.UnsupportedError, match=operator) as caught:
        mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2, adjoint=adjoint).accumulate([task])
    assert "FirstOrder" in str(caught.value)
    assert net["w"].grad is None
    mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2, adjoint=mm.FirstOrder()).accumulate([task])
    assert net["w"].grad is not None  # the way out that the message names


def test_once_differentiable_under_a_constant_cotangent() -> None:
    # Here torch says nothing: it hands back a first derivative that looks constant, and the second would be lost.
    net = nn.ParameterDict({"w": torch.randn(3, 2, dtype=F64)})

    def inner(held: Any, batch: Any) -> Tensor:
        return OnceOnly.apply(batch[0] @ held["w"]).mean()

    problem = mm.Problem(net, inner, norm_of_w)
    for adjoint in (mm.Stepwise(), mm.Unrolled()):
        with pytest.raises(mm.UnsupportedError, match="OnceOnly"):
            mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2, adjoint=adjoint).accumulate(pairs(1))
    mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2, adjoint=mm.FirstOrder()).accumulate(pairs(1))
    assert net["w"].grad is not None


class LastOutput(nn.Module):
    """The last output of a recurrent layer of torch's own, (n, length, 2) to (n, 2)."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_on_the_cpu(kind: Callable[..., nn.RNNBase]) -> None:
    net = LastOutput(kind).double()
    learner = learner_of(net, steps=2, optimizer=mm.SGD(0.5))
    held = list(net.layer._flat_weights)
    exact(learner, pairs(1, (3, 2)))
    # These layers keep a second list of their weights, which must be the network's own again.
    assert all(weight is before for weight, before in zip(net.layer._flat_weights, held, strict=True))


class Noisy(nn.Module):
    """Dropout, and noise of its own, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.tanh(self.first(x)))
        return self.last(hidden + 0.1 * torch.randn_like(hidden))


def test_dropout_and_other_randomness() -> None:
    net = Noisy().double()
    learner = learner_of(net, steps=3)
    grads = exact(learner, pairs(2))  # equal to finite differences: the same masks at every call
    unrolled = learner_of(net, steps=3, adjoint=mm.Unrolled())
    assert error(grads, meta_gradient(unrolled, pairs(2))) < 1e-13


def test_conv_bias_before_bn() -> None:
    # Batch norm takes the bias away, so its gradient is rounding noise: errors are taken over all tensors together.
    case = PROBLEMS["conv_bn"]
    net, tasks = case.net(), case.tasks(2)
    grads = meta_gradient(mm.maml(net, loss=case.loss, optimizer=mm.SGD(0.1), steps=3), tasks)
    unrolled = mm.maml(net, loss=case.loss, optimizer=mm.SGD(0.1), steps=3, adjoint=mm.Unrolled())
    assert float(grads["net.0.bias"].norm()) < 1e-13 * float(grads["net.0.weight"].norm())
    assert error(grads, meta_gradient(unrolled, tasks)) < 1e-13


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.smooth_l1_loss], ids=lambda f: f.__name__)
def test_mse_loss_and_huber_loss(loss: Any) -> None:
    learner = mm.maml(mlp().double(), loss=loss, optimizer=mm.SGD(0.1), steps=3)
    exact(learner, pairs(2))


# What torch 2.13 says where it has no second derivative; the last two are raised on GPUs only.
MESSAGES = {
    "_embedding_bag_backward": "the derivative for '_embedding_bag_backward' is not implemented.",
    "_ctc_loss_backward": "derivative for aten::_ctc_loss_backward is not implemented",
    "_cudnn_rnn_backward": "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not "
    "supported for CuDNN RNNs due to limitations in the CuDNN API.",
    "CuDNN RNNs": "Double backwards is not supported for CuDNN RNNs due to limitations in the CuDNN API.",
}


@pytest.mark.parametrize("operator", MESSAGES)
@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError])
def test_messages_of_torch(operator: str, kind: type[RuntimeError]) -> None:
    with pytest.raises(mm.UnsupportedError, match=f"uses {operator}.*RNN cell.*FirstOrder"), named_operators():
        raise kind(MESSAGES[operator])
    with pytest.raises(kind, match="mat1 and mat2"), named_operators():
        raise kind("mat1 and mat2 shapes cannot be multiplied")
