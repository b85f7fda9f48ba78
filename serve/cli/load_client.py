"""Client that puts load on a server over HTTP, at given times or as fast as the server answers."""

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
    """A tenant's request body, to be sent `at` seconds after the start.

    A body with `images` is that of an edit.
    """

    at: float
    tenant: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class LoadAnswer:
    """A request and how the server answered it.

    `status`: the HTTP status, or 0 if no answer came. `code`: the error code of the answer, or the
    name of the client's error if no answer came; `message`: what it says. `handler_ms`:
    milliseconds that the server's handler took, None if the answer does not say. `cache`: what the
    result cache did, such as `hit` or `miss`.
    """

    request: TimedRequest
    status: int
    code: str
    latency_s: float
    done_at: float  # seconds from the start
    handler_ms: float | None = None
    cache: str = ""
    message: str = ""


class LoadClient:
    """Sends requests to one address with each tenant's API key.

    `url`: the address for generations; `edits_url`: that for edits. `keys`: the API keys by
    tenant; a tenant without a key sends none. `on_answer`: called with every answer.
    `patience_s`: seconds after which a request is given up. `keep_open`: whether a connection takes
    further requests; if not, a server of several processes can spread them better.
    """

    def __init__(
        self,
        url: str,
        keys: Mapping[str, str],
        on_answer: Callable[[LoadAnswer], None] = lambda _: None,
        edits_url: str = "",
        patience_s: float = PATIENCE_S,
        keep_open: bool = True,
    ) -> None:
        self._keep_open = keep_open
        self._edits_url, self._patience_s = edits_url, patience_s
        self.answers: list[LoadAnswer] = []  # so far
        self._url, self._keys, self._on_answer = url, keys, on_answer
        self._began = 0.0

    async def open_loop(self, requests: Iterable[TimedRequest]) -> list[LoadAnswer]:
        """Send each request at its own time, even if earlier ones are still unanswered."""
        async with self._session() as http:
            self._began = time.monotonic()

            async def send_later(request: TimedRequest) -> LoadAnswer:
                await asyncio.sleep(max(self._began + request.at - time.monotonic(), 0))
                return await self._send(http, request)

            return await asyncio.gather(*(send_later(request) for request in requests))

    async def closed_loop(
        self,
        outstanding: Mapping[str, int],
        body: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        seconds: float,
    ) -> list[LoadAnswer]:
        """Keep `outstanding[tenant]` requests of each tenant open for `seconds`.

        `body`: the body of every request, or a function that returns the next one.
        """
        bodies = body if callable(body) else lambda: body
        found: list[LoadAnswer] = []
        async with self._session() as http:
            self._began = time.monotonic()

            async def keep_sending(tenant: str) -> None:
                while (now := time.monotonic() - self._began) < seconds:
                    found.append(await self._send(http, TimedRequest(now, tenant, bodies())))

            await asyncio.gather(
                *(keep_sending(tenant) for tenant, n in outstanding.items() for _ in range(n))
            )
        return found

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, force_close=not self._keep_open)
        timeout = aiohttp.ClientTimeout(total=self._patience_s)
        return aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def _send(self, http: aiohttp.ClientSession, request: TimedRequest) -> LoadAnswer:
        key = self._keys.get(request.tenant)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        began = time.monotonic()
        status, handler_ms, cache, message = 0, None, "", ""
        try:
            url = self._edits_url if "images" in request.body else self._url
            async with http.post(url, json=request.body, headers=headers) as answer:
                status, cache = answer.status, answer.headers.get("x-octet-cache", "")
                timing = re.search(r"\bdur=([\d.]+)$", answer.headers.get("server-timing", ""))
                handler_ms = float(timing[1]) if timing else None
                content = await answer.json(content_type=None)
                code = "" if status == 200 else str(content["error"]["code"])
                message = "" if status == 200 else str(content["error"]["message"])
        except TimeoutError:
            status, code, message = 0, "no answer", f"none came in {self._patience_s:g} s"
        except aiohttp.ClientConnectorError as error:
            status, code = 0, "no connection"
            message = f"{error.os_error.strerror or error.os_error}: is the server running?"
        except aiohttp.ClientError as error:
            status, code, message = 0, "no answer", f"the connection broke: {error}"
        except (LookupError, TypeError, ValueError):
            code, message = "not Octet", f"the answer ({status}) is not in Octet's format"
        done = time.monotonic()
        found = LoadAnswer(
            request, status, code, done - began, done - self._began, handler_ms, cache, message
        )
        self.answers.append(found)
        self._on_answer(found)
        return found


def poisson(
    seed: str, tenant: str, per_s: float, seconds: float, body: Mapping[str, Any]
) -> list[TimedRequest]:
    """Requests of a tenant that arrive as a Poisson process of rate `per_s`, for `seconds`.

    The same seed and tenant give the same times.
    """
    rng, now, requests = random.Random(seed + tenant), 0.0, []  # noqa: S311 - no secrets
    while (now := now + rng.expovariate(per_s)) < seconds:
        requests.append(TimedRequest(now, tenant, body))
    return requests


def percentile(values: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of the sorted values, by nearest rank; nan without values."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else float("nan")
