"""A guard in Ray Serve's HTTP proxy against clients that do not wait when they are told to.

A refusal with `retry-after` says when to try again. A client that goes on sending is refused here,
without any work of an Ingress or the Dispatcher, and without its body being read. So a tenant that
floods the server costs the others little.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..dispatch.client.refusals import retry_after
from ..metric_catalogue import metric
from ..tenants.keys import KEY
from .wire.paths import endpoint

log = logging.getLogger("ray.serve")

FLOOD = 10  # refusals within about a second after which a client is refused here
BATCH = 4  # requests of a client that are sent on before it is known that they have arrived
MOST_SENT = 32  # the same for a client whose requests are not refused
PROBE_S = 5.0  # a probe that takes longer counts as answered
LIGHT_S = 0.25  # a client that sends nothing for so long needs no probe
MOST_PAUSED = 1000  # refusals that wait at a time; further ones are answered at once
MOST_CLIENTS = 10_000  # that are remembered
REFUSALS = 429, 503
PROBE = {
    "method": "GET",
    "path": "/health",
    "raw_path": b"/health",
    "query_string": b"",
    "headers": [],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FloodTiming:
    """The times of a flood guard, in seconds.

    `hold_s`: how long a client is refused here at most; then some of its requests pass again.
    `pause_s`: how long a refusal waits, so that a client in a loop is slower.
    `report_s`: how long refusals are counted before the number is logged.
    """

    hold_s: float = 0.5
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
    """A client's requests and refusals of late.

    `level`: how many refusals it got within about the last second. `held_until`: until then
    `refusal` is its answer. `sent`: requests that were sent on and may not have arrived yet; at
    most `batch`. `rounds`: how many times all of them have arrived. `waiting`: requests that wait
    until others have arrived.
    """

    level: float = 0.0
    at: float = 0.0  # the time of `level`
    held_until: float = 0.0
    refusal: _Refusal | None = None
    sent: int = 0
    sent_at: float = 0.0
    batch: int = BATCH
    rounds: int = 0
    probing: asyncio.Task[None] | None = None
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    @property
    def is_probed(self) -> bool:
        """Return whether a probe is on its way."""
        return self.probing is not None and not self.probing.done()

    @property
    def must_wait(self) -> bool:
        """Return whether a request must wait for a probe before it is sent on."""
        return self.sent >= self.batch and self.is_probed

    def answered(self, rounds: int, *, refused: bool) -> None:
        """Note the answer to a request that was sent on in round `rounds`: so it has arrived.

        A client whose requests are not refused may have more of them on the way at a time.
        """
        self.batch = BATCH if refused else min(self.batch + 1, MOST_SENT)
        if rounds == self.rounds:  # otherwise it is known already
            self.sent -= 1
            self.wake(self.batch - self.sent)

    def all_arrived(self) -> None:
        """Note that all requests that were sent on have arrived."""
        self.rounds += 1
        self.sent = 0
        self.wake(self.batch)

    def count(self, now: float) -> None:
        """Count a refusal."""
        self.level = min(max(self.level - (now - self.at) * FLOOD, 0.0) + 1, 2 * FLOOD)
        self.at = now

    def wake(self, requests: int) -> None:
        """Let so many of the waiting requests go on."""
        for _ in range(min(requests, len(self.waiting))):
            if not (turn := self.waiting.popleft()).done():
                turn.set_result(None)


class FloodGuard:
    """Middleware that answers a flooding client with the last refusal that it got.

    A client is whoever sends the same API key to the same path by POST. A client floods if it is
    refused more than `FLOOD` times a second. Then it is refused here until the time that the last
    refusal named, but for `hold_s` at most, whatever the body of its request is.

    Before the first refusal comes, a sudden flood could fill the Ingress with requests, behind
    which those of other clients would wait. So only a batch of a client's requests is on its way
    at a time. When a batch is full, this guard sends a small request behind it, as a probe. Further
    requests follow as soon as the probe or an earlier request is answered. Answers that are no
    refusals let the batch grow.
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
        # By path, tenant, code and status.
        self._refused: Counter[tuple[str, str, str, int]] = Counter()
        self._requests: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = next((v for name, v in scope["headers"] if name == b"authorization"), b"")
        client = self._client(key, scope["path"])
        if client.must_wait and self._clock() >= client.held_until:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            client.waiting.append(turn)
            await turn
        if client.refusal and self._clock() < client.held_until:
            await self._refuse(scope, send, client, key)
            return
        self._count_sent(client, scope)
        rounds = client.rounds
        start: Message | None = None

        async def watching_send(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                if message["status"] in REFUSALS:
                    start = message
                else:
                    client.answered(rounds, refused=False)
            elif start is not None:
                if not message.get("more_body", False):
                    self._note(client, start, message.get("body", b""))
                client.answered(rounds, refused=True)
                start = None
            await send(message)

        await self._app(scope, receive, watching_send)

    def _client(self, key: bytes, path: str) -> _Client:
        client = self._clients.setdefault((key, path), _Client())
        self._clients.move_to_end((key, path))
        if len(self._clients) > MOST_CLIENTS:
            self._clients.popitem(last=False)
        return client

    def _count_sent(self, client: _Client, scope: Scope) -> None:
        """Count a request that is sent on, and send a probe after the last one of a batch."""
        now = self._clock()
        if not client.is_probed and now - client.sent_at > LIGHT_S:
            client.all_arrived()
        client.sent, client.sent_at = client.sent + 1, now
        if client.sent >= client.batch and not client.is_probed:
            client.probing = asyncio.create_task(self._probe(client, scope))

    async def _probe(self, client: _Client, scope: Scope) -> None:
        """Send probes until no request of the client waits; each lets a batch go on."""
        while client.sent >= client.batch or client.waiting:
            # A probe that fails must not stop the requests.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(PROBE_S):
                    await self._send_probe(scope)
            client.all_arrived()
            await asyncio.sleep(0)  # they are sent on and counted

    async def _send_probe(self, scope: Scope) -> None:
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if sent:  # Serve's proxy goes on to listen for a disconnect, which never comes
                await asyncio.get_running_loop().create_future()
            sent = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_: Message) -> None:
            pass

        await self._app({**scope, **PROBE}, receive, send)

    def _note(self, client: _Client, start: Message, body: bytes) -> None:
        """Note a refusal that the server has sent to a client."""
        wait_ms = Headers(raw=start["headers"]).get("retry-after-ms", "")
        if not wait_ms.isdecimal():
            return
        now, wait_s = self._clock(), (int(wait_ms) - 1) / 1000  # `retry_after` has added 1 ms
        client.count(now)
        if client.level > FLOOD:
            client.refusal = _Refusal(start, body, _code(body), now + wait_s)
            client.held_until = now + min(wait_s, self._timing.hold_s)
            client.wake(len(client.waiting))  # to be refused

    async def _refuse(self, scope: Scope, send: Send, client: _Client, key: bytes) -> None:
        refusal, now = client.refusal, self._clock()
        assert refusal  # noqa: S101 - for the type checker
        client.count(now)
        status = refusal.start["status"]
        self._count(scope["path"], key, refusal.code, status)
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

    def _count(self, path: str, key: bytes, code: str, status: int) -> None:
        """Count a refusal; all are reported together, because a log line for each costs more."""
        if not self._refused:
            asyncio.get_running_loop().call_later(self._timing.report_s, self._report)
        match = KEY.search(key.decode("latin-1"))
        tenant = match[1] if match else "anonymous"
        self._refused[path, tenant, code, status] += 1

    def _report(self) -> None:
        self._requests = self._requests or metric("octet_requests")
        for (path, tenant, code, status), count in self._refused.items():
            tags = {"endpoint": endpoint(path), "model": "", "outcome": code}
            self._requests.inc(count, {**tags, "status": str(status)})
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
