"""What every request passes in Ray Serve's HTTP proxy before Serve reads its headers.

Serve finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.api.proxy_guard:middlewares, in
the environment of every node that runs a proxy.
"""

from __future__ import annotations

import contextlib
import time
import uuid

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidRequest, NotFound
from .wire.request import check_request_id
from .wire.response import error_body

# Clients could set Serve's own time limit with them, or make its proxy fail on odd bytes.
SERVES_OWN = {
    "serve-multiplexed-model-id",
    "x-request-disconnect-disabled",
    "x-request-timeout-seconds",
    "x-session-id",
}


SERVES_ROUTES = "/-/routes"  # which Serve's proxy would answer to everybody
LOOK_S = 1.0
# Serve's own path that says 503 when this proxy's node is about to go.
HEALTH = {
    "method": "GET",
    "path": "/-/healthz",
    "raw_path": b"/-/healthz",
    "query_string": b"",
    "headers": [],
}


class ProxyGuard:
    """Takes out the headers that steer Serve; an `x-request-id` that is not safe is a 400.

    Of Serve's own paths only /-/healthz is answered, which says whether this proxy works. Where it
    does not, or its node is about to go, answers close their connections: clients and gateways that
    keep them would go on to ask here until the end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._leaving, self._look_at = False, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the API has none
            return await send({"type": "websocket.close", "code": 1000})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if await self._is_leaving(scope):
            send = _closing(send)
        if scope["path"] == SERVES_ROUTES:
            error = NotFound("/-/routes: Not Found")
            return await JSONResponse(error_body(error), error.status)(scope, receive, send)
        given = Headers(scope=scope).getlist("x-request-id")
        try:
            if given:
                check_request_id(", ".join(given))  # several are as bad as an unsafe one
        except InvalidRequest as error:
            own = {"x-should-retry": "false", "x-request-id": str(uuid.uuid4())}
            answer = JSONResponse(error_body(error), error.status, own)
            return await answer(scope, receive, send)
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name.decode("latin-1").lower().replace("_", "-") not in SERVES_OWN
        ]
        return await self._app({**scope, "headers": headers}, receive, send)

    async def _is_leaving(self, scope: Scope) -> bool:
        """By Serve's own answer, asked once a second at most."""
        if (now := time.monotonic()) >= self._look_at:
            self._look_at = now + LOOK_S
            asked = {**scope, **HEALTH}

            async def receive() -> Message:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._leaving = message["status"] == 503

            # Whatever is wrong with it, the request itself may be answered.
            with contextlib.suppress(Exception):
                await self._app(asked, receive, send)
        return self._leaving


def _closing(send: Send) -> Send:
    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return closing


def middlewares() -> list[Middleware]:
    return [Middleware(ProxyGuard)]
