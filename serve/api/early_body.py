"""Small request bodies, sent from Ray Serve's HTTP proxy to an Ingress together with their request.

By itself Ray Serve sends a request without its body, and the Ingress then asks the proxy for the
body. For a small body, these questions cost more than the request itself.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .wire.paths import GENERATIONS

BODY = "octet.body"  # the key of the body in the ASGI scope, which Ray Serve sends as it is
SMALL_BODY = 2**14  # bytes
WAIT_S = 0.05


class EarlyBody:
    """Middleware that puts a small body into the scope, if it arrives within `wait_s`.

    After that body the Ingress receives nothing but the client's disconnect. All other bodies, and
    those of other paths, take Ray Serve's way. Clients cannot write to the scope.
    """

    def __init__(self, app: ASGIApp, wait_s: float = WAIT_S) -> None:
        self._app, self._wait_s = app, wait_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == GENERATIONS and _is_small(scope):
            try:
                async with asyncio.timeout(self._wait_s):
                    first = await receive()
            except TimeoutError:
                pass
            else:
                if first["type"] == "http.request" and not first.get("more_body", False):
                    scope = {**scope, BODY: bytes(first.get("body", b""))}
                else:
                    receive = _again(first, receive)
        await self._app(scope, receive, send)


def _is_small(scope: Scope) -> bool:
    size = Headers(scope=scope).get("content-length", "")
    return size.isdecimal() and len(size) < 10 and 0 < int(size) <= SMALL_BODY


def _again(first: Message, receive: Receive) -> Receive:
    """A `receive` that returns `first` once more, and then what `receive` returns."""
    waiting = [first]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received
