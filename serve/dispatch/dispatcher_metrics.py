"""The Dispatcher's metrics of itself, pools and tenants, as `serve.metric_catalogue` lists them.

The number of labels stays small, however many tenants there are. Only the `MOST_NAMED` tenants with
the most recent use have labels of their own. All other tenants share the label `_other`. At most
`EVER_NAMED` different tenants get a label of their own while this process lives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..metric_catalogue import metric
from ..usage.record import UsageRecord
from .grants import Grants
from .job_backlog import StoredWork
from .overview import TenantRow
from .scaling import Scaling

MOST_NAMED, EVER_NAMED = 20, 100
FADE = 0.999  # factor by which a tenant's recent use shrinks at each report
QUEUE = "images", "work_seconds", "oldest_seconds"
OTHER = "_other"  # not a valid tenant id


class DispatcherMetrics:
    """The Dispatcher's own lag, messages and sessions; `messages` counts by kind until a report."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self._messages = metric("octet_dispatcher_messages")
        self._lag = metric("octet_dispatcher_lag_seconds")
        self._sessions = metric("octet_dispatcher_sessions")
        self._recovering = metric("octet_dispatcher_recovering")
        self._cordoned = metric("octet_nodes_cordoned")
        self._stored = metric("octet_jobs_waiting"), metric("octet_jobs_waiting_work_seconds")
        self._stored_before: set[tuple[str, str]] = set()

    def report(
        self, lag_s: float, sessions: int, cordoned: Iterable[str], *, recovering: bool
    ) -> None:
        """Report to Ray; called once per heartbeat."""
        for kind, count in self.messages.items():
            self._messages.inc(count, {"kind": kind})
        self.messages.clear()
        self._lag.set(lag_s)
        self._sessions.set(sessions)
        self._recovering.set(int(recovering))
        for node in cordoned:
            self._cordoned.set(1, {"node": node})

    def stored(self, work: Mapping[tuple[str, str], StoredWork]) -> None:
        """Report the jobs that wait, by pool and lane; called once per heartbeat."""
        before, self._stored_before = self._stored_before, set(work)
        for pool, lane in before | work.keys():
            found = work.get((pool, lane))
            for gauge, value in zip(
                self._stored, (found.jobs, found.work_s) if found else (0, 0.0), strict=True
            ):
                gauge.set(value, {"pool": pool, "lane": lane})


class PoolMetrics:
    """Every pool's queue, slots and replicas."""

    def __init__(self) -> None:
        self._replicas, self._slots = metric("octet_pool_replicas"), metric("octet_pool_slots")
        self._changes = metric("octet_pool_decisions")
        self._queue = {of: metric(f"octet_queue_{of}") for of in QUEUE}
        self._wanted: dict[str, int] = {}

    def report(self, scaling: Scaling, grants: Grants, now: float) -> None:
        """Set all gauges; called once per heartbeat."""
        waiting = {pool: [0, 0.0, 0.0] for pool in scaling.limits.pools}
        for image in grants.queue:
            row = waiting.setdefault(image.pools[0], [0, 0.0, 0.0])
            row[:] = row[0] + 1, row[1] + image.work_s, max(row[2], now - image.since)
        for pool in scaling.limits.pools:
            row = waiting[pool]
            tags = {"model": scaling.limits.pools[pool].model, "pool": pool}
            for of, value in zip(QUEUE, row, strict=True):
                self._queue[of].set(value, tags)
            self._slots.set(grants.free_slots(pool), {"pool": pool, "state": "free"})
            self._slots.set(grants.running_in(pool), {"pool": pool, "state": "running"})
        for pool in scaling.limits.pools:
            wanted, ready = scaling.replicas[pool], grants.staying(pool).replicas
            counts = {"wanted": wanted, "ready": ready, "starting": max(wanted - ready, 0)}
            for state, count in counts.items():
                self._replicas.set(count, {"pool": pool, "state": state})
            before = self._wanted.get(pool, wanted)
            self._wanted[pool] = wanted
            if wanted != before:
                direction = "up" if wanted > before else "down"
                self._changes.inc(1, {"pool": pool, "direction": direction})


class TenantMetrics:
    """Every tenant's calls, queue, charges and refusals."""

    def __init__(self, make: Callable[[str], Any] = metric) -> None:
        """`make`: returns the catalogue's metric of a given name."""
        self._lately: Counter[str] = Counter()
        self._named: set[str] = set()  # named at present
        self._ever: set[str] = set()  # all that were ever named; their counters go on
        # Collected between reports, because a call of Ray for each costs more than its dispatch.
        self._charges: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._gauges = {
            name: make(f"octet_tenant_{name}")
            for name in ("calls", "queued", "queued_work", "running")
        }
        self._work = make("octet_tenant_work")
        self._images = make("octet_tenant_images")
        self._refused = make("octet_tenant_refused")
        self._faults = make("octet_tenants_file_faults")
        self._database_fault = make("octet_database_fault")

    def charged(self, usage: UsageRecord) -> None:
        """Count a charged image, or a reversal with the work that it gives back."""
        self._lately[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
        self._charges[usage.tenant, usage.outcome].append(abs(usage.work_s))

    def refused(self, tenant: str, code: str) -> None:
        """Count a refused call."""
        self._refusals[tenant, code] += 1

    def faults(self, files: Mapping[str, bool], *, database: bool) -> None:
        """Report whether the database and each of the tenants' files have a fault."""
        self._database_fault.set(int(database))
        for file, faulty in files.items():
            self._faults.set(int(faulty), {"file": file})

    def report(self, rows: Sequence[TenantRow]) -> None:
        """Report to Ray; called once per heartbeat, because Ray forgets gauges that are not set."""
        queued = {row["tenant"]: row["queued_work"] for row in rows}
        use = Counter({t: self._lately[t] + queued.get(t, 0) for t in {*self._lately, *queued}})
        before, self._named = self._named, self._most_used(use)
        for (tenant, outcome), work in self._charges.items():
            tags = {"tenant": self._label(tenant), "outcome": outcome}
            self._images.inc(len(work), tags)
            if sum(work):
                self._work.inc(sum(work), tags)
        for (tenant, code), count in self._refusals.items():
            self._refused.inc(count, {"tenant": self._label(tenant), "code": code})
        self._charges.clear()
        self._refusals.clear()
        for tenant in list(self._lately):
            self._lately[tenant] *= FADE  # type: ignore[assignment]  # floats
        for name, gauge in self._gauges.items():
            sums: Counter[str] = Counter(dict.fromkeys(before - self._named, 0))
            for row in rows:
                label = row["tenant"] if row["tenant"] in self._named else OTHER
                sums[label] += row[name]  # type: ignore[literal-required]  # a gauge's name
            for label, value in sums.items():
                gauge.set(value, {"tenant": label})

    def _most_used(self, use: Counter[str]) -> set[str]:
        """The `MOST_NAMED` tenants with the most use.

        After `EVER_NAMED` different tenants have been named, only these can be chosen again.
        """
        named: set[str] = set()
        for tenant, _ in use.most_common():
            if tenant in self._ever or len(self._ever) < EVER_NAMED:
                self._ever.add(tenant)
                named.add(tenant)
            if len(named) == MOST_NAMED:
                break
        return named

    def _label(self, tenant: str) -> str:
        """The label of a tenant's counters: its name, if it was ever named, else `_other`."""
        return tenant if tenant in self._ever else OTHER
