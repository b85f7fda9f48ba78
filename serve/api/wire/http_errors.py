"""Responses for errors: OpenAI's error body, with the header `x-should-retry` for its clients."""

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

UNEXPECTED = "an unexpected error in the server; its log holds the details"


def error_answer(error: OctetError) -> Response:
    """The response for an error of Octet."""
    headers = {"x-should-retry": str(error.retryable).lower(), **error.headers}
    return JSONResponse(error_body(error), error.status, headers)


def unknown_path(method: str, path: str) -> NotFound:
    """The error for a path that does not exist, or that the caller may not know of."""
    path = path[:SHOWN_CHARS]
    return NotFound(f"{method} {path}: Not Found; /openapi.json describes all paths")


# Handlers for Starlette, which types them for any exception; hence `Any` for `error`. `HANDLERS`
# registers each handler for its own exception.


async def octet_error(_: Request, error: Any) -> Response:
    return error_answer(error)


async def http_error(http: Request, error: Any) -> Response:
    """Answer an error of Starlette itself, such as an unknown path or a wrong method."""
    if error.status_code == 404:
        answer = error_answer(unknown_path(http.method, http.url.path))
    else:
        kind = MethodNotAllowed if error.status_code == 405 else InvalidRequest
        path = http.url.path[:SHOWN_CHARS]
        answer = error_answer(kind(f"{http.method} {path}: {error.detail}"))
    answer.headers.update(error.headers or {})
    return answer


async def unexpected_error(_: Request, error: Exception) -> Response:
    """Log an error that no other handler takes, and answer 500 without its details."""
    log.error("unexpected error", exc_info=error)
    return error_answer(OctetError(UNEXPECTED))


async def client_disconnect(_: Request, error: Any) -> Response:
    """Answer a client that has disconnected while it sent its body.

    Nobody reads this answer. The handler exists so that such an error is not logged.
    """
    return Response(status_code=400)


HANDLERS = {
    ClientDisconnect: client_disconnect,
    OctetError: octet_error,
    HTTPException: http_error,
    Exception: unexpected_error,
}
