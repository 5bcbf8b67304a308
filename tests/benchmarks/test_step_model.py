"""The model of a synchronous step: what was put in comes out again, limits, orders, and closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from memmeta.errors import InputError
from memmeta_bench.step_model import PARTS, WORKERS, Measured, StepModel, fit, non_negative
from memmeta_bench.step_report import CLUSTERS, LOADS, modelled
from memmeta_bench.step_terms import Cluster, Load, Reduce, broadcast_seconds, queue, slowest_of

TRUE = {
    "publish": (2e-3, 3e-10),
    "fetch": (1e-4, 1.5e-10),
    "compute:wide": (4e-3, 5e-10),
    "compute:conv4": (0.2, 0.0),
    "gather": (3e-3, 4e-10),
    "message": (1.2e-3,),
    "reduce:server": (1e-3, 2e-10),
    "reduce:tree": (4e-3, 6e-10),
    "update": (2e-3, 7e-10),
}
MODEL = StepModel(TRUE)
MEGABYTE = 10**6
FAST = Cluster(bandwidth=12.5e9, latency=1e-4)


def measured(
    workers: int, megabytes: float, reduce: Reduce, problem: str = "wide", cores: int = 2, waves: int = 1
) -> Measured:
    """A point as the true constants make it."""
    load = Load(workers, workers * waves, 2, int(megabytes * MEGABYTE), reduce, problem)
    message = TRUE["message"][0] if megabytes < 1 else None
    return Measured(load, cores, MODEL.predict(load, Cluster(cores=cores)).parts, message)


def points() -> list[Measured]:
    reduces: tuple[Reduce, Reduce] = ("server", "tree")
    wide = [measured(n, size, reduce) for n in (1, 2, 4) for size in (0.1, 10, 400) for reduce in reduces]
    return [*wide, measured(1, 0.4, "server", "conv4"), measured(2, 0.4, "server", "conv4")]


def test_a_fit_finds_the_constants_of_exact_points() -> None:
    found = fit(points())
    assert found.constants.keys() == TRUE.keys()
    for name, constants in TRUE.items():
        assert found.constants[name] == pytest.approx(constants, rel=1e-9, abs=1e-20), name


def test_held_out_points_are_predicted_exactly_by_their_own_model() -> None:
    held_out = [measured(2, 100, "tree"), measured(3, 1, "server"), measured(2, 0.4, "server", "conv4", waves=5)]
    for check in fit(points()).check(held_out):
        assert check.error == pytest.approx(0, abs=1e-9)
        assert all(abs(error) < 1e-9 for error in check.errors.values())
        assert check.predicted == pytest.approx(check.point.seconds)


def test_noise_of_the_points_comes_out_as_an_error_of_its_size() -> None:
    draw = np.random.default_rng(0)
    noisy = [
        dataclasses.replace(point, parts={part: value * draw.normal(1, 0.03) for part, value in point.parts.items()})
        for point in points()
    ]
    errors = [check.error for check in fit(noisy).check([measured(2, size, "server") for size in (1, 40, 100)])]
    assert 0 < max(map(abs, errors)) < 0.05


def test_constants_are_never_negative_and_the_best_of_those() -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        matrix, values = draw.normal(size=(8, 3)), draw.normal(size=8)
        found = non_negative(matrix, values)
        slope = matrix.T @ (matrix @ found - values)  # Karush, Kuhn and Tucker: the solution and no other
        assert (found >= 0).all()
        assert (slope > -1e-9).all()
        assert abs(found * slope).max() < 1e-9


def test_points_that_do_not_tell_constants_apart_are_refused() -> None:
    with pytest.raises(InputError, match="publish: 2 points do not tell 2 constants apart: measure at two sizes"):
        fit([measured(n, 0.1, "server") for n in (1, 2)])
    with pytest.raises(InputError, match="no point has the driver's seconds for a shard"):
        fit([measured(n, size, "server") for size in (10, 400) for n in (1, 2)])
    with pytest.raises(InputError, match="one shard per worker"):
        fit([measured(2, 1, "server", waves=3)])
    several = fit([*points(), measured(2, 1, "tree", waves=3)]).constants
    assert all(several[name] == pytest.approx(constants, rel=1e-9, abs=1e-20) for name, constants in TRUE.items())
    with pytest.raises(InputError, match="no constants for reduce:tree"):
        fit([point for point in points() if point.load.reduce == "server"]).predict(measured(2, 1, "tree").load)


def test_a_point_is_read_from_a_row() -> None:
    sizes = {"workers": 2, "shards": 4, "shard_tasks": 3, "nbytes": 4096, "cores": 2, "megabytes": 0.004}
    row = {"problem": "wide", "method": "tree", "sizes": sizes, "parts": dict.fromkeys(PARTS, 0.5)}
    row["message_seconds"] = 1e-3
    point = Measured.of(row)
    assert point == Measured(Load(2, 4, 3, 4096, "tree", "wide"), 2, dict.fromkeys(PARTS, 0.5), 1e-3)
    assert point.seconds == 3.0


@pytest.mark.parametrize("broadcast", ["star", "binomial"])
@pytest.mark.parametrize("reduce", ["server", "tree"])
def test_more_of_what_costs_never_makes_a_step_shorter(reduce: Reduce, broadcast: str) -> None:
    cluster = dataclasses.replace(FAST, broadcast=broadcast, sigma=0.3, failures=0.1)
    load = Load(64, 128, 2, 100 * MEGABYTE, reduce)
    base = MODEL.predict(load, cluster).seconds
    for field in ("latency", "sigma", "failures", "detection", "replacement"):
        more = dataclasses.replace(cluster, **{field: 2 * getattr(cluster, field)})
        assert MODEL.predict(load, more).seconds > base, field
    assert MODEL.predict(load, dataclasses.replace(cluster, bandwidth=1e9)).seconds > base
    for field in ("nbytes", "shard_tasks", "shards"):
        assert MODEL.predict(dataclasses.replace(load, **{field: 2 * getattr(load, field)}), cluster).seconds > base
    steps = MODEL.extrapolate(load, cluster)
    assert [step.load.workers for step in steps] == list(WORKERS)
    assert all(a.seconds < b.seconds and a.efficiency > b.efficiency for a, b in itertools.pairwise(steps))


def test_one_worker_on_no_network_is_the_measured_machine() -> None:
    load = Load(1, 3, 2, MEGABYTE)
    alone, here = MODEL.predict(load), MODEL.predict(load, Cluster(cores=2))
    assert alone.parts == here.parts
    assert (alone.redo, alone.seconds) == (0.0, sum(alone.parts.values()))
    assert alone.tasks_per_second == 6 / alone.seconds
    crowded = MODEL.predict(Load(4, 4, 2, MEGABYTE), Cluster(cores=2)).parts["compute"]
    assert crowded == pytest.approx(2 * MODEL.predict(Load(4, 4, 2, MEGABYTE), Cluster(cores=4)).parts["compute"])


def test_the_tree_takes_the_root_alone_to_the_server() -> None:
    server, tree = (
        MODEL.predict(Load(512, 512, 1, 400 * MEGABYTE, reduce), Cluster(bandwidth=12.5e9, broadcast="binomial"))
        for reduce in ("server", "tree")
    )
    assert (server.bytes_in, tree.bytes_in) == (512 * 400 * MEGABYTE, 400 * MEGABYTE)
    assert server.bytes_out == tree.bytes_out == 10 * 400 * MEGABYTE  # 2**9 < 513 holders
    assert server.parts["reduce"] > 512 * 400e6 / 12.5e9 > tree.parts["reduce"]
    assert server.bound == "reduce"


def test_the_network_costs_what_the_formulas_say() -> None:
    star, tree = FAST, dataclasses.replace(FAST, broadcast="binomial")
    assert broadcast_seconds(64, MEGABYTE, star) == pytest.approx(1e-4 + 64e6 / 12.5e9)
    for workers, rounds in ((1, 1), (2, 2), (3, 2), (7, 3), (8, 4), (4096, 13)):
        assert broadcast_seconds(workers, MEGABYTE, tree) == pytest.approx(rounds * (1e-4 + 1e6 / 12.5e9))
    assert broadcast_seconds(64, MEGABYTE, Cluster()) == 0


@pytest.mark.parametrize(("workers", "shards"), [(3, 3), (3, 9), (4, 10), (5, 2)])
def test_what_is_left_in_a_queue_is_what_a_simulation_leaves(workers: int, shards: int) -> None:
    load = Load(workers, shards, 1, 0)
    for seconds, wave in itertools.product((0.0, 0.01, 0.4, 3.0), (0.1, 1.0)):
        free = 0.0
        for index in range(shards):
            arrived = (index // workers + 1) * wave
            free = max(free, arrived) + seconds
        assert queue(seconds, load, wave) == pytest.approx(free - load.waves * wave)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("copy_after", [None, 1.5])
def test_the_slowest_of_many_is_that_of_a_simulation(sigma: float, copy_after: float | None) -> None:
    draw = np.random.default_rng(2)
    for workers, times in ((1, 200_000), (8, 50_000), (100, 5000)):
        found = draw.lognormal(-(sigma**2) / 2, sigma, (times, workers))
        if copy_after is not None:
            found = np.minimum(found, copy_after + draw.lognormal(-(sigma**2) / 2, sigma, found.shape))
        slowest = found.max(axis=1)
        within = 5 * slowest.std() / math.sqrt(times) + 1e-9
        assert slowest_of(workers, sigma, copy_after) == pytest.approx(slowest.mean(), abs=within)


def test_the_slowest_in_closed_form_and_in_the_limits() -> None:
    for sigma in (1e-4, 0.1, 0.5, 1.5):
        assert slowest_of(1, sigma) == pytest.approx(1, rel=1e-7)

        of_two = 1 + math.erf(sigma / 2)
        assert slowest_of(2, sigma) == pytest.approx(of_two, rel=1e-7)
    assert slowest_of(4096, 0.0) == 1.0
    grows = [slowest_of(2**n, 0.4) for n in range(0, 21, 4)]
    assert grows == sorted(grows)
    assert slowest_of(4096, 0.5, 1.5) < slowest_of(4096, 0.5)
    assert slowest_of(64, 0.3, 1e6) == pytest.approx(slowest_of(64, 0.3))


@pytest.mark.parametrize("broadcast", ["star", "binomial"])
def test_the_server_saturates_where_the_closed_form_says(broadcast: str) -> None:
    cluster = dataclasses.replace(FAST, broadcast="star")
    load = Load(1, 1, 4, 100 * MEGABYTE, task_seconds=2.0)
    size, moving = load.nbytes, load.nbytes / cluster.bandwidth
    (p0, p1), (f0, f1), (g0, g1) = TRUE["publish"], TRUE["fetch"], TRUE["gather"]
    (r0, r1), (u0, u1) = TRUE["reduce:server"], TRUE["update"]
    once = p0 + u0 + f0 + g0 + (p1 + u1 + f1 + g1 - r1) * size + cluster.latency
    each = moving + TRUE["message"][0] + r0 + r1 * size + cluster.latency + moving
    for efficiency in (0.9, 0.5, 0.1):
        exact = (8.0 / efficiency - 8.0 - once) / each
        assert MODEL.saturation(load, cluster, efficiency) == math.floor(exact)
    assert MODEL.limit(load, cluster) == pytest.approx(4 / each)
    cluster = dataclasses.replace(FAST, broadcast=broadcast)
    many = MODEL.predict(dataclasses.replace(load, workers=2**22, shards=2**22), cluster)
    assert many.tasks_per_second == pytest.approx(MODEL.limit(load, cluster), rel=1e-3)
    assert many.tasks_per_second < MODEL.limit(load, cluster)


def test_the_tree_saturates_later_and_a_step_of_nothing_never() -> None:
    cluster = dataclasses.replace(FAST, broadcast="binomial")
    load = Load(1, 4, 1, 400 * MEGABYTE, task_seconds=2.0)
    server = MODEL.saturation(load, cluster)
    tree = MODEL.saturation(dataclasses.replace(load, reduce="tree"), cluster)
    assert server is not None
    assert tree is not None
    assert tree > 10 * server
    many = Load(2**22, 2**24, 1, 400 * MEGABYTE, "tree", task_seconds=2.0)
    limit = MODEL.limit(many, cluster)
    assert limit == pytest.approx(1 / TRUE["message"][0])
    assert 0.99 * limit < MODEL.predict(many, cluster).tasks_per_second < limit
    free = StepModel({name: tuple(0.0 for _ in constants) for name, constants in TRUE.items()})
    assert free.saturation(Load(1, 1, 1, 0, task_seconds=1.0), Cluster()) is None
    assert free.limit(Load(1, 1, 1, 0, task_seconds=1.0), Cluster()) == math.inf
    assert MODEL.saturation(Load(1, 1, 1, 400 * MEGABYTE, task_seconds=1e-4), cluster) == 0


def test_failures_cost_the_time_of_what_is_done_again() -> None:
    load = Load(100, 300, 1, 0, task_seconds=10.0)
    found = MODEL.predict(load, Cluster(failures=0.36, detection=2.0, replacement=0.0))
    assert found.parts["compute"] == pytest.approx(30.0)
    assert found.redo == pytest.approx((1 - math.exp(-0.3)) * 12.0)
    slow = MODEL.predict(load, Cluster(failures=0.36, detection=2.0, replacement=100.0))
    assert slow.parts["compute"] == pytest.approx(30.0 * 1.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Load(0, 1, 1, 1), "must be 1 or more"),
        (lambda: Load(1, 1, 1, 1, "ring"), 'write "server" or "tree"'),  # pyright: ignore[reportArgumentType]
        (lambda: Cluster(bandwidth=0), "bandwidth must be above 0"),
        (lambda: Cluster(sigma=-1), "no rate or time can be negative"),
        (lambda: Cluster(copy_after=0.5), "nothing is late before it is due"),
        (lambda: Cluster(broadcast="ring"), 'write "star" or "binomial"'),  # pyright: ignore[reportArgumentType]
        (lambda: MODEL.saturation(Load(1, 1, 1, 1), Cluster(), 0.0), "a number above 0, and 1 at most"),
    ],
)
def test_refusals(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(InputError, match=message):
        wrong()


def test_rows_become_a_model_with_checks_and_an_extrapolation() -> None:
    rows = [as_row(point, held_out=False) for point in points()]
    rows += [as_row(measured(2, 100, "tree"), held_out=True), {**rows[0], "status": "failed", "parts": None}]
    rows += [{**as_row(measured(2, 100, "tree"), held_out=True), "problem": "of which no other point was measured"}]
    found = modelled([*rows, {"benchmark": "memory"}])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (check,) = found["checks"]
    assert (check["method"], check["workers"], check["nbytes"]) == ("tree", 2, 100 * MEGABYTE)
    assert found["worst_error"] == found["median_error"] == pytest.approx(0, abs=1e-9)
    assert len(found["extrapolation"]) == len(CLUSTERS) * len(LOADS) * 4
    for one in found["extrapolation"]:
        assert [step["workers"] for step in one["steps"]] == list(WORKERS)
        assert one["steps"][-1]["tasks_per_second"] < one["limit_tasks_per_second"]


def test_too_few_rows_are_told_and_not_raised() -> None:
    found = modelled([as_row(measured(2, 0.1, "server"), held_out=False)])
    assert found.keys() == {"reason"}
    assert found["reason"].startswith("publish: 1 points do not tell 2 constants apart")
    rows = [as_row(point, held_out=False) for point in points() if point.load.reduce == "server"]
    free = {"none": Cluster()}
    found = modelled(rows, free, {"nothing": Load(1, 1, 1, 0, task_seconds=1e6)}, workers=(1, 2))
    assert {one["reduce"] for one in found["extrapolation"]} == {"server"}
    assert found["worst_error"] is None
    assert found["extrapolation"][0]["inputs"]["bandwidth"] is None
    half = MODEL.saturation(Load(1, 1, 1, 0, task_seconds=1e6), Cluster())
    assert {one["half_efficiency_workers"] for one in found["extrapolation"]} == {half}


def as_row(point: Measured, held_out: bool) -> dict[str, Any]:
    """The row that a measurement of this point would be."""
    load = point.load
    sizes = {"workers": load.workers, "shards": load.shards, "shard_tasks": load.shard_tasks, "nbytes": load.nbytes}
    return {
        "benchmark": "scaling",
        "status": "ok",
        "problem": load.problem,
        "method": load.reduce,
        "sizes": {**sizes, "cores": point.cores},
        "parts": dict(point.parts),
        "message_seconds": point.message,
        "held_out": held_out,
    }
