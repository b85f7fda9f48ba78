"""How many replicas of several pools the nodes of a cluster can hold at the same time.

Each pool may fit on a node alone, and still not beside the others. Ray would keep the replicas that
find no place waiting, and Ray Serve would replace no replica of their deployment meanwhile. `Room`
says beforehand how many find one. It places replicas on empty nodes, one after the other, each on
the first node that has room for it, so what Ray places in another order may fit less well.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush

from .placement import Node, NodeRequirement, fits

PARTS = 10_000  # of a CPU or of a GPU: Ray counts in them


class _FreeNode:
    """What is free on a node, in parts: of its CPUs together, and of each of its cards."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._cpus = round(node.num_cpus * PARTS)
        self._cards = [PARTS] * int(node.num_gpus)

    def take(self, need: NodeRequirement) -> bool:
        """Give a replica its place; return whether there is one.

        A part of a card is taken from the card with the least that is enough.
        """
        cpus, gpus = round(need.num_cpus * PARTS), round(need.num_gpus * PARTS)
        if cpus > self._cpus:
            return False
        whole, part = divmod(gpus, PARTS)
        enough = sorted((free, i) for i, free in enumerate(self._cards) if free >= (part or PARTS))
        if gpus and len(enough) < (whole or 1):
            return False
        for _, i in enough[:1] if part else enough[:whole]:
            self._cards[i] -= part or PARTS
        self._cpus -= cpus
        return True


class Room:
    """The nodes of a cluster, empty but for what always runs there."""

    def __init__(
        self,
        nodes: Sequence[Node],
        needs: Mapping[str, NodeRequirement],
        others: Iterable[NodeRequirement] = (),
    ) -> None:
        """`needs`: what a replica of each pool needs. `others`: what else runs on the nodes."""
        self._nodes, self._needs, self._others = nodes, needs, tuple(others)
        # Like Ray, 16-bit replicas go to nodes without FP8 first.
        self._fitting = {
            need: sorted(
                (i for i, node in enumerate(nodes) if fits(need, node)),
                key=lambda i: nodes[i].has_fp8(),
            )
            for need in {*needs.values(), *self._others}
        }

    def together(self, wanted: Mapping[str, int], least: Mapping[str, int]) -> dict[str, int]:
        """How many of the `wanted` replicas of each pool whose needs are known fit together.

        Each pool first gets its `least` ones, as far as they fit. From then on the next replica is
        one of the pool that has the smallest part of what it wants.
        """
        free = [_FreeNode(node) for node in self._nodes]
        next_nodes = {need: list(reversed(fitting)) for need, fitting in self._fitting.items()}

        def placed(need: NodeRequirement) -> bool:
            left = next_nodes[need]
            while left:
                if free[left[-1]].take(need):
                    return True
                left.pop()  # what is too full now stays so
            return False

        for need in self._others:
            placed(need)
        wanted = {pool: replicas for pool, replicas in wanted.items() if pool in self._needs}
        given = dict.fromkeys(wanted, 0)
        for pool, replicas in wanted.items():
            while given[pool] < min(least[pool], replicas) and placed(self._needs[pool]):
                given[pool] += 1
        hungry = [(given[p] / n, i, p) for i, (p, n) in enumerate(wanted.items()) if given[p] < n]
        heapify(hungry)
        while hungry:
            _, i, pool = heappop(hungry)
            if placed(self._needs[pool]):
                given[pool] += 1
                if given[pool] < wanted[pool]:
                    heappush(hungry, (given[pool] / wanted[pool], i, pool))
        return given
