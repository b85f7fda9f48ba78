"""An Ingress's side of its session with the Dispatcher.

    session.begin(request_id, cancel)  # a call of a client, until `end`
    async with session.slot(pools, request_id) as lease:
        ...  # a slot of `lease.pool` is ours until the block ends

Submits and releases are coalesced: while one message is under way the next ones collect. If the
Dispatcher restarts, a new session resubmits what waits and declares what runs, so running images
are not touched.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from ..errors import NoCapacity, OctetError, QueueFull, RequestIdInUse, Unavailable
from .dispatcher import HEARTBEAT_S
from .messages import Lease, Outcome, Pools, Running, Submission

log = logging.getLogger("ray.serve")

RECONNECT_S = 0.5

REFUSALS: dict[str, tuple[type[OctetError], str]] = {
    "queue_full": (QueueFull, "the queue is full: try again later"),
    "no_capacity": (NoCapacity, "no replica that may draw this lives, and no node can hold one"),
    "draining": (Unavailable, "this server is shutting down"),
    "request_id_in_use": (RequestIdInUse, "x-request-id: a request with this id is being served"),
}


class _Waiting(NamedTuple):
    asked: Submission
    granted: asyncio.Future[str]
    queued: Callable[[int], None] | None


class DispatchSession:
    """`dispatcher` is a handle with the methods of `Dispatcher`; use inside a running loop."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher
        self._name = uuid.uuid4().hex
        self._entries = itertools.count()
        self._calls: dict[str, Callable[[], None]] = {}  # how to cancel them, by request id
        self._waiting: dict[str, _Waiting] = {}
        self._running: dict[str, Running] = {}
        self._submits: dict[str, Submission] = {}
        self._releases: list[str] = []
        self._news = asyncio.Event()
        self._open = False
        self._stream: Any = None
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._talk())]

    def check(self) -> None:
        """Raise `RuntimeError` if the session can no longer work."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("the session with the dispatcher has ended")

    def begin(self, request_id: str, cancel: Callable[[], None] = lambda: None) -> None:
        """A client's call is open until `end`; `cancel` is called if another call asks for it.

        Raises `RequestIdInUse`.
        """
        if request_id in self._calls:
            error, message = REFUSALS["request_id_in_use"]
            raise error(message)
        self._calls[request_id] = cancel

    def end(self, request_id: str) -> None:
        """The call's answer has been sent, or never will be."""
        self._calls.pop(request_id, None)
        self._news.set()

    @asynccontextmanager
    async def slot(
        self,
        pools: Pools,
        request_id: str = "",
        *,
        accepted: bool = False,
        queued: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Lease]:
        """Wait for a slot in one of `pools` (preferred first) and hold it.

        While it waits, `queued` is told its position whenever that changes (1: next).

        Raises `NoCapacity`, and unless it was `accepted` before, `QueueFull`, `Unavailable` while
        draining, and `RequestIdInUse` if another session has entries of this id. Leaving the
        block, or being cancelled while waiting, gives the slot back.
        """
        entry = str(next(self._entries))
        granted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asked = Submission(entry, pools, request_id, accepted, queued is not None)
        self._waiting[entry] = _Waiting(asked, granted, queued)
        self._submits[entry] = asked
        self._news.set()
        try:
            yield Lease(self._name, entry, await granted)
        finally:
            self._waiting.pop(entry, None)
            self._running.pop(entry, None)
            if self._submits.pop(entry, None) is None:  # else it was never told: nothing to undo
                self._releases.append(entry)
                self._news.set()

    async def _listen(self) -> None:
        """Keep a session open and hand its outcomes to those who wait."""
        while True:
            waiting = [
                w.asked._replace(accepted=w.asked.accepted or entry not in self._submits)
                for entry, w in self._waiting.items()
            ]
            # The session starts anew from these facts: what was not yet told is in them.
            self._submits.clear()
            self._releases.clear()
            try:
                self._stream = self._dispatcher.session.options(stream=True).remote(
                    self._name, waiting, list(self._running.values())
                )
                async for outcomes in self._stream:
                    self._open = True
                    self._news.set()
                    for outcome in outcomes:
                        self._hear(Outcome(*outcome))
                log.warning("the dispatcher ended the session; opening it again")
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # it was this task that was cancelled, and not the call
                log.warning("the session's call was cancelled; opening it again")
            except Exception:  # whatever it is, an Ingress without a session is of no use
                log.warning("the dispatcher is not reachable; trying again", exc_info=True)
            self._open = False
            await asyncio.sleep(RECONNECT_S)

    def _hear(self, outcome: Outcome) -> None:
        if outcome.kind == "cancelled":
            self._calls.get(outcome.entry, lambda: None)()
        elif outcome.kind == "queued":
            waiting = self._waiting.get(outcome.entry)
            if waiting and waiting.queued:
                waiting.queued(outcome.position)
        else:
            self._settle(outcome)

    def _settle(self, outcome: Outcome) -> None:
        entry, pool = outcome.entry, outcome.pool
        waiting = self._waiting.pop(entry, None)
        if waiting is None or waiting.granted.done():
            self._releases.append(entry)  # whoever waited is gone; to say so twice does no harm
            self._news.set()
            return
        if pool is None:
            error, message = REFUSALS[outcome.kind]
            waiting.granted.set_exception(error(message))
        else:
            self._running[entry] = Running(entry, pool, waiting.asked.request_id)
            waiting.granted.set_result(pool)

    async def _talk(self) -> None:
        """Tell what is new, or at least that we live, once per heartbeat."""
        while True:
            with suppress(TimeoutError):  # wait_for may swallow a cancellation before Python 3.12
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
            self._news.clear()
            if not self._open:
                continue
            submits, self._submits = list(self._submits.values()), {}
            releases, self._releases = self._releases, []
            try:
                understood = await self._dispatcher.tell.remote(
                    self._name, submits, releases, len(self._calls)
                )
            except Exception:  # Ray's errors have no common class; the cure is the same for all
                log.warning("could not reach the dispatcher", exc_info=True)
                understood = False
            if not understood:  # `_listen` then opens a session that knows the whole state
                with suppress(Exception):
                    self._stream.cancel()
