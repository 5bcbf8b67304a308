"""What docs/results.md says of the committed figures, asked of their files: where a rerun says otherwise, the sentences
have to change with the figures."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import results_page


def data(name: str) -> dict[str, Any]:
    return results_page.content(name)["data"]


def test_forum_maml() -> None:
    found = data("forum_maml")
    assert found["worst_difference"] < 1e-14
    assert found["same_bits"] is True
    assert found["meta_gradient"] == [4.3417762, 4.540181]


def test_learned_dataset() -> None:
    """The more draws, the easier the classes come apart; only at a rate of 1 is the stated task solved."""
    found = data("learned_dataset")

    def value(name: str, rate: float, draws: int) -> float:
        return fmean(r[name] for r in found["runs"] if (r["inner_lr"], r["draws"]) == (rate, draws))

    for rate in (0.01, 0.1):
        assert all(b > a for a, b in pairwise(value("separability", rate, draws) for draws in (1, 2, 4, 8)))
        assert value("separability", rate, 8) > 0.97
        assert all(abs(value("accuracy", rate, draws) - 0.5) < 0.02 for draws in (1, 2, 4, 8))
    assert min(value("accuracy", 1.0, draws) for draws in (1, 8)) > 0.999
    assert found["same_bits_on_workers"] is True


def test_maml_plus_plus() -> None:
    """Learned rates bring most of the gain; seeds end closer together; the annealed rate smooths by itself."""
    runs = data("maml_plus_plus")["runs"]

    def scores(variant: str) -> list[float]:
        return [run["accuracy"][0] for run in runs if run["variant"] == variant]

    def change(variant: str) -> float:
        halves = [run["curve"][len(run["curve"]) // 2 :] for run in runs if run["variant"] == variant]
        return fmean(abs(b - a) for half in halves for a, b in pairwise(half))

    assert all(len(scores(run["variant"])) == 3 for run in runs)
    assert fmean(scores("MAML++")) > fmean(scores("MAML")) + 0.05
    assert fmean(scores("+ LSLR")) > fmean(scores("MAML")) + 0.05
    assert all(fmean(scores(part)) < fmean(scores("MAML")) + 0.02 for part in ("+ MSL", "+ BNRS, BNWB", "+ DA", "+ CA"))
    assert stdev(scores("MAML++")) < stdev(scores("MAML"))
    assert max(change("MAML++"), change("+ CA")) < 0.6 * change("MAML")


def test_methods() -> None:
    """All learn both problems; CAVIA's few numbers fit waves best of what takes one step."""
    runs = data("methods")["runs"]

    def value(problem: str, method: str, name: str) -> float:
        return fmean(run["scores"][name][0] for run in runs if (run["problem"], run["method"]) == (problem, method))

    methods = list(dict.fromkeys(run["method"] for run in runs))
    assert len(runs) == 2 * 3 * len(methods) == 42
    letters = {method: value("letters", method, "accuracy") for method in methods}
    assert min(letters.values()) > 0.35
    assert max(letters, key=letters.__getitem__) in ("MAML", "Meta-SGD")
    assert letters["MAML"] > letters["FOMAML"]
    waves = {method: value("waves", method, "10-shot@1") for method in methods}
    assert min(waves, key=waves.__getitem__) == "CAVIA"


def test_hybrid_hyperopt() -> None:
    found = data("hybrid_hyperopt")
    assert max(x for way in found["agreement"].values() for x in way.values()) < 1e-14
    assert found["memory"]["Forward"][-1] < 1.02 * found["memory"]["Forward"][0]
    assert found["curve"]["hypergradients"][0] == -9407.7075

    def loss(way: str) -> float:
        return fmean(one["ways"][way]["test loss"] for one in found["adam"])

    assert loss("hypergradients, 40 runs") < loss("random search, 40 runs") < 0.2 * loss("Adam's defaults")


def test_reversible_schedules() -> None:
    """A learned schedule beats constant rates and linear decays; ten learned images beat mean and real ones."""
    found = data("reversible_schedules")
    losses = {name: fmean(run["training loss"]) for name, run in found["runs"].items()}
    learned = losses.pop("learned schedule")
    decays = [loss for name, loss in losses.items() if name.startswith("linear decay")]
    assert len(decays) == 2
    assert learned < min(decays) < min(loss for name, loss in losses.items() if name.startswith("constant"))
    assert found["reversing"]["recovered"] == 1000
    assert found["reversing"]["reversed"]["bits_per_step_and_element"] < 0.16
    made, means, real = (fmean(x) for x in found["accuracy after training on ten images"].values())
    assert made > means + 0.02 > real + 0.2


def test_hypercleaning() -> None:
    found = data("hypercleaning")
    exact = found["methods"]["reverse, exact"]
    assert exact["F1"] > 0.9
    assert found["agreement"]["difference"] < 1e-14
    assert found["untaught"]["all labels as they are"] < exact["accuracy"]
    assert exact["accuracy"] < found["untaught"]["the right labels (oracle)"]
    assert all(exact["F1"] >= way["F1"] for way in found["methods"].values())


def test_distillation() -> None:
    found = data("distillation")
    last = {name: curve[-1] for name, curve in found["accuracy"].items()}
    assert last["exact, 500 steps"] > last["last 50 steps"] > last["last 10 steps"]
    assert last["exact, 500 steps"] > max(found["real"].values())


def test_character_adaptation() -> None:
    """MAML's weights beat those of plain training with a tuned rate, and lose where both have the rates it learned."""
    after = {name: curve[-1][0] for name, curve in data("character_adaptation")["curves"].items()}
    borrowed = after.pop("plain, as many gradients; Adam; MAML's rates")
    own = after.pop("MAML; Adam")
    assert borrowed < own < min(after.values())


def test_learn2learn_omniglot() -> None:
    found = data("learn2learn_omniglot")
    assert max(found["apart_float64"].values()) < 1e-12
    theirs, ours = (dict(map(tuple, found["peaks"][name])) for name in ("maml-l2l", "maml-mm"))
    assert theirs[5] > 3.5 * ours[5]
