"""Bits that reversible learning keeps per inner step and element, against log2(1/momentum) and 32-bit snapshots.

    .venv/bin/python benchmarks/reversible.py --json benchmarks/results/reversible.json
    .venv/bin/python benchmarks/reversible.py --plot benchmarks/results/reversible.png

Logistic regression in float32, another minibatch at every step. ``bits_per_step`` is what the products with the
momentum leave to be kept (``status`` of the solution), and the factor after it that of a 32-bit snapshot of every step,
which is what Maclaurin, Duvenaud, Adams (2015) compare with. ``held_bytes`` are all bytes per element that live tensors
hold between the inner loop and its pullback, less the inner losses, and the factor after them the real one at that many
steps. Every state of the way back is compared with that of the way there, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import memmeta as mm
from memmeta.trees import Tensors
from memmeta_bench.record import environment

MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#56B4E9", "#0072B2", "#CC79A7")
ELEMENTS, EXAMPLES, BATCHES = 500, 16, 50


Batch = tuple[Tensor, Tensor]


def logistic(params: Tensors, meta: Any, batch: Batch) -> Tensor:
    """The inner loss."""
    return F.binary_cross_entropy_with_logits(batch[0] @ params["w"], batch[1])


def batches(steps: int) -> list[Batch]:
    """Minibatches in turn from a small set, shapes (examples, elements) and (examples,)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCHES, EXAMPLES, ELEMENTS, generator=generator)
    targets = torch.randint(2, (BATCHES, EXAMPLES), generator=generator).float()
    return [(inputs[t % BATCHES], targets[t % BATCHES]) for t in range(steps)]


def inner_loop(momentum: float, loss: Any, data: list[Batch]) -> tuple[mm.Adapted, Tensor]:
    """An inner loop under ``Reversible()``, and the parameters it began with."""
    w = 0.1 * torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1))
    rule = mm.SGD(0.1 * (1 - momentum), momentum=momentum, weight_decay=1e-3)
    w.requires_grad_()
    return mm.adapt(loss, {"w": w}, data, optimizer=rule, adjoint=mm.Reversible()), w


def row(momentum: float, steps: int) -> dict[str, Any]:
    """The figures of one inner loop, there and back."""
    calls: list[int] = []  # a fingerprint of the parameters' bits at every call

    def recorded(params: Tensors, meta: Any, batch: Batch) -> Tensor:
        bits = params["w"].detach().view(torch.int32).long()
        calls.append(int((bits * torch.arange(1, len(bits) + 1)).sum()))
        return logistic(params, meta, batch)

    data = batches(steps)
    before = live_bytes()
    adapted, w = inner_loop(momentum, recorded, data)
    held = (live_bytes() - before - sum(loss.nbytes for loss in adapted.losses)) / ELEMENTS
    torch.autograd.grad(adapted.params["w"].square().sum(), w)
    bits = adapted.status["bits_per_step_and_element"]
    return {
        "momentum": momentum,
        "steps": steps,
        "log2(1/momentum)": math.log2(1 / momentum),
        "bits_per_step": bits,
        "less_than_32_bit_snapshots": 32 / bits,
        "held_bytes": held,
        "less_than_32_bit_snapshots_held": 4 * steps / held,
        "every_state_recovered": calls[:steps] == calls[steps:][::-1],
    }


def live_bytes() -> int:
    """Bytes of all tensors alive, each storage once: quicker than ``memmeta.memory`` where no peak is asked for."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per step and element against the number of steps; the lines are log2(1/momentum)."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for momentum, colour in zip(MOMENTA, COLOURS, strict=True):
        chosen = [row for row in rows if row["momentum"] == momentum]
        steps, bits = [row["steps"] for row in chosen], [row["bits_per_step"] for row in chosen]
        axes.axhline(math.log2(1 / momentum), color=colour, linewidth=0.8, linestyle=":")
        label = f"{momentum}: {chosen[-1]['less_than_32_bit_snapshots']:.0f} x less than snapshots"
        axes.plot(steps, bits, color=colour, marker="o", markersize=3.5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="bits per step and element")
    ticks = sorted({row["steps"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    levels = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    axes.set_yticks(levels, [str(level) for level in levels])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False, title="momentum")
    figure.suptitle("Reversible(): what is kept of an inner loop (dotted: log2(1/momentum))", fontsize=10)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, draw, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them (PNG)")
    parser.add_argument("--most", type=int, default=10_000, help="most inner steps (default: 10000)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for momentum in MOMENTA:
        for steps in (size for size in (100, 1000, 10_000) if size <= options.most):
            rows.append(row(momentum, steps))
            print("  ".join(f"{key} {value:.6g}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "elements": ELEMENTS, "rows": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
