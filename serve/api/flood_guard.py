"""A guard in Ray Serve's HTTP proxy against clients that do not wait when they are told to.

A refusal with `retry-after` says when to try again. A client that goes on sending is refused here,
without any work of an Ingress or the Dispatcher, and without its body being read. So a tenant that
floods the server costs the others little.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..dispatch.client.refusals import retry_after
from ..metric_catalogue import metric
from ..tenants.keys import KEY

log = logging.getLogger("ray.serve")

FLOOD = 10  # refusals within about a second after which a client is refused here
FIRST = 4  # requests that pass in the first window after a hold
OPEN = 1000  # a window for so many requests is no limit any more
MOST_PAUSED = 1000  # refusals that wait at a time; further ones are answered at once
MOST_CLIENTS = 10_000  # that are remembered
REFUSALS = 429, 503


@dataclass(frozen=True, slots=True, kw_only=True)
class FloodTiming:
    """The times of a flood guard, in seconds.

    `hold_s`: how long a client is refused here at most. `window_s`: after that, a few requests pass
    in a first window of this length, and twice as many in each further one. On a busy machine both
    are at least twice as long as the server takes to refuse a request.
    `pause_s`: how long a refusal waits, so that a client in a loop is slower.
    `report_s`: how long refusals are counted before the number is logged.
    """

    hold_s: float = 0.25
    window_s: float = 0.05
    pause_s: float = 0.02
    report_s: float = 1.0


FLOOD_TIMING = FloodTiming()


class _Refusal(NamedTuple):
    """A refusal as it was sent to a client: response, error code, and when it may try again."""

    start: Message
    body: bytes
    code: str
    retry_at: float


@dataclass(slots=True)
class _Client:
    """What a client was refused lately.

    `level`: how many refusals it got within about the last second. `held_until`: until then
    `refusal` is its answer, and so it is later for requests beyond `left`, the number of requests
    that may pass in the present window. `decided_s`: how long the server took to refuse a request.
    """

    level: float = 0.0
    at: float = 0.0  # the time of `level`
    held_until: float = 0.0
    refusal: _Refusal | None = None
    window_ends: float = 0.0
    allowed: int = FIRST  # requests in the present window
    left: int = 0
    decided_s: float = 0.0

    def count(self, now: float) -> None:
        """Count a refusal."""
        self.level = min(max(self.level - (now - self.at) * FLOOD, 0.0) + 1, 2 * FLOOD)
        self.at = now

    def hold(self, refusal: _Refusal, until: float) -> None:
        """Refuse the client until then; afterwards begin with a small window."""
        self.refusal, self.held_until = refusal, until
        self.window_ends, self.allowed, self.left = until, FIRST // 2, 0

    def passes(self, now: float, window_s: float) -> bool:
        """Return whether a request may pass now, and count it if so.

        The answers to requests that pass take time to come. Without windows, many requests would
        pass before the first of them is refused.
        """
        if self.refusal is None:
            return True
        if now < self.held_until:
            return False
        if now >= self.window_ends:
            self.allowed *= 2
            self.window_ends = now + max(window_s, 2 * self.decided_s)
            self.left = self.allowed
            if self.allowed > OPEN:
                self.refusal = None
        self.left -= 1
        return self.left >= 0


class FloodGuard:
    """Middleware that answers a flooding client with the last refusal that it got.

    A client is whoever sends the same API key to the same path by POST. A client floods if it is
    refused more than `FLOOD` times a second. Then it is refused here until the time that the last
    refusal named, but for `hold_s` at most, whatever the body of its request is.
    """

    def __init__(
        self,
        app: ASGIApp,
        timing: FloodTiming = FLOOD_TIMING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._timing, self._clock = app, timing, clock
        self._clients: OrderedDict[tuple[bytes, str], _Client] = OrderedDict()
        self._paused = 0
        self._refused: Counter[tuple[str, str, int]] = Counter()  # by tenant, code and status
        self._requests: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        client_key = key, scope["path"]
        client = self._clients.get(client_key)
        if client and not client.passes(self._clock(), self._timing.window_s):
            await self._refuse(scope, send, client, key)
            return
        start: Message | None = None
        began = self._clock()

        async def watching_send(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message if message["status"] in REFUSALS else None
            elif start is not None:
                if not message.get("more_body", False):
                    self._note(client_key, began, start, message.get("body", b""))
                start = None
            await send(message)

        await self._app(scope, receive, watching_send)

    def _note(
        self, client_key: tuple[bytes, str], began: float, start: Message, body: bytes
    ) -> None:
        """Note a refusal of a request that came at `began`."""
        wait_ms = Headers(raw=start["headers"]).get("retry-after-ms", "")
        if not wait_ms.isdecimal():
            return
        now, wait_s = self._clock(), (int(wait_ms) - 1) / 1000  # `retry_after` has added 1 ms
        client = self._clients.setdefault(client_key, _Client())
        self._clients.move_to_end(client_key)
        if len(self._clients) > MOST_CLIENTS:
            self._clients.popitem(last=False)
        client.count(now)
        client.decided_s = max(now - began, 0.8 * client.decided_s)
        if client.level > FLOOD:
            hold_s = max(self._timing.hold_s, 2 * client.decided_s)
            refusal = _Refusal(start, body, _code(body), now + wait_s)
            client.hold(refusal, now + min(wait_s, hold_s))

    async def _refuse(self, scope: Scope, send: Send, client: _Client, key: bytes) -> None:
        refusal, now = client.refusal, self._clock()
        assert refusal  # noqa: S101 - for the type checker
        client.count(now)
        status = refusal.start["status"]
        self._count(key, refusal.code, status)
        if self._paused < MOST_PAUSED:
            self._paused += 1
            try:
                await asyncio.sleep(self._timing.pause_s)
            finally:
                self._paused -= 1
        message = {**refusal.start, "headers": list(refusal.start["headers"])}
        headers = MutableHeaders(raw=message["headers"])
        headers["x-request-id"] = Headers(scope=scope).get("x-request-id") or str(uuid.uuid4())
        for name, value in retry_after(refusal.retry_at - self._clock()).items():
            headers[name] = value
        await send(message)
        await send({"type": "http.response.body", "body": refusal.body})

    def _count(self, key: bytes, code: str, status: int) -> None:
        """Count a refusal; all are reported together, because a log line for each costs more."""
        if not self._refused:
            asyncio.get_running_loop().call_later(self._timing.report_s, self._report)
        match = KEY.search(key.decode("latin-1"))
        self._refused[match[1] if match else "anonymous", code, status] += 1

    def _report(self) -> None:
        self._requests = self._requests or metric("octet_requests")
        for (tenant, code, status), count in self._refused.items():
            self._requests.inc(count, {"model": "", "outcome": code, "status": str(status)})
            log.info(
                "refused %d further requests of %s: %s",
                count,
                tenant,
                code,
                extra={"event": "flood", "tenant": tenant, "outcome": code, "count": count},
            )
        self._refused.clear()


def _code(body: bytes) -> str:
    """The error code of a refusal's body."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return "unknown"
