"""Requests that were made before, or are being made: they cost no work."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from starlette.datastructures import Headers

from ..errors import StoreFailed
from ..request import ImageRequest
from ..results.cache.memory import CachedImages, MemoryCache, ResultCache, cache_key
from ..settings.application import ApplicationSettings, CacheSettings, IngressSettings
from ..settings.models import CardResources, ServedModel, Source
from .image_urls import ImageUrls
from .ingress_metrics import IngressMetrics
from .single_flight import SharedGeneration
from .wire.request import GenerationRequest

# What changes no image.
SIZES = {*CardResources.model_fields, "id", "slots", "warm_sizes", "cache_mib", "warm_prompts"}


class ResultReuse:
    """What is remembered, and the flights that others may join, each under its key."""

    def __init__(
        self,
        settings: ApplicationSettings,
        tuning: Callable[[], IngressSettings],
        urls: ImageUrls,
        metrics: IngressMetrics,
    ) -> None:
        """Raises `OSError` if the password of Redis cannot be read."""
        self.flights: dict[str, SharedGeneration] = {}
        self._tuning, self._urls, self._metrics = tuning, urls, metrics
        self._versions = {model.id: _version(settings, model) for model in settings.models}
        self._secret = urls.key or secrets.token_bytes(32)
        self._cache = self._open(settings.cache) if settings.cache else None

    def _open(self, settings: CacheSettings) -> ResultCache:
        if settings.redis_url is None:
            return MemoryCache(settings.memory_bytes)
        from ..results.cache.redis import RedisCache  # only who has one needs its client

        return RedisCache(settings, self._urls.image, self._metrics.cache_failed)

    def key(self, asked: GenerationRequest, tenant: str, headers: Headers) -> str | None:
        """None: it is to be drawn, whatever was drawn before."""
        bypassed = {"no-cache", "no-store"} & {
            part.strip().lower() for part in headers.get("cache-control", "").split(",")
        }
        if self._cache is None or not asked.seeded or bypassed:
            return None
        version = self._versions[asked.requests[0].model]
        return cache_key(self._secret, tenant, version, asked.requests)

    async def find(self, key: str, tenant: str) -> CachedImages | None:
        if self._cache is None:
            return None
        began = time.monotonic()
        found = await self._cache.get(key, tenant, began)
        self._metrics.looked_up(time.monotonic() - began, hit=found is not None)
        return found

    async def remember(
        self,
        key: str,
        tenant: str,
        requests: Sequence[ImageRequest],
        found: CachedImages,
    ) -> None:
        """Store the images first if they have to be found by name."""
        if self._cache is None:
            return
        keep = self._tuning().results
        age_s = keep.max_age_s
        if self._cache.needs_names:
            if not found.names:
                if self._urls.full:
                    return
                try:
                    names = await self._urls.store(requests, found.results, tenant)
                except StoreFailed:
                    return
                found = found._replace(names=tuple(names))
            age_s -= keep.link_expires_s  # a link into it is to work for its time
        else:  # for URLs it is stored again: what was may be gone
            found = found._replace(names=())
        if age_s > 0:
            await self._cache.put(key, found, time.monotonic(), age_s)


def _version(settings: ApplicationSettings, model: ServedModel) -> str:
    """What draws a model's images: weights, arithmetic and code, on however many replicas."""
    (encoder,) = (e for e in settings.text_encoders if e.id == model.text_encoder)
    sources = [s for s in (model.source, encoder.source, *(p.source for p in model.pools)) if s]
    found = [
        version("octet-serve"),
        settings.emulate_fp8,
        model.max_sequence_length,
        [pool.model_dump(mode="json", exclude=SIZES) for pool in model.pools],
        encoder.model_dump(mode="json", exclude=SIZES),
        [(source.location, source.revision, _files(source)) for source in sources],
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _files(source: Source) -> list[tuple[str, int, int]]:
    """A folder's files, their sizes and times: other weights in it are other weights."""
    folder = Path(source.location)
    if source.revision or not folder.is_dir():
        return []
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
