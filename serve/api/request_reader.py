"""Reading of requests for images: their bodies within the tenant's limits, parsed and checked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from starlette.requests import Request

from ..edit_pixels import EditPixels
from ..errors import DeadlineExceeded, InvalidRequest
from ..settings.application import Settings
from ..tenants.keys import TenantAccess
from .body import read_body
from .edit_uploads import EditUploads, HeldPicture
from .idempotency import IdempotentRequest, idempotent
from .job_requests import for_jobs
from .tenant_gate import TenantGate
from .timing import IngressTiming
from .wire.edit import FORM, JSON, parse_edit
from .wire.jobs import parse_new_job
from .wire.paths import EDITS, GENERATIONS
from .wire.request import GenerationRequest, check_request_id, parse

LARGE_BODY = 2**16  # bytes; a longer body is parsed in a thread, because it may take long
MOST_VALUES = 100_000  # of a JSON body that may have pictures
T = TypeVar("T")


class ReadRequest(NamedTuple):
    """A request for images: its Idempotency-Key if it has one, what it asks for, and its path."""

    asked: IdempotentRequest | None
    parsed: GenerationRequest
    endpoint: str


class RequestReader:
    """Reads requests at one Ingress. Each method raises an `OctetError` for a wrong or late one."""

    def __init__(
        self,
        gate: TenantGate,
        uploads: EditUploads,
        access: Callable[[str], TenantAccess],
        allowed: Callable[[str], Settings],
        authenticate_again: Callable[[Request], None],
        live: Callable[[], Settings],
        timing: IngressTiming,
    ) -> None:
        """`access`: returns the access of a tenant; `allowed`: the settings that it may know.

        `authenticate_again`: raises `KeyInvalid` if the caller's key was revoked meanwhile. `live`:
        returns the present settings.
        """
        self._gate, self._uploads, self._timing = gate, uploads, timing
        self._access, self._allowed, self._live = access, allowed, live
        self._authenticate_again = authenticate_again

    async def generation(self, http: Request, request_id: str, *, as_job: bool) -> ReadRequest:
        """Read a request for new images; `as_job`: it is to become a job."""
        tenant: str = http.scope["tenant"]
        access = self._access(tenant)
        with self._gate.reading(tenant, access) as received:
            check_request_id(request_id)
            most, body_s = self._live().max_body_bytes, self._timing.body_s
            body = await read_body(http, received, most, body_s)
            self._authenticate_again(http)
            asked = idempotent(http, body)
            settings, timeout_s = self._terms(tenant, access, as_job=as_job)
            read = partial(parse, body, settings, request_id, timeout_s)
            parsed = await asyncio.to_thread(read) if len(body) > LARGE_BODY else read()
        return ReadRequest(asked, parsed, GENERATIONS)

    async def edit(
        self, http: Request, request_id: str, held: HeldPicture, *, as_job: bool
    ) -> ReadRequest:
        """Read a request for an edit; `held` then has its picture and mask."""
        tenant: str = http.scope["tenant"]
        access = self._access(tenant)
        with self._gate.reading(tenant, access):
            body, asked = await self._large_body(http, request_id, held)
            kind = http.headers.get("content-type", "")
            settings, timeout_s = self._terms(tenant, access, as_job=as_job)
            read = partial(parse_edit, body, kind, settings, request_id, timeout_s)
            del body  # the thread has it, and lets it go before the images are generated
            parsed, pixels = await self._in_turn(tenant, access, read)
        held.keep(pixels)
        return ReadRequest(asked, parsed, EDITS)

    async def job(self, http: Request, request_id: str, held: HeldPicture) -> ReadRequest:
        """Read the body of `POST /v1/jobs`; for an edit, `held` then has its picture and mask."""
        tenant: str = http.scope["tenant"]
        access = self._access(tenant)
        with self._gate.reading(tenant, access):
            body, asked = await self._large_body(http, request_id, held)
            settings, timeout_s = self._terms(tenant, access, as_job=True)

            def read() -> tuple[str, GenerationRequest, EditPixels | None]:
                path, inner = parse_new_job(body)
                if path == EDITS:
                    return path, *parse_edit(inner, JSON, settings, request_id, timeout_s)
                return path, parse(inner, settings, request_id, timeout_s), None

            path, parsed, pixels = await self._in_turn(tenant, access, read)
        if pixels is None:
            held.release()
        else:
            held.keep(pixels)
        return ReadRequest(asked, parsed, path)

    def _terms(
        self, tenant: str, access: TenantAccess, *, as_job: bool
    ) -> tuple[Settings, float | None]:
        """The settings by which a tenant's request is parsed, and its default deadline."""
        settings = self._allowed(tenant)
        return (for_jobs(settings), None) if as_job else (settings, access.timeout_s)

    async def _large_body(
        self, http: Request, request_id: str, held: HeldPicture
    ) -> tuple[bytes, IdempotentRequest | None]:
        """Read a body that may have a picture and a mask."""
        check_request_id(request_id)
        live = self._live()
        limit = live.edits.largest_body_bytes(live.max_body_bytes)
        body = await read_body(http, held.add, limit, self._timing.body_s, held.check)
        self._authenticate_again(http)
        kind = http.headers.get("content-type", "")
        # Parsing takes memory for each value. Pictures in base64 have none of these characters.
        if not kind.startswith(FORM) and sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
            raise InvalidRequest(f"the body has more than {MOST_VALUES} values")
        return body, idempotent(http, body)

    async def _in_turn(self, tenant: str, access: TenantAccess, read: Callable[[], T]) -> T:
        """Call `read` in the thread that reads pictures, when it is the tenant's turn."""
        limit_s = access.timeout_s or self._live().request_timeout_s
        try:
            async with asyncio.timeout(limit_s) as deadline:
                return await self._uploads.read(tenant, read)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"the picture was not read in {limit_s:g} s") from None
