"""Every error as OpenAI's error body, with `x-should-retry` for its client."""

from __future__ import annotations

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ...errors import InvalidRequest, MethodNotAllowed, NotFound, OctetError
from .request import SHOWN_CHARS
from .response import error_body

log = logging.getLogger("ray.serve")

UNEXPECTED = "something went wrong; the server's log says what"
STARLETTE_ERRORS: dict[int, type[OctetError]] = {404: NotFound, 405: MethodNotAllowed}


# Starlette's handlers are typed for any exception; each is registered for its own.


def error_answer(error: OctetError) -> Response:
    headers = {"x-should-retry": str(error.retryable).lower(), **error.headers}
    return JSONResponse(error_body(error), error.status, headers)


async def octet_error(_: Request, error: Any) -> Response:
    return error_answer(error)


async def http_error(http: Request, error: Any) -> Response:
    """Starlette's own: no such path, or not for this method."""
    kind = STARLETTE_ERRORS.get(error.status_code, InvalidRequest)
    path = http.url.path[:SHOWN_CHARS]
    answer = error_answer(kind(f"{http.method} {path}: {error.detail}"))
    answer.headers.update(error.headers or {})
    return answer


async def unexpected_error(_: Request, error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    return error_answer(OctetError(UNEXPECTED))


async def client_disconnect(_: Request, error: Any) -> Response:
    """Nobody hears the answer, and it is nobody's fault."""
    return Response(status_code=400)


HANDLERS = {
    ClientDisconnect: client_disconnect,
    OctetError: octet_error,
    HTTPException: http_error,
    Exception: unexpected_error,
}
