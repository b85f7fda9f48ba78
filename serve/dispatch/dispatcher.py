"""The Dispatcher deployment: the one owner of the queue, exactly one replica, no GPU.

It is `Grants` with a clock and a network. Each Ingress opens a stream on which outcomes arrive in
batches, and tells its submits and releases in batches; each Generator reports itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from .grants import Grants, Outcome, Pools

log = logging.getLogger("ray.serve")

SESSION_LEASE_S = 10.0
REPLICA_LEASE_S = 5.0
HEARTBEAT_S = 1.0  # how often Ingresses and Generators are heard from
RECOVERY_S = 2.0  # after a restart nothing is granted until every Ingress could say what runs


class Dispatcher:
    """See `serve.dispatch.session` for the other end of `session` and `tell`."""

    def __init__(self, max_queued: int, recovery_s: float = RECOVERY_S) -> None:
        self._grants = Grants(
            max_queued=max_queued,
            session_lease_s=SESSION_LEASE_S,
            replica_lease_s=REPLICA_LEASE_S,
        )
        self._grants_from = time.monotonic() + recovery_s
        self._streams: dict[str, asyncio.Queue[Outcome | None]] = {}
        self._expiry = asyncio.create_task(self._expire())

    async def session(
        self,
        session: str,
        waiting: list[tuple[str, Pools]],
        running: list[tuple[str, str]],
    ) -> AsyncIterator[list[Outcome]]:
        """Outcomes for one Ingress, in batches, from what it still waits for and runs.

        Opening a session again replaces it. Ends when it expires or is replaced. The first batch
        is always empty: it says that the session is open.
        """
        self._end(session)
        stream: asyncio.Queue[Outcome | None] = asyncio.Queue()
        self._streams[session] = stream
        self._grants.open(session, time.monotonic(), running)
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
        self, session: str, submits: list[tuple[str, Pools]], releases: list[str]
    ) -> bool:
        """What happened at one Ingress since it last spoke; False if its session is not open."""
        if not self._grants.heard_from(session, time.monotonic()):
            return False
        for entry in releases:
            self._grants.release(session, entry)
        self._submit(session, submits)
        return True

    async def report_replica(self, pool: str, replica: str, slots: int) -> None:
        """The heartbeat of a Generator replica."""
        self._grants.report_replica(pool, replica, slots, time.monotonic())
        self._grant()

    async def replicas(self) -> dict[str, int]:
        """Living replicas per pool."""
        return self._grants.replicas()

    async def check_health(self) -> None:
        """Called by Ray Serve; without expiry the slots of a dead Ingress would stay taken."""
        if self._expiry.done():
            raise RuntimeError("sessions and replicas no longer expire")

    def _submit(self, session: str, entries: list[tuple[str, Pools]]) -> None:
        refused = [self._grants.submit(session, entry, tuple(pools)) for entry, pools in entries]
        self._deliver([outcome for outcome in refused if outcome])
        self._grant()

    def _grant(self) -> None:
        if time.monotonic() >= self._grants_from:
            self._deliver(self._grants.grant())

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._streams[outcome.session].put_nowait(outcome)

    def _end(self, session: str) -> None:
        self._grants.close(session)
        if stream := self._streams.pop(session, None):
            stream.put_nowait(None)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for session in self._grants.expire(time.monotonic()):
                log.warning("session %s fell silent: its slots are free", session)
                self._end(session)
            self._grant()
