"""Uploads of files, which go through a temporary file on this node's disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from ..errors import BodyTimeout, BodyTooLarge, InvalidRequest
from .timing import BODY_BYTES_PER_S

OTHERS_BYTES = 100_000  # of the form, besides its file
MOST_FIELDS = 10


@asynccontextmanager
async def uploaded_form(http: Request, limit: int, body_s: float) -> AsyncIterator[FormData]:
    """Read a form with one file of at most `limit` bytes, for the time of the block.

    `body_s`: see `IngressTiming`. Raises `InvalidRequest` for another body, `BodyTooLarge` beyond
    the limit, and `BodyTimeout` for a body that comes too slowly.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise InvalidRequest("content-type must be multipart/form-data")
    most, received = limit + OTHERS_BYTES, 0
    stated = http.headers.get("content-length", "")
    too_large = BodyTooLarge(f"the file is larger than {limit} bytes", param="file")
    if stated.isdecimal() and len(stated) < 20 and int(stated) > most:
        raise too_large
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def receive() -> Message:
        nonlocal received
        message = await http.receive()
        received += len(message.get("body", b""))
        if received > most:
            raise too_large
        now, quick = loop.time(), received / BODY_BYTES_PER_S
        deadline.reschedule(max(began + body_s, min(began + body_s + quick, now + body_s)))
        return message

    form: FormData | None = None
    try:
        try:
            async with asyncio.timeout(body_s) as deadline:
                form = await Request(http.scope, receive).form(
                    max_files=1, max_fields=MOST_FIELDS, max_part_size=OTHERS_BYTES
                )
        except TimeoutError:
            raise BodyTimeout(
                f"the body came too slowly: after {body_s:g} s it needs {BODY_BYTES_PER_S} bytes/s"
            ) from None
        except HTTPException as error:
            raise InvalidRequest(f"the form cannot be read: {error.detail}") from None
        yield form
    finally:
        if form:
            await form.close()


def file_of(form: FormData, limit: int) -> UploadFile:
    """The file of a form.

    Raises `InvalidRequest` if there is none, and `BodyTooLarge` if it has more bytes than `limit`.
    """
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("file is required, and must be sent as a file", param="file")
    if file.size and file.size > limit:
        raise BodyTooLarge(f"the file is larger than {limit} bytes", param="file")
    return file
