"""Reuse of results: from the result cache, or from equal requests that are still open.

A repeated request costs no work. The key of a request in the cache depends on everything that
decides the pixels. So after a change of the model, recipe, libraries or engine, no image that was
cached before is used. While a rolling update replaces the replicas, those that still have the old
model generate images, and these are cached like new ones.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers

from ..engine.pixel_digest import pixel_digest
from ..errors import StoreFailed
from ..request import ImageRequest
from ..results.cache.memory import CachedImages, MemoryCache, ResultCache, cache_key
from ..settings.application import CacheSettings, FrontSettings, Settings
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .single_flight import SharedGeneration
from .wire.request import GenerationRequest


class ResultReuse:
    """The result cache and the shared generations in flight, each by its cache key."""

    def __init__(
        self,
        settings: FrontSettings,
        live: Callable[[], Settings],
        urls: ImageUrls,
        metrics: IngressMetrics,
    ) -> None:
        """`live`: returns the present live settings.

        Raises `OSError` if the file with Redis' password cannot be read.
        """
        self.in_flight: dict[str, SharedGeneration] = {}
        self._live, self._urls, self._metrics = live, urls, metrics
        self._pixels: dict[str, str] = {}  # by model
        self._secret = urls.key or secrets.token_bytes(32)
        self.cache = self._open(settings.cache) if settings.cache else None

    async def set_models(self, settings: Settings) -> None:
        """Reuse results of the models of `settings` from now on."""

        def digests() -> dict[str, str]:
            return {model.id: pixel_digest(settings, model) for model in settings.models}

        self._pixels = await asyncio.to_thread(digests)  # it reads folders

    def _open(self, settings: CacheSettings) -> ResultCache:
        if settings.redis_url is None:
            return MemoryCache(settings.memory_bytes)
        from ..results.cache.redis import RedisCache  # loads Redis' client only where it is used

        return RedisCache(settings, self._urls.image, self._metrics.cache_failed)

    def key(self, request: GenerationRequest, tenant: str, headers: Headers) -> str | None:
        """The cache key of a request; None if its images must be generated in any case.

        That is so without a cache, without a seed of the client's choice, and if the header
        `cache-control` says `no-cache` or `no-store`.
        """
        bypassed = {"no-cache", "no-store"} & {
            part.strip().lower() for part in headers.get("cache-control", "").split(",")
        }
        pixels = self._pixels.get(request.images[0].model)  # None: the model has just gone
        if self.cache is None or not request.seeded or bypassed or pixels is None:
            return None
        return cache_key(self._secret, tenant, pixels, request.images)

    def shared_key(self, key: str | None) -> str:
        """The key under which other Ingresses will find the images, too; empty if they will not."""
        return key if key and self.cache and self.cache.shared else ""

    async def find(self, key: str, tenant: str) -> CachedImages | None:
        """The images that the cache has for a key; None if it has none."""
        if self.cache is None:
            return None
        began = time.monotonic()
        found = await self.cache.get(key, tenant, began)
        self._metrics.looked_up(time.monotonic() - began, hit=found is not None)
        return found

    async def remember(
        self,
        key: str,
        tenant: str,
        images: Sequence[ImageRequest],
        found: CachedImages,
    ) -> None:
        """Put generated images into the cache.

        Some caches keep only the names of images in the result store. For these the images are
        stored first; if that fails, nothing is cached.
        """
        if self.cache is None:
            return
        keep = self._live().results
        age_s = keep.max_age_s
        if self.cache.needs_names:
            if not found.names:
                if self._urls.full:
                    return
                try:
                    names = await self._urls.store(images, found.results, tenant)
                except StoreFailed:
                    return
                found = found._replace(names=tuple(names))
            age_s -= keep.link_expires_s  # a link to the image must work for its whole time
        else:  # stored anew for each URL, because what was stored may be gone
            found = found._replace(names=())
        if age_s > 0:
            await self.cache.put(key, found, time.monotonic(), age_s)
