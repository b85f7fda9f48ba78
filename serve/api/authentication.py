"""Authentication: every route needs a tenant's API key, except the open ones named here."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import KeyInvalid, OctetError, Unavailable
from ..settings.application import is_loopback
from ..tenants.keys import TenantDirectory, tenant_of
from .wire.http_errors import error_answer

ANONYMOUS = "anonymous"  # the one tenant of a server without authentication
OPEN_PATHS = {"/", "/favicon.ico", "/health", "/ready"}
OPEN_FOLDER = "/v1/files/"  # needs no key, because its links are signed


class Authentication:
    """Middleware that puts the tenant of a request into its scope, or answers 401.

    `directory` returns the directory of tenants; None before the Dispatcher has sent it, and then
    requests are answered with 503. `mode`: the setting `auth`. Only with `keys` a request needs an
    API key. With `none` only requests from the server's own machine are let in. `on_refusal` is
    called for every request that is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        mode: str,
        directory: Callable[[], TenantDirectory | None],
        on_refusal: Callable[[OctetError, Scope], None],
    ) -> None:
        self._app, self._mode, self._directory = app, mode, directory
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            return await self._app(scope, receive, send)
        if self._mode != "keys":
            if self._mode == "none" and scope.get("client") and not is_loopback(scope["client"][0]):
                error = KeyInvalid(
                    "auth is none: only clients on the server's own machine are served"
                )
                return await self._refuse(error, scope, receive, send)
            return await self._app({**scope, "tenant": ANONYMOUS}, receive, send)
        if (directory := self._directory()) is None:
            starting = Unavailable("this server is starting")
            return await self._refuse(starting, scope, receive, send)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        tenant = tenant_of(key.strip(), directory) if scheme.lower() == "bearer" else None
        if tenant is None:
            what = "is wrong or was revoked" if key else "is missing: Authorization: Bearer octet_…"
            error = KeyInvalid(f"the API key {what}")
            error.headers = {"www-authenticate": "Bearer"}
            return await self._refuse(error, scope, receive, send)
        return await self._app({**scope, "tenant": tenant, "key": key.strip()}, receive, send)

    async def _refuse(self, error: OctetError, scope: Scope, receive: Receive, send: Send) -> None:
        self._on_refusal(error, scope)
        await error_answer(error)(scope, receive, send)


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
