"""Reading of request bodies, with a limit of bytes and of time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request

from ..errors import BodyTimeout, BodyTooLarge
from .early_body import BODY
from .timing import BODY_BYTES_PER_S


async def read_body(
    http: Request,
    received: Callable[[int], None],
    limit: int,
    body_s: float,
    check: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Read a request's body; `received` is called with the size of each part of it.

    `check` is called before that with the size that the client has stated. `body_s`: see
    `IngressTiming`. Raises `BodyTooLarge` beyond `limit` bytes, and `BodyTimeout` for a body that
    comes too slowly.
    """
    body = bytearray()
    too_large = BodyTooLarge(f"the body is larger than {limit} bytes")
    stated = http.headers.get("content-length", "")
    if stated.isdecimal() and len(stated) < 20:
        if int(stated) > limit:
            raise too_large
        check(int(stated))
    if (early := http.scope.get(BODY)) is not None:
        received(len(early))
        return bytes(early)
    try:
        async with asyncio.timeout(body_s) as deadline:
            first = deadline.when() or 0.0
            async for chunk in http.stream():
                received(len(chunk))
                body += chunk
                if len(body) > limit:
                    raise too_large
                now, quick = asyncio.get_running_loop().time(), len(body) / BODY_BYTES_PER_S
                deadline.reschedule(max(first, min(first + quick, now + body_s)))
    except TimeoutError:
        raise BodyTimeout(
            f"the body came too slowly: after {body_s:g} s it needs {BODY_BYTES_PER_S} bytes/s"
        ) from None
    return bytes(body)
