"""The routes of files, as in OpenAI's API."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, select
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ..errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    RateLimited,
    StoreFailed,
    Unavailable,
)
from ..jobs import batch_rows, files
from ..jobs.encoding import is_storable
from ..jobs.files import PART_BYTES, StoredFile
from ..jobs.job import Job
from ..jobs.queries import page
from ..store.schema import FILES, JOBS
from .route_context import RouteContext, json_answer, list_answer
from .timing import IngressTiming
from .upload import file_of, uploaded_form
from .wire.batches import (
    LEAST_EXPIRY_S,
    MOST_EXPIRY_S,
    DeletedFile,
    FileList,
    file_item,
    output_line,
)
from .wire.pages import parse_page
from .wire.response import ImagesResponse

UPLOADS, UPLOADS_OF_ONE = 8, 2  # at a time at one Ingress, in all and of one tenant
PAUSES_S = 1.0, 3.0  # between the attempts to read the images of a line
ROWS = 100  # lines of an output file that are read at a time
MOST_FILES = 10_000  # entries of a page of files, as in OpenAI's API
AnswerOf = Callable[[Request], Callable[[Job], Awaitable[ImagesResponse | None]]]


class FileRoutes:
    """Answers requests about files: those that tenants upload, and those that batches make."""

    def __init__(self, context: RouteContext, answer_of: AnswerOf, timing: IngressTiming) -> None:
        """`answer_of`: returns what makes the answer of a line that succeeded."""
        self._context, self._answer_of, self._timing = context, answer_of, timing
        self._uploading: Counter[str] = Counter()  # by tenant
        self.routes = [
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files, methods=["GET"]),
            Route("/v1/files/{id}", self.file, methods=["GET"]),
            Route("/v1/files/{id}", self.delete_file, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.content, methods=["GET"]),
        ]

    async def upload(self, http: Request) -> Response:
        """Answer `POST /v1/files`."""
        tenant: str = http.scope["tenant"]
        with self._context.reading(http), self._upload_of(tenant):
            jobs = self._context.live.jobs
            used = await self._context.read(partial(files.stored_bytes, tenant=tenant))
            left = jobs.max_stored_file_bytes - used
            if left <= 0:
                raise _no_room(jobs.max_stored_file_bytes)
            most = min(jobs.max_file_bytes, left)
            async with uploaded_form(http, most, self._timing.body_s) as form:
                self._context.authenticate_again(http)
                made = await self._kept(tenant, file_of(form, most), _keep_s(form, jobs.keep_s))
        return json_answer(file_item(made))

    @contextmanager
    def _upload_of(self, tenant: str) -> Iterator[None]:
        """Count an upload in the block. Raises an `OctetError` if there are too many."""
        if self._uploading[tenant] >= UPLOADS_OF_ONE:
            raise RateLimited("you are uploading as many files at a time as you may: try again")
        if self._uploading.total() >= UPLOADS:
            raise Unavailable("too many files are being uploaded: try again")
        self._uploading[tenant] += 1
        try:
            yield
        finally:
            self._uploading[tenant] -= 1
            self._uploading += Counter()  # forgets those with none

    async def _kept(self, tenant: str, file: UploadFile, keep_s: float) -> StoredFile:
        """Store a file in the database, part by part."""
        name = "".join(c for c in (file.filename or "file") if c.isprintable() and is_storable(c))
        begun = files.new_upload(tenant, name[:255], keep_s)
        await self._context.write(partial(files.begin, file=begun))
        size = lines = part = 0
        while content := await file.read(PART_BYTES):
            await self._context.write(partial(_add_part, id=begun.id, part=part, content=content))
            size, lines, part = size + len(content), lines + content.count(b"\n"), part + 1
        most = self._context.live.jobs.max_stored_file_bytes
        made = await self._context.write(
            lambda connection, _: files.finish(connection, begun, size, lines, most)
        )
        if made is None:
            raise _no_room(most)
        return made

    async def files(self, http: Request) -> Response:
        """Answer `GET /v1/files`: the tenant's files, newest first."""
        asked = parse_page(http.query_params, "purpose", "order", most=MOST_FILES)
        if asked.only.get("order", "desc") != "desc":
            raise InvalidRequest("order must be desc", param="order")
        only: dict[str, Any] = {"whole": 1}
        if purpose := asked.only.get("purpose"):
            only["purpose"] = purpose
        tenant = http.scope["tenant"]
        rows = await self._context.read(
            lambda connection: page(connection, FILES, tenant, asked.after, asked.limit, **only)
        )
        data = [file_item(StoredFile(*row)) for row in rows[: asked.limit]]
        return list_answer(FileList, data, has_more=len(rows) > asked.limit)

    async def file(self, http: Request) -> Response:
        """Answer `GET /v1/files/ID`."""
        return json_answer(file_item(await self._file(http)))

    async def delete_file(self, http: Request) -> Response:
        """Answer `DELETE /v1/files/ID`."""
        file = await self._file(http)

        def delete(connection: Connection, _: float) -> None:
            if batch_rows.reads(connection, file.id):
                raise Conflict("a batch reads this file: cancel the batch, or wait for its end")
            files.remove(connection, file.id)

        await self._context.write(delete)
        return json_answer(DeletedFile(id=file.id))

    async def content(self, http: Request) -> Response:
        """Answer `GET /v1/files/ID/content`. Files of batches are written now, line by line."""
        file = await self._file(http)
        lines = self._parts(file) if file.kind == "upload" else self._lines(file, http)
        return StreamingResponse(lines, media_type="application/jsonl")

    async def _parts(self, file: StoredFile) -> AsyncIterator[bytes]:
        part = 0
        while content := await self._context.read(partial(files.read_part, id=file.id, part=part)):
            yield content
            part += 1

    async def _lines(self, file: StoredFile, http: Request) -> AsyncIterator[bytes]:
        """The lines of a batch's output or error file, in the order of its input file."""
        answer, last = self._answer_of(http), 0
        succeeded = JOBS.c.state == "succeeded"
        wanted = succeeded if file.kind == "output" else JOBS.c.state != "succeeded"
        while True:
            of_batch = select(JOBS).where(JOBS.c.batch == file.batch, wanted, JOBS.c.line > last)
            jobs = await self._context.read(
                partial(_jobs_of, found=of_batch.order_by(JOBS.c.line).limit(ROWS))
            )
            for job in jobs:
                yield await _line(job, answer)
                last = job.line or last
            if len(jobs) < ROWS:
                return

    async def _file(self, http: Request) -> StoredFile:
        """The tenant's file that the path names. Raises `NotFound` if there is none."""
        id, tenant = self._context.id(http), http.scope["tenant"]
        now = await self._context.now()
        file = await self._context.read(lambda connection: files.find(connection, id, tenant, now))
        if file is None:
            raise self._context.not_found(http)
        return file


async def _line(job: Job, answer: Callable[[Job], Awaitable[ImagesResponse | None]]) -> bytes:
    """A line of an output file; one whose images cannot be read says so."""
    for pause_s in (*PAUSES_S, None):
        try:
            made = await answer(job)
            body = made.model_dump(mode="json", exclude_none=True) if made else None
            return output_line(job, body)
        except StoreFailed as error:
            if pause_s is None:
                return output_line(job, None, error)
            await asyncio.sleep(pause_s)
        except NotFound as error:
            return output_line(job, None, error)
    raise AssertionError("the last attempt returns")


def _jobs_of(connection: Connection, found: Select[Any]) -> list[Job]:
    return [Job(*row) for row in connection.execute(found)]


def _add_part(connection: Connection, _: float, id: str, part: int, content: bytes) -> None:
    files.add_part(connection, id, part, content)


def _no_room(most: int) -> QuotaExceeded:
    return QuotaExceeded(f"all your files together may have {most} bytes: delete some of them")


def _keep_s(form: FormData, default_s: float) -> float:
    """For how long an uploaded file is kept, in seconds.

    Raises `InvalidRequest` for another purpose than batches, and a time that is not allowed.
    """
    purpose = form.get("purpose")
    if purpose != "batch":
        raise InvalidRequest("purpose must be batch", param="purpose")
    anchor, text = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and text is None:
        return default_s
    seconds = str(text)
    if anchor != "created_at":
        raise InvalidRequest("expires_after[anchor] must be created_at", param="expires_after")
    if not (seconds.isdecimal() and len(seconds) < 9):
        raise InvalidRequest("expires_after[seconds] must be a number", param="expires_after")
    if not LEAST_EXPIRY_S <= int(seconds) <= MOST_EXPIRY_S:
        raise InvalidRequest(
            f"expires_after[seconds] {seconds} must be from {LEAST_EXPIRY_S} to {MOST_EXPIRY_S}",
            param="expires_after",
        )
    return float(seconds)
