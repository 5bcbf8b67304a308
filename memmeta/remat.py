"""Computing cheap values again, in a flat program, instead of keeping them over its peak."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

from torch import Tensor
from torch.fx import GraphModule, Node

from .flat import aten

_VIEWS = {
    aten.reshape.default,
    aten.view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.unbind.int,
    operator.getitem,
}

_CHEAP = {
    *_VIEWS,
    aten.clone.default,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.neg.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.where.self,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten._native_batch_norm_legit_functional.default,
}
"""One or two passes over memory: less than a tenth of the matrix product or convolution beside it."""

_DEPTH = 4
_numbers = itertools.count(-1, -1)  # names of storages that were not there in the tracing
_SHARE = 100  # storages below this fraction of the peak are left alone


class _Lives:
    """From where to where in a program each storage is alive, and the peak that comes of it."""

    def __init__(self, module: GraphModule) -> None:
        self.nodes = list(module.graph.nodes)
        self.at = {node: index for index, node in enumerate(self.nodes)}
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self.uses: dict[int, set[int]] = {}
        self.given: set[int] = set()
        for index, node in enumerate(self.nodes):
            for storage, size in _sizes(node):
                self.first.setdefault(storage, index)
                self.last[storage] = max(self.last.get(storage, index), index)
                self.size[storage] = size
                if node.op == "placeholder":
                    self.given.add(storage)
            for used in node.all_input_nodes:
                for storage, _ in _sizes(used):
                    self.last[storage] = index
                    self.uses.setdefault(storage, set()).add(index)

        self.live = self._live()
        self.peak = max(self.live)
        self.where = self.live.index(self.peak)

    def _live(self) -> list[int]:
        """The bytes that are alive at each node; inputs are the caller's."""
        changes = [0] * (len(self.nodes) + 1)
        for storage, first in self.first.items():
            if storage not in self.given:
                changes[first] += self.size[storage]
                changes[self.last[storage] + 1] -= self.size[storage]
        return list(itertools.accumulate(changes))

    def across(self) -> Iterator[int]:
        """Storages that are kept over the peak without being used there, the largest first."""
        where = self.where
        found = [
            storage
            for storage, first in self.first.items()
            if storage not in self.given
            and first < where < self.last[storage]
            and where not in self.uses.get(storage, ())
        ]
        yield from sorted(found, key=lambda storage: (-self.size[storage], self.first[storage]))


def _sizes(node: Node) -> list[tuple[int, int]]:
    """(identity, bytes) of each storage that a node's values lie in."""
    found: list[tuple[int, int]] | None = node.meta.get("storages")
    if found is None:
        value = node.meta.get("val")
        tensors = value if isinstance(value, (list, tuple)) else [value]
        pieces = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
        found = node.meta["storages"] = [(piece._cdata, piece.nbytes()) for piece in pieces]
    return found


def _held(node: Node) -> set[int]:
    return {storage for storage, _ in _sizes(node)}


def rematerialise(module: GraphModule) -> int:
    """Compute cheap values again after the peak where what they come from is alive anyway; returns how many.

    Activation checkpointing without a cost in matrix products: a normalisation or an elementwise function is computed
    again from its input, which its own backward keeps. The values are the same bits.
    """
    done, refused = 0, set[int]()
    while True:
        lives = _Lives(module)
        for storage in lives.across():
            # What is computed again already stays where it is: two that are made together would change places for ever.
            if (
                storage >= 0
                and storage not in refused
                and lives.size[storage] * _SHARE >= lives.peak
                and _again(module, lives, storage)
            ):
                done += 1
                break
            refused.add(storage)
        else:
            break
    module.recompile()
    return done


def _again(module: GraphModule, lives: _Lives, storage: int) -> bool:
    """Compute what lies in ``storage`` again before its first use after the peak, unless that would be a higher one."""
    where = lives.where
    holders = [node for node in lives.nodes if storage in _held(node)]
    later = sorted(
        {user for node in holders for user in node.users if lives.at[user] > where}, key=lives.at.__getitem__
    )
    later = [user for user in later if user not in holders]
    if not later or any(user.op == "output" for user in later):
        return False
    first = lives.at[later[0]]
    copies: dict[Node, Node] = {}
    wanted = [node for node in holders if any(user in node.users for user in later)]
    plan: list[Node] = []
    if not all(_plan(node, lives, storage, first, plan, _DEPTH) for node in wanted):
        return False
    made = {storage: next(_numbers) for node in plan for storage in _held(node) if _begins(node, storage, lives)}
    if lives.live[first] - lives.size[storage] + sum(lives.size[s] for s in made) > lives.peak:
        return False
    with module.graph.inserting_before(later[0]):
        for node in plan:
            copy = copies[node] = module.graph.node_copy(node, lambda n: copies.get(n, n))
            copy.meta = {**node.meta, "storages": [(made.get(s, s), size) for s, size in _sizes(node)]}
    for node in wanted:
        for user in later:
            user.replace_input_with(node, copies[node])
    module.graph.eliminate_dead_code()
    return True


def _begins(node: Node, storage: int, lives: _Lives) -> bool:
    """Whether a node makes a storage (and does not just look at it)."""
    return lives.first[storage] == lives.at[node]


def _plan(node: Node, lives: _Lives, gone: int, first: int, plan: list[Node], depth: int) -> bool:
    """Append to ``plan`` what has to be run to have ``node`` again at ``first``, in order."""
    if node in plan:
        return True
    held = _held(node)
    if node.op == "placeholder" or (gone not in held and all(lives.last[s] >= first for s in held)):
        return True
    if depth == 0 or node.target not in _CHEAP:
        return False
    if not all(_plan(n, lives, gone, first, plan, depth - (node.target not in _VIEWS)) for n in node.all_input_nodes):
        return False
    plan.append(node)
    return True
