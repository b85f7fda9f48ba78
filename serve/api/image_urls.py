"""Images that are answered as URLs: kept in the result store, read through signed links."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..errors import InvalidRequest, NotFound, OctetError, StoreFailed
from ..request import ImageRequest, ImageResult
from ..results.from_settings import open_links, open_store
from ..results.spool import Spool
from ..results.store import StoreFault, new_name
from ..settings.application import FrontSettings, Settings
from .ingress_metrics import IngressMetrics

log = logging.getLogger("ray.serve")

THREADS = 32
FILES = "/v1/files/"
JOB_SPARE_S = 86400.0  # for which images of jobs outlast the longest time of a job
NO_IMAGES = "this server keeps no images"


class ImageUrls:
    """Stores images and signs their links. A server without a data folder keeps no images."""

    def __init__(
        self,
        settings: FrontSettings,
        live: Callable[[], Settings],
        metrics: IngressMetrics,
        sweep_s: float,
        on_fault: Callable[[StoreFault | None], None],
    ) -> None:
        """`live`: returns the present live settings. `sweep_s`: seconds between two sweeps.

        `on_fault` is called when images can no longer be put where they belong, and with None when
        they can again. Raises `OSError` if the data folder cannot be used.
        """
        self._live, self._metrics, self._sweep_s = live, metrics, sweep_s
        self._on_fault = on_fault
        self._fault: StoreFault | None = None
        self._kept = settings.data_folder is not None
        if self._kept:
            # Threads of their own, so that a slow store delays neither reads nor anything else.
            self._writers = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
            self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
            self._store, self._links = open_store(settings), open_links(settings)
            self._sweeping = asyncio.create_task(self._sweep())

    def check(self) -> None:
        """Raise `RuntimeError` if the task has ended that sweeps or uploads stored images."""
        if self._kept and self._sweeping.done():
            raise RuntimeError("stored images are no longer swept")
        if self._kept and isinstance(self._store, Spool):
            self._store.check()

    def admit(self) -> None:
        """Check that images can be stored, before a request that wants URLs causes any work.

        Raises `InvalidRequest` if the server keeps no images, and `StoreFailed` if the store is
        full at the moment.
        """
        if not self._kept:
            raise InvalidRequest(f"response_format 'url': {NO_IMAGES}", param="response_format")
        if self.full:
            raise StoreFailed("images cannot be stored at the moment: ask for b64_json")

    @property
    def full(self) -> bool:
        """Return whether no more images can be kept at the moment."""
        return self._store.full

    @property
    def key(self) -> bytes | None:
        """A secret that all Ingress replicas share; None if the server keeps no images."""
        return self._links.key if self._kept else None

    async def store(
        self, requests: Sequence[ImageRequest], results: Sequence[ImageResult], tenant: str
    ) -> list[str]:
        """Store the images of one call; returns their names in the store.

        Raises `StoreFailed` if an image cannot be stored.
        """
        names = []
        for request, result in zip(requests, results, strict=True):
            name = new_name(tenant, request.output_format, time.time())
            began = time.monotonic()
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._writers, self._store.put, name, result.image, request.id
                )
            finally:
                self._note_fault()
            self._metrics.stored(time.monotonic() - began)
            names.append(name)
        return names

    def _note_fault(self) -> None:
        if (fault := self._store.fault) != self._fault:
            self._metrics.store_fault(self._fault, fault)
            self._fault = fault
            self._on_fault(fault)

    def url(self, name: str, http: Request) -> str:
        """A signed link to a stored image, which works for `link_expires_s`."""
        base = self._live().public_url or str(http.base_url).rstrip("/")
        expires = math.ceil(time.time()) + self._live().results.link_expires_s
        return base + self._links.link(name, expires)

    async def image(self, name: str) -> bytes:
        """Return a stored image's bytes.

        Raises `NotFound` if no image has this name, and `StoreFailed` if it cannot be read.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._readers, self._store.read, name
        )

    async def read(self, http: Request) -> Response:
        """Answer `GET /v1/files/…` with the image, or with a redirect to the image's bucket.

        Raises `LinkInvalid` for a wrong or expired signature, `NotFound` if the image does not
        exist, and `StoreFailed` if it cannot be read.
        """
        if not self._kept:
            raise NotFound(NO_IMAGES)
        name, link = http.url.path.removeprefix(FILES), http.query_params
        expires, signature = link.get("expires", ""), link.get("signature", "")
        self._links.check(name, expires, signature, time.time())
        image = await asyncio.get_running_loop().run_in_executor(
            self._readers, self._store.get, name
        )
        if isinstance(image, str):
            return RedirectResponse(image, headers={"cache-control": "no-store"})
        return Response(
            image,
            media_type=f"image/{name.rpartition('.')[2]}",
            headers={"x-content-type-options": "nosniff", "cache-control": "private"},
        )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_s)
            self._note_fault()
            if isinstance(self._store, Spool):
                self._metrics.spooled(self._store.entries, self._store.bytes, self._store.max_bytes)
            keep, jobs = self._live().results, self._live().jobs
            try:
                await asyncio.to_thread(
                    self._store.sweep,
                    time.time(),
                    max_age_s=keep.max_age_s,
                    max_bytes=keep.max_bytes,
                    max_job_age_s=jobs.keep_s + jobs.max_age_s + JOB_SPARE_S,
                )
            except (OSError, OctetError):  # requests that store nothing are not affected
                log.warning("could not sweep the stored images; trying again", exc_info=True)
