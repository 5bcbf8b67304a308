"""How far a meta-gradient's memory is from its floor: one plain training step on a batch of the same size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from problems import Workload, conv4_wide, gpt, resnet18

import memmeta as mm

MIB = 2**20


def plain_step(work: Workload) -> Callable[[], None]:
    """One step of plain SGD on the first task's support set, on a copy of the network made before."""
    net, (inputs, targets) = copy.deepcopy(work.net), work.tasks[0].support
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        work.loss(net(inputs), targets).backward()
        optimizer.step()

    return step


def peak_of(
    work: Workload,
    adjoint: mm.Adjoint,
    *,
    microbatch: int | None = None,
    step_weights: Sequence[float] | None = None,
    momentum: float = 0.0,
) -> int:
    """Counted peak bytes of one meta-gradient from ``.grad`` None; programs are made and checked before."""
    learner = mm.maml(
        work.net,
        loss=work.loss,
        optimizer=mm.SGD(lr=work.lr, momentum=momentum),
        steps=work.steps,
        metrics={},
        adjoint=adjoint,
        step_weights=step_weights,
    )
    if isinstance(adjoint, mm.Stepwise) and adjoint.hvp == "forward":
        # Two steps use all programs that more of them use.
        learner.steps = work.steps if step_weights else min(work.steps, 2)
        learner.accumulate(work.tasks, microbatch=microbatch)
        learner.steps = work.steps
    work.net.zero_grad()
    return mm.memory.peak_of(lambda: learner.accumulate(work.tasks, microbatch=microbatch))


@dataclass(frozen=True)
class Setting:
    """A row: how the product is taken, whether activations are computed again, whether examples come in pieces."""

    name: str
    hvp: Any = "forward"
    layers: bool = False
    microbatch: bool = False


SETTINGS = (
    Setting("reverse", hvp="reverse"),
    Setting("forward"),
    Setting("forward, layers", layers=True),
    Setting("forward, microbatch", microbatch=True),
    Setting("forward, layers, microbatch", layers=True, microbatch=True),
)


@dataclass(frozen=True)
class Model:
    """A network to measure: its blocks by name, and a quarter of its batch, if it can be computed in pieces."""

    name: str
    make: Callable[..., Workload]
    layers: tuple[str, ...]
    microbatch: int | None


MODELS = (
    Model("GPT", gpt, ("blocks.*",), 1),
    # Batch norm's statistics are those of the whole batch; its layers have no blocks.
    Model("Conv4", conv4_wide, (), None),
    Model("ResNet-18", resnet18, ("[4-9]", "1?"), 4),
)


def distances(model: Model, steps: int) -> dict[str, Any]:
    """Peaks of one meta-gradient under each setting, in bytes and against those of one plain training step."""
    work = replace(model.make(), steps=steps)
    plain = mm.memory.peak_of(plain_step(work))
    parameters = sum(p.nbytes for p in work.net.parameters())
    rows: dict[str, Any] = {}
    for setting in SETTINGS:
        if (setting.layers and not model.layers) or (setting.microbatch and model.microbatch is None):
            continue
        adjoint = mm.Stepwise(
            hvp=setting.hvp,
            snapshots="disk" if steps > 1 else "all",
            layers=model.layers if setting.layers else (),
        )
        peak = peak_of(work, adjoint, microbatch=model.microbatch if setting.microbatch else None)
        rows[setting.name] = {"bytes": peak, "times_plain": peak / plain}
        print(
            f"  {model.name:10s} T={steps}  {setting.name:28s} {peak / MIB:8.1f} MiB {peak / plain:6.2f} x", flush=True
        )
    return {
        "problem": work.name,
        "steps": steps,
        "plain_bytes": plain,
        "parameter_bytes": parameters,
        "parameters_share": parameters / plain,
        "settings": rows,
    }
