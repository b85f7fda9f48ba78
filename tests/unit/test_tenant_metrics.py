"""The number of tenant labels of metrics stays bounded."""

from __future__ import annotations

import pytest

from serve.dispatch.dispatcher_metrics import EVER_NAMED, MOST_NAMED, OTHER, TenantMetrics
from serve.dispatch.overview import TenantRow

from ..builders import usage_record


class RecordedMetric:
    """A stand-in for a metric of Ray that keeps its values in `found`."""

    found: dict[str, dict[str, float]] = {}  # noqa: RUF012 - replaced by each test

    def __init__(self, name: str) -> None:
        self.values = RecordedMetric.found.setdefault(name, {})

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tags["tenant"]] = value

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert tags
        self.values[tags["tenant"]] = self.values.get(tags["tenant"], 0.0) + value


@pytest.fixture
def found() -> dict[str, dict[str, float]]:
    RecordedMetric.found = {}
    return RecordedMetric.found


def row(tenant: str, queued: int) -> TenantRow:
    return {
        "tenant": tenant,
        "weight": 1.0,
        "calls": 0,
        "running": 0,
        "queued": queued,
        "queued_work": float(queued),
        "spent": 0.0,
        "monthly_work": None,
    }


def test_tenants_with_the_longest_queues_are_named_and_the_others_are_summed(
    found: dict[str, dict[str, float]],
) -> None:
    metrics = TenantMetrics(RecordedMetric)
    metrics.report([row(f"t{i}", i) for i in range(50)])
    queued = found["octet_tenant_queued"]
    assert len(queued) == MOST_NAMED + 1
    assert queued["t49"] == 49
    assert queued[OTHER] == sum(range(30))


def test_many_tenants_that_come_and_go_leave_few_labels(found: dict[str, dict[str, float]]) -> None:
    metrics = TenantMetrics(RecordedMetric)
    for i in range(500):
        metrics.charged(usage_record(f"c{i}", tenant=f"t{i}"))
        metrics.refused(f"t{i}", "queue_full")
        metrics.report([row(f"t{i}", 1)])
    for values in found.values():
        assert len(values) <= EVER_NAMED + 1
    assert sum(found["octet_tenant_images"].values()) == 500
    assert sum(found["octet_tenant_work"].values()) == 500


def test_a_tenant_without_queued_images_is_set_to_zero(found: dict[str, dict[str, float]]) -> None:
    metrics = TenantMetrics(RecordedMetric)
    metrics.report([row("a", 5)])
    metrics.report([row(f"t{i}", 9) for i in range(MOST_NAMED)])
    assert found["octet_tenant_queued"]["a"] == 0
