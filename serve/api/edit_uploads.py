"""The pictures that an Ingress holds for edits: how many bytes, and which is read next.

Reading a picture takes up to a second and much memory, so an Ingress reads one at a time, in a
thread. Everything that it holds before and after that, for as long as requests are open, has one
limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from ..errors import Unavailable
from .ingress_metrics import IngressMetrics

T = TypeVar("T")


class EditUploads:
    """Counts the bytes of bodies, pictures and masks, and reads pictures in turn."""

    def __init__(self, max_bytes: Callable[[], int], metrics: IngressMetrics) -> None:
        """`max_bytes`: returns how many bytes may be held at present."""
        self._max_bytes, self._metrics = max_bytes, metrics
        self.held = 0  # bytes
        self._reader = ThreadPoolExecutor(1, "pictures")
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}  # by tenant, and how many wait

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Hold bytes until the block ends.

        Yields a function that is to be called with each further number of bytes. It raises
        `Unavailable` if they are too many.
        """
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            if self.held + size > self._max_bytes():
                raise Unavailable("too many pictures are waiting to be edited: try again")
            own += size
            self.held += size

        try:
            yield hold
        finally:
            self.held -= own

    async def read(self, tenant: str, read: Callable[[], T]) -> T:
        """Call `read` in the thread that reads pictures.

        Tenants take turns: one with many pictures delays another's by one picture at most.
        """
        lock, waiting = self._turns.get(tenant, (asyncio.Lock(), 0))
        self._turns[tenant] = lock, waiting + 1
        try:
            async with lock:
                began = time.monotonic()
                found = await asyncio.get_running_loop().run_in_executor(self._reader, read)
                self._metrics.read_picture(time.monotonic() - began)
                return found
        finally:
            lock, waiting = self._turns.pop(tenant)
            if waiting > 1:
                self._turns[tenant] = lock, waiting - 1
