"""Which calls are admitted: every tenant's limits, budget and deadlines, decided in one place.

Gates, in this order: a tenant that is no more · a server that is stopping · request id · request
rate · pools that could ever come · open requests · work rate · budget · queued work, the tenant's
own and all · deadline.
Nothing is taken from a limit unless the call passes all of them, except its place in the request
rate.

A tenant may queue four times as many images as there are places left, so even many floods together
leave room for others (Choudhury & Hahne 1998, dynamic thresholds).

Time is an argument, in seconds on any steady clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..tenants.tenant import Tenant
from ..usage.record import UsageRecord
from .forecast import ArrivalRate, ForecastAccuracy, TenantDemand, wait_s
from .grants import Grants
from .protocol import AdmissionDecision, AdmissionRequest, Pools, Refusal
from .tenant_account import TenantAccount

OWN_SHARE = 4  # places that a tenant may have for each one that is left
IDLE_S = 60.0  # arrivals that are older are forgotten


@dataclass(slots=True, eq=False)
class AdmittedCall:
    """One that was admitted; `reserved` is work that it may still be charged."""

    session: str
    name: str
    tenant: str
    request_id: str
    opened: float
    predicted_s: float | None
    reserved: float


class Forecast(NamedTuple):
    """Seconds until the last grant of a call, and from there to its end."""

    wait_s: float
    service_s: float


class _Refused(Exception):
    def __init__(
        self, refusal: Refusal, retry_after_s: float | None = None, own: bool = False
    ) -> None:
        super().__init__()
        self.refusal: Refusal = refusal
        self.retry_after_s, self.own = retry_after_s, own

    @property
    def for_want_of_replicas(self) -> bool:
        """More of them could have answered it."""
        if self.refusal == "queue_full":
            return not self.own
        return self.refusal == "deadline_unreachable" and self.retry_after_s is not None


@dataclass(slots=True)
class _Tenancy:
    account: TenantAccount
    calls: set[AdmittedCall] = field(default_factory=set)


class Admission:
    def __init__(self, grants: Grants, *, max_queued: int) -> None:
        self.max_queued = max_queued
        self.draining = False  # refuse what is new
        self.month_ends = math.inf
        self._grants = grants
        self._tenants: dict[str, _Tenancy] = {}
        self._known: Mapping[str, Tenant] | None = None  # None: whoever comes
        self._calls: dict[tuple[str, str], AdmittedCall] = {}  # by session and name
        self._ids: dict[tuple[str, str], AdmittedCall] = {}  # by tenant and request id
        self._arrivals: dict[str, dict[str, ArrivalRate]] = {}  # work, by pool and tenant
        self._accuracy = ForecastAccuracy()
        # Work that came for the same pools and was admitted, or would have been had there been
        # more replicas; and the sum of its squares.
        self.arrived: dict[Pools, tuple[float, float]] = {}

    # -- tenants --------------------------------------------------------------------------------

    def set_tenants(self, tenants: Mapping[str, Tenant]) -> None:
        """Those that exist from now on; what they have used stays used."""
        self._known = tenants
        self._grants.queue.weights = {name: tenant.weight for name, tenant in tenants.items()}
        for name, tenancy in self._tenants.items():
            if name in tenants:
                tenancy.account.change(tenants[name])

    def begin_month(self, spent: Mapping[str, float], ends: float) -> None:
        """A month, what was spent in it so far, and when it ends."""
        self.month_ends = ends
        for name in {*self._tenants, *spent}:
            self.account(name).spent = spent.get(name, 0.0)

    def account(self, tenant: str) -> TenantAccount:
        return self._tenancy(tenant).account

    def accounts(self) -> Iterator[tuple[str, TenantAccount, int]]:
        """Every tenant that has been heard of, its account and its open calls."""
        for name, tenancy in self._tenants.items():
            yield name, tenancy.account, len(tenancy.calls)

    def _tenancy(self, tenant: str) -> _Tenancy:
        if tenant not in self._tenants:
            self._tenants[tenant] = _Tenancy(
                TenantAccount((self._known or {}).get(tenant, Tenant()))
            )
        return self._tenants[tenant]

    # -- calls ----------------------------------------------------------------------------------

    def open(self, session: str, opening: AdmissionRequest, now: float) -> AdmissionDecision:
        """Admit a call or refuse it; entries of an admitted one are then to be queued."""
        account = self.account(opening.tenant)
        predicted_s = None
        try:
            if not opening.accepted:
                predicted_s = self._pass(opening, account, now)
        except _Refused as no:
            if no.for_want_of_replicas:
                self._count(opening)
            standings = account.standings(now, self.month_ends - now)
            return AdmissionDecision(
                session, opening.call, no.refusal, None, no.retry_after_s, no.own, standings
            )
        self._admit(session, opening, predicted_s, now)
        standings = account.standings(now, self.month_ends - now)
        eta_s = None if predicted_s is None else self._accuracy.expected(predicted_s)
        return AdmissionDecision(session, opening.call, None, eta_s, standings=standings)

    def call(self, session: str, name: str) -> AdmittedCall | None:
        return self._calls.get((session, name))

    def find(self, tenant: str, request_id: str) -> AdmittedCall | None:
        """A tenant's open call by the id that its client gave it."""
        return self._ids.get((tenant, request_id))

    def hold(self, session: str, usage: UsageRecord) -> float:
        """Of a call's reservation, what stays until `free`, whatever becomes of the call."""
        call = self._calls.get((session, usage.call))
        held = min(usage.work_s, call.reserved) if call else 0.0
        if call:
            call.reserved -= held
        return held

    def free(self, tenant: str, held: float) -> None:
        self.account(tenant).reserved -= held

    def spend(self, session: str, usage: UsageRecord, spent: float | None, now: float) -> None:
        """An image was paid for; `spent`: by its tenant this month, where somebody else counts."""
        account = self.account(usage.tenant)
        account.spent = account.spent + usage.work_s if spent is None else spent
        if call := self._calls.get((session, usage.call)):
            self._learn(call, now)

    def end(self, session: str, name: str, now: float) -> None:
        """A call was answered, or nobody waits for it any more."""
        if call := self._calls.pop((session, name), None):
            if call.predicted_s is not None and now - call.opened > call.predicted_s:
                self._learn(call, now)  # it took at least so long
            tenancy = self._tenancy(call.tenant)
            tenancy.calls.discard(call)
            tenancy.account.reserved -= call.reserved
            if self._ids.get((call.tenant, call.request_id)) is call:
                del self._ids[call.tenant, call.request_id]

    def end_session(self, session: str, now: float) -> None:
        for owner, name in [key for key in self._calls if key[0] == session]:
            self.end(owner, name, now)

    def _learn(self, call: AdmittedCall, now: float) -> None:
        if call.predicted_s is not None:
            self._accuracy.learn(call.predicted_s, now - call.opened)
            call.predicted_s = None

    @property
    def open_calls(self) -> int:
        return len(self._calls)

    def forget(self, now: float, passed_s: float) -> None:
        """Drop what has faded; so much time has passed since the last time."""
        self._accuracy.fade(passed_s)
        for rates in self._arrivals.values():
            for tenant in [name for name, rate in rates.items() if now - rate.at > IDLE_S]:
                del rates[tenant]

    # -- gates ----------------------------------------------------------------------------------

    def _pass(self, opening: AdmissionRequest, account: TenantAccount, now: float) -> float | None:
        """When the call is predicted to be done, as the model has it. Raises `_Refused`."""
        tenant, entries = account.tenant, opening.entries
        if self._known is not None and opening.tenant not in self._known:
            raise _Refused("no_tenant")
        if self.draining:
            raise _Refused("draining")
        if (opening.tenant, opening.request_id) in self._ids:
            raise _Refused("request_id_in_use")
        if account.requests:
            if late_s := account.requests.wait_s(1, now):
                raise _Refused("rate_limit_exceeded", late_s, own=True)
            account.requests.take(1, now)
        if not all(self._grants.possible(entry.pools) for entry in entries):
            raise _Refused("no_capacity")
        calls = self._tenancy(opening.tenant).calls
        if tenant.max_requests is not None and len(calls) >= tenant.max_requests:
            ends = [c.opened + c.predicted_s - now for c in calls if c.predicted_s is not None]
            later_s = max(min(ends, default=0.0), 1.0) if tenant.max_requests else None
            raise _Refused("rate_limit_exceeded", later_s, own=True)
        if not entries:  # its images are there already, or on their way
            return None
        if account.work and (late_s := account.work.wait_s(opening.work_s, now)):
            raise _Refused("rate_limit_exceeded", late_s, own=True)
        if account.budget_left is not None and opening.work_s > account.budget_left + 1e-6:
            never = opening.work_s > (tenant.monthly_work or 0.0)
            later_s = None if never else self.month_ends - now
            raise _Refused("insufficient_quota", later_s, own=True)
        self._check_queue(opening, tenant, now)
        forecast = self._forecast(opening, now)
        if forecast is None:
            return None
        self._check_deadline(opening, forecast, now)
        return sum(forecast)

    def _check_queue(self, opening: AdmissionRequest, tenant: Tenant, now: float) -> None:
        items, work_s = self._grants.queue.waiting(opening.tenant)
        coming, free = len(opening.entries), self.max_queued - self._grants.queue_depth
        if coming > free:
            raise _Refused("queue_full", self._drained_s(opening, coming - free))
        if items + coming > OWN_SHARE * free:
            raise _Refused("queue_full", self._drained_s(opening, 1), own=True)
        limit = tenant.max_queued_work
        if limit is not None and items and work_s + opening.work_s > limit:
            excess_s = work_s + opening.work_s - limit
            backlogs = self._grants.queue.backlogs(opening.entries[0].pools)
            later_s = self._wait_s(opening, min(excess_s, work_s), backlogs, now)
            known_s = later_s if math.isfinite(later_s) else None
            raise _Refused("queue_full", known_s, own=True)

    def _check_deadline(self, opening: AdmissionRequest, forecast: Forecast, now: float) -> None:
        late_s = self._at_most_s(forecast) - opening.timeout_s
        if late_s <= 0:
            return
        first = self._forecast(opening, now, first=True) or forecast
        own = self._at_most_s(first) <= opening.timeout_s
        never = self._alone_s(opening) > opening.timeout_s
        raise _Refused("deadline_unreachable", None if never else late_s, own)

    def _at_most_s(self, forecast: Forecast) -> float:
        """Past errors count where something is waited for: they alone refuse nobody."""
        return self._accuracy.at_most(sum(forecast)) if forecast.wait_s else forecast.service_s

    def _admit(
        self, session: str, opening: AdmissionRequest, predicted_s: float | None, now: float
    ) -> None:
        tenancy = self._tenancy(opening.tenant)
        call = AdmittedCall(
            session,
            opening.call,
            opening.tenant,
            opening.request_id,
            now,
            predicted_s,
            opening.work_s,
        )
        self._calls[session, opening.call] = call
        self._ids.setdefault((opening.tenant, opening.request_id), call)
        tenancy.calls.add(call)
        tenancy.account.reserved += opening.work_s
        if opening.accepted:
            return
        if tenancy.account.work:
            tenancy.account.work.take(opening.work_s, now)
        self._count(opening)
        for pool in {pool for entry in opening.entries for pool in entry.pools}:
            rates = self._arrivals.setdefault(pool, {})
            rate = rates.setdefault(opening.tenant, ArrivalRate())
            rate.add(sum(e.work_s for e in opening.entries if pool in e.pools), now)

    def _count(self, opening: AdmissionRequest) -> None:
        for entry in opening.entries:
            work_s, squares = self.arrived.get(entry.pools, (0.0, 0.0))
            self.arrived[entry.pools] = work_s + entry.work_s, squares + entry.work_s**2

    # -- forecasts ------------------------------------------------------------------------------

    def _forecast(
        self, opening: AdmissionRequest, now: float, *, first: bool = False
    ) -> Forecast | None:
        """None while none of the pools has a replica. `first`: with nothing else of its tenant."""
        if not opening.entries:
            return None
        pools = opening.entries[0].pools
        speed, slots, running = self._capacity(pools)
        if not speed:
            return None
        backlogs = self._grants.queue.backlogs(pools)
        coming = len(opening.entries)
        wait_s = 0.0
        if backlogs or running + coming > slots:
            own_s = 0.0 if first else backlogs.get(opening.tenant, 0.0)
            wait_s = self._wait_s(opening, own_s + opening.work_s, backlogs, now)
        return Forecast(wait_s, self._service_s(opening, full=wait_s > 0))

    def _service_s(self, opening: AdmissionRequest, *, full: bool) -> float:
        """From the grants to the end: of the first pool that has room, or of all when `full`."""
        pools = opening.entries[0].pools
        if not full:
            pools = tuple(p for p in pools if self._grants.free_slots(p) > 0)[:1] or pools
        speed, slots, running = self._capacity(pools)
        return self._drawn_s(opening, pools, min(slots, running + len(opening.entries)), speed)

    def _alone_s(self, opening: AdmissionRequest) -> float:
        """With nothing beside it, in the fastest of its pools."""
        speeds = {pool: self._capacity((pool,))[0] for pool in opening.entries[0].pools}
        coming = len(opening.entries)
        return min(self._drawn_s(opening, (p,), coming, s) for p, s in speeds.items() if s)

    def _drawn_s(self, opening: AdmissionRequest, pools: Pools, images: int, speed: float) -> float:
        """The largest of a call's images among so many in these pools."""
        replicas = sum(len(self._grants.replicas(pool)) for pool in pools)
        return max(entry.work_s for entry in opening.entries) * max(replicas, images) / speed

    def _wait_s(
        self, opening: AdmissionRequest, own_s: float, backlogs: Mapping[str, float], now: float
    ) -> float:
        """Until so much of the tenant's own work is under way."""
        pools = opening.entries[0].pools
        queue = self._grants.queue
        arriving = dict.fromkeys(backlogs, 0.0)
        for pool in pools:
            for name, rate in self._arrivals.get(pool, {}).items():
                arriving[name] = max(arriving.get(name, 0.0), rate.per_s(now))
        arriving.pop(opening.tenant, None)
        others = [
            TenantDemand(queue.weight(name), backlogs.get(name, 0.0), per_s)
            for name, per_s in arriving.items()
        ]
        speed, _, _ = self._capacity(pools)
        return wait_s(own_s, queue.weight(opening.tenant), others, speed)

    def _drained_s(self, opening: AdmissionRequest, items: int) -> float | None:
        """Until so many of those who wait are granted."""
        pools = opening.entries[0].pools
        speed, _, _ = self._capacity(pools)
        depth = self._grants.queue_depth
        if not (speed and depth):
            return None
        return items * sum(self._grants.queue.backlogs(pools).values()) / depth / speed

    def _capacity(self, pools: Iterable[str]) -> tuple[float, int, int]:
        """Speed, slots and running images of the pools' replicas that stay."""
        speed, slots, running = 0.0, 0, 0
        for pool in pools:
            staying = self._grants.slots(pool)
            slots += staying
            running += staying - self._grants.free_slots(pool)
            speed += sum(said.speed for said in self._grants.staying(pool))
        return speed, slots, running
