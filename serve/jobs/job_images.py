"""The images of jobs, and the pictures that they edit, in the result store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..edit_pixels import EditPixels
from ..errors import StoreFailed
from ..results.disk import DiskStore
from ..results.from_settings import open_store
from ..results.store import new_name
from ..settings.application import FrontSettings
from .encoding import StoredPictures
from .pictures import files_of, pixels_of

log = logging.getLogger("ray.serve")

THREADS = 16
RETRY_S, LONGEST_S = 0.5, 10.0  # the first pause after a failure, and the longest


class JobImages:
    """Puts images where they survive this node, and reads them. Needs a running event loop."""

    def __init__(self, settings: FrontSettings) -> None:
        """Open the result store. Raises `OSError` if the data folder cannot be used."""
        self._store = open_store(settings, durable=True)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="job-images")

    @property
    def full(self) -> bool:
        """Return whether no more images can be kept at the moment."""
        return self._store.full

    async def put(self, tenant: str, extension: str, image: bytes, request_id: str) -> str:
        """Keep an image; return its name. Tries again until it is kept."""
        name, pause_s = new_name(tenant, extension, time.time(), "j"), RETRY_S
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._threads, self._store.put, name, image, request_id)
                return name
            except StoreFailed:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_S)

    async def pictures(self, names: StoredPictures) -> EditPixels:
        """Read the picture and the mask of an edit.

        Raises `NotFound` if they are gone, and `StoreFailed` if they cannot be read.
        """
        loop = asyncio.get_running_loop()

        def read() -> EditPixels:
            mask = self._store.read(names.mask) if names.mask else None
            return pixels_of(self._store.read(names.image), mask)

        return await loop.run_in_executor(self._threads, read)

    async def put_pictures(
        self, tenant: str, edited: EditPixels, request_id: str
    ) -> StoredPictures:
        """Keep the picture and the mask of an edit; raises `StoreFailed` if that fails."""

        def put() -> StoredPictures:
            names = []
            for file in files_of(edited):
                if file:
                    names.append(new_name(tenant, "png", time.time(), "j"))
                    self._store.put(names[-1], file, request_id)
            return StoredPictures(*names)

        return await asyncio.get_running_loop().run_in_executor(self._threads, put)

    async def delete_soon(self, names: Iterable[str | None]) -> None:
        """Delete images that no job has; if that fails, they are swept when they are old."""
        try:
            await self.delete([name for name in names if name])
        except (OSError, StoreFailed):
            log.warning("images of no job are left until they are swept", exc_info=True)

    async def delete(self, names: Sequence[str]) -> None:
        """Delete images. Raises `OSError` or `StoreFailed` if the store fails."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._store.delete, names)

    async def look(self) -> None:
        """Find out whether a full disk has room again. Raises `OSError` if the disk fails."""
        if isinstance(self._store, DiskStore):
            await asyncio.get_running_loop().run_in_executor(self._threads, self._store.look)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._store.close()
