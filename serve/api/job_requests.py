"""Requests for images that become jobs, as their bodies are parsed."""

from __future__ import annotations

from starlette.requests import Request

from ..request import ImageRequest
from ..settings.application import Settings
from .wire.request import parse

PREFER, ASYNC = "prefer", "respond-async"  # RFC 7240


def wants_job(http: Request) -> bool:
    """Return whether a request is to be answered at once with 202, and done later."""
    given = ",".join(http.headers.getlist(PREFER))
    return any(part.partition(";")[0].strip().lower() == ASYNC for part in given.split(","))


def for_jobs(settings: Settings) -> Settings:
    """The settings by which the bodies of jobs are parsed: a job may take as long as a job may."""
    return settings.model_copy(update={"request_timeout_s": settings.jobs.max_age_s})


def parse_images(body: bytes, settings: Settings) -> tuple[tuple[ImageRequest, ...], bool]:
    """Parse the body of a line of a batch.

    Returns its images, and whether it asks for them in base64. Raises an `OctetError` if it cannot
    be served.
    """
    parsed = parse(body, for_jobs(settings), "line")
    parsed.check_stored()
    return tuple(parsed.images), parsed.as_b64
