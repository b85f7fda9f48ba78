"""A tenant: its share of the cluster, and its limits.

Pure: standard library only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar

ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
MAY_BE_NOTHING = "max_requests", "monthly_work"
BURST_S = 10.0  # of a rate: how much of it may come at once, unless the tenant says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """None is "no limit". *Work* is in seconds of a reference replica: `serve/cost.py`.

    `requests_per_s` and `work_per_s` are kept over time; up to `request_burst` and `work_burst` may
    come at once (by default what ten seconds bring, and at least one request).

    Raises `ValueError`.
    """

    weight: float = 1.0  # its share is weight ÷ the weights of all who wait
    models: tuple[str, ...] | None = None  # that it may use
    requests_per_s: float | None = None
    request_burst: float | None = None
    work_per_s: float | None = None
    work_burst: float | None = None
    max_requests: int | None = None  # open at a time
    max_queued_work: float | None = None
    monthly_work: float | None = None  # of a calendar month in UTC
    timeout_s: float | None = None  # the deadline of requests that state none
    operator: bool = False  # may read the state of the whole server

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 0 if field.name in MAY_BE_NOTHING else math.ulp(0.0)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{field.name} {value} must be a finite number above 0")
        if not 0.001 <= self.weight <= 1000:
            raise ValueError(f"weight {self.weight} must be between 0.001 and 1000")
        for burst, rate in ("request_burst", "requests_per_s"), ("work_burst", "work_per_s"):
            if getattr(self, burst) is not None and getattr(self, rate) is None:
                raise ValueError(f"{burst} is for a tenant with {rate}")
        if self.request_burst is not None and self.request_burst < 1:
            raise ValueError(f"request_burst {self.request_burst} must be at least 1")
