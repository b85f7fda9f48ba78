"""What became of a request for images: one line of the log, and how it is counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict

from ..errors import OctetError
from ..request import ImageResult
from .wire.request import GenerationRequest

log = logging.getLogger("ray.serve")


def log_request(
    asked: GenerationRequest,
    tenant: str,
    request_id: str,
    cache: str,
    results: Sequence[ImageResult],
    outcome: str,
    status: int,
    took_s: float,
) -> None:
    """One line for each request: who, what became of it and where its time went, never a prompt."""
    first = asked.requests[0]
    seconds = [asdict(result.timings) for result in results]
    phases = {phase: max(of[phase] for of in seconds) for phase in seconds[0]} if seconds else {}
    log.info(
        "%s: %s",
        request_id,
        outcome,
        extra={
            "event": "request",
            "request": request_id,
            "tenant": tenant,
            "model": first.model,
            "outcome": outcome,
            "status": status,
            "cache": cache,
            "images": len(asked.requests),
            "size": first.size,
            "steps": first.num_inference_steps,
            "took_s": round(took_s, 4),
            **{phase: round(value, 4) for phase, value in phases.items()},
        },
    )


def outcome_of(error: BaseException) -> tuple[str, int]:
    """As it is counted: a code and a status."""
    if isinstance(error, asyncio.CancelledError):
        return "client_gone", 499
    kind = type(error) if isinstance(error, OctetError) else OctetError
    return kind.code, kind.status
