"""Repeated requests: under which key their images are remembered, and a memory for them.

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


class CachedImages(NamedTuple):
    """The images of one call; `names`: where the result store has them, if it has to."""

    results: tuple[ImageResult, ...]
    names: tuple[str, ...] = ()


class ResultCache(Protocol):
    """`now` is seconds on any clock. Nothing here raises: what is not known is drawn."""

    needs_names: bool

    async def get(self, key: str, tenant: str, now: float) -> CachedImages | None:
        """None: never seen, forgotten, or nobody can say in time."""

    async def put(self, key: str, found: CachedImages, now: float, max_age_s: int) -> None:
        """Remember it, for so long at most."""


def cache_key(secret: bytes, tenant: str, version: str, requests: Sequence[ImageRequest]) -> str:
    """64 hexadecimal digits that tell nothing of a call to whoever does not know `secret`.

    All that makes a difference to the images is in it: the tenant, every field of the requests but
    their ids, and `version`: which weights and which code draw them.
    """
    own = hmac.digest(secret, f"octet result cache\0{tenant}".encode(), "sha256")
    fields = [{k: v for k, v in asdict(request).items() if k != "id"} for request in requests]
    return hmac.new(own, json.dumps([version, fields]).encode(), hashlib.sha256).hexdigest()


class MemoryCache:
    """A `ResultCache` of one process: what was used longest ago is forgotten first."""

    needs_names = False

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of all images together."""
        self._max_bytes, self._bytes = max_bytes, 0
        self._found: OrderedDict[str, tuple[CachedImages, float]] = OrderedDict()

    async def get(self, key: str, tenant: str, now: float) -> CachedImages | None:
        found, expires = self._found.get(key, (None, 0.0))
        if found and expires <= now:
            self._forget(key)
            return None
        if found:
            self._found.move_to_end(key)
        return found

    async def put(self, key: str, found: CachedImages, now: float, max_age_s: int) -> None:
        self._forget(key)
        if _size(found) > self._max_bytes:
            return
        self._found[key] = found, now + max_age_s
        self._bytes += _size(found)
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._found)))

    def _forget(self, key: str) -> None:
        if known := self._found.pop(key, None):
            self._bytes -= _size(known[0])


def _size(found: CachedImages) -> int:
    return sum(len(result.image) for result in found.results)
