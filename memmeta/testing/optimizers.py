"""check_optimizer: an inner update rule against its own differences, and against real ``torch.optim`` steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapt import adapt
from ..adjoints import Adjoint, Stepwise, Unrolled
from ..errors import InputError
from ..optimizers import InnerOptimizer
from ..trees import Tensors
from .conformance import Conformance, named, require
from .measures import central_gradient, error, fine_difference, norm, same_bits
from .update import check_update

STEPS = 4
START = {
    "w": torch.tensor([[0.7, -0.4, 0.9], [-0.8, 0.6, 0.3]], dtype=torch.float64),
    "b": torch.tensor([0.5, -0.6], dtype=torch.float64),
    "dead": torch.tensor([1.0, -2.0], dtype=torch.float64),  # the inner loss's gradient there is exactly zero
}
MIXING = torch.tensor([[1.3, 0.4, 0.1], [0.4, 0.9, -0.2], [0.1, -0.2, 0.7]], dtype=torch.float64)
BATCHES = (0.5, -0.2, 0.8, 0.1, -0.6, 0.3)

Reference = Callable[[list[Tensor]], torch.optim.Optimizer]


def check_optimizer(
    make: InnerOptimizer | Callable[[], InnerOptimizer],
    reference: Reference | None = None,
    *,
    tolerance: float = 1e-8,
) -> Conformance:
    """Check that an inner optimiser keeps the contract of ``mm.InnerOptimizer``; less than a second on one core.

    - ``slots`` are zeros of the parameter's shape, made anew at each call; ``update`` is pure (its arguments stay as
      they are, the same call gives the same bits) and elementwise (tasks can be stacked); ``affine`` says what
      ``update`` does; the derivative of one update is that of central finite differences, to ``tolerance``;
    - every task starts from a fresh state; parameters whose gradient is zero at every step (dead units) get finite
      meta-gradients; ``Stepwise()`` gives what ``Unrolled()`` gives;
    - each hyperparameter may be a tensor: a scalar, one per step, per parameter tensor, per tensor and step, and per
      element, with the same trajectory and gradients that add up to the scalar's;
    - with a ``reference`` six steps give its values to 1e-12, and meta-gradients with respect to the initial parameters
      and every hyperparameter are those of central finite differences of its real steps, to ``tolerance``.

    Args:
        make: the rule or a function that makes it, with a number for each hyperparameter. Those that are 0 are taken
            for switched off, and stay numbers.
        reference: from a list of parameters to torch's optimiser of the same semantics with the same numbers, for
            instance ``lambda params: torch.optim.SGD(params, lr=0.1)``; its ``param_groups`` are set to other numbers.
        tolerance: of derivatives, relative to their norm or absolute where that is below 1.

    Returns:
        What passed; as refused those hyperparameters that the reference does not have under the same name.

    Raises:
        AssertionError: of one line that names the rule, what was checked, the leaf or hyperparameter, and the error.
        InputError: a hyperparameter that is no number.
    """
    with named("making the inner optimiser"):
        rule = make if isinstance(make, InnerOptimizer) else make()
        require(isinstance(rule, InnerOptimizer), f"{type(rule).__name__} is no mm.InnerOptimizer")
    numbers = _numbers(rule)
    checks: dict[str, Callable[[], object]] = {
        "one update": lambda: check_update(rule, numbers, tolerance),
        "fresh state for each task": lambda: _check_fresh(rule),
        "Stepwise() and dead units": lambda: _check_adjoints(rule, numbers),
        "forms of hyperparameters": lambda: [_check_forms(rule, name, value) for name, value in numbers.items()],
    }
    refused: dict[str, str] = {}
    if reference is not None:
        checks["values of the reference"] = lambda: _check_values(rule, reference)
        checks["finite differences of the reference"] = lambda: refused.update(
            _check_reference(rule, numbers, reference, tolerance)
        )
    for name, check in checks.items():
        with named(f"{rule}, {name}"):
            check()
    return Conformance(tuple(f"{type(rule).__name__}: {name}" for name in checks), refused)


def _numbers(rule: InnerOptimizer) -> dict[str, float]:
    """The hyperparameters that are switched on, by name."""
    found: dict[str, float] = {}
    for name, value in rule._fields().items():
        if isinstance(value, Mapping) or (isinstance(value, Tensor) and value.dim() > 0):
            raise InputError(f"check_optimizer needs a number for each hyperparameter: write {name}=0.1, for instance")
        if float(value) != 0:
            found[name] = float(value)
    return found


def inner_loss(params: Tensors, meta: Any, batch: float) -> Tensor:
    """Smooth, coupled, not convex, another one at every step."""
    hidden = torch.tanh(params["w"] @ MIXING) + params["b"][:, None]
    value = (hidden * hidden).sum() + batch * torch.sin(params["w"]).sum() + 0.3 * (params["b"] ** 4).sum()
    return value + 0.0 * params["dead"].sum()


def _outer_loss(params: Tensors) -> Tensor:
    mixed = (params["w"][0, 0] * params["b"]).sum() + (params["dead"] ** 2).sum()
    return (params["w"] ** 3).sum() + mixed + torch.cos(params["b"]).sum()


def _start() -> Tensors:
    return {name: value.clone().requires_grad_() for name, value in START.items()}


def _tensors(numbers: Mapping[str, float]) -> Tensors:
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in numbers.items()}


def _gradients(
    rule: InnerOptimizer, learned: Mapping[str, Tensor], adjoint: Adjoint | None = None
) -> tuple[Tensors, Tensors, Tensors]:
    """The adapted parameters, and the meta-gradients of initial parameters and of the ``learned`` tensors."""
    params = _start()
    adapted = adapt(inner_loss, params, BATCHES[:STEPS], optimizer=rule, adjoint=adjoint or Stepwise())
    leaves = [*params.values(), *learned.values()]
    found = torch.autograd.grad(_outer_loss(adapted.params), leaves, materialize_grads=True)
    by_start, by_learned = found[: len(params)], found[len(params) :]
    values = {name: param.detach() for name, param in adapted.params.items()}
    return values, dict(zip(params, by_start, strict=True)), dict(zip(learned, by_learned, strict=True))


def _check_fresh(rule: InnerOptimizer) -> None:
    """A task in between, from elsewhere and of other length, has no influence."""
    first = adapt(inner_loss, _start(), BATCHES, optimizer=rule)
    adapt(inner_loss, {name: -0.5 * value for name, value in _start().items()}, BATCHES[:3], optimizer=rule)
    again = adapt(inner_loss, _start(), BATCHES, optimizer=rule)
    for name, value in first.params.items():
        same = same_bits({name: value}, {name: again.params[name]})
        require(same, f"{name}: a second run after another task gives other values, so state is shared between tasks")


def _check_adjoints(rule: InnerOptimizer, numbers: Mapping[str, float]) -> None:
    learned = _tensors(numbers)
    rule = rule.replaced(learned)
    for what, found, wanted in zip(
        ("theta_T", "the gradient of initial parameters", "the gradient of hyperparameters"),
        _gradients(rule, learned),
        _gradients(rule, learned, Unrolled()),
        strict=True,
    ):
        for name, grad in found.items():
            require(bool(grad.isfinite().all()), f"{what}: {name} is not finite")
        gap = error(found, wanted)
        require(gap < 1e-9, f"{what}: relative error {gap:.1e} of Stepwise() against Unrolled()")


def _check_forms(rule: InnerOptimizer, name: str, number: float) -> None:
    """The same number in every form: the same trajectory, and gradients whose sum is the scalar's."""
    plain, _, _ = _gradients(rule, {})
    scalar = torch.tensor(number, dtype=torch.float64, requires_grad=True)
    values, _, grads = _gradients(rule.replaced({name: scalar}), {name: scalar})
    gap = error(values, plain)
    require(gap < 1e-12, f"{name} as a scalar tensor: theta_T differs by {gap:.1e} from that with a number")
    for form, learned in _forms(name, number).items():
        changed = _with(rule, name, learned)
        values, _, parts = _gradients(changed, learned)
        gap = error(values, plain)
        require(gap < 1e-12, f"{name} {form}: theta_T differs by {gap:.1e} from that with a number")
        total, wanted = sum(float(part.sum()) for part in parts.values()), float(grads[name])
        gap = abs(total - wanted) / max(abs(wanted), 1.0)
        require(gap < 1e-9, f"{name} {form}: its gradients add up to {total:.6g}, that of the scalar is {wanted:.6g}")


def _forms(name: str, number: float) -> dict[str, Tensors]:
    """Tensors by the names of ``InnerOptimizer.hyperparameters()``; one more entry than there are steps."""

    def full(*shape: int) -> Tensor:
        return torch.full(shape, number, dtype=torch.float64, requires_grad=True)

    return {
        "per step": {name: full(STEPS + 1)},
        "per tensor": {f"{name}/{key}": full() for key in START},
        "per tensor and step": {f"{name}/{key}": full(STEPS + 1) for key in START},
        "per element": {f"{name}/{key}": full(*value.shape) for key, value in START.items()},
    }


def _with(rule: InnerOptimizer, name: str, learned: Mapping[str, Tensor]) -> InnerOptimizer:
    """The rule with hyperparameter ``name`` given by these tensors."""
    form: Any = learned.get(name) if name in learned else {key.split("/", 1)[1]: t for key, t in learned.items()}
    field, index = _place(rule, name)
    if index is None:
        return dataclasses.replace(rule, **{field: form})
    members = list(getattr(rule, field))
    members[index] = form
    return dataclasses.replace(rule, **{field: tuple(members)})


def _place(rule: InnerOptimizer, name: str) -> tuple[str, int | None]:
    """The dataclass field, and the index in it where it is a tuple, that hold a hyperparameter."""
    for f in dataclasses.fields(rule):
        value = getattr(rule, f.name)
        if isinstance(value, tuple):
            for index in range(len(value)):
                if name == f"{f.name.removesuffix('s')}{index + 1}":
                    return f.name, index
    return name, None


def _check_values(rule: InnerOptimizer, reference: Reference) -> None:
    for steps in (1, 2, len(BATCHES)):
        found = adapt(inner_loss, _start(), BATCHES[:steps], optimizer=rule).params
        wanted = _real_steps(rule, reference, steps, START, {})
        for name, value in wanted.items():
            gap = float((found[name].detach() - value).norm()) / max(float(value.norm()), 1.0)
            require(gap < 1e-12, f"{name} differs by {gap:.1e} from the reference's after {steps} steps")


def _check_reference(
    rule: InnerOptimizer, numbers: Mapping[str, float], reference: Reference, tolerance: float
) -> dict[str, str]:
    learned = _tensors(numbers)
    _, by_start, by_number = _gradients(rule.replaced(learned), learned)
    for name, found in by_start.items():

        def from_there(point: Tensor, name: str = name) -> float:
            params = _real_steps(rule, reference, STEPS, {**START, name: point}, {})
            return float(_outer_loss(params))

        wanted = central_gradient(from_there, START[name])
        gap = float((found - wanted).norm()) / max(norm(by_start), 1.0)
        require(gap < tolerance, f"the gradient of {name}: relative error {gap:.1e} against central differences")
    scale, refused = max(norm(by_number), 1.0), {}
    group = reference(list(_start().values())).param_groups[0]
    for name, number in numbers.items():
        field, index = _place(rule, name)
        if field not in group or (index is not None and not isinstance(group[field], tuple)):
            refused[f"the gradient of {name}"] = f"the reference's param_groups have no {field!r}"
            continue

        def with_number(size: float, name: str = name, number: float = number) -> float:
            return float(_outer_loss(_real_steps(rule, reference, STEPS, START, {name: number + size})))

        gap = abs(float(by_number[name]) - fine_difference(with_number)) / scale
        require(gap < tolerance, f"the gradient of {name}: relative error {gap:.1e} against central differences")
    return refused


def _real_steps(
    rule: InnerOptimizer, reference: Reference, steps: int, at: Tensors, numbers: Mapping[str, float]
) -> Tensors:
    """The parameters after real steps of the reference with other ``numbers``."""
    params = {name: value.detach().clone().requires_grad_() for name, value in at.items()}
    optimizer = reference(list(params.values()))
    for group in optimizer.param_groups:
        for name, number in numbers.items():
            field, index = _place(rule, name)
            group[field] = number if index is None else (*group[field][:index], number, *group[field][index + 1 :])
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        inner_loss(params, None, batch).backward()
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}
