"""How many replicas of several pools the nodes of a cluster can hold at the same time.

Pools may each fit on the nodes alone, but not all at once. Ray keeps replicas that fit on no node
pending, and while a deployment has a pending replica, Ray Serve replaces none of its replicas.
`Room` computes before the order how many replicas fit. It places replicas on empty nodes one after
the other, each on the first node with enough room. Ray may place them in another order, so fewer
may fit in reality.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from heapq import heapify, heappop, heappush

from .placement import Node, NodeRequirement, fits

PARTS = 10_000  # of a CPU or of a GPU: Ray counts in them


class _FreeNode:
    """Counts the free parts of a node: of all its CPUs, and of each of its cards."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._cpus = round(node.num_cpus * PARTS)
        self._cards = [PARTS] * int(node.num_gpus)

    def take(self, need: NodeRequirement) -> bool:
        """Give a replica its place; return whether there is one.

        A part of a card is taken from the card with the least free room that is enough.
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
    """The nodes of a cluster, empty at first."""

    def __init__(self, nodes: Sequence[Node], needs: Mapping[str, NodeRequirement]) -> None:
        """`needs`: what one replica of each pool, or of another deployment, needs of a node."""
        self._nodes, self._needs = nodes, needs
        self._fitting = {
            need: sorted(
                (i for i, node in enumerate(nodes) if fits(need, node)),
                key=partial(self._last_resort, need),
            )
            for need in set(needs.values())
        }

    def _last_resort(self, need: NodeRequirement, node: int) -> bool:
        """Return whether the node has a card, or FP8, that this replica does not need."""
        found = self._nodes[node]
        return found.has_fp8() if need.num_gpus else bool(found.num_gpus)

    def together(self, *stages: Mapping[str, int]) -> dict[str, int]:
        """How many replicas of each deployment fit, if they are placed stage after stage.

        A stage gives a target for each deployment: the number of replicas that it should have at
        the end of that stage. Replicas are placed one at a time. The next one goes to the
        deployment that has the smallest fraction of its target; on a tie, to the one that the stage
        names first. Deployments whose needs are not known are left out.
        """
        free = [_FreeNode(node) for node in self._nodes]
        next_nodes = {need: list(reversed(fitting)) for need, fitting in self._fitting.items()}
        given: dict[str, int] = {}

        def placed(need: NodeRequirement) -> bool:
            left = next_nodes[need]
            while left:
                if free[left[-1]].take(need):
                    return True
                left.pop()  # a node without room for this replica gets none later
            return False

        for stage in stages:
            known = {name: number for name, number in stage.items() if name in self._needs}
            given = dict.fromkeys(known, 0) | given
            hungry = [
                (given[n] / k, i, n) for i, (n, k) in enumerate(known.items()) if given[n] < k
            ]
            heapify(hungry)
            while hungry:
                _, i, name = heappop(hungry)
                if placed(self._needs[name]):
                    given[name] += 1
                    if given[name] < known[name]:
                        heappush(hungry, (given[name] / known[name], i, name))
        return given
