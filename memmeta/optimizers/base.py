"""Inner update rules: differentiable, elementwise, and with torch's exact semantics.

A rule is a frozen dataclass of hyperparameters. Each hyperparameter is a float, or a tensor that may require grad:

- a 0-d tensor: one value for all;
- a 1-d tensor of at least T values, or a mapping from parameter names to such: one per step (and tensor), as LSLR;
- a mapping from parameter names to tensors of the parameters' shapes: one per element, as Meta-SGD;
- a mapping from parameter names to floats or 0-d tensors: one per parameter tensor.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..trees import Tensors

Value = float | Tensor
Hyper = Value | Mapping[str, Value]
Values = dict[str, Value]
Slots = dict[str, Tensors]


@dataclasses.dataclass(frozen=True, eq=False)
class InnerOptimizer(abc.ABC):
    """An inner update rule U: (parameter, gradient, slots) -> (parameter, slots), written per tensor.

    Every field of a subclass that is not a bool is a hyperparameter; a field that is a tuple is several of them
    (``betas`` is ``beta1`` and ``beta2``). Both methods must be pure, elementwise (so that tasks can be stacked on a
    leading dimension) and made of differentiable tensor operations.
    """

    @property
    def linear(self) -> bool:
        """Whether the update is affine in (parameter, gradient, slots) for fixed hyperparameters: its derivative with
        respect to those then does not read their values."""
        return False

    @abc.abstractmethod
    def slots(self, param: Tensor) -> Tensors:
        """The fresh optimiser state of one parameter tensor: zeros of its shape, by slot name."""

    @abc.abstractmethod
    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        """One update of one parameter tensor.

        Args:
            t: number of the inner step, from 0.
            param: the parameter, shape (...) or (C, ...) for C stacked tasks.
            grad: its inner gradient, same shape.
            slots: its optimiser state before the step, each of the same shape.
            h: the hyperparameters for this tensor and step, each a float or a tensor that broadcasts.

        Returns:
            The parameter and the slots after the step, as new tensors.
        """

    def affine(self, h: Values) -> tuple[float, float] | None:
        """(a, b) if the update is p <- a p - b g with these two numbers and nothing else, so that its derivative needs
        no graph; None otherwise."""
        return None

    def hyperparameters(self) -> Tensors:
        """The hyperparameters that are tensors, by name: ``lr``, or ``lr/encoder.weight`` where given per tensor."""
        return {key: value for key, value in self._entries().items() if isinstance(value, Tensor)}

    def replaced(self, tensors: Mapping[str, Tensor]) -> InnerOptimizer:
        """The same rule with other tensors in the place of ``hyperparameters()``."""

        def swap(field: str, value: Hyper) -> Hyper:
            if isinstance(value, Mapping):
                return {name: tensors.get(f"{field}/{name}", inner) for name, inner in value.items()}
            return tensors.get(field, value)

        changes: dict[str, object] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                changes[f.name] = tuple(swap(_member(f.name, i), item) for i, item in enumerate(value))
            elif not isinstance(value, bool):
                changes[f.name] = swap(f.name, value)
        return dataclasses.replace(self, **changes)

    def bind(self, params: Mapping[str, Tensor], steps: int) -> BoundRule:
        """Check the hyperparameters against the parameters they are for.

        Raises:
            InputError: a name or shape that fits no reading, or fewer values than ``steps``.
        """
        forms = {field: _form(field, value, params, steps) for field, value in self._fields().items()}
        bound = BoundRule(self, forms)
        found = None if self.hyperparameters() else {self.affine(bound.values(name, 0, {})) for name in params}
        return dataclasses.replace(bound, affine=found.pop() if found is not None and len(found) == 1 else None)

    def _fields(self) -> dict[str, Hyper]:
        found: dict[str, Hyper] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                found.update({_member(f.name, i): item for i, item in enumerate(value)})
            elif not isinstance(value, bool):
                found[f.name] = value
        return found

    def _entries(self) -> dict[str, Value]:
        entries: dict[str, Value] = {}
        for field, value in self._fields().items():
            if isinstance(value, Mapping):
                entries.update({f"{field}/{name}": inner for name, inner in value.items()})
            else:
                entries[field] = value
        return entries


@dataclasses.dataclass(frozen=True)
class _Form:
    """How one field is read: its values' keys have the parameter's name in them, and an index per step."""

    constant: float | None = None
    named: Mapping[str, float | None] | None = None
    per_step: bool = False


@dataclasses.dataclass(frozen=True)
class BoundRule:
    """An update rule checked against its parameters; applied to all of them at once.

    ``affine`` is (a, b) where the whole update is p <- a p - b g with these two numbers at every step, else None.
    """

    rule: InnerOptimizer
    forms: dict[str, _Form]
    affine: tuple[float, float] | None = None

    def baked(self) -> Hashable:
        """All of the rule that is not in its tensors."""
        forms = tuple(
            (field, form.constant, None if form.named is None else tuple(form.named.items()), form.per_step)
            for field, form in self.forms.items()
        )
        flags = (getattr(self.rule, f.name) for f in dataclasses.fields(self.rule))
        return type(self.rule), forms, tuple(flag for flag in flags if isinstance(flag, bool))

    def start(self, params: Mapping[str, Tensor]) -> Slots:
        """Fresh slots for every parameter: no state is shared with any other task."""
        with torch.no_grad():
            return {name: self.rule.slots(param) for name, param in params.items()}

    def __call__(
        self, t: int, params: Tensors, grads: Tensors, slots: Slots, hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Slots]:
        """One step on all parameters; ``hyper`` holds the tensors named by ``InnerOptimizer.hyperparameters``."""
        if self.affine is not None and self.affine[0] == 1 and not torch.is_grad_enabled():
            moved = torch._foreach_add(list(params.values()), [grads[name] for name in params], alpha=-self.affine[1])
            return dict(zip(params, moved, strict=True)), slots
        new_params: Tensors = {}
        new_slots: Slots = {}
        for name, param in params.items():
            h = self.values(name, t, hyper)
            new_params[name], new_slots[name] = self.rule.update(t, param, grads[name], slots[name], h)
        return new_params, new_slots

    def values(self, name: str, t: int, hyper: Mapping[str, Tensor]) -> Values:
        values: Values = {}
        for field, form in self.forms.items():
            constant = form.constant if form.named is None else form.named[name]
            if constant is not None:
                values[field] = constant
            else:
                tensor = hyper[field if form.named is None else f"{field}/{name}"]
                values[field] = tensor[t] if form.per_step else tensor
        return values


def _member(field: str, index: int) -> str:
    return f"{field.removesuffix('s')}{index + 1}"


def _form(field: str, value: Hyper, params: Mapping[str, Tensor], steps: int) -> _Form:
    if isinstance(value, Mapping):
        return _named_form(field, value, params, steps)
    if not isinstance(value, Tensor):
        return _Form(constant=float(value))
    if value.dim() == 0:
        return _Form()
    if value.dim() == 1 and len(value) >= steps:
        return _Form(per_step=True)
    raise InputError(
        f"{field}= has shape {list(value.shape)}: write a scalar, a 1-d tensor with one value for each of the "
        f"{steps} steps, or a dict from parameter names to tensors"
    )


def _named_form(field: str, values: Mapping[str, Value], params: Mapping[str, Tensor], steps: int) -> _Form:
    if values.keys() != params.keys():
        missing, extra = sorted(params.keys() - values.keys()), sorted(values.keys() - params.keys())
        raise InputError(f"{field}= must name each adapted parameter once: missing {missing}, unknown {extra}")
    named = {name: None if isinstance(value, Tensor) else float(value) for name, value in values.items()}
    shaped = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.dim() > 0}
    if not shaped:
        return _Form(named=named)
    per_element = all(value.shape == params[name].shape for name, value in shaped.items())
    lengths = {len(value) if value.dim() == 1 else -1 for value in shaped.values()}
    per_step = len(shaped) == len(values) and len(lengths) == 1 and lengths.pop() >= steps
    if per_element and per_step:
        raise InputError(
            f"{field}= can be read as one per step or as one per element: give step vectors another length than "
            f"the parameters (a longer one is allowed)"
        )
    if per_element:
        _check_dtypes(field, shaped, params)
    if per_element or per_step:
        return _Form(named=named, per_step=per_step)
    name, value = next((name, value) for name, value in shaped.items() if value.shape != params[name].shape)
    raise InputError(
        f"{field}= for {name} has shape {list(value.shape)}: write a scalar, the parameter's shape "
        f"{list(params[name].shape)}, or for every parameter a vector of at least {steps} values (one per step)"
    )


def _check_dtypes(field: str, values: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if torch.promote_types(value.dtype, params[name].dtype) != params[name].dtype:
            raise InputError(
                f"{field}= for {name} is {value.dtype}, which would turn the parameter ({params[name].dtype}) into it: "
                f"give it the parameter's dtype"
            )


def check_range(field: str, value: Hyper, low: float, high: float = float("inf")) -> None:
    """Refuse a number outside [low, high); tensors are the outer optimiser's business and may go anywhere.

    Raises:
        InputError: not a number, or outside.
    """
    for number in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(number, Tensor):
            continue
        if not isinstance(number, (int, float)):
            raise InputError(f"{field}={number!r}: write a float, a tensor, or a dict from parameter names to those")
        if not low <= number < high:
            raise InputError(f"{field}={number}: write a number in [{low:g}, {high:g})")


def is_zero(value: Hyper) -> bool:
    """True for the plain number 0, which switches a term off; a tensor that holds 0 keeps it."""
    return not isinstance(value, (Tensor, Mapping)) and value == 0


def decay(param: Tensor, grad: Tensor, weight_decay: Value) -> Tensor:
    """``grad + weight_decay * param``, as torch's coupled weight decay."""
    if isinstance(weight_decay, Tensor):
        return grad + weight_decay * param
    return torch.add(grad, param, alpha=weight_decay) if weight_decay else grad


def move(param: Tensor, direction: Tensor, lr: Value) -> Tensor:
    """``param - lr * direction``."""
    return param - lr * direction if isinstance(lr, Tensor) else torch.add(param, direction, alpha=-lr)


def ema(old: Tensor, new: Tensor, beta: Value) -> Tensor:
    """``beta * old + (1 - beta) * new``."""
    return beta * old + (1 - beta) * new


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0 instead of infinity.

    Dead units have second moments of exactly 0 at every step, where sqrt has no derivative; the subgradient 0 gives
    what central finite differences give. Values below the smallest normal number count as 0 for the derivative.
    """
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
