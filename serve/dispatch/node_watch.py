"""Watching the cluster: which pools could be placed, which nodes and replicas are about to go."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from cluster.placement import Node, NodeRequirement, fits, unknown_cards
from cluster.room import Room

from .cordons import WINDOW_S, Cordons
from .grants import Grants
from .protocol import CordonedNode, DispatchEvent
from .scaling import Scaling
from .serve_status import ReplicaStates

log = logging.getLogger("ray.serve")


class NodeWatch:
    """Reads the nodes from time to time, and passes on what follows.

    Grants and scaling learn where replicas could be placed and which nodes are being drained.
    Sessions learn which of their waiting images are refused, because no pool is possible any more.
    Cordoned nodes are drained.
    """

    def __init__(
        self,
        read_nodes: Callable[[], Iterable[Node]],
        drain: Callable[[str], None],
        read_states: Callable[[], ReplicaStates],
        grants: Grants,
        scaling: Scaling,
        cordons: Cordons,
        deliver: Callable[[Iterable[DispatchEvent]], None],
    ) -> None:
        """`read_nodes`: returns the cluster's nodes.

        `drain`: lets Ray place nothing new on a node. `read_states`: returns the states of Ray
        Serve's replicas. These three may block. `deliver`: sends events to their sessions.
        """
        self._needs: Mapping[str, NodeRequirement] = {}
        self._others: Mapping[str, NodeRequirement] = {}
        self._cordoned_at = -math.inf  # the last time that a node was cordoned by itself
        self._read_nodes, self._drain, self._read_states = read_nodes, drain, read_states
        self._grants, self._scaling, self._deliver = grants, scaling, deliver
        self._cordons = cordons
        self.nodes: dict[str, Node] = {}  # living nodes, by id
        self._warned: set[str] = set()
        self._changed = asyncio.Event()  # pools or cordons have changed since the last look

    def set_needs(
        self,
        needs: Mapping[str, NodeRequirement],
        others: Mapping[str, NodeRequirement] | None = None,
    ) -> None:
        """Set what one replica of each pool, and of each other deployment, needs of a node."""
        self._needs, self._others = needs, others or {}
        self.look_again()

    def end_drain(self, node: str) -> None:
        """Let the replicas of a node get images again, unless Ray drains it."""
        self._grants.set_draining(self._grants.draining - {node}, time.monotonic())

    def look_again(self) -> None:
        """Look at the nodes at once."""
        self._changed.set()

    async def run(self, every_s: float) -> None:
        """Look at the nodes every `every_s` seconds and when something has changed, for ever."""
        await self._changed.wait()
        while True:
            self._changed.clear()
            await self.look()
            await self.look_at_excess()
            with suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._changed.wait()

    async def look(self) -> None:
        """Look at the nodes once. If Ray does not answer, the last known state stays."""
        try:
            nodes = list(await asyncio.to_thread(self._read_nodes))
        except Exception:  # Ray's errors have no common class
            log.warning("could not read the cluster's nodes; trying again", exc_info=True)
            return
        self._warn(nodes)
        before, self.nodes = self.nodes.keys(), {node.id: node for node in nodes}
        for node in before - self.nodes.keys():
            self._cordons.gone(node)
        # A drained node stays drained after it is gone: its replicas may still report themselves.
        gone = {node for node in self._grants.draining if node not in self.nodes}
        cordoned = self._cordons.cordoned.keys() & self.nodes.keys()
        draining = {node.id for node in nodes if node.draining}
        self._grants.set_draining(frozenset(draining | cordoned | gone), time.monotonic())
        staying = self._staying()
        self._scaling.placeable = frozenset(
            pool for pool, need in self._needs.items() if any(fits(need, n) for n in staying)
        )
        self._scaling.room = Room(staying, {**self._needs, **self._others})
        self._grants.set_placeable(filter(self._scaling.may_come, self._needs))
        self._deliver(self._grants.refuse())
        for node in cordoned - draining:
            if node not in self._cordons.cordoned:  # an operator has changed his mind meanwhile
                continue
            try:
                await asyncio.to_thread(self._drain, node)
            except Exception:  # Ray's errors have no common class
                log.warning("node %s: could not drain it; trying again", node[:8], exc_info=True)

    def to_cordon(self, now: float) -> CordonedNode | None:
        """The node that is to be cordoned now, because a card of it fails; None if there is none.

        At most one within `WINDOW_S`: what looks like the failure of many cards is more likely to
        be one of the network. A node without which a pool or another deployment could not be
        placed is not cordoned: images are tried again on a card that may fail, but without any card
        they would be refused.
        """
        if now - self._cordoned_at < WINDOW_S:
            return None
        for due in self._cordons.due(now):
            if (node := self.nodes.get(due.node)) is None:
                continue
            others = [
                other
                for other in self._staying()
                if other.id != node.id and other.id not in self._cordons.cordoned
            ]
            needed = any(
                fits(need, node) and not any(fits(need, other) for other in others)
                for need in (*self._needs.values(), *self._others.values())
            )
            if not needed or self._scaling.limits.tuning.node_wait_s:
                self._cordoned_at = now
                return due
            if node.id not in self._warned:
                self._warned.add(node.id)
                log.error("%s; its node stays, because no other could take its place", due.reason)
        return None

    async def look_at_excess(self) -> None:
        """Let replicas get images again that were in excess, but that Ray Serve does not stop."""
        if not self._grants.in_excess():
            return
        try:
            states = await asyncio.to_thread(self._read_states)
        except Exception:  # Ray's errors have no common class
            log.warning("could not read the states of the replicas; trying again", exc_info=True)
            return
        stopping = {name: found.get("STOPPING", 0) for name, found in states.items()}
        self._scaling.restore(stopping, time.monotonic())

    def _staying(self) -> list[Node]:
        """The living nodes that are not about to go."""
        return [node for node in self.nodes.values() if node.id not in self._grants.draining]

    def _warn(self, nodes: Iterable[Node]) -> None:
        for node, warning in unknown_cards(nodes).items():
            if node not in self._warned:
                log.warning(warning)
                self._warned.add(node)
