"""Cross-origin requests: browsers may call the server from the web pages that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

METHODS = "GET", "POST", "DELETE"
SENT = (
    *("authorization", "cache-control", "content-type", "idempotency-key", "last-event-id"),
    *("prefer", "x-request-id"),
)
SHOWN = (
    *(
        "idempotent-replayed",
        "location",
        "retry-after",
        "retry-after-ms",
        "x-request-id",
        "x-should-retry",
    ),
    *("x-octet-cache", "x-octet-eta-s", "x-octet-ignored"),
    *(
        f"x-ratelimit-{part}-{of}"
        for of in ("requests", "work", "budget")
        for part in ("limit", "remaining", "reset")
    ),
)


class Cors:
    """Middleware that answers browsers' preflight requests and adds the headers that they need.

    `origins` returns the present allowed origins, because live settings may change them. Without
    any origin, every request passes as it is.
    """

    def __init__(self, app: ASGIApp, origins: Callable[[], Sequence[str]]) -> None:
        self._app, self._origins = app, origins
        self._allowed: Sequence[str] = ()
        self._cors: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start comes before the live settings
            await self._app(scope, receive, send)
            return
        if (allowed := self._origins()) != self._allowed:
            self._allowed, self._cors = allowed, self._app
            if allowed:
                self._cors = CORSMiddleware(
                    self._app,
                    allow_origins=allowed,
                    allow_methods=METHODS,
                    allow_headers=SENT,
                    expose_headers=SHOWN,
                )
        await self._cors(scope, receive, send)
