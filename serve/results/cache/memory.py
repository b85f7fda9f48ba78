"""The result cache: its keys, its interface, and the cache in memory.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple, Protocol

from ...request import ImageRequest, ImageResult

NO_DIFFERENCE = "id", "preset", "routed_by"  # fields of requests that do not change the image


class CachedImages(NamedTuple):
    """The images of one call; `names`: their names in the result store, if they are kept there."""

    results: tuple[ImageResult, ...]
    names: tuple[str, ...] = ()


class ResultCache(Protocol):
    """Keeps the images of calls by their keys; `now` is in seconds on any steady clock.

    No method raises an error: images that cannot be read count as not cached, and are generated.
    `needs_names`: whether images have to be in the result store before they are put into the cache.
    `shared`: whether all Ingresses have the same cache.
    """

    needs_names: bool
    shared: bool

    async def get(self, key: str, tenant: str, now: float) -> CachedImages | None:
        """The images of a key; None if they are not cached, or cannot be read in time.

        `tenant`: the tenant that calls; images of another tenant are never returned.
        """

    async def put(self, key: str, found: CachedImages, now: float, max_age_s: int) -> None:
        """Keep the images of a key for `max_age_s` at most."""


def cache_key(secret: bytes, tenant: str, version: str, requests: Sequence[ImageRequest]) -> str:
    """The cache key of a call: 64 hexadecimal digits, an HMAC-SHA256 with `secret`.

    The key depends on everything that makes a difference to the images: the tenant, `version`, and
    every field of the requests except their ids and those that only name a reason for others
    (`NO_DIFFERENCE`). `version` is a digest of the weights and the code that generate the
    images. The key reveals nothing about the call to a reader without `secret`.
    """
    own = hmac.digest(secret, f"octet result cache\0{tenant}".encode(), "sha256")
    fields = [
        {k: v for k, v in asdict(request).items() if k not in NO_DIFFERENCE} for request in requests
    ]
    return hmac.new(own, json.dumps([version, fields]).encode(), hashlib.sha256).hexdigest()


class MemoryCache:
    """A `ResultCache` in the memory of one process; drops the least recently used images first."""

    needs_names = False
    shared = False

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: the largest size of all images together."""
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[str, tuple[CachedImages, float]] = OrderedDict()  # and expiry

    async def get(self, key: str, tenant: str, now: float) -> CachedImages | None:
        found, expires = self._kept.get(key, (None, 0.0))
        if found and expires <= now:
            self._drop(key)
            return None
        if found:
            self._kept.move_to_end(key)
        return found

    async def put(self, key: str, found: CachedImages, now: float, max_age_s: int) -> None:
        self._drop(key)
        if _size_bytes(found) > self._max_bytes:
            return
        self._kept[key] = found, now + max_age_s
        self._bytes += _size_bytes(found)
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        if kept := self._kept.pop(key, None):
            self._bytes -= _size_bytes(kept[0])


def _size_bytes(found: CachedImages) -> int:
    return sum(len(result.image) for result in found.results)
