"""The end of each request for images: one line of the log, and its counters."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ..errors import OctetError
from ..request import ImageResult
from .wire.request import GenerationRequest

log = logging.getLogger("ray.serve")

LINES_PER_S = 10


class Outcome(NamedTuple):
    """How a request ended: `ok` or an error's code, and the HTTP status."""

    code: str
    status: int


OK = Outcome("ok", 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLogEntry:
    """The facts about an ended request for images that go into the log."""

    request: GenerationRequest
    tenant: str
    request_id: str
    cache: str  # what the result cache did
    results: Sequence[ImageResult]
    outcome: Outcome
    took_s: float


def log_request(entry: RequestLogEntry) -> None:
    """Write the log line of a request, without its prompt.

    The time of each phase is that of the image for which the phase took longest.
    """
    first = entry.request.images[0]
    seconds = [asdict(result.timings) for result in entry.results]
    phases = {phase: max(of[phase] for of in seconds) for phase in seconds[0]} if seconds else {}
    log.info(
        "%s: %s",
        entry.request_id,
        entry.outcome.code,
        extra={
            "event": "request",
            "request": entry.request_id,
            "tenant": entry.tenant,
            "model": first.model,
            "outcome": entry.outcome.code,
            "status": entry.outcome.status,
            "cache": entry.cache,
            "images": len(entry.request.images),
            "size": first.size,
            "steps": first.steps,
            "edit": "no" if first.edit is None else "mask" if first.edit.mask_sha256 else "image",
            "took_s": round(entry.took_s, 4),
            **{phase: round(value, 4) for phase, value in phases.items()},
        },
    )


class RefusalLog:
    """The log of requests that were refused before they were parsed, or because they are wrong.

    After `LINES_PER_S` lines in a second, further ones are only counted; the next line says how
    many.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second, self._lines, self._left_out = -math.inf, 0, 0

    def refused(self, error: OctetError, tenant: str | None, request_id: str | None) -> None:
        """Log a refusal, without anything that the client has sent except its request id."""
        if (second := math.floor(self._clock())) != self._second:
            self._second, self._lines = second, 0
        if self._lines == LINES_PER_S:
            self._left_out += 1
            return
        self._lines += 1
        left_out, self._left_out = self._left_out, 0
        log.info(
            "%s: %s",
            request_id,
            error.code,
            extra={
                "event": "refused",
                "request": request_id,
                "tenant": tenant,
                "outcome": error.code,
                "status": error.status,
                "left_out": left_out,
            },
        )


def outcome_of(error: BaseException) -> Outcome:
    """The outcome under which a request that ended with this error is counted and logged."""
    if isinstance(error, asyncio.CancelledError):
        return Outcome("client_gone", 499)
    kind = type(error) if isinstance(error, OctetError) else OctetError
    return Outcome(kind.code, kind.status)
