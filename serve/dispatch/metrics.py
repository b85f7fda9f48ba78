"""What the Dispatcher counts of tenants; Ray exports it with the names `ray_octet_tenant_…`.

However many tenants there are, labels stay few: the `MOST` who have used most lately are named,
all others together are `other`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ray.serve import metrics

from .messages import Usage
from .overview import TenantRow

MOST = 20
FADE = 0.999  # of what was used lately, at each report
OTHER = "other"


class TenantMetrics:
    def __init__(self) -> None:
        self._lately: Counter[str] = Counter()
        self._named: set[str] = set()
        self._gauges = {
            name: metrics.Gauge(f"octet_tenant_{name}", text, tag_keys=("tenant",))
            for name, text in (
                ("calls", "Open requests."),
                ("queued", "Images that wait."),
                ("queued_work", "Their work, in seconds of a reference replica."),
                ("running", "Images that are drawn."),
            )
        }
        self._work = metrics.Counter(
            "octet_tenant_work",
            "Work that was charged, in seconds of a reference replica.",
            tag_keys=("tenant", "outcome"),
        )
        self._images = metrics.Counter(
            "octet_tenant_images", "Images that were charged.", tag_keys=("tenant", "outcome")
        )
        self._refused = metrics.Counter(
            "octet_tenant_refused", "Requests that were refused.", tag_keys=("tenant", "code")
        )

    def charged(self, usage: Usage) -> None:
        self._lately[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
        tags = {"tenant": self._label(usage.tenant), "outcome": usage.outcome}
        self._images.inc(tags=tags)
        if usage.work_s:
            self._work.inc(usage.work_s, tags)

    def refused(self, tenant: str, code: str) -> None:
        self._refused.inc(tags={"tenant": self._label(tenant), "code": code})

    def report(self, rows: Sequence[TenantRow]) -> None:
        """Once per heartbeat: Ray forgets gauges that are not set again."""
        for tenant in list(self._lately):
            self._lately[tenant] *= FADE  # type: ignore[assignment]  # floats
        queued = {row["tenant"]: row["queued_work"] for row in rows}
        use = Counter({t: self._lately[t] + queued.get(t, 0) for t in {*self._lately, *queued}})
        before, self._named = self._named, {tenant for tenant, _ in use.most_common(MOST)}
        for name, gauge in self._gauges.items():
            sums: Counter[str] = Counter(dict.fromkeys(before - self._named, 0))
            for row in rows:
                sums[self._label(row["tenant"])] += row[name]  # type: ignore[literal-required]
            for label, value in sums.items():
                gauge.set(value, {"tenant": label})

    def _label(self, tenant: str) -> str:
        if len(self._named) < MOST:
            self._named.add(tenant)
        return tenant if tenant in self._named else OTHER
