"""A lock that many may hold together, or one alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SharedExclusiveLock:
    """A lock that several tasks may hold at the same time, or one task exclusively.

    A task that wants the lock exclusively waits until all holders have released it. During that
    wait no other task gets the lock. `exclusive`: how many tasks hold the lock exclusively or wait
    to do so.
    """

    def __init__(self) -> None:
        self.exclusive = 0
        self._holders = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def held(self, *, exclusively: bool = False) -> AsyncIterator[None]:
        """Wait for the lock and hold it until the block ends."""
        self.exclusive += exclusively
        try:
            while self._holders if exclusively else self.exclusive:
                await self._changed.wait()
            self._holders += 1
            try:
                yield
            finally:
                self._holders -= 1
        finally:
            self.exclusive -= exclusively
            self._changed.set()
            self._changed = asyncio.Event()
