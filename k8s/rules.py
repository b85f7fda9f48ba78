"""Prometheus alerts: `python -m k8s.rules [--runbook URL]` writes them into k8s/prometheus.

Each alert's runbook is a heading of docs/runbook.md; `--runbook` says under which address people
find that page. Every alert is raised for each cluster by itself.

The error budget counts requests answered with 5xx; requests that the client got wrong or abandoned
do not count. The latency budget counts a model's requests that took longer than `SLOW_S`. Each
budget has an alert for three rates at which it burns, which look at a long and a short window, as
in the Site Reliability Workbook (chapter 5, "Alerting on SLOs"). With few requests a single one
would raise an alert, so the long window must hold at least `LEAST` of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .queries import CLUSTER, Queries

RULES = Path(__file__).parent / "prometheus" / "rules.yaml"
RUNBOOK = "docs/runbook.md"
OBJECTIVE = 0.995  # share of requests answered without 5xx, over 30 days
FAST_ENOUGH = 0.95  # share of a model's requests that take at most SLOW_S, over 30 days
SLOW_S = 37.779  # a bucket of the histogram
LEAST = 50  # requests
LEAST_SSIM = 0.9  # of FP8 to 16 bit; `octet compare` says what is usual for a model
LEAST_SHADOWS = 20  # comparisons from which that is known
Q = Queries(apart=CLUSTER)
POOLS, STARTS = Q.name("octet_pool_replicas"), Q.name("octet_engine_start_seconds")


class Burn(NamedTuple):
    """How fast a budget burns: `rate` is a multiple of what uses it up in exactly 30 days."""

    rate: float
    long: str
    short: str
    pending: str
    severity: str
    gone: str


BURNS = {  # by the ending of the alert's name
    "Fast": Burn(14.4, "1h", "5m", "2m", "critical", "in two days"),
    "Slow": Burn(6.0, "6h", "30m", "15m", "warning", "in five days"),
    "Creeping": Burn(1.0, "3d", "6h", "1h", "warning", "before the month ends"),
}
WINDOWS = tuple(dict.fromkeys(w for burn in BURNS.values() for w in (burn.long, burn.short)))


def errors(window: str) -> str:
    """The name of the recorded metric: the share of requests answered with 5xx over a window."""
    return f"octet:errors:ratio_rate{window}"


def slow(window: str) -> str:
    """The name of the recorded metric: the share of a model's slow requests over a window."""
    return f"octet:slow:ratio_rate{window}"


def recorded() -> dict[str, str]:
    """The expressions of the recorded metrics, by their names."""
    found = {}
    for window in WINDOWS:
        everything = Q.rate("octet_requests", window=window)
        failed = Q.rate("octet_requests", window=window, status="5..")
        found[errors(window)] = f"({failed} or 0 * {everything}) / {everything}"
    for window in WINDOWS:
        within, everything = (
            Q.bucket_rate("octet_request_seconds", "model", window, le=le)
            for le in (f"{SLOW_S}", "+Inf")
        )
        found[slow(window)] = f"1 - {within} / {everything}"
    return found


def burns(budget: str, burn: Burn) -> str:
    """A condition: a budget burns at this rate over both windows; `budget`: `errors` or `slow`."""
    share, allowed, by = {
        "errors": (errors, 1 - OBJECTIVE, ""),
        "slow": (slow, 1 - FAST_ENOUGH, "model"),
    }[budget]
    limit = f"{burn.rate * allowed:.4g}"
    valid = {"model_not": ""} if by else {}  # invalid requests have no model
    requests = Q.increase("octet_requests", burn.long, by, **valid)
    return (
        f"{share(burn.long)} > {limit} and {share(burn.short)} > {limit} and {requests} >= {LEAST}"
    )


def mounted(claim: str) -> str:
    """How much of the volumes of a claim is free, as a share of their size."""
    free, size = (
        f'kubelet_volume_stats_{of}{{persistentvolumeclaim=~"{claim}"}}'
        for of in ("available_bytes", "capacity_bytes")
    )
    return f"{free} / {size}"


BUDGETS: dict[str, tuple[str, str, str, str]] = {
    f"OctetErrorBudget{name}": (
        burns("errors", burn),
        burn.pending,
        burn.severity,
        "{{ $value | humanizePercentage }} of requests are answered with 5xx: at this rate the "
        f"month's error budget is used up {burn.gone}.",
    )
    for name, burn in BURNS.items()
} | {
    f"OctetLatencyBudget{name}": (
        burns("slow", burn),
        burn.pending,
        burn.severity,
        f"{{{{ $value | humanizePercentage }}}} of the requests for {{{{ $labels.model }}}} take "
        f"longer than {SLOW_S:.0f} s: at this rate the month's latency budget is used up "
        f"{burn.gone}.",
    )
    for name, burn in BURNS.items()
}

ALERTS: dict[str, tuple[str, str, str, str]] = {  # expression, for, severity, summary
    **BUDGETS,
    "OctetNoDispatcher": (
        # In no cluster, or not in one that had it within the hour and still has nodes.
        f"absent({POOLS}) or count{Q.by()} (max_over_time({POOLS}[1h])) "
        f"and count{Q.by()} (ray_node_cpu_count) unless count{Q.by()} ({POOLS})",
        "2m",
        "critical",
        "No Dispatcher reports its pools: no new image can start.",
    ),
    "OctetUsageUnrecorded": (
        Q.happened("octet_requests", "10m", outcome="usage_unrecorded"),
        "0m",
        "critical",
        "{{ $value | humanize }} images were generated and not delivered, because usage records "
        "cannot be written.",
    ),
    "OctetOldestWait": (
        f"{Q.most('octet_queue_oldest_seconds', 'pool')} > 60",
        "2m",
        "warning",
        "The oldest queued image of {{ $labels.pool }} has waited {{ $value | humanize }} s.",
    ),
    "OctetReplicasNotReady": (
        f"{Q.most('octet_pool_replicas', 'pool', state='starting')} > 0",
        "15m",
        "warning",
        "{{ $value }} replicas of {{ $labels.pool }} are wanted and have not become ready for 15 "
        "minutes.",
    ),
    "OctetManyStarts": (
        f"{Q.increase('octet_pool_decisions', '1h', 'pool', direction='up')} > 20",
        "0m",
        "warning",
        "{{ $labels.pool }} was scaled up {{ $value | humanize }} times within an hour: its "
        "replicas keep starting cold.",
    ),
    "OctetSlowStart": (
        f"max{Q.by('pool')} (sum{Q.by('pool, replica')} ({STARTS})) > 600",
        "0m",
        "warning",
        "A replica of {{ $labels.pool }} took {{ $value | humanizeDuration }} to start.",
    ),
    "OctetGpuFault": (
        f"{Q.happened('octet_card_xids', '10m', 'uuid, xid')} or "
        f"max{Q.by('uuid')} (delta({Q.name('octet_card_ecc_errors')}[10m])) > 0",
        "0m",
        "critical",
        "The card {{ $labels.uuid }} reports a fault: Xid {{ $labels.xid }}, or errors of its "
        "memory (ECC).",
    ),
    "OctetNodeCordoned": (
        f"{Q.most('octet_nodes_cordoned', 'node')} > 0",
        "0m",
        "warning",
        "The node {{ $labels.node }} gets no new work.",
    ),
    "OctetOutOfMemory": (
        Q.happened("octet_engine_out_of_memory", "15m", "pool"),
        "0m",
        "warning",
        "{{ $value | humanize }} steps of {{ $labels.pool }} ran out of memory and were repeated "
        "in smaller batches.",
    ),
    "OctetNonFiniteImages": (
        f"{Q.rate('octet_engine_images', 'pool', '15m', outcome='non_finite')} / "
        f"{Q.rate('octet_engine_images', 'pool', '15m')} > 0.01",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of the images of {{ $labels.pool }} have non-finite "
        "numbers.",
    ),
    "OctetDatabase": (
        f"{Q.most('octet_database_fault')} > 0",
        "1m",
        "critical",
        "The database of tenants and usage cannot be used, so all new work is refused.",
    ),
    "OctetJobsNotClaimed": (
        f"{Q.most('octet_jobs_waiting')} > 0 "
        f"unless{Q.on()} {Q.increase('octet_job_claims', '15m')} > 0",
        "15m",
        "warning",
        "{{ $value }} jobs wait, and none was claimed for 15 minutes.",
    ),
    "OctetJobsPaused": (
        f"{Q.most('octet_jobs_paused')} > 0",
        "5m",
        "warning",
        "No job is claimed, because the store of images is full.",
    ),
    "OctetJobClaimsLost": (
        Q.happened("octet_job_claims_lost", "15m"),
        "0m",
        "warning",
        "{{ $value | humanize }} jobs were claimed and then lost with their process; they are "
        "claimed again.",
    ),
    "OctetWebhooksDead": (
        Q.happened("octet_webhook_attempts", "1h", outcome="dead"),
        "0m",
        "warning",
        "{{ $value | humanize }} messages could not be sent to their webhook for three days.",
    ),
    "OctetFp8Drifts": (
        f"{Q.quantile(0.5, 'octet_shadow_ssim', 'model', '6h')} < {LEAST_SSIM} and "
        f"{Q.increase('octet_shadow_images', '6h', 'model', outcome='compared')} "
        f">= {LEAST_SHADOWS}",
        "0m",
        "warning",
        "Images of {{ $labels.model }} in FP8 differ from those in 16 bit: the median SSIM within "
        "six hours is {{ $value | humanize }}.",
    ),
    "OctetTenantsFile": (
        f"{Q.most('octet_tenants_file_faults', 'file')} > 0",
        "1m",
        "warning",
        "{{ $labels.file }} has a fault: the tenants as they were before it are served.",
    ),
    "OctetStoreFault": (
        f"{Q.most('octet_store_faults', 'NodeAddress, place, cause')} > 0",
        "2m",
        "warning",
        "{{ $labels.NodeAddress }} cannot put images into {{ $labels.place }}: "
        "{{ $labels.cause }}.",
    ),
    "OctetSpoolFilling": (
        f"{Q.most('octet_spool_bytes', 'NodeAddress')} / "
        f"{Q.most('octet_spool_limit_bytes', 'NodeAddress')} > 0.5",
        "5m",
        "warning",
        "The spool on {{ $labels.NodeAddress }} is {{ $value | humanizePercentage }} full: the "
        "bucket is unreachable or too slow.",
    ),
    "OctetServiceNotReady": (
        'kuberay_service_condition_ready{condition="false"} == 1',
        "10m",
        "critical",
        "KubeRay finds no pod that serves the RayService {{ $labels.name }}.",
    ),
    "OctetUpgradeStuck": (
        'kuberay_service_condition_upgrade_in_progress{condition="true"} == 1',
        "2h",
        "warning",
        "The second cluster of the RayService {{ $labels.name }} has not taken over for two hours.",
    ),
    "OctetGcsRedisDown": (
        'kube_statefulset_status_replicas_ready{statefulset="octet-gcs-redis"} < 1',
        "5m",
        "critical",
        "The Redis that keeps the head's state has no ready pod: a lost head could not come back.",
    ),
    "OctetVolumeFilling": (
        f"{mounted('(data-)?octet-.*')} < 0.1",
        "10m",
        "warning",
        "{{ $value | humanizePercentage }} of the volume {{ $labels.persistentvolumeclaim }} is "
        "left.",
    ),
    "OctetPullFailing": (
        'kube_pod_init_container_status_running{pod=~"octet-.*",container="pull"} == 1 or '
        'kube_pod_init_container_status_waiting_reason{pod=~"octet-.*",container="pull",'
        'reason!="PodInitializing"} == 1',
        "1h",
        "warning",
        "The pod {{ $labels.pod }} has not finished pulling its image or weights for an hour.",
    ),
    "OctetRedisDown": (
        f"{Q.increase('octet_cache_failures', '5m')} > 10",
        "2m",
        "warning",
        "Redis did not answer {{ $value | humanize }} times within 5 minutes: images of repeated "
        "requests are generated again.",
    ),
}


def groups(runbook: str = RUNBOOK) -> list[dict[str, Any]]:
    """The groups of rules: recorded shares of requests, and alerts.

    `runbook`: the address of the runbook.
    """
    records = [{"record": record, "expr": expr} for record, expr in recorded().items()]
    alerts = [
        {
            "alert": alert,
            "expr": expr,
            "for": pending,
            "labels": {"severity": severity},
            "annotations": {
                "summary": summary,
                "runbook_url": f"{runbook}#{alert.lower()}",
            },
        }
        for alert, (expr, pending, severity, summary) in ALERTS.items()
    ]
    return [{"name": "octet-slo", "rules": records}, {"name": "octet-alerts", "rules": alerts}]


def files(runbook: str = RUNBOOK) -> dict[Path, str]:
    """The texts of the files, by path.

    One file holds the rules for Prometheus, the other the same rules for the Prometheus operator.
    """
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "octet"},
        "spec": {"groups": groups(runbook)},
    }
    documents: dict[Path, Any] = {
        RULES: {"groups": groups(runbook)},
        RULES.with_name("prometheus-rule.yaml"): rule,
    }
    return {
        path: "# Made by python -m k8s.rules\n"
        + yaml.safe_dump(document, sort_keys=False, width=100)
        for path, document in documents.items()
    }


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Write Octet's alerts for Prometheus.")
    arguments.add_argument("--runbook", default=RUNBOOK, help="address of the runbook")
    for path, text in files(arguments.parse_args().runbook).items():
        path.write_text(text, encoding="utf-8")
