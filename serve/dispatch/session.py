"""An Ingress's side of its session with the Dispatcher.

    async with session.slot(entry_id, pools) as pool:
        ...  # a slot of `pool` is ours until the block ends

Submits and releases are coalesced: while one message is under way the next ones collect. If the
Dispatcher restarts, a new session resubmits what waits and declares what runs, so running images
are not touched.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from ..errors import QueueFull
from .dispatcher import HEARTBEAT_S
from .grants import Pools

log = logging.getLogger("ray.serve")

RECONNECT_S = 0.5


class DispatchSession:
    """`dispatcher` is a handle with the methods of `Dispatcher`; use inside a running loop."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher
        self._waiting: dict[str, tuple[Pools, asyncio.Future[str]]] = {}
        self._running: dict[str, str] = {}
        self._submits: dict[str, Pools] = {}
        self._releases: list[str] = []
        self._news = asyncio.Event()
        self._open: str | None = None  # the session's name while the Dispatcher knows it
        self._stream: Any = None
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._talk())]

    @asynccontextmanager
    async def slot(self, entry: str, pools: Pools) -> AsyncIterator[str]:
        """Wait for a slot in one of `pools` (preferred first) and hold it; yields the pool.

        Raises `QueueFull`. Leaving the block, or being cancelled while waiting, gives it back.
        """
        granted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[entry] = pools, granted
        self._submits[entry] = pools
        self._news.set()
        try:
            yield await granted
        finally:
            self._waiting.pop(entry, None)
            self._running.pop(entry, None)
            if self._submits.pop(entry, None) is None:  # else it was never told: nothing to undo
                self._releases.append(entry)
                self._news.set()

    async def _listen(self) -> None:
        """Keep a session open and hand its outcomes to those who wait."""
        previous: str | None = None
        while True:
            name = uuid.uuid4().hex
            waiting = [(entry, pools) for entry, (pools, _) in self._waiting.items()]
            # The new session starts from these facts: what was not yet told is in them.
            self._submits.clear()
            self._releases.clear()
            try:
                self._stream = self._dispatcher.session.options(stream=True).remote(
                    name, previous, waiting, list(self._running.items())
                )
                previous = name
                async for outcomes in self._stream:
                    self._open = name
                    self._news.set()
                    for _, entry, pool, kind in outcomes:
                        self._settle(entry, pool, kind)
                log.warning("the dispatcher ended session %s; opening another", name)
            except Exception:
                log.warning("the dispatcher is not reachable; trying again", exc_info=True)
            self._open = None
            await asyncio.sleep(RECONNECT_S)

    def _settle(self, entry: str, pool: str | None, kind: str) -> None:
        _, future = self._waiting.pop(entry, (None, None))
        if future is None or future.done():
            return  # its release is on the way
        if pool is None:
            future.set_exception(QueueFull(f"the queue is full ({kind}): try again later"))
        else:
            self._running[entry] = pool
            future.set_result(pool)

    async def _talk(self) -> None:
        """Tell what is new, or at least that we live, once per heartbeat."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), HEARTBEAT_S)
            self._news.clear()
            if self._open is None:
                continue
            submits, self._submits = list(self._submits.items()), {}
            releases, self._releases = self._releases, []
            try:
                await self._dispatcher.tell.remote(self._open, submits, releases)
            except Exception:
                # Told or not told? `_listen` opens a session that knows the whole state.
                log.warning("could not reach the dispatcher", exc_info=True)
                self._stream.cancel()
