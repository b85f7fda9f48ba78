"""Recovery: after its start, a Dispatcher only listens until it knows what its Ingresses have."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from ..deployments import INGRESS, JOBS
from .protocol import Timing
from .serve_status import ReplicaStates

log = logging.getLogger("ray.serve")


class Recovery:
    """The time in which a Dispatcher grants nothing and admits no new calls.

    It begins with the first message. It ends when as many Ingresses and runners of jobs have opened
    a session as Ray Serve has running, or after `recovery_s`; in both cases only once the tenants'
    usage was read.
    """

    def __init__(
        self, timing: Timing, read_states: Callable[[], ReplicaStates], then: Callable[[], None]
    ) -> None:
        """`read_states`: returns the states of Ray Serve's replicas; may block.

        `then` is called at the end of the recovery. Needs a running event loop.
        """
        self._timing, self._read_states, self._then = timing, read_states, then
        self._heard: set[str] = set()  # names of the sessions that were opened
        self._expected = math.inf
        self._began = self._knows_usage = self._waited = False
        self.ended_at = math.inf
        # Without any Ingress or Generator there is nothing to wait for.
        asyncio.get_running_loop().call_later(timing.session_lease_s, self.reached)

    @property
    def over(self) -> bool:
        """Return whether the Dispatcher may grant slots and admit calls."""
        return self.ended_at < math.inf

    def reached(self) -> None:
        """Note that a message has arrived; the first one begins the recovery."""
        if self._began:
            return
        self._began = True
        if self._timing.recovery_s:
            asyncio.get_running_loop().call_later(self._timing.recovery_s, self._end)
            self._counting = asyncio.create_task(self._count_ingresses())
        else:
            self._end()

    def knows_usage(self) -> None:
        """Note that the tenants' usage was read, without which no budget can be checked."""
        self._knows_usage = True
        if self._waited:
            self._end()

    def opened(self, session: str) -> None:
        """Note that an Ingress has opened a session, and so has said what it has."""
        self._heard.add(session)
        self._end_if_all_were_heard()

    async def _count_ingresses(self) -> None:
        try:
            states = await asyncio.to_thread(self._read_states)
        except Exception:  # Ray's errors have no common class; then the whole time is waited for
            log.warning("could not count the Ingresses", exc_info=True)
            return
        running = {name: states.get(name, {}).get("RUNNING", 0) for name in (INGRESS, JOBS)}
        # Without any running Ingress the application itself is starting.
        self._expected = sum(running.values()) if running[INGRESS] else math.inf
        self._end_if_all_were_heard()

    def _end_if_all_were_heard(self) -> None:
        if len(self._heard) >= self._expected:
            self._end()

    def _end(self) -> None:
        self._waited = True
        if self._knows_usage and not self.over:
            self.ended_at = time.monotonic()
            self._then()
