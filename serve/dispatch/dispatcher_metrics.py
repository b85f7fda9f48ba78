"""What the Dispatcher counts of pools and tenants: see `serve.metrics`.

However many tenants there are, labels stay few: the `MOST` who have used most lately are named, all
others together are `_other`; and no more than `EVER` are named while this process lives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ..metric_catalogue import metric
from ..usage.record import UsageRecord
from .grants import Grants
from .overview import TenantRow
from .scaling import Scaling

MOST, EVER = 20, 100
FADE = 0.999  # of what was used lately, at each report
QUEUE = "images", "work_seconds", "oldest_seconds"
OTHER = "_other"  # no tenant's id


class PoolMetrics:
    """Of every pool: what waits for it, its slots and replicas."""

    def __init__(self) -> None:
        self._replicas, self._slots = metric("octet_pool_replicas"), metric("octet_pool_slots")
        self._changes = metric("octet_pool_decisions")
        self._queue = {of: metric(f"octet_queue_{of}") for of in QUEUE}
        self._wanted: dict[str, int] = {}

    def report(self, scaling: Scaling, grants: Grants, now: float) -> None:
        """Once per heartbeat."""
        waiting = {pool: [0, 0.0, 0.0] for pool in scaling.limits.pools}
        for item in grants.queue:
            row = waiting.setdefault(item.pools[0], [0, 0.0, 0.0])
            row[:] = row[0] + 1, row[1] + item.work_s, max(row[2], now - item.what.since)
        for pool in scaling.limits.pools:
            row = waiting[pool]
            tags = {"model": scaling.limits.pools[pool].model, "pool": pool}
            for of, value in zip(QUEUE, row, strict=True):
                self._queue[of].set(value, tags)
            self._slots.set(grants.free_slots(pool), {"pool": pool, "state": "free"})
            self._slots.set(grants.running_in(pool), {"pool": pool, "state": "running"})
        for pool in scaling.limits.pools:
            wanted, ready = scaling.replicas[pool], len(grants.staying(pool))
            counts = {"wanted": wanted, "ready": ready, "starting": max(wanted - ready, 0)}
            for state, count in counts.items():
                self._replicas.set(count, {"pool": pool, "state": state})
            before = self._wanted.get(pool, wanted)
            self._wanted[pool] = wanted
            if wanted != before:
                direction = "up" if wanted > before else "down"
                self._changes.inc(1, {"pool": pool, "direction": direction})


class TenantMetrics:
    def __init__(self) -> None:
        self._lately: Counter[str] = Counter()
        self._named: set[str] = set()  # now
        self._ever: set[str] = set()  # whose counters go on
        # Since the last report: telling Ray of each costs more than dispatching it.
        self._charges: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._gauges = {
            name: metric(f"octet_tenant_{name}")
            for name in ("calls", "queued", "queued_work", "running")
        }
        self._work = metric("octet_tenant_work")
        self._images = metric("octet_tenant_images")
        self._refused = metric("octet_tenant_refused")

    def charged(self, usage: UsageRecord) -> None:
        self._lately[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
        self._charges[usage.tenant, usage.outcome].append(usage.work_s)

    def refused(self, tenant: str, code: str) -> None:
        self._refusals[tenant, code] += 1

    def report(self, rows: Sequence[TenantRow]) -> None:
        """Once per heartbeat: Ray forgets gauges that are not set again."""
        queued = {row["tenant"]: row["queued_work"] for row in rows}
        use = Counter({t: self._lately[t] + queued.get(t, 0) for t in {*self._lately, *queued}})
        before, self._named = self._named, self._admitted(use)
        for (tenant, outcome), work in self._charges.items():
            tags = {"tenant": self._counted(tenant), "outcome": outcome}
            self._images.inc(len(work), tags)
            if sum(work):
                self._work.inc(sum(work), tags)
        for (tenant, code), count in self._refusals.items():
            self._refused.inc(count, {"tenant": self._counted(tenant), "code": code})
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

    def _admitted(self, use: Counter[str]) -> set[str]:
        """Those with most, as far as they have a name or may still get one."""
        named: set[str] = set()
        for tenant, _ in use.most_common():
            if tenant in self._ever or len(self._ever) < EVER:
                self._ever.add(tenant)
                named.add(tenant)
            if len(named) == MOST:
                break
        return named

    def _counted(self, tenant: str) -> str:
        """A counter's label stays once it has begun."""
        return tenant if tenant in self._ever else OTHER
