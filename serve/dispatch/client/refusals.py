"""Refusals of the Dispatcher as the errors that clients see.

Pure: imports the standard library and pure files only.
"""

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
    TimeoutTooShort,
    Unavailable,
)
from ..protocol import AdmissionDecision, RateLimitStatus

NO_CAPACITY = "no replica can generate this image, and no node can hold one"
EVICTED = "the queue is full, and you have more queued in it than others: try again later"
# By reason, and whether the tenant's own limit is the cause.
REFUSALS: dict[tuple[str, bool], tuple[type[OctetError], str]] = {
    ("no_tenant", False): (KeyInvalid, "the tenant of this API key no longer exists"),
    ("draining", False): (Unavailable, "this server is shutting down"),
    ("database_unavailable", False): (
        Unavailable,
        "usage cannot be recorded at the moment, so no new work is accepted",
    ),
    ("request_id_in_use", False): (
        RequestIdInUse,
        "x-request-id: another request with this id is still open",
    ),
    ("no_capacity", False): (NoCapacity, NO_CAPACITY),
    ("rate_limit_exceeded", True): (RateLimited, "you have reached your rate limit"),
    ("insufficient_quota", True): (
        QuotaExceeded,
        "what is left of this month's budget is less than this request costs",
    ),
    ("queue_full", True): (OwnQueueFull, "you have as many images queued as you may"),
    ("queue_full", False): (QueueFull, "the queue is full: try again later"),
    ("deadline_unreachable", True): (
        BacklogTooLong,
        "it would not be done in time behind your other queued requests",
    ),
    ("deadline_unreachable", False): (DeadlineUnreachable, "it would not be done in time"),
    ("timeout_too_short", False): (
        TimeoutTooShort,
        "timeout_s: these images take longer than that, even on an idle server",
    ),
}


def refusal(decision: AdmissionDecision) -> OctetError | None:
    """The error of a refused call; None if the call is admitted."""
    if decision.refusal is None:
        return None
    kind, message = REFUSALS[decision.refusal, decision.own_limit]
    if decision.retry_after_s is not None and decision.refusal != "insufficient_quota":
        message += f"; try again in {decision.retry_after_s:.1f} s"
    error = kind(message)
    error.headers = {
        **rate_limit_headers(decision.rate_limits),
        **retry_after(decision.retry_after_s),
    }
    if decision.refusal == "timeout_too_short":
        error.param = "timeout_s"
        error.message += f": about {decision.eta_s:.1f} s"
    return error


def rate_limit_headers(rate_limits: tuple[RateLimitStatus, ...]) -> dict[str, str]:
    """The `x-ratelimit-…` headers, with the names that OpenAI uses."""
    return {
        f"x-ratelimit-{name}-{status.of}": value
        for status in rate_limits
        for name, value in (
            ("limit", _plain(status.limit)),
            ("remaining", _plain(status.remaining)),
            ("reset", f"{status.reset_s:.3f}s"),
        )
    }


def _plain(amount: float) -> str:
    """A number rounded down to thousandths, without an exponent."""
    return f"{math.floor(amount * 1000 + 1e-6) / 1000:.3f}".rstrip("0").rstrip(".")


def retry_after(seconds: float | None) -> dict[str, str]:
    """The headers that say when to try again; none if `seconds` is None.

    `retry-after` is in whole seconds; `retry-after-ms`, which OpenAI's clients read first, is in
    milliseconds.
    """
    if seconds is None:
        return {}
    milliseconds = int(max(seconds, 0.0) * 1000) + 1
    return {"retry-after": str(-(-milliseconds // 1000)), "retry-after-ms": str(milliseconds)}
