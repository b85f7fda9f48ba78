"""A tenant's limits and what it has used of them. Time is an argument, seconds on any clock."""

from __future__ import annotations

from dataclasses import dataclass

from ..tenants.tenant import BURST_S, Tenant
from .protocol import RateLimitStatus


@dataclass(slots=True)
class Gcra:
    """The generic cell rate algorithm (ITU-T I.371): an exact leaky bucket in one number.

    `rate` a second are let through, and `burst` at once. Something larger than `burst` is let
    through when nothing else was for long enough; what follows then waits for it.
    """

    rate: float
    burst: float
    empty_at: float = float("-inf")  # when all that came will have leaked out

    def wait_s(self, amount: float, now: float) -> float:
        """Until so much would be let through; 0: now."""
        level = max(self.empty_at - now, 0.0) * self.rate
        return max(level + amount - max(self.burst, amount), 0.0) / self.rate

    def take(self, amount: float, now: float) -> None:
        self.empty_at = max(self.empty_at, now) + amount / self.rate

    def remaining(self, now: float) -> float:
        return max(self.burst - self.reset_s(now) * self.rate, 0.0)

    def reset_s(self, now: float) -> float:
        """Until all of `burst` is there again."""
        return max(self.empty_at - now, 0.0)


class TenantAccount:
    """What a tenant has under way and has used; `spent` is of one calendar month."""

    def __init__(self, tenant: Tenant) -> None:
        self.reserved = 0.0  # work that calls under way may still be charged
        self.spent = 0.0
        self.requests: Gcra | None = None
        self.work: Gcra | None = None
        self.tenant = Tenant()
        self.change(tenant)

    def change(self, tenant: Tenant) -> None:
        """Other limits from now on; what was used stays used."""
        self.tenant = tenant
        self.requests = _gcra(self.requests, tenant.requests_per_s, tenant.request_burst, 1.0)
        self.work = _gcra(self.work, tenant.work_per_s, tenant.work_burst, 0.0)

    @property
    def budget_left(self) -> float | None:
        """Work that may still be promised this month; None: any."""
        if self.tenant.monthly_work is None:
            return None
        return self.tenant.monthly_work - self.spent - self.reserved

    def standings(self, now: float, month_left_s: float) -> tuple[RateLimitStatus, ...]:
        found = []
        if gcra := self.requests:
            left = float(int(gcra.remaining(now) + 1e-9))  # a part of a request is none
            found.append(RateLimitStatus("requests", gcra.burst, left, gcra.reset_s(now)))
        if gcra := self.work:
            found.append(
                RateLimitStatus("work", gcra.burst, gcra.remaining(now), gcra.reset_s(now))
            )
        if (left_s := self.budget_left) is not None:
            monthly = self.tenant.monthly_work or 0.0
            found.append(RateLimitStatus("budget", monthly, max(left_s, 0.0), month_left_s))
        return tuple(found)


def _gcra(
    before: Gcra | None, rate: float | None, burst: float | None, least: float
) -> Gcra | None:
    if rate is None:
        return None
    gcra = Gcra(rate, burst or max(rate * BURST_S, least))
    if before:
        gcra.empty_at = before.empty_at
    return gcra
