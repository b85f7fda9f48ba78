"""Dashboards and alerts: every query runs on a real Prometheus with the metrics of Octet."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import dashboards, rules
from serve.metric_catalogue import ALL, exported, table

from ..builders import ROOT
from ..dashboards import metrics_in, queries
from ..prometheus import TOOL, Prometheus, require_prometheus

# Of ten comparisons, nine have an SSIM between 0.8 and 0.85: by bucket, how many are below.
DRIFT = (("0.8", 0.0), ("0.85", 0.9), ("0.9", 0.9), ("1.0", 1.0), ("+Inf", 1.0))

# -- files ----------------------------------------------------------------------------------------


def test_committed_dashboards_rules_and_tables_are_what_the_code_makes() -> None:
    made = {**dashboards.files(), **rules.files()}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: make it again"
    assert set(dashboards.OUT.glob("*.json")) == dashboards.files().keys()
    assert table() in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_every_metric_is_in_the_table_and_on_a_dashboard() -> None:
    """Metrics are created only in `serve.metric_catalogue`, and a dashboard shows each."""
    for folder in ("serve", "cluster", "autoscaling", "k8s"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            made = re.findall(r"metrics\.(?:Counter|Gauge|Histogram)\b", text)
            assert not made or file == ROOT / "serve" / "metric_catalogue.py", file
            for name in re.findall(r'metric\("(\w+)"\)', text):
                assert name in ALL
    shown = set().union(*map(metrics_in, queries()))
    assert shown == set(ALL)
    for name, metric in ALL.items():
        assert metric.text.isascii(), name


def test_every_alert_has_a_section_in_the_runbook() -> None:
    headings = {
        line.removeprefix("### ").strip()
        for line in (ROOT / rules.RUNBOOK).read_text(encoding="utf-8").splitlines()
        if line.startswith("### Octet")
    }
    assert headings == set(rules.ALERTS)


# -- with real data -------------------------------------------------------------------------------


OTHERS = (  # of kube-state-metrics
    'kube_pod_status_phase{namespace="x",pod="octet-x",phase="Pending"}',
    'kube_pod_init_container_status_running{namespace="x",pod="octet-x",container="pull"}',
)


class AllMetrics(BaseHTTPRequestHandler):
    """Serves every metric of the catalogue in Ray's format, with rising values."""

    def do_GET(self) -> None:
        lines = []
        for name, metric in ALL.items():
            tags = ",".join(f'{tag}="x"' for tag in (*metric.tags, "replica", "NodeAddress"))
            value = time.monotonic()
            if metric.kind != "histogram":
                lines.append(f"{exported(name)}{{{tags}}} {value}")
                continue
            bounds = [*metric.buckets, "+Inf"]
            lines += [f'ray_{name}_bucket{{{tags},le="{le}"}} {value}' for le in bounds]
            lines += [f"ray_{name}_{part}{{{tags}}} {value}" for part in ("sum", "count")]
        lines += [f"{series} 1" for series in OTHERS]
        self.send_response(200)
        self.end_headers()
        self.wfile.write("\n".join([*lines, ""]).encode())

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def prometheus() -> Iterator[Prometheus]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), AllMetrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    prometheus = Prometheus(f"127.0.0.1:{server.server_port}", rules.RULES)
    yield prometheus
    prometheus.close()
    server.shutdown()
    server.server_close()


def test_every_query_finds_series(prometheus: Prometheus) -> None:
    left = set(queries())
    deadline = time.monotonic() + 15
    while left and time.monotonic() < deadline:
        left = {query for query in left if not prometheus.ask(query)}
        time.sleep(0.5)
    assert not left
    found = prometheus.rules()
    assert len(found) == len(rules.ALERTS) + len(rules.recorded())
    assert {rule["health"] for rule in found} == {"ok"}


# -- alerts ---------------------------------------------------------------------------------------

OK, BAD = 'status="200",outcome="ok"', 'status="503",outcome="unavailable"'
REQUESTS = "ray_octet_requests_total"


def slow(within: int, above: int, samples: int) -> dict[str, str]:
    """Series of a model: requests within the latency goal and above it, in each of the samples."""
    series = 'ray_octet_request_seconds_bucket{model="m",le="%s"}'
    return {
        series % "37.779": f"0+{within}x{samples}",
        series % "+Inf": f"0+{within + above}x{samples}",
        f'{REQUESTS}{{model="m",{OK}}}': f"0+{within + above}x{samples}",
    }


BLUE, GREEN = 'namespace="o",ray_io_cluster="blue"', 'namespace="o",ray_io_cluster="green"'
# For each alert: series with which it fires and does not, and the minute. They have a value for
# each minute, or for every fourth one if these are more than a thousand: promtool takes long for
# days, and after five minutes a value no longer counts.
CASES: dict[str, tuple[dict[str, str], dict[str, str], int]] = {
    "OctetErrorBudgetFast": (
        {f"{REQUESTS}{{{OK}}}": "0+90x90", f"{REQUESTS}{{{BAD}}}": "0+10x90"},
        {f"{REQUESTS}{{{OK}}}": "0+98x90", f"{REQUESTS}{{{BAD}}}": "0+2x90"},
        90,
    ),
    "OctetErrorBudgetSlow": (
        {f"{REQUESTS}{{{OK}}}": "0+95x400", f"{REQUESTS}{{{BAD}}}": "0+5x400"},
        {f"{REQUESTS}{{{OK}}}": "0+98x400", f"{REQUESTS}{{{BAD}}}": "0+2x400"},
        400,
    ),
    "OctetErrorBudgetCreeping": (
        {f"{REQUESTS}{{{OK}}}": "0+990x1100", f"{REQUESTS}{{{BAD}}}": "0+10x1100"},
        {f"{REQUESTS}{{{OK}}}": "0+998x1100", f"{REQUESTS}{{{BAD}}}": "0+2x1100"},
        4400,
    ),
    "OctetLatencyBudgetFast": (slow(20, 80, 90), slow(60, 40, 90), 90),
    "OctetLatencyBudgetSlow": (slow(60, 40, 400), slow(80, 20, 400), 400),
    "OctetLatencyBudgetCreeping": (slow(90, 10, 1100), slow(97, 3, 1100), 4400),
    "OctetServiceNotReady": (
        {'kuberay_service_condition_ready{name="octet",condition="false"}': "1x20"},
        {'kuberay_service_condition_ready{name="octet",condition="true"}': "1x20"},
        20,
    ),
    "OctetUpgradeStuck": (
        {'kuberay_service_condition_upgrade_in_progress{condition="true"}': "1x130"},
        {'kuberay_service_condition_upgrade_in_progress{condition="true"}': "1x60 _x70"},
        130,
    ),
    "OctetGcsRedisDown": (
        {'kube_statefulset_status_replicas_ready{statefulset="octet-gcs-redis"}': "0x9"},
        {'kube_statefulset_status_replicas_ready{statefulset="octet-gcs-redis"}': "1x9"},
        9,
    ),
    "OctetVolumeFilling": (
        {
            'kubelet_volume_stats_available_bytes{persistentvolumeclaim="octet-data"}': "9x20",
            'kubelet_volume_stats_capacity_bytes{persistentvolumeclaim="octet-data"}': "100x20",
        },
        {
            'kubelet_volume_stats_available_bytes{persistentvolumeclaim="octet-data"}': "11x20",
            'kubelet_volume_stats_capacity_bytes{persistentvolumeclaim="octet-data"}': "100x20",
        },
        20,
    ),
    "OctetPullFailing": (
        {'kube_pod_init_container_status_running{container="pull",pod="octet-a"}': "1x70"},
        {'kube_pod_init_container_status_running{container="pull",pod="other"}': "1x70"},
        70,
    ),
    "OctetNoDispatcher": ({"up": "1x9"}, {'ray_octet_pool_replicas{pool="p"}': "0x9"}, 9),
    "OctetUsageUnrecorded": (
        # Ray exports a counter only after its first event.
        {f'{REQUESTS}{{outcome="usage_unrecorded"}}': "_ _ 1 1 1"},
        {f'{REQUESTS}{{outcome="ok"}}': "_ _ 1 1 1"},
        4,
    ),
    "OctetOldestWait": (
        {'ray_octet_queue_oldest_seconds{pool="p"}': "61x9"},
        {'ray_octet_queue_oldest_seconds{pool="p"}': "61 61 59 61 61 61"},
        4,
    ),
    "OctetReplicasNotReady": (
        {'ray_octet_pool_replicas{pool="p",state="starting"}': "1x20"},
        {'ray_octet_pool_replicas{pool="p",state="require_prometheus"}': "1x20"},
        20,
    ),
    "OctetManyStarts": (
        {'ray_octet_pool_decisions_total{pool="p",direction="up"}': "0+1x60"},
        {'ray_octet_pool_decisions_total{pool="p",direction="down"}': "0+1x60"},
        60,
    ),
    "OctetSlowStart": (
        {
            'ray_octet_engine_start_seconds{pool="p",replica="r",phase="load"}': "400x5",
            'ray_octet_engine_start_seconds{pool="p",replica="r",phase="warm-up"}': "400x5",
        },
        {
            'ray_octet_engine_start_seconds{pool="p",replica="r",phase="load"}': "400x5",
            'ray_octet_engine_start_seconds{pool="p",replica="q",phase="load"}': "400x5",
        },
        5,
    ),
    "OctetGpuFault": (
        {'ray_octet_card_xids_total{uuid="u",xid="79"}': "_x26 1x5"},
        {
            'ray_octet_card_xids_total{uuid="u",xid="79"}': "1x30",
            'ray_octet_card_ecc_errors{uuid="u"}': "2x30",
        },
        30,
    ),
    "OctetOutOfMemory": (
        {'ray_octet_engine_out_of_memory_total{pool="p"}': "1x28 2 2 2"},
        {'ray_octet_engine_out_of_memory_total{pool="p"}': "1x30"},
        30,
    ),
    "OctetNonFiniteImages": (
        {
            'ray_octet_engine_images_total{pool="p",outcome="drawn"}': "0+90x30",
            'ray_octet_engine_images_total{pool="p",outcome="non_finite"}': "0+2x30",
        },
        {
            'ray_octet_engine_images_total{pool="p",outcome="drawn"}': "0+900x30",
            'ray_octet_engine_images_total{pool="p",outcome="non_finite"}': "0+2x30",
        },
        30,
    ),
    "OctetTenantsFile": (
        {'ray_octet_tenants_file_faults{file="keys.json"}': "1x9"},
        {'ray_octet_tenants_file_faults{file="keys.json"}': "1 0 0 1 0 0 0 0 0"},
        9,
    ),
    "OctetNodeCordoned": (
        {'ray_octet_nodes_cordoned{node="n"}': "1x9"},
        {'ray_octet_nodes_cordoned{node="n"}': "_x9"},
        9,
    ),
    "OctetDatabase": (
        {"ray_octet_database_fault": "1x9"},
        {"ray_octet_database_fault": "1 0 0 1 0 0 0 0 0"},
        9,
    ),
    "OctetJobsNotClaimed": (
        {
            'ray_octet_jobs_waiting{pool="p",lane="job"}': "3x40",
            "ray_octet_job_claims_total": "0+1x10 10x30",
        },
        {
            'ray_octet_jobs_waiting{pool="p",lane="job"}': "3x40",
            "ray_octet_job_claims_total": "0+1x40",
        },
        40,
    ),
    "OctetFp8Drifts": (  # many comparisons, most of them between 0.8 and 0.85; or only a few
        {
            'ray_octet_shadow_images_total{model="m",outcome="compared"}': "0+1x60",
            **{
                f'ray_octet_shadow_ssim_bucket{{model="m",le="{le}"}}': f"0+{n}x60"
                for le, n in DRIFT
            },
        },
        {
            'ray_octet_shadow_images_total{model="m",outcome="compared"}': "0+0.2x60",
            **{
                f'ray_octet_shadow_ssim_bucket{{model="m",le="{le}"}}': f"0+{0.2 * n}x60"
                for le, n in DRIFT
            },
        },
        60,
    ),
    "OctetJobsPaused": ({"ray_octet_jobs_paused": "1x9"}, {"ray_octet_jobs_paused": "0x9"}, 9),
    "OctetJobClaimsLost": (
        {"ray_octet_job_claims_lost_total": "_x26 1x5"},
        {"ray_octet_job_claims_lost_total": "1x30"},
        30,
    ),
    "OctetWebhooksDead": (
        {'ray_octet_webhook_attempts_total{outcome="dead"}': "_x26 1x5"},
        {'ray_octet_webhook_attempts_total{outcome="waiting"}': "_x26 1x5"},
        30,
    ),
    "OctetStoreFault": (
        {'ray_octet_store_faults{NodeAddress="n",place="bucket b",cause="X"}': "1x9"},
        {'ray_octet_store_faults{NodeAddress="n",place="bucket b",cause="X"}': "1 1 0 0 1 0 0 0 0"},
        9,
    ),
    "OctetSpoolFilling": (
        {
            'ray_octet_spool_bytes{NodeAddress="n"}': "6x9",
            'ray_octet_spool_limit_bytes{NodeAddress="n"}': "10x9",
        },
        {
            'ray_octet_spool_bytes{NodeAddress="n"}': "4x9",
            'ray_octet_spool_limit_bytes{NodeAddress="n"}': "10x9",
        },
        9,
    ),
    "OctetRedisDown": (
        {"ray_octet_cache_failures_total": "0+5x9"},
        {"ray_octet_cache_failures_total": "0+1x9"},
        9,
    ),
}


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    require_prometheus()
    assert CASES.keys() == rules.ALERTS.keys()

    def case(alert: str, series: dict[str, str], fires: bool, minutes: int) -> dict[str, Any]:
        """A test of promtool that counts firing alerts, so that it need not repeat their texts."""
        expected = [{"labels": "{}", "value": 1}] if fires else []
        firing = f'ALERTS{{alertstate="firing",alertname="{alert}"}}'
        return {
            "name": f"{alert} {'fires' if fires else 'does not fire'}",
            "interval": "4m" if minutes > 1000 else "1m",
            "input_series": [{"series": s, "values": v} for s, v in series.items()],
            "promql_expr_test": [
                {"expr": f"count({firing})", "eval_time": f"{minutes}m", "exp_samples": expected}
            ],
        }

    memory = {'ray_octet_card_ecc_errors{uuid="u"}': "1x25 2x5"}
    # Of the two clusters of an upgrade, one answers with errors, or has lost its Dispatcher.
    mixed = {f"{REQUESTS}{{{BLUE},{OK}}}": "0+999x90", f"{REQUESTS}{{{GREEN},{OK}}}": "0+9x90"}
    mixed[f"{REQUESTS}{{{GREEN},{BAD}}}"] = "0+9x90"
    few = {f"{REQUESTS}{{{OK}}}": "0+0.3x90", f"{REQUESTS}{{{BAD}}}": "0+0.3x90"}
    pools = {f'ray_octet_pool_replicas{{{c},pool="p"}}': "1x9" for c in (BLUE, GREEN)}
    nodes = {f"ray_node_cpu_count{{{c}}}": "1x30" for c in (BLUE, GREEN)}
    lost = {**pools, **nodes, f'ray_octet_pool_replicas{{{BLUE},pool="p"}}': "1x30"}
    ended = {**lost, f"ray_node_cpu_count{{{GREEN}}}": "1x9"}
    more = [
        ("OctetGpuFault", memory, True, 30),
        ("OctetErrorBudgetFast", mixed, True, 90),
        ("OctetErrorBudgetFast", few, False, 90),
        ("OctetNoDispatcher", lost, True, 25),
        ("OctetNoDispatcher", ended, False, 25),
    ]
    cases = [(a, with_it, True, m) for a, (with_it, _, m) in CASES.items()]
    cases += [(a, without, False, m) for a, (_, without, m) in CASES.items()]
    files = []
    for number, one in enumerate(cases + more):
        alert, test = one[0], case(*one)
        # promtool evaluates every rule of the file at every minute, so each test has its own.
        (tmp_path / f"{alert}.yaml").write_text(yaml.safe_dump({"groups": groups_of(alert)}))
        chosen = {
            "rule_files": [f"{alert}.yaml"],
            "evaluation_interval": test["interval"],
            "tests": [test],
        }
        files.append(tmp_path / f"test-{number}.yaml")
        files[-1].write_text(yaml.safe_dump(chosen, sort_keys=False))
    done = subprocess.run(  # noqa: S603 - found on the path
        [str(TOOL), "test", "rules", *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)


def groups_of(alert: str) -> list[dict[str, Any]]:
    """The groups of the rules as they are deployed, without the other alerts."""
    records, alerts = yaml.safe_load(rules.RULES.read_text())["groups"]
    (rule,) = [rule for rule in alerts["rules"] if rule["alert"] == alert]
    needed = [records] if alert in rules.BUDGETS else []
    return [*needed, {**alerts, "rules": [rule]}]
