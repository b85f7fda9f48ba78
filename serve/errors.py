"""The error tree. Each class carries what the HTTP edge needs to answer truthfully.

    OctetError                      500  server_error            internal_error
    ├── InvalidRequest              400  invalid_request_error   invalid_value
    │   ├── ModelNotFound           404  invalid_request_error   model_not_found
    │   └── BodyTooLarge            413  invalid_request_error   body_too_large
    ├── Unavailable                 503  server_error            no_capacity
    │   └── QueueFull               503  server_error            queue_full
    ├── DeadlineExceeded            504  server_error            deadline_exceeded
    ├── ReplicaLost                 502  server_error            replica_lost
    └── NonFiniteImage              500  server_error            non_finite_image

Messages are written for the client: what was wrong, the value, what is allowed. They never hold
paths, prompts or stack traces. `retryable` is what `x-should-retry` says.
"""

from __future__ import annotations

from typing import ClassVar


class OctetError(Exception):
    """Something went wrong that a client should hear of in these words."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(OctetError):
    """The request can never succeed as it stands; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"


class Unavailable(OctetError):
    """No replica can take the request now."""

    status = 503
    code = "no_capacity"
    retryable = True


class QueueFull(Unavailable):
    code = "queue_full"


class DeadlineExceeded(OctetError):
    status = 504
    code = "deadline_exceeded"


class ReplicaLost(OctetError):
    """Every attempt ended with the death of its replica: perhaps the request kills them."""

    status = 502
    code = "replica_lost"


class NonFiniteImage(OctetError):
    """The model produced NaN or infinity; such an image is never returned."""

    code = "non_finite_image"
