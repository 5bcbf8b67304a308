"""The momenta of reversible learning: fractions to multiply integers by, and to divide by on the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..fixed_point import LARGEST_DENOMINATOR, Ratio, fractions
from ..optimizers import BoundRule
from ..rollout import Rollout


class Momenta:
    """The momentum of each tensor and step as a fraction, and the update rule with that number in its place."""

    def __init__(self, rule: BoundRule, hyper: Mapping[str, Tensor]) -> None:
        self.rule = rule
        tensors = {key: x.detach() for key, x in hyper.items() if key.split("/")[0] == "momentum"}
        numbers = {key: torch.tensor(x, dtype=torch.float64) for key, x in constants(rule).items()}
        self.asked = {**numbers, **tensors}
        refuse_forgetful(self.asked)
        self.found = {key: fractions(x) for key, x in self.asked.items()}
        self.used = {key: n.double() / d.double() for key, (n, d) in self.found.items()}
        self.ratios = {key: self._ratios(key) for key in self.found}

    def ratio(self, name: str, t: int) -> Ratio:
        """What the momentum buffer of ``name`` is multiplied by at step t."""
        ratios = self.ratios["momentum" if "momentum" in self.ratios else f"momentum/{name}"]
        return ratios[t if len(ratios) > 1 else 0]

    def _ratios(self, key: str) -> list[Ratio]:
        """One for all steps, or one for each."""
        n, d = self.found[key]
        if n.dim() and not self.rule.forms["momentum"].per_step:
            return [Ratio.elementwise(n, d)]
        return [Ratio.of(*pair) for pair in zip(n.flatten().tolist(), d.flatten().tolist(), strict=True)]

    def put_in(self, rollout: Rollout) -> Rollout:
        """The rollout whose momentum is n/d: what is run, so what is to be differentiated."""
        hyper = dict(rollout.leaves.hyper)
        for key, leaf in hyper.items():
            if key in self.used:
                hyper[key] = self.used[key].to(leaf.dtype).detach().requires_grad_(leaf.requires_grad)
        form = self.rule.forms["momentum"]
        if form.named is not None:
            named = {n: None if x is None else float(self.used[f"momentum/{n}"]) for n, x in form.named.items()}
            form = dataclasses.replace(form, named=named)
        elif form.constant is not None:
            form = dataclasses.replace(form, constant=float(self.used["momentum"]))
        rule = dataclasses.replace(self.rule, forms={**self.rule.forms, "momentum": form})
        return dataclasses.replace(rollout, rule=rule, leaves=rollout.leaves._replace(hyper=hyper))

    def status(self) -> dict[str, float]:
        """How far the fractions are from what was asked for, and the momentum itself where there is but one."""
        off = max(float((self.used[key] - x.double()).abs().max()) for key, x in self.asked.items())
        values = {float(x) if x.dim() == 0 else None for x in self.used.values()}
        one = values.pop() if len(values) == 1 else None
        return {"momentum_rounding": off} if one is None else {"momentum": one, "momentum_rounding": off}


def constants(rule: BoundRule) -> dict[str, float]:
    """The momenta that are plain numbers, by the names that tensors would have."""
    form = rule.forms["momentum"]
    named = {"momentum": form.constant} if form.named is None else {f"momentum/{n}": x for n, x in form.named.items()}
    return {key: value for key, value in named.items() if value is not None}


def refuse_forgetful(momenta: Mapping[str, Tensor | float]) -> None:
    """Raise UnsupportedError for a momentum that no fraction in (0, 1) is near to: too much would be lost."""
    least = 1 / LARGEST_DENOMINATOR
    for key, value in momenta.items():
        x = torch.as_tensor(value, dtype=torch.float64)
        inside = (x > least) & (x < 1 - 2 * least)
        if not bool(inside.all()):
            worst = float(x[~inside].flatten()[0])
            raise UnsupportedError(
                f"Reversible() undoes a step by dividing by the momentum, and {key} is {worst:g}: write one between "
                f"{least:.1e} and {1 - 2 * least:.5f}, or use Stepwise(), which keeps "
                "snapshots"
            )
