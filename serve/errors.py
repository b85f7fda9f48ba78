"""The error tree. Each class carries what the HTTP edge needs to answer truthfully.

    OctetError                      500  server_error            internal_error
    ├── InvalidRequest              400  invalid_request_error   invalid_value
    │   ├── KeyInvalid              401  invalid_request_error   invalid_api_key
    │   ├── LinkInvalid             403  invalid_request_error   link_invalid
    │   ├── NotFound                404  invalid_request_error   not_found
    │   │   └── ModelNotFound       404  invalid_request_error   model_not_found
    │   ├── MethodNotAllowed        405  invalid_request_error   method_not_allowed
    │   ├── BodyTimeout             408  invalid_request_error   body_timeout
    │   ├── RequestIdInUse          409  invalid_request_error   request_id_in_use
    │   ├── BodyTooLarge            413  invalid_request_error   body_too_large
    │   └── RequestCancelled        499  invalid_request_error   request_cancelled
    ├── RateLimited                 429  rate_limit_error        rate_limit_exceeded
    │   ├── QuotaExceeded           429  insufficient_quota      insufficient_quota
    │   ├── OwnQueueFull            429  rate_limit_error        queue_full
    │   └── BacklogTooLong          429  rate_limit_error        deadline_unreachable
    ├── Unavailable                 503  server_error            unavailable
    │   ├── NoCapacity              503  server_error            no_capacity
    │   ├── QueueFull               503  server_error            queue_full
    │   ├── DeadlineUnreachable     503  server_error            deadline_unreachable
    │   ├── ReplicaFailed           503  server_error            replica_failed
    │   ├── StoreFailed             503  server_error            store_failed
    │   └── UsageUnrecorded         503  server_error            usage_unrecorded
    ├── DeadlineExceeded            504  server_error            deadline_exceeded
    └── NonFiniteImage              500  server_error            non_finite_image

Messages are written for the client: what was wrong, the value, what is allowed. They never hold
paths, prompts or stack traces. `retryable` is what `x-should-retry` says; `headers` are those of
the answer.

Pure: standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import ClassVar


class OctetError(Exception):
    """Something went wrong here; the server's log says what."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers: dict[str, str] = {}


class InvalidRequest(OctetError):
    """The request can never succeed as it stands; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class KeyInvalid(InvalidRequest):
    """The API key is missing, wrong, or has been revoked."""

    status = 401
    code = "invalid_api_key"


class LinkInvalid(InvalidRequest):
    """The signature of an image's URL is wrong, or its time is over."""

    status = 403
    code = "link_invalid"


class NotFound(InvalidRequest):
    """There is nothing at this path, or the image is no longer kept."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No model of this name is served; `GET /v1/models` lists them."""

    code = "model_not_found"


class MethodNotAllowed(InvalidRequest):
    """The path exists, but not for this method; `allow` lists those it has."""

    status = 405
    code = "method_not_allowed"


class BodyTimeout(InvalidRequest):
    """The body did not arrive in time."""

    status = 408
    code = "body_timeout"


class RequestIdInUse(InvalidRequest):
    """A request with this `x-request-id` is still being served."""

    status = 409
    code = "request_id_in_use"


class BodyTooLarge(InvalidRequest):
    """The body is larger than the settings allow."""

    status = 413
    code = "body_too_large"


class RequestCancelled(InvalidRequest):
    """It was cancelled by DELETE /v1/requests/ID."""

    status = 499
    code = "request_cancelled"


class RateLimited(OctetError):
    """More requests or work at a time than the tenant's limits; `retry-after` says when."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class QuotaExceeded(RateLimited):
    """What is left of the tenant's monthly budget does not suffice."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    retryable = False


class OwnQueueFull(RateLimited):
    """The tenant has as much waiting as it may; others may be taken."""

    code = "queue_full"


class BacklogTooLong(RateLimited):
    """With what the tenant has waiting already it would not be done within `timeout_s`."""

    code = "deadline_unreachable"


class Unavailable(OctetError):
    """The request cannot be taken now; another time it may."""

    status = 503
    code = "unavailable"
    retryable = True


class NoCapacity(Unavailable):
    """No replica lives that may serve the request, and no node could hold one."""

    code = "no_capacity"


class QueueFull(Unavailable):
    """As many images wait as the settings allow."""

    code = "queue_full"


class DeadlineUnreachable(Unavailable):
    """It would not be done within `timeout_s`."""

    code = "deadline_unreachable"


class ReplicaFailed(Unavailable):
    """Every attempt ended with the death of its replica: perhaps the request kills them."""

    code = "replica_failed"
    retryable = False


class StoreFailed(Unavailable):
    """The image was drawn, but could not be stored for its URL."""

    code = "store_failed"


class UsageUnrecorded(Unavailable):
    """The image was drawn, but what it costs could not be written down; it is not charged."""

    code = "usage_unrecorded"


class DeadlineExceeded(OctetError):
    """The images were not done within `timeout_s`."""

    status = 504
    code = "deadline_exceeded"


class NonFiniteImage(OctetError):
    """The model produced NaN or infinity; such an image is never returned."""

    code = "non_finite_image"


def tree(cls: type[OctetError] = OctetError) -> Iterator[type[OctetError]]:
    """A class of the tree and all below it, as drawn above."""
    yield cls
    for child in cls.__subclasses__():
        yield from tree(child)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    name = name[:100]  # comparing takes time that grows with its square
    inside = [k for k in known if len(name) > 2 and (name in k or (k in name and len(k) > 2))]
    near = inside or difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def markdown_table() -> str:
    """The tree as docs/api.md shows it, by status."""
    rows = [
        f"| {error.status} | `{error.code}` | {'yes' if error.retryable else 'no'} "
        f"| {(error.__doc__ or '').splitlines()[0]} |"
        for error in sorted(tree(), key=lambda error: (error.status, error.code))
    ]
    return "\n".join(["| status | code | retry | |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    print(markdown_table(), end="")  # noqa: T201 - what `python -m serve.errors` is for


class SettingsError(Exception):
    """The settings cannot be used; the message says which key, its value and what is allowed."""
