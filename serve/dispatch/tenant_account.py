"""A tenant's account: its limits, and what it has used of them.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tenants.tenant import BURST_S, Tenant
from .protocol import RateLimitStatus

DUST = 1e-6  # seconds of work by which sums of the same numbers may differ


@dataclass(slots=True)
class Gcra:
    """A rate limit by the generic cell rate algorithm (ITU-T I.371).

    The algorithm is an exact leaky bucket whose whole state is one number. The bucket lets `rate`
    units a second pass over time, and up to `burst` units at once. A request for more than `burst`
    units passes if the bucket is empty; the requests after it then wait longer.
    """

    rate: float
    burst: float
    empty_at: float = float("-inf")  # when all that was taken will have leaked out

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` would pass; 0 if it passes now."""
        level = max(self.empty_at - now, 0.0) * self.rate
        return max(level + amount - max(self.burst, amount), 0.0) / self.rate

    def change(self, rate: float, burst: float, now: float) -> None:
        """Apply another rate and burst from now on; the amount that was used stays used."""
        level = self.reset_s(now) * self.rate
        self.rate, self.burst, self.empty_at = rate, burst, now + level / rate

    def take(self, amount: float, now: float) -> None:
        """Count `amount` as passed."""
        self.empty_at = max(self.empty_at, now) + amount / self.rate

    def remaining(self, now: float) -> float:
        """The largest amount that would pass now, at most `burst`."""
        return max(self.burst - self.reset_s(now) * self.rate, 0.0)

    def reset_s(self, now: float) -> float:
        """Seconds until the whole `burst` would pass at once again."""
        return max(self.empty_at - now, 0.0)


class TenantAccount:
    """A tenant's limits, and the work that it has reserved and spent.

    `spent`: the work charged in the present calendar month. `requests`, `work`: the limits of the
    request rate and the work rate; None if there is no such limit. `leased`: the work that may be
    reserved here, if other clusters share the budget; None if this is the only cluster. `held`: the
    work of accepted jobs that wait in the database. `accepting`: that of jobs that are being
    accepted. Requests leave so much of the budget to these jobs.
    """

    def __init__(self, tenant: Tenant) -> None:
        self.reserved = 0.0  # work that open calls may still be charged
        self.spent = 0.0
        self.leased: float | None = None
        self.held = 0.0
        self.accepting = 0.0
        self.counted = [0.0, 0.0]  # requests and work since the start, for other clusters
        self.used_at = float("-inf")  # when a call was admitted last
        self.open_elsewhere = 0  # open requests at other clusters
        self.requests: Gcra | None = None
        self.work: Gcra | None = None
        self.tenant = Tenant()
        self.change(tenant, 0.0)

    def change(self, tenant: Tenant, now: float) -> None:
        """Apply changed limits from now on; what was used stays used."""
        self.tenant = tenant
        self.requests = _gcra(self.requests, tenant.requests_per_s, tenant.request_burst, 1.0, now)
        self.work = _gcra(self.work, tenant.work_per_s, tenant.work_burst, 0.0, now)

    @property
    def budget_left(self) -> float | None:
        """Work that may still be reserved this month; None if the tenant has no budget."""
        if self.tenant.monthly_work is None:
            return None
        used = self.spent + self.reserved + self.held + self.accepting
        return self.tenant.monthly_work - used

    def lacks(self, work_s: float) -> float:
        """The work that must be leased before so much can be reserved; 0 without such a budget."""
        if self.leased is None or self.tenant.monthly_work is None:
            return 0.0
        lacking = self.reserved + work_s - self.leased
        return lacking if lacking > DUST else 0.0

    def lease(self, more: float) -> None:
        """Change the leased work by so much."""
        if self.leased is not None:
            self.leased = max(self.leased + more, 0.0)

    def may_reserve(self, work_s: float, *, held: bool = False) -> bool:
        """Return whether the budget allows so much more work; `held`: it was held for a job."""
        if self.leased is not None:
            return not self.lacks(work_s)
        if self.budget_left is None:
            return True
        for_jobs = self.held + self.accepting if held else 0.0
        return work_s <= self.budget_left + for_jobs + DUST

    def rate_limits(self, now: float, month_left_s: float) -> tuple[RateLimitStatus, ...]:
        """How much the tenant has left of each of its limits.

        `month_left_s`: seconds until the month ends, and the budget begins anew.
        """
        found = []
        if gcra := self.requests:
            left = float(int(gcra.remaining(now) + 1e-9))  # whole requests only
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
    before: Gcra | None, rate: float | None, burst: float | None, least: float, now: float
) -> Gcra | None:
    if rate is None:
        return None
    burst = burst or max(rate * BURST_S, least)
    if before is None:
        return Gcra(rate, burst)
    before.change(rate, burst, now)
    return before
