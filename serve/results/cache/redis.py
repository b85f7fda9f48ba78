"""The result cache in Redis, which all Ingress replicas share.

Redis holds the names, digests and timings of images; the result store keeps the images themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ...errors import NotFound
from ...request import ImageResult, Timings
from ...settings.application import CacheSettings
from ..store import folders_of
from .circuit_breaker import CircuitBreaker
from .memory import CachedImages

log = logging.getLogger("ray.serve")

ANSWER_S = 0.1  # time for an answer; by default Redis' client retries for almost a minute
READ_S = 2.0  # time to read a call's images; generating them may be faster than waiting longer
CONNECTIONS = 64
PREFIX = "octet:image:"

T = TypeVar("T")


class RedisCache:
    """A `ResultCache` in Redis.

    While Redis does not answer, `get` finds nothing and `put` keeps nothing.
    """

    needs_names = True
    shared = True

    def __init__(
        self,
        settings: CacheSettings,
        read: Callable[[str], Awaitable[bytes]],
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the connections to Redis.

        `read`: returns an image by its name, or raises an `OctetError`. `failed`: called each time
        that Redis does not answer in time. Raises `OSError` if the password file cannot be read.
        """
        file = settings.redis_password_file
        self._read, self._failed, self._breaker = read, failed, CircuitBreaker()
        pool = BlockingConnectionPool.from_url(  # with all connections in use, the next call waits
            str(settings.redis_url),
            password=Path(file).expanduser().read_text().strip() if file else None,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=ANSWER_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=CONNECTIONS,
            timeout=ANSWER_S,
        )
        self._redis: Any = Redis.from_pool(pool)

    async def get(self, key: str, tenant: str, now: float) -> CachedImages | None:
        value: bytes | None = await self._ask(lambda: self._redis.get(PREFIX + key), now)
        if value is None:
            return None
        try:
            images = json.loads(value)
            if not all(image["name"].startswith(folders_of(tenant)) for image in images):
                raise ValueError("an image of another tenant")
            async with asyncio.timeout(READ_S), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._image(dict(image))) for image in images]
        except (LookupError, TypeError, ValueError):
            log.warning("the result cache holds a value that Octet did not write", exc_info=True)
            return None
        except (TimeoutError, ExceptionGroup):  # an image was deleted or is out of reach or late
            return None
        names = tuple(str(image["name"]) for image in images)
        return CachedImages(tuple(task.result() for task in tasks), names)

    async def put(self, key: str, found: CachedImages, now: float, max_age_s: int) -> None:
        value = await asyncio.to_thread(_value, found)
        await self._ask(lambda: self._redis.set(PREFIX + key, value, ex=max_age_s), now)

    async def close(self) -> None:
        """Close the connections to Redis."""
        await self._redis.aclose()

    async def _image(self, image: dict[str, Any]) -> ImageResult:
        """Read one image from the result store, and check it against its digest.

        `image`: what Redis holds about the image. Raises `NotFound` if the digest differs.
        """
        name, digest, timings = (image.pop(key) for key in ("name", "sha256", "timings"))
        data = await self._read(name)
        if await asyncio.to_thread(_digest, data) != digest:
            raise NotFound(f"{name} is not the image that was put into the result cache")
        return ImageResult(image=data, timings=Timings(**timings), **image)

    async def _ask(self, command: Callable[[], Awaitable[T]], now: float) -> T | None:
        """The answer of Redis to a command; None if Redis does not answer in time.

        Also None, without asking, while the circuit breaker refuses calls.
        """
        if not self._breaker.allows(now):
            return None
        was_open = self._breaker.open
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await command()
        except (RedisError, OSError, TimeoutError) as error:
            self._breaker.failed(now)
            self._failed()
            if self._breaker.open and not was_open:
                log.warning("Redis does not answer: working without the result cache: %s", error)
            return None
        self._breaker.succeeded()
        if was_open:
            log.info("Redis answers again")
        return answer


def _value(found: CachedImages) -> str:
    """The value that Redis holds for these images: JSON with everything but their bytes."""
    images = [
        {
            **{k: v for k, v in asdict(result).items() if k != "image"},
            "name": name,
            "sha256": _digest(result.image),
        }
        for name, result in zip(found.names, found.results, strict=True)
    ]
    return json.dumps(images)


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()
