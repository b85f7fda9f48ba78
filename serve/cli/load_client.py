"""Load over HTTP: requests at given times or as fast as they are answered, and what came back."""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

PATIENCE_S = 300.0


class TimedRequest(NamedTuple):
    """A request of a tenant at a time, seconds from the start."""

    at: float
    tenant: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class LoadAnswer:
    """`status` 0: no answer, and `code` says why. `handler_ms`: of the server's handler, where it
    says so; `cache`: what the result cache did.
    """

    ask: TimedRequest
    status: int
    code: str
    latency_s: float
    done_at: float  # seconds from the start
    handler_ms: float | None = None
    cache: str = ""


class LoadClient:
    """Sends to one address, with each tenant's key; `tell` hears every answer."""

    def __init__(
        self,
        url: str,
        keys: Mapping[str, str],
        tell: Callable[[LoadAnswer], None] = lambda _: None,
    ) -> None:
        self._url, self._keys, self._tell = url, keys, tell
        self._began = 0.0

    async def open_loop(self, asks: Iterable[TimedRequest]) -> list[LoadAnswer]:
        """Every request at its time, whatever has become of the others."""
        async with self._session() as http:
            self._began = time.monotonic()

            async def later(ask: TimedRequest) -> LoadAnswer:
                await asyncio.sleep(max(self._began + ask.at - time.monotonic(), 0))
                return await self._send(http, ask)

            return await asyncio.gather(*(later(ask) for ask in asks))

    async def closed_loop(
        self,
        outstanding: Mapping[str, int],
        body: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        seconds: float,
    ) -> list[LoadAnswer]:
        """Each tenant has so many requests open all the time, each of one body or the next."""
        bodies = body if callable(body) else lambda: body
        found: list[LoadAnswer] = []
        async with self._session() as http:
            self._began = time.monotonic()

            async def keep_asking(tenant: str) -> None:
                while (now := time.monotonic() - self._began) < seconds:
                    found.append(await self._send(http, TimedRequest(now, tenant, bodies())))

            await asyncio.gather(
                *(keep_asking(tenant) for tenant, n in outstanding.items() for _ in range(n))
            )
        return found

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        return aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def _send(self, http: aiohttp.ClientSession, ask: TimedRequest) -> LoadAnswer:
        key = self._keys.get(ask.tenant)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        began = time.monotonic()
        status, handler_ms, cache = 0, None, ""
        try:
            async with http.post(self._url, json=ask.body, headers=headers) as answer:
                status, cache = answer.status, answer.headers.get("x-octet-cache", "")
                timing = re.search(r"\bdur=([\d.]+)$", answer.headers.get("server-timing", ""))
                handler_ms = float(timing[1]) if timing else None
                content = await answer.json(content_type=None)
                code = "" if status == 200 else str(content["error"]["code"])
        except (aiohttp.ClientError, TimeoutError) as error:
            status, code = 0, type(error).__name__
        except (LookupError, TypeError, ValueError):
            code = "no answer of Octet's"
        done = time.monotonic()
        found = LoadAnswer(ask, status, code, done - began, done - self._began, handler_ms, cache)
        self._tell(found)
        return found


def poisson(
    seed: str, tenant: str, per_s: float, seconds: float, body: Mapping[str, Any]
) -> list[TimedRequest]:
    """Arrivals by a Poisson process; the same for the same seed."""
    rng, now, asks = random.Random(seed + tenant), 0.0, []  # noqa: S311 - no secrets
    while (now := now + rng.expovariate(per_s)) < seconds:
        asks.append(TimedRequest(now, tenant, body))
    return asks


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; nan if there are none."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else float("nan")
