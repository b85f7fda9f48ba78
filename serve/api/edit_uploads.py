"""The pictures that an Ingress holds for edits: how many bytes, and which is read next.

Reading a picture takes up to a second or two and much memory, so an Ingress reads one at a time, in
a thread. One limit covers all bytes that it holds: bodies until they are read, and pixels until
their images are generated.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..dispatch.client.refusals import retry_after
from ..edit_pixels import EditPixels
from ..errors import Unavailable
from .ingress_metrics import IngressMetrics

T = TypeVar("T")

RETRY_S = 1.0  # until a client whose picture found no room may try again


class HeldPicture:
    """Memory that an Ingress holds for one edit: first its body, then its picture and mask.

    `pixels`: None until the picture is read, and again after `release`.
    """

    def __init__(self, uploads: EditUploads, tenant: str) -> None:
        self.tenant = tenant
        self.pixels: EditPixels | None = None
        self._uploads, self._size = uploads, 0
        self._arrived = asyncio.get_running_loop().time()

    @property
    def age_s(self) -> float:
        """Seconds since the body has arrived."""
        return asyncio.get_running_loop().time() - self._arrived

    def check(self, size: int) -> None:
        """Raise `Unavailable` if `size` more bytes would be too many."""
        self._uploads.check(self.tenant, size)

    def add(self, size: int) -> None:
        """Count `size` more bytes of the body. Raises `Unavailable` if they are too many."""
        self.check(size)
        self._count(size)
        self._arrived = asyncio.get_running_loop().time()

    def keep(self, pixels: EditPixels) -> None:
        """Hold pixels instead of the body. Raises `Unavailable` if they are too many."""
        if (more := pixels.nbytes - self._size) > 0:
            self.check(more)
        self._count(more)
        self.pixels = pixels

    def release(self) -> None:
        """Let go of everything; may be called again."""
        self.pixels = None
        self._count(-self._size)

    def _count(self, size: int) -> None:
        self._size += size
        self._uploads.count(self.tenant, size)


class EditUploads:
    """Counts the bytes of bodies, pictures and masks, and reads pictures in turn.

    A tenant may hold as many bytes as are free: one tenant alone gets a half of `max_bytes`, two
    get a third each. So there is always room for a tenant that holds little.
    """

    def __init__(self, max_bytes: Callable[[], int], metrics: IngressMetrics) -> None:
        """`max_bytes`: returns how many bytes may be held at present."""
        self._max_bytes, self._metrics = max_bytes, metrics
        self._held: Counter[str] = Counter()  # bytes, by tenant
        self._reader = ThreadPoolExecutor(1, "pictures")
        self._reading = asyncio.Lock()
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}  # by tenant, and its open reads

    @property
    def held(self) -> int:
        """The bytes that are held for all tenants."""
        return self._held.total()

    def check(self, tenant: str, size: int) -> None:
        """Raise `Unavailable` if a tenant may not hold `size` more bytes."""
        free = self._max_bytes() - self.held - size
        if self._held[tenant] + size > free:
            error = Unavailable("too many pictures are waiting to be edited: try again")
            error.headers = retry_after(RETRY_S)
            raise error

    def count(self, tenant: str, size: int) -> None:
        """Count bytes that a tenant holds from now on; a negative `size` is let go."""
        self._held[tenant] += size
        if not self._held[tenant]:
            del self._held[tenant]

    async def read(self, tenant: str, read: Callable[[], T]) -> T:
        """Call `read` in the thread that reads pictures.

        Tenants take turns: a tenant with many pictures delays another tenant's by at most one. If
        the caller is cancelled while `read` runs, it is cancelled after that.
        """
        began = time.monotonic()
        lock, waiting = self._turns.get(tenant, (asyncio.Lock(), 0))
        self._turns[tenant] = lock, waiting + 1
        try:
            async with lock, self._reading:
                work = asyncio.get_running_loop().run_in_executor(self._reader, read)
                return await _to_its_end(work)
        finally:
            self._metrics.read_picture(time.monotonic() - began)
            lock, waiting = self._turns.pop(tenant)
            if waiting > 1:
                self._turns[tenant] = lock, waiting - 1


async def _to_its_end(work: asyncio.Future[T]) -> T:
    """The result of work that cannot be stopped; a cancellation is raised when the work is done."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        work.exception()  # so that asyncio does not report it as forgotten
        raise cancelled
    return work.result()
