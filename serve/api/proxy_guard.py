"""A guard in Ray Serve's HTTP proxy: every request passes it before Serve reads the headers.

Serve finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.api.proxy_guard:middlewares, in
the environment of every node that runs a proxy.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidRequest, Unavailable
from .early_body import EarlyBody
from .flood_guard import FloodGuard
from .wire.http_errors import error_answer, unknown_path
from .wire.request import check_request_id
from .wire.response import error_body

# Headers with which clients could change Serve's own time limit, or make its proxy fail.
SERVES_OWN = {
    "serve-multiplexed-model-id",
    "x-request-disconnect-disabled",
    "x-request-timeout-seconds",
    "x-session-id",
}


SERVES_ROUTES = "/-/routes"  # Serve's proxy would show all routes to everybody
READY = "/ready"
LOOK_S = 1.0
# Serve ends a proxy at the earliest so long after its node was drained, if it has no open request.
# After two thirds of that Kubernetes sends the proxy no new connections, because its readiness
# probe has failed for long.
MIN_DRAINING_S = float(os.environ.get("RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S", "30"))
ACCEPT_S = MIN_DRAINING_S * 2 / 3
DRAINING = b"This node is being drained."  # Serve's answer on a node that is about to go
SERVERS = {("asyncio.base_events", "Server"), ("uvloop.loop", "Server")}  # listeners of event loops
# A request for Serve's own health path, which answers 503 when this proxy's node is about to go.
HEALTH = {
    "method": "GET",
    "path": "/-/healthz",
    "raw_path": b"/-/healthz",
    "query_string": b"",
    "headers": [],
}


class ProxyGuard:
    """Middleware that keeps clients from steering Ray Serve's proxy.

    The guard removes the headers `SERVES_OWN`. An unsafe `x-request-id` is answered with 400, and
    a request for Serve's list of routes with 404.

    The guard also asks Serve's own path /-/healthz whether this proxy works. If the proxy is
    unhealthy, or its node is about to go, every response closes its connection. Otherwise clients
    and gateways that keep connections open would go on sending requests to this proxy. After
    `accept_s` on a node that is about to go, the proxy accepts no more connections. Serve ends it
    some seconds later, and would cut off a connection that had come just before its end. If the
    node stays after all, the proxy's process ends, so that Serve starts one that accepts again.

    A proxy that has just started answers every path with 404 until it has its routes. The guard
    makes it a 503, after which clients try again.

    The answer to `GET /ready` is used again for `look_s`, so that many probes cost no Ingress
    anything. The header `age` says how old it is, in seconds.
    """

    def __init__(self, app: ASGIApp, look_s: float = LOOK_S, accept_s: float = ACCEPT_S) -> None:
        """`look_s`: seconds for which the answers of Serve's health path and of /ready count.

        `accept_s`: seconds for which a proxy that is about to go accepts connections.
        """
        self._app, self._look_s, self._accept_s = app, look_s, accept_s
        self._leaving, self._look_at = False, 0.0
        self._draining_since: float | None = None
        self._deaf = False  # the proxy accepts no more connections
        self._ready: list[Message] = []  # the messages of the last answer
        self._ready_at = -look_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the API has no websockets
            return await send({"type": "websocket.close", "code": 1000})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        send = _retried_if_unrouted(send)
        if await self._is_leaving(scope):
            send = _closing(send)
        self._stop_accepting(scope)
        if scope["path"] == SERVES_ROUTES:
            error = unknown_path(scope["method"], SERVES_ROUTES)
            return await JSONResponse(error_body(error), error.status)(scope, receive, send)
        given = Headers(scope=scope).getlist("x-request-id")
        try:
            if given:
                check_request_id(", ".join(given))  # several ids are refused like an unsafe one
        except InvalidRequest as error:
            own = {"x-should-retry": "false", "x-request-id": str(uuid.uuid4())}
            answer = JSONResponse(error_body(error), error.status, own)
            return await answer(scope, receive, send)
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name.decode("latin-1").lower().replace("_", "-") not in SERVES_OWN
        ]
        scope = {**scope, "headers": headers}
        if scope["path"] == READY and scope["method"] == "GET":
            return await self._answer_ready(scope, receive, send)
        return await self._app(scope, receive, send)

    async def _answer_ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `GET /ready` with the last answer, or ask an Ingress if that is too old."""
        if (age_s := time.monotonic() - self._ready_at) >= self._look_s:
            messages: list[Message] = []

            async def keep(message: Message) -> None:
                messages.append(message)
                await send(message)

            await self._app(scope, receive, keep)
            if messages and not messages[-1].get("more_body", False):  # else the client has gone
                self._ready, self._ready_at = messages, time.monotonic()
            return
        start, *rest = self._ready
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["age"] = str(round(age_s))
        headers["x-request-id"] = Headers(scope=scope).get("x-request-id") or str(uuid.uuid4())
        for message in ({**start, "headers": headers.raw}, *rest):
            await send(message)

    def _stop_accepting(self, scope: Scope) -> None:
        """Close the listening socket if this proxy's node has been draining for `accept_s`."""
        if self._draining_since is None:
            if self._deaf:
                os._exit(1)
            return
        if self._deaf or time.monotonic() - self._draining_since < self._accept_s:
            return
        self._deaf = True
        _, port = scope["server"]
        for found in gc.get_objects():  # Serve gives nobody its server
            kind = type(found)
            if (kind.__module__, kind.__name__) in SERVERS and any(
                _port(socket.getsockname()) == port for socket in found.sockets
            ):
                found.close()

    async def _is_leaving(self, scope: Scope) -> bool:
        """Return whether Serve's health path answers 503; asks it once in `look_s` s at most."""
        if (now := time.monotonic()) >= self._look_at:
            self._look_at = now + self._look_s
            asked = {**scope, **HEALTH}

            async def receive() -> Message:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._leaving = message["status"] == 503
                # A proxy without routes or replicas answers 503 as well, and stays.
                elif self._leaving and DRAINING in message.get("body", b""):
                    self._draining_since = self._draining_since or time.monotonic()
                else:
                    self._draining_since = None

            # Even if asking fails for any reason, the request itself may still be answered.
            with contextlib.suppress(Exception):
                await self._app(asked, receive, send)
        return self._leaving


def _port(address: object) -> int | None:
    """The port of a socket's address; None for a socket without one."""
    return int(address[1]) if isinstance(address, tuple) else None


def _retried_if_unrouted(send: Send) -> Send:
    """Answer 503 in place of the 404 of a proxy that has just started and has no routes yet.

    Octet's own 404s are JSON, and Serve's is plain text. A client tries again after a 503.
    """
    replaced = False

    async def retried(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] == 404:
            kind = Headers(raw=list(message["headers"])).get("content-type", "")
            if replaced := kind.startswith("text/plain"):
                answer = error_answer(Unavailable("this proxy is starting: try again"))
                headers = [*answer.raw_headers, (b"connection", b"close")]
                await send({**message, "status": answer.status_code, "headers": headers})
                await send({"type": "http.response.body", "body": answer.body})
        if not replaced:
            await send(message)

    return retried


def _closing(send: Send) -> Send:
    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return closing


def middlewares() -> list[Middleware]:
    """The middlewares that Ray Serve puts into its proxy."""
    return [Middleware(ProxyGuard), Middleware(FloodGuard), Middleware(EarlyBody)]
