"""Watching the cluster: which pools could be placed, which nodes and replicas are about to go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from cluster.placement import Node, NodeRequirement, fits, unknown_cards

from .grants import Grants
from .protocol import DispatchEvent
from .scaling import Scaling
from .serve_status import ReplicaStates

log = logging.getLogger("ray.serve")


class NodeWatch:
    """Reads the nodes from time to time, and passes on what follows.

    Grants and scaling learn where replicas could be placed and which nodes are being drained.
    Sessions learn which of their waiting images are refused, because no pool is possible any more.
    """

    def __init__(
        self,
        read_nodes: Callable[[], Iterable[Node]],
        read_states: Callable[[], ReplicaStates],
        grants: Grants,
        scaling: Scaling,
        deliver: Callable[[Iterable[DispatchEvent]], None],
    ) -> None:
        """`read_nodes`: returns the cluster's nodes.

        `read_states`: returns the states of Ray Serve's replicas. Both may block. `deliver`: sends
        events to their sessions.
        """
        self._needs: Mapping[str, NodeRequirement] = {}
        self._read_nodes, self._read_states = read_nodes, read_states
        self._grants, self._scaling, self._deliver = grants, scaling, deliver
        self._warned: set[str] = set()
        self._changed = asyncio.Event()  # the pools have changed since the last look

    def set_needs(self, needs: Mapping[str, NodeRequirement]) -> None:
        """Set the pools: by pool, what one replica needs of a node."""
        self._needs = needs
        self._changed.set()

    async def run(self, every_s: float) -> None:
        """Look at the nodes every `every_s` seconds and when the pools change, for ever."""
        await self._changed.wait()
        while True:
            self._changed.clear()
            await self.look()
            await self.look_at_excess()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), every_s)

    async def look(self) -> None:
        """Look at the nodes once. If Ray does not answer, the last known state stays."""
        try:
            nodes = list(await asyncio.to_thread(self._read_nodes))
        except Exception:  # Ray's errors have no common class
            log.warning("could not read the cluster's nodes; trying again", exc_info=True)
            return
        self._warn(nodes)
        alive = {node.id for node in nodes}
        # A drained node stays drained after it is gone: its replicas may still report themselves.
        gone = {node for node in self._grants.draining if node not in alive}
        self._grants.draining = frozenset({node.id for node in nodes if node.draining} | gone)
        staying = [node for node in nodes if not node.draining]
        self._scaling.placeable = frozenset(
            pool for pool, need in self._needs.items() if any(fits(need, n) for n in staying)
        )
        self._grants.set_placeable(filter(self._scaling.may_come, self._needs))
        self._deliver(self._grants.refuse())

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

    def _warn(self, nodes: Iterable[Node]) -> None:
        for node, warning in unknown_cards(nodes).items():
            if node not in self._warned:
                log.warning(warning)
                self._warned.add(node)
