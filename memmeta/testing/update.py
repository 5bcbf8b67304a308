"""One update of an inner optimiser: pure, elementwise, and with the derivative that its differences have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import trees
from ..optimizers import InnerOptimizer
from ..optimizers.base import Values
from ..trees import Tensors
from .conformance import named, require
from .measures import copies, error, fine_difference, moved, norm, random_like, same_bits, slope


class Place(NamedTuple):
    """A step of one parameter tensor: all that ``update`` reads."""

    t: int
    param: Tensor
    grad: Tensor
    slots: Tensors


def check_update(rule: InnerOptimizer, numbers: Mapping[str, float], tolerance: float) -> None:
    """Check ``slots``, ``update`` and ``affine`` at the first steps of a random trajectory.

    Raises:
        AssertionError: with the step and what is wrong.
    """
    h: Values = {**{name: float(value) for name, value in _plain(rule).items()}}
    _check_slots(rule)
    for place in _places(rule, h):
        with named(f"step {place.t}"):
            _check_pure(rule, place, h)
            _check_elementwise(rule, place, h)
            _check_affine(rule, place, h)
            _check_derivative(rule, place, {**h, **_tensors(numbers)}, tolerance)


def _plain(rule: InnerOptimizer) -> dict[str, float]:
    return {name: float(value) for name, value in rule._fields().items() if not isinstance(value, Mapping)}


def _tensors(numbers: Mapping[str, float]) -> Tensors:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def _drawn(t: int) -> tuple[Tensor, Tensor]:
    """A parameter and a gradient of shape (2, 3), no entry near zero, where second moments have no good differences."""
    generator = torch.Generator().manual_seed(t)
    values = torch.rand(2, 2, 3, generator=generator, dtype=torch.float64) + 0.5
    values *= torch.where(torch.rand(2, 2, 3, generator=generator) < 0.5, -1.0, 1.0)
    return values[0], values[1]


def _places(rule: InnerOptimizer, h: Values) -> Iterator[Place]:
    """Three steps; each with the slots that the steps before it have left."""
    param, grad = _drawn(0)
    slots = rule.slots(param)
    for t in range(3):
        yield Place(t, param, grad, slots)
        param, slots = rule.update(t, param.clone(), grad.clone(), copies(slots), h)
        _, grad = _drawn(t + 1)


def _check_slots(rule: InnerOptimizer) -> None:
    param, _ = _drawn(0)
    first, second = rule.slots(param), rule.slots(param)
    require(first.keys() == second.keys(), "slots: other names at a second call")
    for name, slot in first.items():
        fits = (slot.shape, slot.dtype) == (param.shape, param.dtype)
        require(fits, f"slots: {name} has shape {list(slot.shape)} and {slot.dtype}: zeros_like(param) has the right")
        require(not bool(slot.any()), f"slots: {name} is not zero before the first step")
        shared = slot.data_ptr() in (second[name].data_ptr(), param.data_ptr())
        require(not shared, f"slots: {name} has the same memory at a second call, so tasks would share it")


def _check_pure(rule: InnerOptimizer, place: Place, h: Values) -> None:
    given = {"param": place.param, "grad": place.grad, **{f"slot {n}": s for n, s in place.slots.items()}}
    before = copies(given)
    first = _flat(rule.update(*place, h))
    for name, tensor in given.items():
        require(torch.equal(tensor, before[name]), f"update has changed its argument {name} in place")
    expected = {"param", *place.slots}
    require(first.keys() == expected, f"update gives {sorted(first)}: param and the slots are {sorted(expected)}")
    for name, tensor in first.items():
        require(tensor.shape == place.param.shape, f"update gives {name} of shape {list(tensor.shape)}")
    first = copies(first)
    again = _flat(rule.update(*place, h))
    require(same_bits(again, first), "update gives other values when called again, so it has a state of its own")


def _check_elementwise(rule: InnerOptimizer, place: Place, h: Values) -> None:
    """The whole tensor gives what its elements give one by one."""
    whole = {name: tensor.flatten() for name, tensor in _flat(rule.update(*place, h)).items()}
    parts: list[Tensors] = []
    for i in range(place.param.numel()):
        chosen = {name: slot.flatten()[i] for name, slot in place.slots.items()}
        parts.append(_flat(rule.update(place.t, place.param.flatten()[i], place.grad.flatten()[i], chosen, h)))
    gap = error({name: torch.stack([part[name].reshape(()) for part in parts]) for name in whole}, whole)
    require(
        gap < 1e-13, f"update is not elementwise: element by element it gives other values, relative error {gap:.1e}"
    )


def _check_affine(rule: InnerOptimizer, place: Place, h: Values) -> None:
    claimed = rule.affine(h)
    if claimed is None:
        return
    require(not place.slots, "affine is claimed by a rule that has slots: return None")
    a, b = claimed
    found, _ = rule.update(*place, h)
    gap = float((found - (a * place.param - b * place.grad)).norm()) / float(found.norm())
    require(gap < 1e-13, f"affine says {a} p - {b} g, update gives something else, relative error {gap:.1e}")


def _check_derivative(rule: InnerOptimizer, place: Place, h: Values, tolerance: float) -> None:
    """The VJP of one update in a random direction, with respect to each of its arguments."""
    learned = {name: value for name, value in h.items() if isinstance(value, Tensor)}
    # Before the first step slots are a constant, at which a square root has no difference quotient.
    slots = {f"slot {name}": slot for name, slot in place.slots.items() if place.t > 0}
    leaves = trees.leaves({"param": place.param, "grad": place.grad, **slots, **learned})

    def outputs(at: Tensors) -> Tensors:
        state = {name: at.get(f"slot {name}", slot) for name, slot in place.slots.items()}
        numbers = {**h, **{name: at[name] for name in learned}}
        return _flat(rule.update(place.t, at["param"], at["grad"], state, numbers))

    results = outputs(leaves)
    cotangent = random_like(results, seed=40 + place.t)
    total = torch.stack([(cotangent[name] * result).sum() for name, result in results.items()]).sum()
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        direction = random_like({name: leaf}, seed=50)
        if name.startswith("slot"):
            direction[name] *= leaf.detach().abs()  # of their own size: those under a square root may be small

        def along_it(size: float, direction: Tensors = direction) -> float:
            return slope(cotangent, trees.detach(outputs(moved(leaves, direction, size))))

        gap = abs(slope({name: grad}, direction) - fine_difference(along_it)) / max(norm({name: grad}), 1.0)
        require(gap < tolerance, f"the derivative of update by {name}: relative error {gap:.1e} against differences")


def _flat(result: tuple[Tensor, Tensors]) -> Tensors:
    param, slots = result
    return {"param": param, **slots}
