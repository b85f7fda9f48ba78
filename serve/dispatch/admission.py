"""Admission of calls: every tenant's limits, budget and deadlines, decided in one place.

The checks of a client's request, in this order: the tenant exists · the server is not stopping ·
the database answers · request id · request rate · possible pools · open requests · work rate ·
budget · queue length, the tenant's own and all · deadline. The first check that a call fails
refuses it. A refused call uses up nothing of any limit, except that a call which has passed the
request rate's check counts for that rate.

Jobs that are stored wait as long as they must. Their request rate is paid when they are accepted,
where their budget is checked too. When their calls come, only these checks are left: tenant,
possible pools, work rate, budget, and room in the queue.

A tenant may have at most `OWN_SHARE` times as many images in the queue as the queue has places
left. So even several tenants that flood the queue together leave room for the others (dynamic
thresholds: Choudhury & Hahne 1998). Many such tenants leave little room. So a tenant that has
nothing waiting is admitted even to a full queue, if another tenant has more work waiting ÷ weight
than the newcomer asks for; the Dispatcher then evicts images of that tenant.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..tenants.tenant import Tenant
from ..usage.record import UsageRecord, Used
from .call_forecasts import CallForecasts, Forecast
from .grants import Grants
from .protocol import (
    BATCH,
    STORED,
    AdmissionDecision,
    AdmissionRequest,
    CallProgress,
    Lane,
    Pools,
    RefusalReason,
    job_of,
    tenant_of,
)
from .tenant_account import DUST, TenantAccount

USED_S = 60.0  # for which other clusters are told of a tenant after its last call
DATABASE_RETRY_S = 5.0  # after which a client may try again while the database is away
OWN_SHARE = 4  # places that a tenant may take for each place that is left


@dataclass(slots=True, eq=False)
class AdmittedCall:
    """An open call.

    `opened`: the time of its admission. `deadline`: the time after which its client does not wait
    any more. `pools`: those of its images; empty if it has none.
    `predicted_s`: the forecast of its duration, until the forecast has been compared with the real
    one. `reserved`: the work that it may still be charged. `lane`: how it has come. `progress`: as
    its session told it last.
    """

    session: str
    id: str
    tenant: str
    request_id: str
    opened: float
    deadline: float
    pools: Pools
    predicted_s: float | None
    reserved: float
    lane: Lane = "request"
    progress: CallProgress | None = None


class Arrivals(NamedTuple):
    """The work of all images that have arrived for the same pools since the start.

    `squares`: the sum of the squares of each image's work, from which its variance follows.
    `images`: their number.
    """

    work_s: float = 0.0
    squares: float = 0.0
    images: int = 0

    def and_one_of(self, work_s: float) -> Arrivals:
        return Arrivals(self.work_s + work_s, self.squares + work_s**2, self.images + 1)


class _RefusedError(Exception):
    def __init__(
        self,
        reason: RefusalReason,
        retry_after_s: float | None = None,
        own_limit: bool = False,
        takes_s: float | None = None,
    ) -> None:
        super().__init__()
        self.reason: RefusalReason = reason
        self.retry_after_s, self.own_limit, self.takes_s = retry_after_s, own_limit, takes_s

    @property
    def for_want_of_replicas(self) -> bool:
        """Return whether the call would have been admitted with more replicas."""
        if self.reason == "queue_full":
            return not self.own_limit
        return self.reason == "deadline_unreachable"


@dataclass(slots=True)
class _Tenancy:
    account: TenantAccount
    calls: set[AdmittedCall] = field(default_factory=set)  # open requests, without jobs


class Admission:
    """The open calls of all tenants, and the decision about each new one."""

    def __init__(self, grants: Grants, *, max_queued: int) -> None:
        self.max_queued = max_queued
        self.batch_weight = 1.0  # of a tenant's batches, as a part of the tenant's own weight
        self.batches_scale = True  # whether batches may have replicas added
        self.draining = False  # refuse new calls
        self.database_fault = (
            ""  # why nothing can be charged at present; new calls are refused then
        )
        self.month_ends = math.inf
        # Arrived work by pools: admitted, or refused only because there were too few replicas.
        self.arrived: dict[Pools, Arrivals] = {}
        self._grants = grants
        self._leasing = False  # whether other clusters share the budgets
        self._tenancies: dict[str, _Tenancy] = {}
        # The tenants and the work of acceptances, by the ids of their job and of their call; and
        # which of them have ended.
        self._accepting: dict[str, dict[str, tuple[str, float]]] = {}
        self._accepted: list[str] = []
        self._held: set[str] = set()  # tenants with work of jobs that is held
        self._known: Mapping[str, Tenant] | None = None  # None: any tenant may call
        self._calls: dict[tuple[str, str], AdmittedCall] = {}  # by session and call id
        self._request_ids: dict[tuple[str, str], AdmittedCall] = {}  # by tenant and request id
        self._forecasts = CallForecasts(grants)
        grants.queue.weight = self._weight

    # -- tenants --------------------------------------------------------------------------------

    def set_tenants(self, tenants: Mapping[str, Tenant], now: float) -> None:
        """Replace the tenants and their limits; what each has used so far still counts."""
        self._known = tenants
        for name, tenancy in self._tenancies.items():
            if name in tenants:
                tenancy.account.change(tenants[name], now)

    def _weight(self, flow: str) -> float:
        """The weight of the images that queue under this name."""
        tenant = (self._known or {}).get(tenant_of(flow))
        weight = tenant.weight if tenant else 1.0
        return weight * self.batch_weight if flow.endswith(BATCH) else weight

    def hold_for_jobs(self, held: Mapping[str, float]) -> None:
        """Keep the work of accepted jobs free in their tenants' budgets; `held`: by tenant."""
        before, self._held = self._held, set(held)
        for name in before | held.keys():
            self.account(name).held = held.get(name, 0.0)

    def accepted(self) -> list[str]:
        """The ids of acceptances that have ended since the last call of this.

        Their work stays free in the budgets until `forget_accepted` is called with them, or their
        job's own call comes.
        """
        found, self._accepted = self._accepted, []
        return found

    @property
    def any_accepted(self) -> bool:
        """Return whether `accepted` would return any."""
        return bool(self._accepted)

    def forget_accepted(self, accepted: Iterable[str]) -> None:
        """Keep nothing free for these acceptances any more: their jobs are among those held."""
        for call_id in accepted:
            of_job = self._accepting.get(job_of(call_id), {})
            if kept := of_job.pop(call_id, None):
                tenant, work_s = kept
                self.account(tenant).accepting -= work_s
            if not of_job:
                self._accepting.pop(job_of(call_id), None)

    def begin_month(self, spent: Mapping[str, float], ends: float) -> None:
        """Begin a month. `spent`: each tenant's work in it so far; `ends`: the time of its end."""
        self.month_ends = ends
        for name in {*self._tenancies, *spent}:
            self.account(name).spent = spent.get(name, 0.0)

    def account(self, tenant: str) -> TenantAccount:
        return self._tenancy(tenant).account

    def accounts(self) -> Iterator[tuple[str, TenantAccount, int]]:
        """Every tenant that has called, its account and the number of its open calls."""
        for name, tenancy in self._tenancies.items():
            yield name, tenancy.account, len(tenancy.calls)

    def _tenancy(self, tenant: str) -> _Tenancy:
        if tenant not in self._tenancies:
            limits = (self._known or {}).get(tenant, Tenant())
            account = TenantAccount(limits)
            account.leased = 0.0 if self._leasing else None
            self._tenancies[tenant] = _Tenancy(account)
        return self._tenancies[tenant]

    # -- limits that other clusters share -------------------------------------------------------

    def begin_leases(self, leased: Mapping[str, float]) -> None:
        """From now on only leased work may be reserved; `leased`: by tenant, none for others."""
        self._leasing = True
        for name in {*self._tenancies, *leased}:
            self.account(name).leased = leased.get(name, 0.0)

    def return_leases(self, idle_since: float) -> dict[str, float]:
        """Give up the leased work that no open call needs, of tenants that were idle; return it."""
        found = {}
        for name, account, _ in self.accounts():
            excess = (account.leased or 0.0) - account.reserved
            if excess > DUST and account.used_at < idle_since:
                account.lease(-excess)
                found[name] = excess
        return found

    def used(self, now: float) -> dict[str, Used]:
        """The use of those tenants that have called in the last minute."""
        return {
            name: Used(account.counted[0], account.counted[1], calls)
            for name, account, calls in self.accounts()
            if calls or account.used_at > now - USED_S
        }

    def hear_of_others(
        self,
        before: Mapping[str, Mapping[str, Used]],
        after: Mapping[str, Mapping[str, Used]],
        now: float,
    ) -> None:
        """Take what tenants have used at other clusters from their limits here.

        `before`, `after`: by cluster, what it has told last and now.
        """
        for _, account, _ in self.accounts():
            account.open_elsewhere = 0
        for cluster, told in after.items():
            known = before.get(cluster, told)  # what was used before this cluster was known is past
            for name, used in told.items():
                account = self.account(name)
                account.open_elsewhere += used.open
                last = known.get(name, Used(0.0, 0.0, 0))
                if account.requests and (requests := used.requests - last.requests) > 0:
                    account.requests.take(requests, now)
                if account.work and (work_s := used.work_s - last.work_s) > 0:
                    account.work.take(work_s, now)

    # -- calls ----------------------------------------------------------------------------------

    def open(self, session: str, request: AdmissionRequest, now: float) -> AdmissionDecision:
        """Admit a call or refuse it; the caller then queues the images of an admitted call."""
        account = self.account(request.tenant)
        predicted_s = None
        try:
            if not request.accepted:
                predicted_s = self._check(request, account, now)
        except _RefusedError as refused:
            if refused.for_want_of_replicas:
                self._count_arrival(request)
            return AdmissionDecision(
                session,
                request.call_id,
                refused.reason,
                refused.takes_s,
                refused.retry_after_s,
                refused.own_limit,
                account.rate_limits(now, self.month_ends - now),
            )
        self._admit(session, request, predicted_s, now)
        eta_s = None
        if predicted_s is not None:
            eta_s = self._forecasts.expected_s(_pools_of(request), predicted_s)
        rate_limits = account.rate_limits(now, self.month_ends - now)
        return AdmissionDecision(session, request.call_id, None, eta_s, rate_limits=rate_limits)

    def call(self, session: str, call_id: str) -> AdmittedCall | None:
        """An open call by its session and id."""
        return self._calls.get((session, call_id))

    def find(self, tenant: str, request_id: str) -> AdmittedCall | None:
        """A tenant's open call by the id that its client gave it."""
        return self._request_ids.get((tenant, request_id))

    def hold(self, session: str, usage: UsageRecord) -> float:
        """Move the work of an image from its call's reservation to a charge that is being written.

        Returns the work that is held; `free` must give it back. The held work stays reserved even
        if the call ends meanwhile, so the tenant's budget cannot be spent twice.
        """
        call = self._calls.get((session, usage.call))
        held = min(usage.work_s, call.reserved) if call else 0.0
        if call:
            call.reserved -= held
        return held

    def free(self, tenant: str, held: float) -> None:
        """Give back work that `hold` has held."""
        self.account(tenant).reserved -= held

    def spend(self, session: str, usage: UsageRecord, spent: float | None, now: float) -> None:
        """Count a charged image for its tenant.

        `spent`: the tenant's charged work of the month, if the caller knows it from the usage
        ledger. If it is None, this method adds the image's work to the sum itself.
        """
        account = self.account(usage.tenant)
        account.spent = account.spent + usage.work_s if spent is None else spent
        if usage.work_s > 0:
            account.lease(-usage.work_s)
        if call := self._calls.get((session, usage.call)):
            self._learn(call, now)

    def end(self, session: str, call_id: str, now: float) -> None:
        """Close a call that was answered, or that nobody waits for any more."""
        if call := self._calls.pop((session, call_id), None):
            if call.predicted_s is not None and now - call.opened > call.predicted_s:
                self._learn(call, now)  # the call took at least this long
            tenancy = self._tenancy(call.tenant)
            tenancy.calls.discard(call)
            if call.lane == "acceptance":  # its job may be stored now, but was not read yet
                self._accepted.append(call.id)
            else:
                tenancy.account.reserved -= call.reserved
            if self._request_ids.get((call.tenant, call.request_id)) is call:
                del self._request_ids[call.tenant, call.request_id]

    def end_session(self, session: str, now: float) -> None:
        """Close all calls of a session."""
        for owner, call_id in [key for key in self._calls if key[0] == session]:
            self.end(owner, call_id, now)

    @property
    def open_calls(self) -> int:
        """The number of open calls."""
        return len(self._calls)

    def forget(self, now: float, passed_s: float) -> None:
        """Let what was learned from past calls fade, because `passed_s` seconds have passed."""
        self._forecasts.forget(now, passed_s)

    def _learn(self, call: AdmittedCall, now: float) -> None:
        if call.predicted_s is not None:
            self._forecasts.learn(call.pools, call.predicted_s, now - call.opened)
            call.predicted_s = None

    # -- checks ---------------------------------------------------------------------------------

    def _check(self, request: AdmissionRequest, account: TenantAccount, now: float) -> float | None:
        """Check a call against all limits; returns the predicted seconds until it is done.

        Returns None if there is nothing to predict from: the call has no images, or none of its
        pools has a replica. Raises `_RefusedError` for the first check that the call fails.
        """
        tenant, images = account.tenant, request.images
        if self._known is not None and request.tenant not in self._known:
            raise _RefusedError("no_tenant")
        if self.draining:
            raise _RefusedError("draining")
        if self.database_fault:
            raise _RefusedError("database_unavailable", DATABASE_RETRY_S)
        if (request.tenant, request.request_id) in self._request_ids:
            raise _RefusedError("request_id_in_use")
        if account.requests and request.lane not in STORED:  # it was paid at the acceptance
            if late_s := account.requests.wait_s(1, now):
                raise _RefusedError("rate_limit_exceeded", late_s, own_limit=True)
            account.requests.take(1, now)
        account.counted[0] += request.lane not in STORED
        if request.lane == "acceptance":
            if account.leased is None and not account.may_reserve(request.work_s):
                raise self._over_budget(request, account, now)
            return None
        if not all(self._grants.possible(image.pools) for image in images):
            raise _RefusedError("no_capacity")
        if request.lane in STORED:
            return self._check_stored(request, account, now)
        calls = self._tenancy(request.tenant).calls
        open_calls = len(calls) + account.open_elsewhere
        if tenant.max_requests is not None and open_calls >= tenant.max_requests:
            ends = [c.opened + c.predicted_s - now for c in calls if c.predicted_s is not None]
            later_s = max(min(ends, default=0.0), 1.0) if tenant.max_requests else None
            raise _RefusedError("rate_limit_exceeded", later_s, own_limit=True)
        if not images:  # its images are in the result cache, or generated for another call
            return None
        if account.work and (late_s := account.work.wait_s(request.work_s, now)):
            raise _RefusedError("rate_limit_exceeded", late_s, own_limit=True)
        if not account.may_reserve(request.work_s):
            raise self._over_budget(request, account, now)
        self._check_queue(request, tenant, now)
        forecast = self._forecasts.forecast(request, now)
        if forecast is None:
            return None
        self._check_deadline(request, forecast, now)
        return sum(forecast)

    def _over_budget(
        self, request: AdmissionRequest, account: TenantAccount, now: float
    ) -> _RefusedError:
        never = request.work_s > (account.tenant.monthly_work or 0.0)
        later_s = None if never else self.month_ends - now
        return _RefusedError("insufficient_quota", later_s, own_limit=True)

    def _check_stored(
        self, request: AdmissionRequest, account: TenantAccount, now: float
    ) -> float | None:
        """Check the call of a job, which waits as long as it must; returns what `_check` does."""
        if account.work and (late_s := account.work.wait_s(request.work_s, now)):
            raise _RefusedError("rate_limit_exceeded", late_s, own_limit=True)
        if not account.may_reserve(request.work_s, held=True):
            raise self._over_budget(request, account, now)
        if len(request.images) > self.max_queued - self._grants.queue_depth:
            raise _RefusedError("queue_full")
        forecast = self._forecasts.forecast(request, now)
        return None if forecast is None else sum(forecast)

    def _check_queue(self, request: AdmissionRequest, tenant: Tenant, now: float) -> None:
        queued, work_s = self._grants.waiting_requests(request.tenant)
        coming, free = len(request.images), self.max_queued - self._grants.queue_depth
        if not queued and (coming <= free or self._may_displace(request)):
            return
        if coming > free:
            raise _RefusedError("queue_full", self._forecasts.grants_in_s(request, coming - free))
        if queued + coming > OWN_SHARE * free:
            raise _RefusedError(
                "queue_full", self._forecasts.grants_in_s(request, 1), own_limit=True
            )
        limit = tenant.max_queued_work
        if limit is not None and queued and work_s + request.work_s > limit:
            excess_s = work_s + request.work_s - limit
            later_s = self._forecasts.wait_s(request, min(excess_s, work_s), now)
            known_s = later_s if math.isfinite(later_s) else None
            raise _RefusedError("queue_full", known_s, own_limit=True)

    def _may_displace(self, request: AdmissionRequest) -> bool:
        """Return whether a tenant has more work waiting ÷ weight than this call would have."""
        queue = self._grants.queue
        if (largest := queue.largest_backlog(but=request.tenant)) is None:
            return False
        _, backlog_s = queue.waiting(largest)
        own = request.work_s / queue.weight(request.tenant)
        return backlog_s / queue.weight(largest) > own

    def _check_deadline(self, request: AdmissionRequest, forecast: Forecast, now: float) -> None:
        left_s = request.timeout_s - request.waited_s
        pools = _pools_of(request)
        late_s = self._forecasts.at_most_s(pools, forecast) - left_s
        if late_s <= 0:
            return
        alone_s = self._forecasts.alone_s(request)
        if alone_s > request.timeout_s:
            raise _RefusedError("timeout_too_short", takes_s=alone_s)
        with_empty_backlog = self._forecasts.forecast(request, now, own_backlog=False) or forecast
        own_limit = self._forecasts.at_most_s(pools, with_empty_backlog) <= left_s
        raise _RefusedError("deadline_unreachable", late_s, own_limit)

    def _admit(
        self, session: str, request: AdmissionRequest, predicted_s: float | None, now: float
    ) -> None:
        tenancy = self._tenancy(request.tenant)
        call = AdmittedCall(
            session,
            request.call_id,
            request.tenant,
            request.request_id,
            now,
            now + request.timeout_s - request.waited_s if request.timeout_s else math.inf,
            _pools_of(request),
            predicted_s,
            request.work_s,
            request.lane,
        )
        self._calls[session, request.call_id] = call
        self._request_ids.setdefault((request.tenant, request.request_id), call)
        if request.lane == "request":
            tenancy.calls.add(call)
        if request.lane == "acceptance":
            of_job = self._accepting.setdefault(job_of(request.call_id), {})
            of_job[request.call_id] = request.tenant, request.work_s
            tenancy.account.accepting += request.work_s
        else:
            tenancy.account.reserved += request.work_s
        if request.lane in STORED:  # what was kept for the job is reserved now
            self.forget_accepted(list(self._accepting.get(job_of(request.call_id), ())))
        if request.accepted:
            return
        tenancy.account.used_at = now
        tenancy.account.counted[1] += request.work_s
        if tenancy.account.work:
            tenancy.account.work.take(request.work_s, now)
        if request.lane in STORED:  # what waits for them is known, and nobody predicts what comes
            return
        self._count_arrival(request)
        self._forecasts.count_arrival(request, now)

    def _count_arrival(self, request: AdmissionRequest) -> None:
        for image in request.images:
            before = self.arrived.get(image.pools, Arrivals())
            self.arrived[image.pools] = before.and_one_of(image.work_s)


def _pools_of(request: AdmissionRequest) -> Pools:
    """The pools of a call's images; empty if it has none."""
    return request.images[0].pools if request.images else ()
