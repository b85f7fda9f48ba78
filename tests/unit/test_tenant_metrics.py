"""However many tenants come and go, their labels stay few."""

from __future__ import annotations

from typing import Any

import pytest

from serve.dispatch.dispatcher_metrics import EVER_NAMED, MOST_NAMED, OTHER, TenantMetrics
from serve.dispatch.overview import TenantRow

from ..builders import usage_record


class Kept:
    """A metric of Ray's that remembers what it was told."""

    found: dict[str, dict[str, float]] = {}  # noqa: RUF012 - the tests' own

    def __init__(self, name: str) -> None:
        self.values = Kept.found.setdefault(name, {})

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["tenant"]] = value

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert tags
        self.values[tags["tenant"]] = self.values.get(tags["tenant"], 0.0) + value


@pytest.fixture
def found() -> dict[str, dict[str, float]]:
    Kept.found = {}
    return Kept.found


def row(tenant: str, queued: int) -> TenantRow:
    zeros: dict[str, Any] = {"weight": 1.0, "calls": 0, "running": 0, "spent": 0.0}
    more = {"queued": queued, "queued_work": float(queued), "monthly_work": None}
    return {"tenant": tenant, **zeros, **more}  # type: ignore[typeddict-item]  # all are there


def test_those_with_most_are_named_and_the_others_are_together(
    found: dict[str, dict[str, float]],
) -> None:
    metrics = TenantMetrics(Kept)
    metrics.report([row(f"t{i}", i) for i in range(50)])
    queued = found["octet_tenant_queued"]
    assert len(queued) == MOST_NAMED + 1
    assert queued["t49"] == 49
    assert queued[OTHER] == sum(range(30))


def test_many_who_come_and_go_leave_few_labels(found: dict[str, dict[str, float]]) -> None:
    metrics = TenantMetrics(Kept)
    for i in range(500):
        metrics.charged(usage_record(f"c{i}", tenant=f"t{i}"))
        metrics.refused(f"t{i}", "queue_full")
        metrics.report([row(f"t{i}", 1)])
    for values in found.values():
        assert len(values) <= EVER_NAMED + 1
    assert sum(found["octet_tenant_images"].values()) == 500
    assert sum(found["octet_tenant_work"].values()) == 500


def test_a_tenant_that_waits_no_more_is_set_to_nothing(found: dict[str, dict[str, float]]) -> None:
    metrics = TenantMetrics(Kept)
    metrics.report([row("a", 5)])
    metrics.report([row(f"t{i}", 9) for i in range(MOST_NAMED)])
    assert found["octet_tenant_queued"]["a"] == 0
