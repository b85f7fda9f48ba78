"""The Dispatcher deployment: the one owner of the queue, exactly one replica, no GPU.

It is `Grants` with a clock and a network. Each Ingress opens a stream on which outcomes arrive in
batches, and tells its submits and releases in batches; each Generator reports itself. Which pools
the cluster's nodes could hold is looked up every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from cluster.placement import Need, Node, fits, unknown_cards
from cluster.ray_nodes import living_nodes

from ..settings import Live
from .grants import Grants
from .messages import Heartbeat, Lease, Outcome, Running, Submission

log = logging.getLogger("ray.serve")

SESSION_LEASE_S = 10.0
REPLICA_LEASE_S = 5.0
HEARTBEAT_S = 1.0  # how often Ingresses and Generators are heard from
NODES_S = 2.0  # how often the cluster's nodes are looked up
RECOVERY_S = 2.0  # after a restart nothing is granted until every Ingress could say what runs


class Dispatcher:
    """See `serve.dispatch.session` for the other end of `session` and `tell`."""

    def __init__(
        self,
        pools: Mapping[str, Need],
        read_nodes: Callable[[], Iterable[Node]] = living_nodes,
        recovery_s: float = RECOVERY_S,
    ) -> None:
        """`pools` and what one replica of each needs; `read_nodes` may block."""
        self._pools, self._read_nodes = pools, read_nodes
        self._grants = Grants(
            max_queued=Live().max_queued,
            session_lease_s=SESSION_LEASE_S,
            replica_lease_s=REPLICA_LEASE_S,
        )
        self._grants_from = time.monotonic() + recovery_s
        self._streams: dict[str, asyncio.Queue[Outcome | None]] = {}
        self._calls: dict[str, int] = {}  # open ones, by session
        self._warned: set[str] = set()
        self._tasks = [asyncio.create_task(self._expire()), asyncio.create_task(self._place())]

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with `max_queued`, at the start and when it changes."""
        self._grants.max_queued = user_config["max_queued"]

    async def session(
        self, session: str, waiting: list[Submission], running: list[Running]
    ) -> AsyncIterator[list[Outcome]]:
        """Outcomes for one Ingress, in batches, from what it still waits for and runs.

        Opening a session again replaces it. Ends when it expires or is replaced. The first batch
        is always empty: it says that the session is open.
        """
        self._end(session)
        stream: asyncio.Queue[Outcome | None] = asyncio.Queue()
        self._streams[session] = stream
        self._grants.open(session, time.monotonic(), [Running(*entry) for entry in running])
        self._submit(session, waiting)
        try:
            yield []
            while (first := await stream.get()) is not None:
                batch = [first]
                while not stream.empty():
                    if (more := stream.get_nowait()) is None:
                        yield batch
                        return
                    batch.append(more)
                yield batch
        finally:
            if self._streams.get(session) is stream:
                self._end(session)

    async def tell(
        self, session: str, submits: list[Submission], releases: list[str], calls: int
    ) -> bool:
        """What happened at one Ingress since it last spoke, and how many calls it has open now.

        False if its session is not open.
        """
        if not self._grants.heard_from(session, time.monotonic()):
            return False
        self._calls[session] = calls
        for entry in releases:
            self._grants.release(session, entry)
        self._submit(session, submits)
        return True

    async def cancel(self, request_id: str) -> bool | None:
        """End the call with this id, at whichever Ingress; False if none of its images is here.

        None right after a start, when an Ingress may not yet have said that it is.
        """
        if (session := self._grants.owner(request_id)) is None:
            return None if time.monotonic() < self._grants_from else False
        self._deliver([Outcome(session, request_id, None, "cancelled")])
        return True

    async def report_replica(self, said: Heartbeat, drawing: Iterable[Lease] = ()) -> list[Lease]:
        """The heartbeat of a Generator replica; returns the leases that no session holds."""
        self._grants.report_replica(Heartbeat(*said), time.monotonic())
        self._grant()
        leases = [Lease(*lease) for lease in drawing]
        return [lease for lease in leases if not self._grants.holds(lease)]

    async def state(self) -> dict[str, Any]:
        """Open `calls` of clients, `queued` images, and of each pool what its replicas say.

        `running`: images granted to the pool; `speed`: reference replicas that it amounts to.
        """
        pools = {}
        for pool in self._pools:
            replicas = self._grants.replicas(pool)
            pools[pool] = {
                "replicas": len(replicas),
                "slots": sum(said.slots for said in replicas),
                "running": self._grants.running_in(pool),
                "running_work_s": round(sum(said.running_work_s for said in replicas), 3),
                "speed": round(sum(said.speed for said in replicas), 3),
                "placeable": self._grants.placeable(pool),
            }
        return {
            "draining": self._grants.draining,
            "calls": sum(self._calls.values()),
            "queued": self._grants.queue_depth,
            "pools": pools,
        }

    async def drain(self) -> int:
        """Refuse new images from now on; returns how many calls and images are still open.

        At least one right after a start, when Ingresses have not yet said what they have.
        """
        self._grants.draining = True
        unheard = time.monotonic() < self._grants_from
        running = sum(self._grants.running_in(pool) for pool in self._pools)
        known = self._grants.queue_depth + running + sum(self._calls.values())
        return known + unheard

    async def check_health(self) -> None:
        """Called by Ray Serve; without expiry the slots of a dead Ingress would stay taken."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("sessions, replicas or nodes are no longer watched")

    def _submit(self, session: str, entries: list[Submission]) -> None:
        refused = [self._grants.submit(session, Submission(*entry)) for entry in entries]
        self._deliver([outcome for outcome in refused if outcome])
        self._grant()
        if any(Submission(*entry).watched for entry in entries):
            self._deliver(self._grants.positions())

    def _grant(self) -> None:
        if time.monotonic() >= self._grants_from:
            self._deliver(self._grants.grant())

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._streams[outcome.session].put_nowait(outcome)

    def _end(self, session: str) -> None:
        self._grants.close(session)
        self._calls.pop(session, None)
        if stream := self._streams.pop(session, None):
            stream.put_nowait(None)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for session in self._grants.expire(time.monotonic()):
                log.warning("session %s fell silent: its slots are free", session)
                self._end(session)
            self._grant()
            self._deliver(self._grants.positions())

    async def _place(self) -> None:
        """Learn which pools could be held, and refuse what waits for pools that cannot."""
        while True:
            try:
                nodes = list(await asyncio.to_thread(self._read_nodes))
            except Exception:  # whatever Ray says, the last known state serves until it answers
                log.warning("could not read the cluster's nodes; trying again", exc_info=True)
            else:
                self._warn(nodes)
                self._grants.set_placeable(
                    pool
                    for pool, need in self._pools.items()
                    if any(fits(need, node) for node in nodes)
                )
                self._deliver(self._grants.refuse())
            await asyncio.sleep(NODES_S)

    def _warn(self, nodes: Iterable[Node]) -> None:
        for node, warning in unknown_cards(nodes).items():
            if node not in self._warned:
                log.warning(warning)
                self._warned.add(node)
