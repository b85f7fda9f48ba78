"""The HTTP routes for operators: state, requests in quarantine, nodes out of service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..dispatch.client.session import DispatchSession
from ..errors import NotFound, Unavailable
from ..tenants.keys import TenantAccess
from .body import read_body
from .timing import IngressTiming
from .wire.http_errors import unknown_path
from .wire.request import SHOWN_CHARS, reason_of
from .wire.response import LiftedQuarantine, NodeCordon


class OperatorRoutes:
    """Answers the requests of operators; to other callers their paths do not exist."""

    def __init__(
        self,
        session: DispatchSession,
        dispatcher: Any,
        timing: IngressTiming,
        auth: str,
        access: Callable[[str], TenantAccess],
        authenticate_again: Callable[[Request], None],
        max_body_bytes: Callable[[], int],
    ) -> None:
        """`dispatcher`: a Ray Serve handle of the `Dispatcher`. `auth`: the setting.

        `access` returns the access of a tenant, `max_body_bytes` the present setting.
        `authenticate_again` raises `KeyInvalid` if the caller's key was revoked meanwhile.
        """
        self._session, self._dispatcher, self._timing = session, dispatcher, timing
        self._auth, self._access, self._max_body_bytes = auth, access, max_body_bytes
        self._authenticate_again = authenticate_again
        self.routes = [
            Route("/v1/state", self.state),
            Route("/v1/quarantine/{id}", self.lift_quarantine, methods=["DELETE"]),
            Route("/v1/nodes/{id}/cordon", self.cordon, methods=["PUT"]),
            Route("/v1/nodes/{id}/cordon", self.uncordon, methods=["DELETE"]),
        ]

    async def state(self, http: Request) -> Response:
        """Answer `GET /v1/state` with pools, queue and tenants, but only to an operator."""
        self._check_operator(http)
        try:
            async with asyncio.timeout(self._timing.dispatcher_s):
                return JSONResponse(await self._dispatcher.overview.remote())
        except (TimeoutError, RayError, RayServeException):
            raise Unavailable("the dispatcher is restarting: try again") from None

    async def lift_quarantine(self, http: Request) -> Response:
        """Answer `DELETE /v1/quarantine/ID`: an operator lets a request pass again."""
        id = http.path_params["id"]
        if not (self._is_operator(http) and id in self._session.quarantined):
            raise NotFound(f"no request in quarantine has the id '{id[:SHOWN_CHARS]}'")
        self._session.lift_quarantine(id)
        return JSONResponse(LiftedQuarantine(id=id).model_dump())

    async def cordon(self, http: Request) -> Response:
        """Answer `PUT /v1/nodes/ID/cordon`: an operator gives a node no new work."""
        self.check_admin(http)
        body = await read_body(http, lambda _: None, self._max_body_bytes(), self._timing.body_s)
        self._authenticate_again(http)
        self.check_admin(http)
        return await self._change_node(http, "cordon", reason_of(body))

    async def uncordon(self, http: Request) -> Response:
        """Answer `DELETE /v1/nodes/ID/cordon`: an operator lets a node get work again."""
        self.check_admin(http)
        return await self._change_node(http, "uncordon")

    async def _change_node(self, http: Request, method: str, *arguments: str) -> Response:
        """Call the Dispatcher's `cordon` or `uncordon` for the node that the path names.

        Raises `NotFound` if there is no such node, and `Unavailable` without a Dispatcher.
        """
        id = http.path_params["id"]
        try:
            async with asyncio.timeout(self._timing.dispatcher_s):
                node = await getattr(self._dispatcher, method).remote(id, *arguments)
        except (TimeoutError, RayError, RayServeException):
            raise Unavailable("the dispatcher is restarting: try again") from None
        if node is None:
            which = "node" if method == "cordon" else "cordoned node"
            raise NotFound(f"'{id[:SHOWN_CHARS]}' does not begin the id of exactly one {which}")
        return JSONResponse(NodeCordon(node=node, cordoned=method == "cordon").model_dump())

    def check_admin(self, http: Request) -> None:
        """Raise `NotFound` unless the caller may administer the server.

        Without keys everybody is an operator. Then only callers of this machine may do so.
        """
        if self._auth == "none-on-any-address":
            raise unknown_path(http.method, http.url.path)
        self._check_operator(http)

    def _check_operator(self, http: Request) -> None:
        """Raise the `NotFound` of an unknown path if the caller is no operator."""
        if not self._is_operator(http):
            raise unknown_path(http.method, http.url.path)

    def _is_operator(self, http: Request) -> bool:
        """Return whether the caller is an operator, and its key may be used for that."""
        return "admin" in http.scope["scopes"] and self._access(http.scope["tenant"]).operator
