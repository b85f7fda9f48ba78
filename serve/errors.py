"""All errors that Octet answers over HTTP, as a tree of classes, and `SettingsError`.

Each class of the tree holds the status, type and code of its answer:

    OctetError                      500  server_error            internal_error
    ├── InvalidRequest              400  invalid_request_error   invalid_value
    │   ├── TimeoutTooShort         400  invalid_request_error   timeout_too_short
    │   ├── KeyInvalid              401  invalid_request_error   invalid_api_key
    │   ├── ScopeMissing            403  invalid_request_error   insufficient_scope
    │   ├── LinkInvalid             403  invalid_request_error   link_invalid
    │   ├── NotFound                404  invalid_request_error   not_found
    │   │   └── ModelNotFound       404  invalid_request_error   model_not_found
    │   ├── MethodNotAllowed        405  invalid_request_error   method_not_allowed
    │   ├── BodyTimeout             408  invalid_request_error   body_timeout
    │   ├── RequestIdInUse          409  invalid_request_error   request_id_in_use
    │   ├── Conflict                409  invalid_request_error   conflict
    │   ├── IdempotencyKeyInUse     409  invalid_request_error   idempotency_key_in_use
    │   ├── IdempotencyKeyReused    422  invalid_request_error   idempotency_key_reused
    │   ├── BodyTooLarge            413  invalid_request_error   body_too_large
    │   └── RequestCancelled        499  invalid_request_error   request_cancelled
    ├── RateLimited                 429  rate_limit_error        rate_limit_exceeded
    │   ├── QuotaExceeded           429  insufficient_quota      insufficient_quota
    │   ├── OwnQueueFull            429  rate_limit_error        queue_full
    │   └── BacklogTooLong          429  rate_limit_error        deadline_unreachable
    ├── Unavailable                 503  server_error            unavailable
    │   ├── NoCapacity              503  server_error            no_capacity
    │   ├── QueueFull               503  server_error            queue_full
    │   ├── Evicted                 503  server_error            evicted
    │   ├── DeadlineUnreachable     503  server_error            deadline_unreachable
    │   ├── ReplicaFailed           503  server_error            replica_failed
    │   ├── StoreFailed             503  server_error            store_failed
    │   └── UsageUnrecorded         503  server_error            usage_unrecorded
    ├── DeadlineExceeded            504  server_error            deadline_exceeded
    └── NonFiniteImage              500  server_error            non_finite_image

Messages are written for the client: what was wrong, the value, what is allowed. They never hold
paths, prompts or stack traces.

`SettingsError` is the one error that is not an HTTP answer. It is for the operator, whose settings
or tenants' files cannot be used.

Pure: standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import ClassVar


class SettingsError(Exception):
    """The settings cannot be used; the message names the key, its value and what is allowed.

    Not an HTTP answer: commands print the message, and a server does not start.
    """


class OctetError(Exception):
    """An unexpected error in the server; its log holds the details.

    The root of the tree. `retryable`: the value of the header `x-should-retry`. `param`: the field
    of the request that was wrong. `headers`: further headers of the answer.
    """

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
    """The request is not valid and cannot succeed unchanged; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class TimeoutTooShort(InvalidRequest):
    """The images take longer than `timeout_s`, even on an idle server."""

    code = "timeout_too_short"


class KeyInvalid(InvalidRequest):
    """The API key is missing, wrong or revoked."""

    status = 401
    code = "invalid_api_key"


class ScopeMissing(InvalidRequest):
    """The API key is valid, but may not be used for this request."""

    status = 403
    code = "insufficient_scope"


class LinkInvalid(InvalidRequest):
    """The URL of an image has a wrong signature or has expired."""

    status = 403
    code = "link_invalid"


class NotFound(InvalidRequest):
    """Nothing exists at this path, or the image is no longer kept."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model is served to this tenant; `GET /v1/models` lists those that are."""

    code = "model_not_found"


class MethodNotAllowed(InvalidRequest):
    """The path does not support this method; the header `allow` lists its methods."""

    status = 405
    code = "method_not_allowed"


class BodyTimeout(InvalidRequest):
    """The request body did not arrive in time."""

    status = 408
    code = "body_timeout"


class RequestIdInUse(InvalidRequest):
    """A request with this `x-request-id` is still being served."""

    status = 409
    code = "request_id_in_use"


class Conflict(InvalidRequest):
    """The change does not fit to what is there, such as a tenant that exists already."""

    status = 409
    code = "conflict"


class IdempotencyKeyInUse(InvalidRequest):
    """A request with this `idempotency-key` is still being answered."""

    status = 409
    code = "idempotency_key_in_use"
    retryable = True


class IdempotencyKeyReused(InvalidRequest):
    """Another request was sent with this `idempotency-key`; use a new key for each request."""

    status = 422
    code = "idempotency_key_reused"


class BodyTooLarge(InvalidRequest):
    """The request body, or a file in it, is larger than the settings allow."""

    status = 413
    code = "body_too_large"


class RequestCancelled(InvalidRequest):
    """The request was cancelled by `DELETE /v1/requests/ID`."""

    status = 499
    code = "request_cancelled"


class RateLimited(OctetError):
    """The tenant is at its limit of rate or open requests; `retry-after` says when to try again."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class QuotaExceeded(RateLimited):
    """The rest of the tenant's monthly budget is less than the request costs."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    retryable = False


class OwnQueueFull(RateLimited):
    """The tenant has as much work queued as it may; other tenants' requests are still accepted."""

    code = "queue_full"


class BacklogTooLong(RateLimited):
    """The request would miss `timeout_s` behind the tenant's own queued requests."""

    code = "deadline_unreachable"


class Unavailable(OctetError):
    """The request cannot be served at the moment; try again later."""

    status = 503
    code = "unavailable"
    retryable = True


class NoCapacity(Unavailable):
    """No replica can serve the request, and no node can hold such a replica."""

    code = "no_capacity"


class QueueFull(Unavailable):
    """The queue holds as many images as the settings allow (`max_queued`)."""

    code = "queue_full"


class Evicted(Unavailable):
    """The images gave their places in a full queue to a tenant that had nothing waiting."""

    code = "evicted"


class DeadlineUnreachable(Unavailable):
    """The request would not be finished within `timeout_s`."""

    code = "deadline_unreachable"


class ReplicaFailed(Unavailable):
    """The replica died in every attempt; the request itself may be the cause."""

    code = "replica_failed"
    retryable = False


class StoreFailed(Unavailable):
    """The image could not be stored for its URL, or the store does not answer."""

    code = "store_failed"


class UsageUnrecorded(Unavailable):
    """The image was generated, but its usage could not be recorded; it is not charged."""

    code = "usage_unrecorded"


class DeadlineExceeded(OctetError):
    """The images were not finished within `timeout_s`."""

    status = 504
    code = "deadline_exceeded"


class NonFiniteImage(OctetError):
    """The model produced NaN or infinity; such an image is never returned."""

    code = "non_finite_image"


def tree(cls: type[OctetError] = OctetError) -> Iterator[type[OctetError]]:
    """Yield an error class and all its subclasses, in the order of the tree above."""
    yield cls
    for child in cls.__subclasses__():
        yield from tree(child)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all known names.

    For example "did you mean 'size'?" or "known: fp8, fp16".
    """
    name = name[:100]  # comparing takes time that grows with its square
    inside = [k for k in known if len(name) > 2 and (name in k or (k in name and len(k) > 2))]
    inside.sort(key=lambda k: abs(len(k) - len(name)))
    near = inside or difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def markdown_table() -> str:
    """The table of all errors in docs/api.md, sorted by status and code."""
    rows = [
        f"| {error.status} | `{error.code}` | {'yes' if error.retryable else 'no'} "
        f"| {(error.__doc__ or '').splitlines()[0]} |"
        for error in sorted(tree(), key=lambda error: (error.status, error.code))
    ]
    return "\n".join(["| status | code | retry | |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    print(markdown_table(), end="")  # noqa: T201 - what `python -m serve.errors` is for
