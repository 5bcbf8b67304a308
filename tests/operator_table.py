"""Single operators with arguments: all that memmeta.dual has a rule for, and some that it has none for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Fill = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Op:
    """An operator and arguments for it: those at ``moving`` (a list counts as several) have tangents.

    ``fill`` gives all arguments from the moving ones, where some of the others (saved statistics) depend on those.
    """

    target: Any
    args: Sequence[Any]
    moving: tuple[int, ...] = (0,)
    fill: Fill | None = None
    kwargs: tuple[tuple[str, Any], ...] = ()
    name: str = ""

    def tensors(self) -> list[Tensor]:
        """The tensors that may have a tangent."""
        return [x for i in self.moving for x in (self.args[i] if isinstance(self.args[i], list) else [self.args[i]])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> list[Any]:
        """All arguments, these tensors in their places."""
        left, args = iter(tensors), list(self.args)
        for i in self.moving:
            args[i] = [next(left) for _ in args[i]] if isinstance(args[i], list) else next(left)
        return args if self.fill is None else self.fill(args)

    def outputs(self, args: Sequence[Any]) -> list[Any]:
        out = self.target(*args, **dict(self.kwargs))
        return list(out) if isinstance(out, (list, tuple)) else [out]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def strided(*shape: int) -> Tensor:
    """Values with the strides of a transposed tensor."""
    return randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def saved(index: int, forward: Callable[..., Any], *places: tuple[int, int]) -> Fill:
    """Arguments whose saved statistics are outputs of ``forward(args)``: (place among the arguments, output)."""

    def fill(args: list[Any]) -> list[Any]:
        out = forward(args)
        for place, which in places:
            args[place] = out[which]
        return args

    return fill


TARGET, WINDOW = torch.tensor([0, 2, 1, -100]), ([2, 2], [2, 2], [0, 0])
INDICES = torch.tensor([[0, 3, 1], [1, 0, 4]])


def linear() -> Iterator[Op]:
    x, image = randn(4, 5), randn(2, 3, 6, 6)
    yield from (Op(getattr(aten, n).default, [x]) for n in ("t", "clone", "detach", "alias", "neg", "sum", "mean"))
    yield Op(aten.t.default, [strided(4, 5)])
    yield Op(aten.clone.default, [strided(4, 5)], kwargs=(("memory_format", torch.contiguous_format),))
    yield Op(aten.transpose.int, [image, 1, 3])
    yield Op(aten.permute.default, [image, [0, 2, 3, 1]])
    yield Op(aten.expand.default, [randn(4, 1), [3, 4, 5]])
    yield Op(aten.squeeze.default, [randn(4, 1, 5)])
    yield Op(aten.squeeze.dim, [randn(4, 1, 5), 1])
    yield Op(aten.squeeze.dims, [randn(1, 4, 1), [0, 2]])
    yield Op(aten.unsqueeze.default, [x, 1])
    yield Op(aten.slice.Tensor, [x, 1, 1, 5, 2])
    yield Op(aten.select.int, [x, 0, 2])
    yield Op(aten.sum.dim_IntList, [image, [0, 2], True])
    yield Op(aten.mean.dim, [image, [-1]])
    yield Op(aten.mul.Scalar, [x, -1.5])
    yield Op(aten.div.Scalar, [x, 3])
    yield Op(aten.unbind.int, [x, 1])
    yield Op(aten.split.Tensor, [x, 2, 1])
    yield Op(aten.split_with_sizes.default, [x, [1, 3]])
    yield Op(aten.slice_backward.default, [randn(4, 2), [4, 5], 1, 1, 5, 2])
    yield Op(aten.select_backward.default, [randn(5), [4, 5], 0, 2])
    yield Op(aten._to_copy.default, [x], kwargs=(("dtype", torch.float64),))
    yield Op(aten._to_copy.default, [x], kwargs=(("dtype", torch.int32),), name="to an integer")
    yield from (Op(aten.avg_pool2d.default, [form(image), *WINDOW]) for form in (torch.clone, channels_last))
    yield Op(aten.avg_pool2d_backward.default, [randn(2, 3, 3, 3), image, *WINDOW, False, True, None])
    yield Op(aten._adaptive_avg_pool2d.default, [image, [2, 3]])
    yield Op(aten._adaptive_avg_pool2d_backward.default, [randn(2, 3, 2, 3), image])
    _, found = aten.max_pool2d_with_indices.default(image, *WINDOW)
    yield Op(
        aten.max_pool2d_with_indices_backward.default, [randn(2, 3, 3, 3), image, *WINDOW, [1, 1], False, found], (0, 1)
    )
    yield Op(aten.embedding_dense_backward.default, [randn(2, 3, 4), INDICES, 6, 1, False])
    total = torch.tensor(3.0, dtype=torch.float64)
    for reduction, g in ((1, randn()), (2, randn()), (0, randn(4))):
        rest = [randn(4, 3), TARGET, None, reduction, -100, total]
        yield Op(aten.nll_loss_backward.default, [g, *rest], (0, 1), name=f"reduction {reduction}")
    yield Op(aten.threshold_backward.default, [x, randn(4, 5), 0], (0, 1))


def products() -> Iterator[Op]:
    yield Op(aten.mm.default, [randn(3, 4), strided(4, 2)], (0, 1))
    yield Op(aten.bmm.default, [randn(2, 3, 4), strided(2, 4, 5)], (0, 1))
    for beta, alpha in ((1, 1), (0.5, 2.0)):
        for bias in (randn(2), randn(3, 2), randn(3, 1)):
            given = (("beta", beta), ("alpha", alpha))
            yield Op(aten.addmm.default, [bias, randn(3, 4), randn(4, 2)], (0, 1, 2), kwargs=given, name=f"{beta}")
    for groups, bias, form in ((1, True, torch.clone), (2, False, torch.clone), (1, True, channels_last)):
        how = [[2, 1], [1, 1], [1, 1], False, [0, 0], groups]
        x, w = form(randn(2, 4, 5, 5)), form(randn(6, 4 // groups, 3, 3))
        moving = (0, 1, 2) if bias else (0, 1)
        yield Op(aten.convolution.default, [x, w, randn(6) if bias else None, *how], moving)
        g = form(randn(*aten.convolution.default(x, w, None, *how).shape))
        for mask in ([True, True, bias], [False, True, bias], [True, False, False], [False, False, True]):
            args = [g, x, w, [6] if mask[2] else None, *how, mask]
            yield Op(aten.convolution_backward.default, args, (0, 1, 2), name=f"{mask}")
    up = [[2], [1], [1], True, [1], 1]
    yield Op(aten.convolution.default, [randn(2, 3, 4), randn(3, 2, 3), randn(2), *up], (0, 1, 2), name="transposed")


def elementwise() -> Iterator[Op]:
    for target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
        yield Op(target, [randn(4, 5), randn(4, 5)], (0, 1))
        yield Op(target, [randn(4, 1), randn(3, 1, 5)], (0, 1), name="broadcast")
        yield Op(target, [randn(5), strided(4, 5)], (0, 1), name="broadcast")
        yield Op(target, [randn(4, 5), 2.5], name="number")
    for target in (aten.add.Tensor, aten.sub.Tensor):
        yield Op(target, [randn(4, 5), randn(5)], (0, 1), kwargs=(("alpha", 3),))
    condition = randn(4, 5) > 0
    yield Op(aten.where.self, [condition, randn(4, 5), randn(4, 5)], (1, 2))
    yield Op(aten.where.self, [condition[:, :1], randn(5), randn(3, 4, 1)], (1, 2), name="broadcast")
    for shape, size in (([20], [20]), ([2, 10], [2, -1])):
        for target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            yield Op(target, [randn(4, 5), size], name=f"{shape}")
    yield Op(aten.reshape.default, [strided(4, 5), [20]])
    yield Op(aten.stack.default, [[randn(2, 3), randn(2, 3), randn(2, 3)], 1])
    yield Op(aten.cat.default, [[randn(2, 3), randn(2, 1)], 1])
    yield Op(aten.cat.default, [[randn(0), randn(2, 1)]], name="with an empty one")
    yield Op(aten.copy.default, [randn(4, 5), randn(5)], (0, 1))
    yield Op(aten.constant_pad_nd.default, [randn(4, 5), [1, 2], 3.0])
    yield from (Op(getattr(aten, name).default, [randn(4, 5)]) for name in ("relu", "silu", "tanh"))
    for form in ("none", "tanh"):
        given = (("approximate", form),)
        yield Op(aten.gelu.default, [randn(4, 5)], kwargs=given, name=form)
        yield Op(aten.gelu_backward.default, [randn(4, 5), randn(4, 5)], (0, 1), kwargs=given, name=form)
    yield Op(aten.silu_backward.default, [randn(4, 5), randn(4, 5)], (0, 1))
    yield Op(aten.tanh_backward.default, [randn(4, 5), randn(4, 5)], (0, 1))
    yield Op(aten.log_sigmoid_forward.default, [3 * randn(4, 5)])
    buffer = saved(2, lambda args: aten.log_sigmoid_forward.default(args[1]), (2, 1))
    yield Op(aten.log_sigmoid_backward.default, [randn(4, 5), 3 * randn(4, 5), None], (0, 1), buffer)


def rows() -> Iterator[Op]:
    for dim in (-1, 0, 1):
        x = strided(3, 4, 5)
        for target in (aten._softmax, aten._log_softmax):
            yield Op(target.default, [x, dim, False], name=f"{dim}")
        for target in (aten._softmax_backward_data, aten._log_softmax_backward_data):
            yield Op(target.default, [randn(3, 4, 5), x, dim, torch.float64], (0, 1), name=f"{dim}")
    yield Op(aten._safe_softmax.default, [randn(3, 4), 1])
    for reduction in (0, 1, 2):
        args = [randn(4, 3), TARGET, torch.rand(3, dtype=torch.float64), reduction, -100]
        yield Op(aten.nll_loss_forward.default, args, name=f"reduction {reduction}")
    for form in (torch.clone, channels_last):
        yield Op(aten.max_pool2d_with_indices.default, [form(randn(2, 3, 6, 6)), [3, 3], [2, 2], [1, 1]])
    yield Op(aten.max_pool2d_with_indices.default, [randn(3, 6, 6), *WINDOW], name="no batch")
    for indices in (INDICES, INDICES[0, 0]):
        yield Op(aten.embedding.default, [randn(6, 4), indices])


def layer_norms() -> Iterator[Op]:
    for x, shape, affine in ((randn(3, 4), [4], True), (randn(2, 3, 4), [3, 4], True), (strided(3, 4), [4], False)):
        w, b = (randn(*shape), randn(*shape)) if affine else (None, None)
        moving = (0, 2, 3) if affine else (0,)
        yield Op(aten.native_layer_norm.default, [x, shape, w, b, 1e-5], moving)

        def forward(args: list[Any]) -> Any:
            return aten.native_layer_norm.default(args[1], args[2], args[5], args[6], 1e-5)

        for mask in masks(affine):
            args = [randn(*x.shape), x, shape, None, None, w, b, mask]
            moving = (0, 1, 5) if affine else (0, 1)
            fill = saved(3, forward, (3, 1), (4, 2))
            yield Op(aten.native_layer_norm_backward.default, args, moving, fill, name=f"{mask}")


def masks(affine: bool) -> list[list[bool]]:
    both = [[True, True, True], [False, True, True], [True, False, True], [False, True, False], [False, False, True]]
    return both if affine else [[True, False, False]]


def group_norms() -> Iterator[Op]:
    for groups, affine, form in ((2, True, torch.clone), (1, False, torch.clone), (4, True, channels_last)):
        x, g = form(randn(3, 4, 2, 3)), randn(3, 4, 2, 3)
        w, b = (randn(4), randn(4)) if affine else (None, None)
        sizes = [3, 4, 6, groups]
        moving = (0, 1, 2) if affine else (0,)
        yield Op(aten.native_group_norm.default, [x, w, b, *sizes, 1e-5], moving)

        def forward(args: list[Any]) -> Any:
            return aten.native_group_norm.default(args[1], args[4], None, *args[5:9], 1e-5)

        # torch's kernel for channels_last fails where the input's gradient is not asked for.
        for mask in (mask for mask in masks(affine) if mask[0] or form is torch.clone):
            moving = (0, 1, 4) if affine else (0, 1)
            fill = saved(2, forward, (2, 1), (3, 2))
            args = [form(g), x, None, None, w, *sizes, mask]
            yield Op(aten.native_group_norm_backward.default, args, moving, fill, name=f"{mask}")


def batch_norms() -> Iterator[Op]:
    forms = ((True, torch.clone), (False, torch.clone), (True, channels_last))
    for training, (affine, form) in itertools.product((True, False), forms):
        x, g = form(randn(4, 3, 2, 2)), randn(4, 3, 2, 2)
        w, b = (randn(3), randn(3)) if affine else (None, None)
        mean, var = randn(3), torch.rand(3, dtype=torch.float64) + 0.5
        moving = (0, 1, 2) if affine else (0,)
        name = "training" if training else "evaluation"
        for target in (aten.native_batch_norm.default, aten._native_batch_norm_legit_functional.default):
            if target is not aten.native_batch_norm.default or not training:  # it would change its arguments
                yield Op(target, [x, w, b, mean, var, training, 0.1, 1e-5], moving, name=name)
        if training:
            yield Op(
                aten.native_batch_norm.default, [x, w, b, None, None, True, 0.1, 1e-5], moving, name="no statistics"
            )

        def forward(args: list[Any], training: bool = training) -> Any:
            return aten._native_batch_norm_legit_functional.default(
                args[1], args[2], None, args[3], args[4], training, 0.1, 1e-5
            )

        for mask in masks(affine):
            args = [g, x, w, mean, var, None, None, training, 1e-5, mask]
            moving = (0, 1, 2) if affine else (0, 1)
            fill = saved(5, forward, (5, 1), (6, 2))
            yield Op(aten.native_batch_norm_backward.default, args, moving, fill, name=f"{name} {mask}")


def parts() -> Iterator[Op]:
    for dim, shape in ((0, (4, 1)), (1, (1, 3))):
        yield Op(aten._weight_norm_interface.default, [randn(4, 3), randn(*shape), dim], (0, 1), name=f"{dim}")
        norms = torch.rand(*shape, dtype=torch.float64) + 1
        args = [randn(4, 3), randn(4, 3), randn(*shape), norms, dim]
        yield Op(aten._weight_norm_interface_backward.default, args, (0, 1, 2, 3), name=f"{dim}")


def others() -> Iterator[Op]:
    """Operators without a rule: torch's forward mode, or what they are made of."""
    yield Op(aten.exp.default, [randn(4, 5)])
    yield Op(aten.div.Tensor, [randn(1, 1).expand(4, 5), 3 + randn(4, 5)], (0, 1), name="expanded")
    yield Op(aten.view_as_real.default, [torch.complex(randn(4), randn(4))], name="complex")
    yield Op(aten.mish_backward.default, [randn(4, 5), randn(4, 5)], (0, 1))
    yield Op(aten.huber_loss_backward.default, [randn(), randn(4, 5), randn(4, 5), 1, 1.0], (0, 1, 2))
    yield Op(aten.var_mean.correction, [randn(4, 5), [0]])


def table() -> list[Op]:
    torch.manual_seed(0)
    groups = (linear, products, elementwise, rows, layer_norms, group_norms, batch_norms, parts, others)
    return [op for group in groups for op in group()]
