"""The tables of hypercleaning.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memmeta.memory import in_bytes
from memmeta_bench.tables import Sheet


def headline(found: Mapping[str, Any]) -> str:
    """What exact weights per example come to, beside all labels and the right ones."""
    exact, plain = found["methods"]["reverse, exact"], found["untaught"]
    return (
        f"wrong labels among {exact['hyperparameters']} found with F1 {exact['F1']:.3f}; accuracy without them "
        f"{_percent(exact['accuracy'])} (all labels: {_percent(plain['all labels as they are'])}, oracle: "
        f"{_percent(plain['the right labels (oracle)'])}); forward and reverse differ by "
        f"{found['agreement']['difference']:.1g}"
    )


def sheets(found: Mapping[str, Any], steps: int) -> tuple[Sheet, ...]:
    """What was found by which method, what a hypergradient takes, what truncation leaves out."""
    return _methods(found), _agreement(found["agreement"], steps), _truncation(found["truncation"], steps)


def _methods(found: Mapping[str, Any]) -> Sheet:
    lines: list[tuple[str, ...]] = [
        (name, "0", _percent(value), "", "", "", "", "") for name, value in found["untaught"].items()
    ]
    for name, one in found["methods"].items():
        quality = tuple(f"{one[key]:.3f}" for key in ("precision", "recall", "F1"))
        cost = (f"{one['seconds'][-1]:.1f}", in_bytes(one["peak"]))
        lines.append((name, str(one["hyperparameters"]), _percent(one["accuracy"]), *quality, *cost))
    header = ("method", "weights", "test accuracy", "precision", "recall", "F1", "seconds", "peak bytes")
    sources = found["sources"]
    notes = (
        "precision, recall, F1: of a weight below 1/2 as a sign of a wrong label; half of the labels are wrong",
        "accuracy: of a network trained on the examples kept and the validation set; seconds of all of the learning; "
        "peak: counted bytes of one hypergradient (in real time: of a step)",
        f"sources with more wrong labels than right ones: {sources['wrong']}; dropped: {sources['dropped']}, of which "
        f"{sources['both']} are among those",
    )
    return Sheet("cleaning", header, tuple(lines), notes)


def _agreement(found: Mapping[str, Any], steps: int) -> Sheet:
    lines = tuple(
        (f"mm.{name}()", f"{found[key]['seconds']:.2f}", in_bytes(found[key]["peak"]), difference)
        for name, key, difference in (
            ("Forward", "forward", f"{found['difference']:.1g}"),
            ("Stepwise", "reverse", "0"),
        )
    )
    title = f"the hypergradient of the sources' weights through {steps} steps"
    return Sheet(title, ("adjoint", "seconds", "peak bytes", "difference"), lines)


def _truncation(found: Mapping[int, float], steps: int) -> Sheet:
    header = ("steps walked back", *(str(window) for window in found))
    lines = (("relative error", *(f"{error:.2g}" for error in found.values())),)
    return Sheet(f"truncation: the hypergradient of a weight per example, {steps} steps", header, lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
