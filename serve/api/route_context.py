"""Reading bodies and the database, for the routes of jobs, batches and webhooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import NotFound, OctetError, Unavailable
from ..settings.application import Settings
from ..store.link import DatabaseLink
from ..tenants.keys import TenantAccess
from .body import read_body
from .tenant_gate import TenantGate
from .timing import IngressTiming

T = TypeVar("T")

ID = re.compile(r"[a-z0-9_]{1,48}")


class RouteContext:
    """Reads bodies and the database for the routes of jobs, batches and webhooks."""

    def __init__(
        self,
        database: DatabaseLink,
        gate: TenantGate,
        access: Callable[[str], TenantAccess],
        authenticate_again: Callable[[Request], None],
        live: Callable[[], Settings],
        timing: IngressTiming,
    ) -> None:
        """`access`: returns the access of a tenant. `live`: returns the present settings.

        `authenticate_again`: raises `KeyInvalid` if the caller's key was revoked meanwhile.
        """
        self._database, self._gate, self._access = database, gate, access
        self.authenticate_again, self._live, self._timing = authenticate_again, live, timing

    @property
    def live(self) -> Settings:
        """The present settings."""
        return self._live()

    def reading(self, http: Request) -> AbstractContextManager[Callable[[int], None]]:
        """Count a request and its body, which is read in the block; see `TenantGate.reading`."""
        tenant: str = http.scope["tenant"]
        return self._gate.reading(tenant, self._access(tenant))

    async def body(self, http: Request) -> bytes:
        """Read the body of a request."""
        with self.reading(http) as received:
            body = await read_body(http, received, self.live.max_body_bytes, self._timing.body_s)
        self.authenticate_again(http)
        return body

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Read the database. Raises `Unavailable` without it."""
        try:
            return await self._database.read(work)
        except OSError:
            raise _unavailable() from None

    async def write(self, work: Callable[[Connection, float], T]) -> T:
        """Change the database; `work` gets the time by its clock. Raises `Unavailable` without it.

        Whether the change was made is then not known.
        """
        try:
            database = await self._database.opened()
            return await self._database.write(
                lambda connection: work(connection, database.now(connection))
            )
        except OSError:
            raise _unavailable() from None

    @staticmethod
    def id(http: Request) -> str:
        """The id in the path. Raises `NotFound` if it cannot be one."""
        id: str = http.path_params["id"]
        if not ID.fullmatch(id):
            raise RouteContext.not_found(http)
        return id

    @staticmethod
    def not_found(http: Request) -> NotFound:
        """The error for a path that names nothing of the tenant's."""
        id: str = http.path_params["id"]
        return NotFound(f"nothing here has the id '{id[:80]}', or it is no longer kept")

    async def now(self) -> float:
        """The Unix time by the database's clock. Raises `Unavailable` without the database."""
        try:
            database = await self._database.opened()
            return await self._database.read(database.now)
        except OSError:
            raise _unavailable() from None


def _unavailable() -> OctetError:
    return Unavailable("the database does not answer at the moment: try again")


def json_answer(
    answer: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON response of a model of the wire formats."""
    return JSONResponse(answer.model_dump(mode="json"), status, headers)  # type: ignore[attr-defined]


def list_answer(kind: Callable[..., object], data: Sequence[Any], *, has_more: bool) -> Response:
    """A page of a list as JSON; `kind`: its model of the wire formats."""
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return json_answer(kind(data=data, first_id=first, last_id=last, has_more=has_more))
