"""Every meta-gradient is that of memmeta's ``Unrolled``, on every problem; workloads are the same each time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from memmeta.errors import InputError
from memmeta.testing import error
from memmeta_bench.peers import REFERENCES, Method, find, methods
from memmeta_bench.problems import Workload, make, names, sizes_of

SMALL: dict[str, dict[str, Any]] = {
    "sinusoid_mlp": {"tasks": 3, "steps": 3, "shots": 4, "query": 4, "width": 5},
    "conv4": {"tasks": 2, "steps": 2, "query": 2, "width": 3, "depth": 2},
    "resnet12": {"tasks": 2, "steps": 2, "query": 1, "width": 2, "depth": 2},
    "gpt": {"tasks": 2, "steps": 2, "shots": 1, "query": 1, "width": 4, "depth": 1},
}
EXACT = [method for method in methods().values() if method.exact and not method.compiled]
PROGRAMS = ("traced", "forward")  # seconds of tracing on all but the smallest network
CROSSED = [
    pytest.param(
        problem,
        method,
        id=f"{problem}-{method.name}",
        marks=pytest.mark.slow if problem != "sinusoid_mlp" and method.name.endswith(PROGRAMS) else (),
    )
    for problem in names()
    for method in EXACT
]
FLOORS = [method for method in methods().values() if method.floor]


def small(problem: str) -> Workload:
    return make(problem, dtype="float64", **SMALL[problem])


def gradient(method: Method, work: Workload, **options: int) -> dict[str, torch.Tensor]:
    method.run(work, **options)
    return {"all": work.gradient()}


@pytest.mark.parametrize(("problem", "method"), CROSSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gradients_are_those_of_unrolled(problem: str, method: Method) -> None:
    if reason := method.available():
        pytest.skip(reason)
    work = small(problem)
    reference = gradient(find("memmeta-unrolled"), work)
    before = [p.detach().clone() for p in work.net.parameters()]
    assert reference["all"].norm() > 0
    assert error(gradient(method, work), reference) < 1e-9
    assert all(torch.equal(p, value) for p, value in zip(work.net.parameters(), before, strict=True))


def test_a_second_call_gives_the_same_gradient_again() -> None:
    for name in ("learn2learn-batched", "torch.func", "memmeta-stepwise-traced"):
        work = small("sinusoid_mlp")
        call = find(name).call(work)
        call()
        first = {"all": work.gradient()}
        work.net.zero_grad()
        call()
        assert error({"all": work.gradient()}, first) < 1e-12


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_do_not_change_the_gradient(chunk: int) -> None:
    work = small("sinusoid_mlp")
    reference = gradient(find("memmeta-unrolled"), work)
    assert error(gradient(find("memmeta-stepwise"), work, chunk=chunk), reference) < 1e-9


@pytest.mark.parametrize("method", FLOORS, ids=lambda method: method.name)
def test_floors_leave_the_parameters_as_they_are(method: Method) -> None:
    work = small("conv4")
    before = [p.detach().clone() for p in work.net.parameters()]
    method.run(work)
    assert all(torch.equal(p, value) for p, value in zip(work.net.parameters(), before, strict=True))


@pytest.mark.parametrize("problem", names())
def test_workloads_are_the_same_each_time(problem: str) -> None:
    state = torch.get_rng_state()
    first, second = make(problem, **SMALL[problem]), make(problem, **SMALL[problem])
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    for a, b in zip(first.tasks, second.tasks, strict=True):
        assert torch.equal(a.support[0], b.support[0])
        assert torch.equal(a.query[1], b.query[1])


@pytest.mark.parametrize("problem", names())
def test_sizes_are_those_of_the_workload(problem: str) -> None:
    work = make(problem, **SMALL[problem])
    assert (len(work.tasks), work.steps) == (SMALL[problem]["tasks"], SMALL[problem]["steps"])
    assert set(SMALL[problem]) <= set(sizes_of(problem)) == {"tasks", "steps", "shots", "query", "width", "depth"}
    wider = make(problem, **{**SMALL[problem], "width": 2 * SMALL[problem]["width"]})
    assert sum(p.numel() for p in wider.net.parameters()) > sum(p.numel() for p in work.net.parameters())


def test_the_first_tasks_do_not_depend_on_how_many_there_are() -> None:
    few, many = make("conv4", tasks=1, width=2), make("conv4", tasks=3, width=2)
    assert torch.equal(few.tasks[0].query[0], many.tasks[0].query[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lstm"}, "there is no problem 'lstm': write one of sinusoid_mlp"),
        ({"name": "conv4", "layers": 3}, "conv4 has no size 'layers': write one of tasks"),
        ({"name": "conv4", "tasks": 0}, "tasks=0: write an integer of at least 1"),
        ({"name": "conv4", "dtype": "int8"}, "dtype='int8': write 'float32' or 'float64'"),
        ({"name": "gpt", "width": 100}, "width=100 is not divisible by 3 heads: write a multiple of 32"),
    ],
)
def test_refused_workloads(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**arguments)  # pyright: ignore[reportArgumentType]


def test_refused_methods() -> None:
    with pytest.raises(InputError, match="there is no method 'reptile': write one of learn2learn-batched"):
        find("reptile")
    with pytest.raises(InputError, match=r"torch\.func has no option 'chunk': leave it out"):
        find("torch.func").run(small("sinusoid_mlp"), chunk=2)


def test_a_peer_that_is_not_installed_says_so() -> None:
    missing = dataclasses.replace(find("higher-batched"), module="no_such_package_here")
    assert missing.available() == "no_such_package_here is not installed: pip install no_such_package_here"
    with pytest.raises(InputError, match="no_such_package_here is not installed"):
        missing.run(small("sinusoid_mlp"))


def test_references_are_methods_of_this_library_and_exact() -> None:
    assert all(find(name).exact and not find(name).peer for name in REFERENCES)
