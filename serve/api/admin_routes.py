"""The admin API: tenants, their keys, the audit of both, and usage records, for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import Conflict, InvalidRequest, NotFound, OctetError, Unavailable
from ..tenants.keys import SCOPES
from .body import read_body
from .idempotency import Idempotency, idempotent
from .timing import IngressTiming
from .wire.admin import (
    AuditItem,
    AuditList,
    DeletedTenant,
    DifferenceItem,
    DifferenceList,
    KeyList,
    RevokedKey,
    TenantList,
    key_item,
    new_key_item,
    next_of,
    parse_body,
    parse_files,
    parse_query,
    tenant_item,
)
from .wire.http_errors import error_answer
from .wire.response import usage_list

MOST_FILE_BYTES = 16 * 2**20  # of tenants' files that are applied
OVERLAP_S = 24 * 3600.0  # for which a rotated key stays valid, unless the request says otherwise


class AdminRoutes:
    """Answers requests about tenants, keys and usage; to others than operators these do not exist.

    The Dispatcher's `Administration` does the work, so that each change holds at once.
    """

    def __init__(
        self,
        dispatcher: Any,
        idempotency: Idempotency,
        timing: IngressTiming,
        check_admin: Callable[[Request], None],
        authenticate_again: Callable[[Request], None],
        max_body_bytes: Callable[[], int],
    ) -> None:
        """`dispatcher`: a Ray Serve handle. `check_admin`: raises `NotFound` for other callers.

        `authenticate_again`: raises `KeyInvalid` if the caller's key was revoked meanwhile.
        """
        self._dispatcher, self._timing = dispatcher, timing
        self._idempotency = idempotency
        self._check_admin, self._max_body_bytes = check_admin, max_body_bytes
        self._authenticate_again = authenticate_again
        tenants, keys = "/admin/v1/tenants", "/admin/v1/keys"
        self.routes = [
            Route(tenants, self.tenants, methods=["GET"]),
            Route(tenants, self.create_tenant, methods=["POST"]),
            Route(tenants + "/{id}", self.tenant, methods=["GET"]),
            Route(tenants + "/{id}", self.change_tenant, methods=["PATCH"]),
            Route(tenants + "/{id}", self.delete_tenant, methods=["DELETE"]),
            Route(keys, self.keys, methods=["GET"]),
            Route(keys, self.create_key, methods=["POST"]),
            Route(keys + "/{id}/rotate", self.rotate_key, methods=["POST"]),
            Route(keys + "/{id}", self.revoke_key, methods=["DELETE"]),
            Route("/admin/v1/apply", self.apply, methods=["POST"]),
            Route("/admin/v1/audit", self.audit, methods=["GET"]),
            Route("/admin/v1/usage", self.usage, methods=["GET"]),
        ]

    async def tenants(self, http: Request) -> Response:
        self._check_admin(http)
        query = parse_query(http.query_params, numbered=False, of_tenant=False)
        page = await self._ask("tenants", after=query.after, limit=query.limit)
        data = [tenant_item(one) for one in page.items]
        following = next_of(data, query.after)
        return _json(TenantList(data=data, has_more=page.has_more, next=following))

    async def tenant(self, http: Request) -> Response:
        self._check_admin(http)
        return _json(tenant_item(await self._ask("tenant", tenant=http.path_params["id"])))

    async def create_tenant(self, http: Request) -> Response:
        body = await self._body(http)
        given = parse_body(body, needed=("id",))
        tenant = given.pop("id")

        async def create() -> Response:
            made = await self._change(http, "create_tenant", tenant=tenant, limits=given)
            return _json(tenant_item(made), 201)

        return await self._once(http, body, create)

    async def change_tenant(self, http: Request) -> Response:
        changes = parse_body(await self._body(http))
        tenant = http.path_params["id"]
        changed = await self._change(http, "change_tenant", tenant=tenant, changes=changes)
        return _json(tenant_item(changed))

    async def delete_tenant(self, http: Request) -> Response:
        self._check_admin(http)
        gone = await self._change(http, "delete_tenant", tenant=http.path_params["id"])
        return _json(DeletedTenant(id=gone.id))

    async def keys(self, http: Request) -> Response:
        self._check_admin(http)
        query = parse_query(http.query_params, numbered=False, of_tenant=True)
        page = await self._ask("keys", tenant=query.tenant, after=query.after, limit=query.limit)
        data = [key_item(one) for one in page.items]
        following = next_of(data, query.after)
        return _json(KeyList(data=data, has_more=page.has_more, next=following))

    async def create_key(self, http: Request) -> Response:
        body = await self._body(http)
        given = parse_body(body, "tenant", "scopes", "expires_at", needed=("tenant",))
        scopes = given.get("scopes", list(SCOPES))
        if not (isinstance(scopes, list) and all(isinstance(one, str) for one in scopes)):
            raise InvalidRequest(f"scopes: must be a list of {', '.join(SCOPES)}", param="scopes")
        arguments = {"tenant": given["tenant"], "expires": given.get("expires_at")}

        async def create() -> Response:
            made = await self._change(http, "create_key", scopes=scopes, **arguments)
            return _json(new_key_item(made), 201)

        return await self._once(http, body, create, secret=True)

    async def rotate_key(self, http: Request) -> Response:
        body = await self._body(http)
        overlap_s = parse_body(body, "overlap_s").get("overlap_s", OVERLAP_S)
        if isinstance(overlap_s, bool) or not isinstance(overlap_s, int | float):
            raise InvalidRequest("overlap_s: must be a number of seconds", param="overlap_s")
        id = http.path_params["id"]

        async def rotate() -> Response:
            made = await self._change(http, "rotate_key", id=id, overlap_s=overlap_s)
            return _json(new_key_item(made), 201)

        return await self._once(http, body, rotate, secret=True)

    async def revoke_key(self, http: Request) -> Response:
        self._check_admin(http)
        gone = await self._change(http, "revoke_key", id=http.path_params["id"])
        return _json(RevokedKey(id=gone.id))

    async def apply(self, http: Request) -> Response:
        body = await self._body(http, MOST_FILE_BYTES)
        given = await asyncio.to_thread(parse_files, body)

        async def change() -> Response:
            found = await self._change(http, "apply", **given._asdict())
            data = [DifferenceItem(**one._asdict()) for one in found]
            return _json(DifferenceList(data=data, applied=not given.dry_run))

        return await self._once(http, body, change)

    async def audit(self, http: Request) -> Response:
        self._check_admin(http)
        query = parse_query(http.query_params, numbered=True, of_tenant=True)
        page = await self._ask(
            "audit", after=query.after_id, limit=query.limit, tenant=query.tenant
        )
        data = [AuditItem(**one._asdict()) for one in page.items]
        following = next_of(data, query.after)
        return _json(AuditList(data=data, has_more=page.has_more, next=following))

    async def usage(self, http: Request) -> Response:
        self._check_admin(http)
        query = parse_query(http.query_params, numbered=True, of_tenant=True)
        page = await self._call("usage", query.after_id, query.limit, query.tenant)
        return _json(usage_list(page.records, page.has_more, query.after_id))

    async def _once(
        self,
        http: Request,
        body: bytes,
        work: Callable[[], Awaitable[Response]],
        *,
        secret: bool = False,
    ) -> Response:
        """Answer a POST once if it has an Idempotency-Key; see `Idempotency.answer`.

        `secret`: the answer holds an API key, which is kept nowhere; repeated requests are told so.
        """
        if (asked := idempotent(http, body)) is None:
            return await work()
        shown_once = Conflict("this key was made already, and is shown only once: make another")
        return await self._idempotency.answer(
            asked,
            http,
            self._timing.store_s,
            lambda _: work(),
            (lambda _: error_answer(shown_once)) if secret else lambda response: response,
        )

    # -- the Dispatcher -------------------------------------------------------------------------

    async def _body(self, http: Request, limit: int | None = None) -> bytes:
        """Read the body of an operator's request, of at most `limit` bytes.

        Without `limit` the setting holds. Raises `NotFound` for other callers.
        """
        self._check_admin(http)
        limit = limit or self._max_body_bytes()
        body = await read_body(http, lambda _: None, limit, self._timing.body_s)
        self._authenticate_again(http)  # a body may take long
        self._check_admin(http)
        return body

    async def _change(self, http: Request, operation: str, **arguments: Any) -> Any:
        """Call a method of `Administration` that changes something, in the operator's name."""
        key_id = http.scope.get("key_id", "")
        actor = f"{http.scope['tenant']}/{key_id}".rstrip("/")
        return await self._ask(operation, actor=actor, **arguments)

    async def _ask(self, operation: str, **arguments: Any) -> Any:
        """Call a method of `Administration`; return its result, or raise its `OctetError`."""
        return await self._call("administer", operation, arguments)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the Dispatcher that needs the store.

        Raises `Unavailable` if the Dispatcher or the database does not answer.
        """
        try:
            async with asyncio.timeout(self._timing.store_s):
                found = await getattr(self._dispatcher, method).remote(*arguments)
        except (TimeoutError, OSError, RayError, RayServeException):
            raise Unavailable("the database does not answer at the moment: try again") from None
        if isinstance(found, OctetError):
            raise found
        if found is None:
            raise NotFound("this server keeps nothing: set data_folder, or the url of store")
        return found


def _json(answer: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(answer.model_dump(), status)
