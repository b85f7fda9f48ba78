"""A tenant's share of the cluster and its limits.

Pure: standard library only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar

ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
MAY_BE_NOTHING = (
    "max_requests",
    "max_queued_jobs",
    "monthly_work",
)  # limits that may be 0: nothing is allowed
BURST_S = 10.0  # a tenant without a burst may use what its rate allows in this time at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """The share and the limits of one tenant; None means "no limit".

    Work is in seconds of a reference replica (`cluster/cost.py`). `requests_per_s` and `work_per_s`
    are averages over time. Up to `request_burst` requests and `work_burst` seconds of work may come
    at once. By default a burst is what the rate allows in ten seconds, and at least one request.

    Raises `ValueError` for a value that is out of range.
    """

    weight: float = 1.0  # the tenant's share is weight ÷ the weights of all waiting tenants
    models: tuple[str, ...] | None = None  # models that the tenant may use; None: all
    requests_per_s: float | None = None
    request_burst: float | None = None
    work_per_s: float | None = None
    work_burst: float | None = None
    max_requests: int | None = None  # requests that may be open at a time
    max_queued_work: float | None = None  # work that may wait at a time
    max_queued_jobs: int | None = None  # jobs and lines of batches that may wait at a time
    monthly_work: float | None = None  # work in a calendar month, UTC
    timeout_s: float | None = None  # deadline of requests without one; None: the settings' own
    operator: bool = False  # whether the tenant may read the state of the whole server

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 0 if field.name in MAY_BE_NOTHING else math.ulp(0.0)
            if not (math.isfinite(value) and value >= least):
                allowed = "above 0" if least else "0 or more"
                raise ValueError(f"{field.name} {value} must be a finite number {allowed}")
        if not 0.001 <= self.weight <= 1000:
            raise ValueError(f"weight {self.weight} must be between 0.001 and 1000")
        for burst, rate in ("request_burst", "requests_per_s"), ("work_burst", "work_per_s"):
            if getattr(self, burst) is not None and getattr(self, rate) is None:
                raise ValueError(f"{burst} needs {rate}: set both, or leave {burst} out")
        if self.request_burst is not None and self.request_burst < 1:
            raise ValueError(f"request_burst {self.request_burst} must be at least 1")
