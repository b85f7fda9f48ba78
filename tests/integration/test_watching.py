"""Test of the dashboards and alerts on the running demo, through a real Prometheus."""

from __future__ import annotations

from pathlib import Path

import httpx
import ray

from k8s import rules
from serve.metric_catalogue import ALL

from ..dashboards import metrics_in, queries
from ..prometheus import Prometheus
from ..wait import wait_for

# Metrics that have no values on a healthy demo on a CPU without a bucket and Redis.
SILENT = {
    *(name for name in ALL if "card" in name or "spool" in name),
    *("octet_replica_memory_bytes", "octet_cache_failures", "octet_engine_out_of_memory"),
    *("octet_retried", "octet_pool_decisions"),
    *("octet_tenant_refused", "octet_tenants_file_faults", "octet_nodes_cordoned"),
    "octet_store_faults",
    *(name for name in ALL if "routed" in name or "shadow" in name),
    *(name for name in ALL if "job" in name or "webhook" in name),
}
EDIT = {"prompt": "dunes", "num_inference_steps": "1", "size": "64x64"}
PICTURE = {"image": (Path(__file__).parents[1] / "edits" / "plain.png").read_bytes()}
# Alerts that the earlier tests cause on the same server.
PROVOKED = {"OctetJobClaimsLost", "OctetOutOfMemory", "OctetUsageUnrecorded"}


def test_a_running_demo_fills_the_dashboards_and_fires_no_alert(url: str) -> None:
    """Every query of the dashboards has data, except the queries about metrics in `SILENT`.

    Only the alerts in `PROVOKED` may fire.
    """
    (node,) = ray.nodes()
    prometheus = Prometheus(f"127.0.0.1:{node['MetricsExportPort']}", rules.RULES)
    body = {"prompt": "dunes", "num_inference_steps": 4, "size": "64x64"}
    try:
        shown = {query: metrics_in(query) for query in queries()}  # none: a query about Kubernetes
        left = {query for query, metrics in shown.items() if metrics and not metrics & SILENT}
        assert len(left) > 30
        left |= {rules.errors(window) for window in rules.WINDOWS}

        def all_have_data() -> bool:
            for more in ({"seed": 1}, {"seed": 1}, {"response_format": "url"}, {}):
                asked = {**body, **more}
                answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=120)
                assert answer.status_code == 200
            edit = httpx.post(f"{url}/v1/images/edits", data=EDIT, files=PICTURE, timeout=120)
            assert edit.status_code == 200
            left.difference_update([query for query in left if prometheus.ask(query)])
            return not left

        wait_for(all_have_data)
        found = prometheus.rules()
        assert {rule["health"] for rule in found} == {"ok"}
        firing = {rule["name"] for rule in found if rule.get("state") == "firing"}
        assert not firing - PROVOKED
    finally:
        prometheus.close()
