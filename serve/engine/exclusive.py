"""Who may draw on a replica together, and who alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SharedExclusiveLock:
    """Entered by many at a time, or by one alone: it waits until the others have left.

    Meanwhile nobody else enters. `reserved`: how many wait or are inside to be alone.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._inside = 0
        self._change = asyncio.Event()

    @asynccontextmanager
    async def entered(self, *, alone: bool = False) -> AsyncIterator[None]:
        self.reserved += alone
        try:
            while self._inside if alone else self.reserved:
                await self._change.wait()
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
        finally:
            self.reserved -= alone
            self._change.set()
            self._change = asyncio.Event()
