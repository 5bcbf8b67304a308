"""Algebra on dicts of tensors, and nested trees seen as such dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import memmeta as mm
from memmeta import trees


class Pair(NamedTuple):
    left: Any
    right: Any


def x(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


TREES: dict[str, tuple[Any, list[str]]] = {
    "a tensor": (x(1), [""]),
    "nothing": ({}, []),
    "a constant": ("text", []),
    "a dict": ({"a": x(1), "b": x(2)}, ["a", "b"]),
    "its order": ({"b": x(1), "a": x(2)}, ["b", "a"]),
    "a list": ([x(1), 3, x(2)], ["0", "2"]),
    "a tuple": ((x(1), None, (x(2),)), ["0", "2.0"]),
    "a named tuple": (Pair(x(1), [x(2)]), ["0", "1.0"]),
    "numbers as keys": ({1: x(1), 2: {"c": x(2)}}, ["1", "2.c"]),
    "names with dots": ({"0.weight": x(1), "0.bias": x(2)}, ["0.weight", "0.bias"]),
    "a shape": ({"size": torch.Size([2, 3]), "a": x(1)}, ["a"]),
    "deep": ({"a": [({"b": Pair(x(1), "c")}, x(2))], "d": 1.5}, ["a.0.0.b.0", "a.0.1"]),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", TREES)
def test_trees_go_round(name: str) -> None:
    tree, paths = TREES[name]
    leaves, rebuild = trees.flatten(tree)
    assert list(leaves) == paths
    assert same(rebuild(leaves), tree)
    assert [id(leaf) for leaf in trees.tensors(tree)] == [id(leaf) for leaf in leaves.values()]
    doubled = trees.map_tensors(lambda leaf: 2 * leaf, tree)
    assert same(trees.map_tensors(lambda leaf: leaf / 2, doubled), tree)


def test_a_prefix_and_other_mappings() -> None:
    leaves, rebuild = trees.flatten(OrderedDict(a=x(1)), "root")
    assert list(leaves) == ["root.a"]
    assert torch.equal(rebuild({"root.a": x(7)})["a"], x(7))


@pytest.mark.parametrize("tree", [{"a.b": x(1), "a": {"b": x(2)}}, {1: x(1), "1": x(2)}], ids=["dots", "types"])
def test_two_tensors_at_one_path_are_refused(tree: Any) -> None:
    with pytest.raises(mm.InputError, match="two tensors of a tree have the path"):
        trees.flatten(tree)
    with pytest.raises(mm.InputError, match="two tensors of a tree have the path"):
        mm.adapt(lambda p, m, b: p["w"].sum(), {"w": x(1)}, [0], optimizer=mm.SGD(lr=0.1), meta=tree)


A = {"u": x(1, 2), "v": x(3)}
B = {"u": x(-1, 4), "v": x(0.5)}


def test_algebra() -> None:
    assert float(trees.dot(A, B)) == -1 + 8 + 1.5
    assert float(trees.norm(A)) == 14**0.5
    assert same(trees.axpy(2.0, A, B), {"u": x(1, 8), "v": x(6.5)})
    assert same(trees.zeros_like(A), {"u": x(0, 0), "v": x(0)})
    total = {name: leaf.clone() for name, leaf in A.items()}
    assert trees.add_(total, {"u": x(1, 1)}) is total
    assert same(total, {"u": x(2, 3), "v": x(3)})
    assert trees.nbytes(A) == 24


@pytest.mark.parametrize(
    "operation", [lambda a, b: trees.dot(a, b), lambda a, b: trees.axpy(1.0, a, b)], ids=["dot", "axpy"]
)
def test_other_names_are_refused(operation: Callable[..., Any]) -> None:
    for other in ({"u": x(1, 2)}, {**A, "w": x(1)}):
        with pytest.raises(mm.InputError, match=r"two trees have other names: \['[vw]'\]"):
            operation(A, other)


def test_adding_to_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        trees.add_({"u": x(1, 2)}, A)


def test_leaves_share_memory_and_know_whether_they_require_grad() -> None:
    tree = {"a": x(1).requires_grad_(), "b": x(2), "n": torch.tensor([1])}
    cut, all_of_them = trees.cut(tree), trees.leaves({name: tree[name] for name in "ab"})
    assert trees.wanted(tree) == trees.wanted(cut) == ["a"]
    assert trees.wanted(all_of_them) == ["a", "b"]
    assert trees.wanted(trees.detach(tree)) == []
    for made in (cut, all_of_them):
        assert all(leaf.is_leaf and leaf is not tree[name] for name, leaf in made.items())
        assert all(leaf.data_ptr() == tree[name].data_ptr() for name, leaf in made.items())
