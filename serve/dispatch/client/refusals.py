"""Why a call was refused, as the error that its client sees."""

from __future__ import annotations

import math

from ...errors import (
    BacklogTooLong,
    DeadlineUnreachable,
    KeyInvalid,
    NoCapacity,
    OctetError,
    OwnQueueFull,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    RequestIdInUse,
    Unavailable,
)
from ..protocol import AdmissionDecision, RateLimitStatus

NO_CAPACITY = "no replica that may draw this lives, and no node can hold one"
REFUSALS: dict[tuple[str, bool], tuple[type[OctetError], str]] = {
    ("no_tenant", False): (KeyInvalid, "the tenant of this API key is no more"),
    ("draining", False): (Unavailable, "this server is shutting down"),
    ("request_id_in_use", False): (
        RequestIdInUse,
        "x-request-id: a request with this id is being served",
    ),
    ("no_capacity", False): (NoCapacity, NO_CAPACITY),
    ("rate_limit_exceeded", True): (RateLimited, "you ask for more at a time than your limits"),
    ("insufficient_quota", True): (QuotaExceeded, "this month's budget does not suffice for it"),
    ("queue_full", True): (OwnQueueFull, "you have as much waiting as you may"),
    ("queue_full", False): (QueueFull, "the queue is full: try again later"),
    ("deadline_unreachable", True): (
        BacklogTooLong,
        "it would not be done in time after what you have waiting already",
    ),
    ("deadline_unreachable", False): (DeadlineUnreachable, "it would not be done in time"),
}


def refusal(verdict: AdmissionDecision) -> OctetError | None:
    """None if the call is admitted."""
    if verdict.refusal is None:
        return None
    kind, message = REFUSALS[verdict.refusal, verdict.own]
    if verdict.retry_after_s is not None and verdict.refusal != "insufficient_quota":
        message += f"; in {verdict.retry_after_s:.1f} s it may be taken"
    error = kind(message)
    error.headers = {**standing_headers(verdict.standings), **retry_after(verdict.retry_after_s)}
    if verdict.refusal == "deadline_unreachable" and verdict.retry_after_s is None:
        error.message = "timeout_s is less than it takes, even with nothing else there"
        error.headers["x-should-retry"] = "false"
    return error


def standing_headers(standings: tuple[RateLimitStatus, ...]) -> dict[str, str]:
    """`x-ratelimit-…`, as OpenAI names them."""
    return {
        f"x-ratelimit-{name}-{standing.of}": value
        for standing in standings
        for name, value in (
            ("limit", _plain(standing.limit)),
            ("remaining", _plain(standing.remaining)),
            ("reset", f"{standing.reset_s:.3f}s"),
        )
    }


def _plain(amount: float) -> str:
    """To a thousandth below, without an exponent."""
    return f"{math.floor(amount * 1000 + 1e-6) / 1000:.3f}".rstrip("0").rstrip(".")


def retry_after(seconds: float | None) -> dict[str, str]:
    """In whole seconds, and in milliseconds as OpenAI's clients read it first."""
    if seconds is None:
        return {}
    milliseconds = int(max(seconds, 0.0) * 1000) + 1
    return {"retry-after": str(-(-milliseconds // 1000)), "retry-after-ms": str(milliseconds)}
