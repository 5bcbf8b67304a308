"""Flat programs: what is traced and refused, operators in place, masks, captured tensors, values computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from memmeta import flat, inductor, memory
from memmeta.attention import LeanAttention
from memmeta.flat import BERNOULLI, aten
from memmeta.remat import rematerialise
from memmeta.stops import STOP, MarkedStops

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in its tracers


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def program_of(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> flat.Flat:
    program = flat.trace(function, inputs)
    flat.functional(program, inputs)
    return program


def targets(program: flat.Flat) -> list[Any]:
    return [node.target for node in program.module.graph.nodes if node.op == "call_function"]


def gradient_of(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """The loss and its gradient as a function of the parameters, and the parameters."""
    names = [name for name, _ in net.named_parameters()]

    def function(*tensors: Tensor) -> list[Tensor]:
        params = {name: p.detach().requires_grad_() for name, p in zip(names, tensors, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(net, params, x), y)
        return [loss.detach().clone(), *torch.autograd.grad(loss, list(params.values()))]

    return function, [p.detach() for p in net.parameters()]


def in_place(x: Tensor, w: Tensor) -> list[Tensor]:
    h = x @ w
    h.relu_().mul_(2)
    h[:, 0].add_(1)  # through a view
    h.view(-1)[3:5] = 7.0
    h.t()[1] *= w[0, 0]
    out = torch.zeros_like(h)
    out.index_add_(0, torch.tensor([0, 0, 1]), h)
    return [h, out.masked_fill_(out > 6, 0.5), x.clone().sqrt_()]


def test_operators_in_place_are_replaced() -> None:
    x, w = torch.rand(3, 4, dtype=torch.float64), randn(4, 2)
    before, wanted = x.clone(), in_place(x, w)
    program = program_of(in_place, x, w)
    assert all(torch.equal(a, b) for a, b in zip(program(x, w), wanted, strict=True))
    assert torch.equal(x, before)
    assert not any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets(program))
    other = torch.rand(3, 4, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(program(other, -w), in_place(other, -w), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_outputs(training: bool) -> None:
    x, mean, var = randn(4, 3, 2), randn(3), torch.rand(3, dtype=torch.float64)

    def function(x: Tensor, mean: Tensor, var: Tensor) -> list[Tensor]:
        mean, var = mean.clone(), var.clone()
        return [F.batch_norm(x, mean, var, training=training), mean, var]

    program, wanted = program_of(function, x, mean, var), function(x, mean, var)
    assert all(torch.equal(a, b) for a, b in zip(program(x, mean, var), wanted, strict=True))
    assert torch.equal(wanted[1], mean) is not training


def test_a_captured_tensor_is_an_input_whose_change_is_seen() -> None:
    frozen = randn(3)
    program = program_of(lambda x: [x * frozen + frozen], randn(3))
    x = randn(3)
    for _ in range(2):
        assert torch.equal(program(x)[0], x * frozen + frozen)
        frozen.add_(1)
    assert len(program.captured) == 1


def test_a_captured_tensor_that_requires_grad_is_refused() -> None:
    weight = randn(3).requires_grad_()
    with pytest.raises(RuntimeError, match=r"shape \[3\] that requires grad reaches it by closure"):
        flat.trace(lambda x: [(x * weight).detach()], [randn(3)])


LOOKING: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "if": lambda x: [x * 2] if x.sum() > 0 else [x],
    "float": lambda x: [x * float(x.norm())],
    "tolist": lambda x: [x * torch.tensor(x.tolist(), dtype=x.dtype)],
    "numpy": lambda x: [x + torch.from_numpy(x.numpy())],
    "item": lambda x: [x * x[0].item()],
    "mask": lambda x: [x[x > 0].sum()],
    "loop": lambda x: [x * sum(1 for value in x if value > 0)],
}


@pytest.mark.parametrize("name", LOOKING)
def test_values_are_never_baked_in(name: str) -> None:
    """A function that looks at them is refused, or its program looks again."""
    function = LOOKING[name]
    try:
        program = flat.trace(function, [torch.ones(4, dtype=torch.float64)])
    except Exception:  # whatever torch raises
        return
    for x in (randn(4), -torch.ones(4, dtype=torch.float64)):
        assert torch.equal(program(x)[0], function(x)[0])


def test_masks_are_those_of_dropout_whatever_the_strides() -> None:
    def function(x: Tensor) -> list[Tensor]:
        turned = x.transpose(0, 1)
        return [F.dropout(turned, 0.4) + F.dropout(x.relu().transpose(0, 1), 0.2), F.dropout2d(x.unsqueeze(-1), 0.5)]

    x = torch.rand(5, 4, 3, dtype=torch.float64)
    program = program_of(function, x)
    assert program.random()
    assert not program_of(lambda x: [x.relu()], x).random()
    assert BERNOULLI in targets(program)
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = function(x)
        torch.manual_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(program(x), wanted, strict=True))


def test_views_copy_where_strides_are_others_than_when_traced() -> None:
    program = program_of(lambda x: [(x * 1).view(-1)], randn(3, 4))
    x = randn(4, 3).t()
    assert torch.equal(program(x)[0], x.reshape(-1))


def test_tracing_leaves_the_choice_of_kernels_as_it_was() -> None:
    before, seen = torch.backends.cudnn.enabled, []

    def function(x: Tensor) -> list[Tensor]:
        seen.append(torch.backends.cudnn.enabled)
        raise ValueError("of the loss")

    with pytest.raises(ValueError, match="of the loss"):
        flat.trace(function, [randn(2)])
    assert seen == [False]
    assert torch.backends.cudnn.enabled == before


def test_outputs_that_nobody_uses_are_not_computed() -> None:
    x, w, b = randn(2, 4, 3, 3), randn(4), randn(4)

    def function(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        x, w, b = (v.detach().requires_grad_() for v in (x, w, b))
        grads = torch.autograd.grad(F.group_norm(x, 2, w, b).square().sum(), (x, w, b))
        turned = torch.autograd.grad(F.layer_norm(x, [3], w[:3], b[:3]).square().sum(), (x, w, b))
        return [grads[1], turned[0]]

    program, wanted = program_of(function, x, w, b), function(x, w, b)
    found = flat.trimmed(program)(x, w, b)
    assert all(torch.equal(a, c) for a, c in zip(found, wanted, strict=True))
    masks = {node.target: node.args[-1] for node in program.module.graph.nodes if "backward" in str(node.target)}
    assert masks[aten.native_layer_norm_backward.default] == [True, False, False]
    # Its kernel for channels_last fails where the input's gradient is not asked for.
    assert masks[aten.native_group_norm_backward.default] == [True, True, False]


def test_sums_without_alpha() -> None:
    x, y = randn(3, 4), randn(4)
    program = program_of(lambda x, y: [torch.add(x, y, alpha=-0.3), torch.sub(x, y, alpha=2), x + y], x, y)
    wanted = program(x, y)
    inductor.without_alpha(program.module)
    assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(program(x, y), wanted, strict=True))
    assert not any("alpha" in node.kwargs for node in program.module.graph.nodes)


class Deep(nn.Module):
    """Residual blocks of a normalisation and a wide elementwise function; (n, 16) to (n, 2)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        width = 16
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.ups = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(depth)])
        self.downs = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(depth)])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(x)


def test_cheap_values_are_computed_again_with_the_same_bits_in_less_memory() -> None:
    function, params = gradient_of(Deep(4).double(), randn(64, 16), torch.arange(64) % 2)
    program, again = program_of(function, *params), program_of(function, *params)
    count = rematerialise(again.module)
    assert count >= 4
    assert again.operators > program.operators
    assert all(torch.equal(a, b) for a, b in zip(again(*params), program(*params), strict=True))
    assert memory.peak_of(lambda: again(*params)) < 0.8 * memory.peak_of(lambda: program(*params))
    products = [aten.mm.default, aten.addmm.default]
    assert sum(t in products for t in targets(again)) == sum(t in products for t in targets(program))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.LayerNorm(6, elementwise_affine=False),
        lambda: nn.BatchNorm1d(6),
        lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.GroupNorm(2, 6), nn.Flatten()),
    ],
    ids=["layer", "batch", "group"],
)
def test_statistics_that_are_made_together_do_not_change_places_for_ever(middle: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(3, 6), middle(), nn.Linear(6, 2)).double()
    function, params = gradient_of(net, randn(5, 3), torch.arange(5) % 2)
    program, again = program_of(function, *params), program_of(function, *params)
    rematerialise(again.module)
    assert memory.peak_of(lambda: again(*params)) <= memory.peak_of(lambda: program(*params))
    assert all(torch.equal(a, b) for a, b in zip(again(*params), program(*params), strict=True))


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "mask": {"attn_mask": torch.ones(4, 6).tril().bool()},
    "bias": {"attn_mask": torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)},
    "dropout": {"dropout_p": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("lead", [(2, 4), (4,), (3, 2, 4), (1, 4)], ids=["4d", "3d", "5d", "one"])
def test_lean_attention_is_attention(lead: tuple[int, ...], name: str) -> None:
    options = ATTENTION[name]
    keys = (*lead[:-1], 2) if name == "grouped" else lead
    q, k, v = randn(*lead, 4, 8), randn(*keys, 6, 8), randn(*keys, 6, 5)
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        wanted = F.scaled_dot_product_attention(q, k, v, **options)
        torch.manual_seed(0)
        with LeanAttention():
            found = F.scaled_dot_product_attention(query=q, key=k, value=v, **options)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13)


def test_a_row_that_attends_to_nothing_is_as_torch_has_it() -> None:
    q, k, v = randn(1, 1, 2, 4), randn(1, 1, 3, 4), randn(1, 1, 3, 4)
    mask = torch.tensor([[False, False, False], [True, True, False]])
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(q, k, v, mask)
        with LeanAttention():
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, mask), wanted)


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return (x * 2).exp()


@pytest.mark.parametrize(
    "stop",
    [lambda x: x.detach(), torch.detach, lambda x: x.data, under_no_grad, lambda x: x.detach().unbind(0)[0]],
    ids=["method", "function", "data", "no_grad", "then a view"],
)
def test_what_autograd_takes_for_a_constant_is_marked(stop: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        with MarkedStops():
            value = (stop(x) * x).sum()
        return [*torch.autograd.grad(value, x)]

    x = randn(3, 2)
    program = program_of(function, x)
    assert targets(program).count(STOP) == 1
    assert torch.equal(program(x)[0], function(x)[0])


def test_what_needs_no_gradient_is_not_marked_and_what_is_changed_in_place_stays_itself() -> None:
    x, y = randn(3), randn(3).requires_grad_()
    with MarkedStops():
        assert x.detach().data_ptr() == x.data_ptr()
        with torch.no_grad():
            assert (y + 1).requires_grad is False
            assert x.add_(y) is x
            index = y.argmax()
    assert not index.is_floating_point()
