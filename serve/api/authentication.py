"""Authentication: every route needs a tenant's API key, except the open ones named here.

What a key may be used for follows from its scopes: "generate" for requests that ask for images or
cancel them, "admin" for the paths of operators, and "read" for all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from ..errors import KeyInvalid, OctetError, ScopeMissing, Unavailable
from ..settings.application import is_loopback
from ..tenants.keys import SCOPES, Scope, TenantDirectory
from .wire.http_errors import error_answer

ANONYMOUS = "anonymous"  # the one tenant of a server without authentication
OPEN_PATHS = {"/", "/favicon.ico", "/health", "/ready"}
OPEN_FOLDERS = "/v1/files/t/", "/v1/files/j/"  # need no key, because their links are signed
OPERATORS = "/admin/", "/v1/state", "/v1/quarantine/", "/v1/nodes/"  # how their paths begin


class Authentication:
    """Middleware that puts the tenant of a request into its scope, or answers 401.

    `directory` returns the directory of tenants; None before the Dispatcher has sent it, and then
    requests are answered with 503. `mode`: the setting `auth`. Only with `keys` a request needs an
    API key. With `none` only requests from the server's own machine are let in. `on_use` is called
    with the id of a valid key and the Unix time, `on_refusal` for every request that is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        mode: str,
        directory: Callable[[], TenantDirectory | None],
        on_use: Callable[[str, float], None],
        on_refusal: Callable[[OctetError, AsgiScope], None],
    ) -> None:
        self._app, self._mode, self._directory = app, mode, directory
        self._on_use, self._on_refusal = on_use, on_refusal

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]):
            return await self._app(scope, receive, send)
        if self._mode != "keys":
            if self._mode == "none" and scope.get("client") and not is_loopback(scope["client"][0]):
                error = KeyInvalid(
                    "auth is none: only clients on the server's own machine are served"
                )
                return await self._refuse(error, scope, receive, send)
            known = {"tenant": ANONYMOUS, "scopes": SCOPES}
            return await self._app({**scope, **known}, receive, send)
        if (directory := self._directory()) is None:
            starting = Unavailable("this server is starting")
            return await self._refuse(starting, scope, receive, send)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        now = time.time()
        owner = directory.owner(key.strip(), now) if scheme.lower() == "bearer" else None
        if owner is None:
            what = (
                "is wrong, was revoked or has expired"
                if key
                else "is missing: Authorization: Bearer octet_…"
            )
            error = KeyInvalid(f"the API key {what}")
            error.headers = {"www-authenticate": "Bearer"}
            return await self._refuse(error, scope, receive, send)
        needed = scope_needed(scope["method"], scope["path"])
        # Operators' paths decide by themselves: to other callers they do not exist.
        if needed != "admin" and needed not in owner.key.scopes:
            has = ", ".join(owner.key.scopes)
            missing = ScopeMissing(f"the API key needs the scope '{needed}' for this; it has {has}")
            return await self._refuse(missing, {**scope, "tenant": owner.tenant}, receive, send)
        self._on_use(owner.key.id, now)
        known = {
            "tenant": owner.tenant,
            "key": key.strip(),
            "key_id": owner.key.id,
            "scopes": owner.key.scopes,
        }
        return await self._app({**scope, **known}, receive, send)

    async def _refuse(
        self, error: OctetError, scope: AsgiScope, receive: Receive, send: Send
    ) -> None:
        self._on_refusal(error, scope)
        await error_answer(error)(scope, receive, send)


def scope_needed(method: str, path: str) -> Scope:
    """The scope of a key that a request with this method and path needs."""
    if path.startswith(OPERATORS):
        return "admin"
    return "read" if method in ("GET", "HEAD", "OPTIONS") else "generate"


def is_open(path: str) -> bool:
    """Return whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
