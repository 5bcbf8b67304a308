"""Tangents of single operators against central differences: every rule, every pattern of missing tangents, strides."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from operator_table import INDICES, Op, aten, randn, table
from torch import Tensor
from torch.fx import Graph, GraphModule

from memmeta import dual
from memmeta.dual.rules import LINEAR, PARTS, RULES
from memmeta.flat import BERNOULLI
from memmeta.stops import STOP

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in its forward mode
STEP = 1e-6


def flat(args: Sequence[Any]) -> Iterator[Any]:
    for x in args:
        yield from x if isinstance(x, list) else [x]


def carried(op: Op, tensors: Sequence[Tensor], moves: Sequence[Tensor | None]) -> tuple[list[Any], list[Any]]:
    """The outputs of one operator and their tangents; what is ``fill``ed in has none."""
    graph, args = Graph(), op.with_tensors(tensors)
    primals = [x for x in flat(args) if isinstance(x, Tensor)]
    nodes = {id(x): graph.placeholder(f"x{i}") for i, x in enumerate(primals)}
    known = dict(zip(map(id, tensors), moves, strict=True))

    def named(x: Any) -> Any:
        return [named(y) for y in x] if isinstance(x, list) else nodes.get(id(x), x)

    call = graph.call_function(op.target, tuple(named(x) for x in args), dict(op.kwargs))
    out = op.target(*args, **dict(op.kwargs))
    several = range(len(out)) if isinstance(out, (list, tuple)) else []
    graph.output([graph.call_function(operator.getitem, (call, i)) for i in several] or [call])
    return dual.carry(GraphModule({}, graph), primals, [known.get(id(x)) for x in primals])


def differences(op: Op, tensors: Sequence[Tensor], moves: Sequence[Tensor | None]) -> list[Any]:
    """The tangents of the outputs, to about 1e-9; None where there is no number."""

    def at(size: float) -> list[Any]:
        moved = [x if v is None else x + size * v for x, v in zip(tensors, moves, strict=True)]
        return op.outputs(op.with_tensors(moved))

    def difference(a: Any, b: Any) -> Tensor | None:
        real = isinstance(a, Tensor) and a.is_floating_point()
        return (a - b) / (2 * STEP) if real else None

    return [difference(a, b) for a, b in zip(at(STEP), at(-STEP), strict=True)]


def moves_of(op: Op, moved: Sequence[bool], form: Callable[[Tensor], Tensor] = torch.clone) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)

    def like(x: Tensor) -> Tensor:
        return form(torch.randn(x.shape, generator=generator, dtype=x.real.dtype).to(x.dtype))

    return [like(x) if move else None for x, move in zip(op.tensors(), moved, strict=True)]


STATISTICS = {
    aten.native_layer_norm.default: 1,
    aten.native_group_norm.default: 1,
    aten.native_batch_norm.default: 1,
    aten._native_batch_norm_legit_functional.default: 1,
    aten.log_sigmoid_forward.default: 1,
}
"""From which output on there is no tangent, because the rule of what reads it knows better."""


def check(op: Op, moves: list[Tensor | None]) -> None:
    tensors = op.tensors()
    before = [(x.clone(), v if v is None else v.clone()) for x, v in zip(tensors, moves, strict=True)]
    outputs, tangents = carried(op, tensors, moves)
    for found, wanted in zip(outputs, op.outputs(op.with_tensors(tensors)), strict=True):
        assert found is None or torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    end = STATISTICS.get(op.target, len(outputs))
    for found, wanted, out in list(zip(tangents, differences(op, tensors, moves), outputs, strict=True))[:end]:
        if wanted is None:
            assert found is None
            continue
        assert found is not None or not wanted.any()
        if found is not None:
            assert found.shape == out.shape
            assert found.dtype == out.dtype
            assert (found - wanted).norm() <= 1e-7 * (1 + wanted.norm())
    for (x, v), same_x, same_v in zip(before, tensors, moves, strict=True):
        assert torch.equal(x, same_x)  # neither arguments nor their tangents are changed
        assert v is same_v is None or (v is not None and same_v is not None and torch.equal(v, same_v))


TABLE = table()
NAMES = [f"{op.target} {op.name}".removeprefix("aten.").strip() for op in TABLE]


@pytest.mark.parametrize("op", TABLE, ids=NAMES)
def test_a_rule(op: Op) -> None:
    count = len(op.tensors())
    for moved in itertools.product((True, False), repeat=count):
        if any(moved):
            check(op, moves_of(op, moved))


@pytest.mark.parametrize("op", TABLE, ids=NAMES)
def test_tangents_of_other_strides(op: Op) -> None:
    def turned(v: Tensor) -> Tensor:
        return v.clone() if v.dim() < 2 else v.transpose(0, -1).contiguous().transpose(0, -1)

    check(op, moves_of(op, [True] * len(op.tensors()), turned))


def test_every_rule_is_in_the_table() -> None:
    assert {*RULES, *LINEAR, *PARTS} - {op.target for op in TABLE} == set()


def test_at_a_kink_the_derivative_is_autograds() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    _, (found,) = carried(Op(aten.relu.default, [x.detach()]), [x.detach()], [torch.ones_like(x).detach()])
    (wanted,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert torch.equal(found, wanted)


def test_a_row_of_padding_is_a_constant_as_for_autograd() -> None:
    weight, v = randn(6, 4), randn(6, 4)
    op = Op(aten.embedding.default, [weight, INDICES, 1])
    _, (found,) = carried(op, [weight], [v])
    v[1] = 0
    assert torch.equal(found, aten.embedding.default(v, INDICES))


@pytest.mark.parametrize("target", [STOP, BERNOULLI])
def test_what_is_a_constant_has_no_tangent(target: Any) -> None:
    args = [torch.rand(3, 4, dtype=torch.float64), *([0.5] if target is BERNOULLI else [])]
    torch.manual_seed(0)
    _, tangents = carried(Op(target, args), args[:1], [torch.ones(3, 4, dtype=torch.float64)])
    assert tangents == [None]


def test_low_precision_keeps_its_dtype() -> None:
    x, v = torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    for target in (aten._softmax.default, aten._log_softmax.default):
        outputs, (found,) = carried(Op(target, [x, -1, False]), [x], [v])
        assert found.dtype == outputs[0].dtype == torch.bfloat16
    _, (found,) = carried(Op(aten.add.Tensor, [x, v.float()], (0, 1)), [x, v.float()], [v, None])
    assert found.dtype == torch.float32


@pytest.mark.parametrize("target", [aten._linalg_solve_ex.default, aten._linalg_slogdet.default])
def test_an_output_whose_tangent_torch_keeps_to_itself_is_refused_where_it_is_read(target: Any) -> None:
    """A factorisation that the backward reads: without its tangent the product would be wrong, silently."""
    matrix, right = randn(3, 3) + 4 * torch.eye(3, dtype=torch.float64), randn(3, 2)
    args = [matrix] if target is aten._linalg_slogdet.default else [matrix, right]
    lu, pivots = (2, 3) if len(args) == 1 else (1, 2)
    graph = Graph()
    x, b = graph.placeholder("x"), graph.placeholder("b")
    call = graph.call_function(target, (x,) if len(args) == 1 else (x, b))
    read = [graph.call_function(operator.getitem, (call, i)) for i in (lu, pivots)]
    solved = graph.call_function(aten.linalg_lu_solve.default, (*read, b))
    graph.output([solved])
    with pytest.raises(dual.Unsupported, match=str(target)):
        dual.carry(GraphModule({}, graph), [matrix, right], [torch.ones_like(matrix), None])


def test_an_operator_without_a_forward_derivative_is_named() -> None:
    x = randn(3, 4)
    op = Op(aten.rrelu_with_noise_functional.default, [x, torch.rand_like(x), 0.1, 0.3, True])
    with pytest.raises(dual.Unsupported, match=r"aten\.rrelu_with_noise_functional\.default"):
        carried(op, [x], [x])
