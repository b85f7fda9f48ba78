"""Prometheus alerts: `python -m k8s.rules` writes them into k8s/prometheus.

Each alert's runbook is a heading of docs/runbook.md. The error budget counts requests answered with
5xx; requests that the client got wrong or abandoned do not count. Each of the two budget alerts
looks at two windows, as in the Site Reliability Workbook (chapter 5, "Alerting on SLOs").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .queries import happened, increase, most, name, rate

RULES = Path(__file__).parent / "prometheus" / "rules.yaml"
RUNBOOK = "docs/runbook.md"
OBJECTIVE = 0.995  # share of requests answered without 5xx, over 30 days
# Burn rates: multiples of the rate that uses up the budget in exactly 30 days. At these rates the
# budget is gone in two days and in five days.
FAST, SLOW = 14.4, 6.0
WINDOWS = "5m", "30m", "1h", "6h"


def errors(window: str) -> str:
    """The name of the recorded metric: the share of requests answered with 5xx over a window."""
    return f"octet:errors:ratio_rate{window}"


def burns(long: str, short: str, burn_rate: float) -> str:
    """A condition: the error budget burns faster than `burn_rate` over both windows.

    `long`, `short`: two of `WINDOWS`.
    """
    limit = f"{burn_rate * (1 - OBJECTIVE):.4g}"
    return f"{errors(long)} > {limit} and {errors(short)} > {limit}"


ALERTS: dict[str, tuple[str, str, str, str]] = {  # expression, for, severity, summary
    "OctetErrorBudgetFast": (
        burns("1h", "5m", FAST),
        "2m",
        "critical",
        "{{ $value | humanizePercentage }} of requests are answered with 5xx: at this rate the "
        "month's error budget is used up in two days.",
    ),
    "OctetErrorBudgetSlow": (
        burns("6h", "30m", SLOW),
        "15m",
        "warning",
        "{{ $value | humanizePercentage }} of requests are answered with 5xx: at this rate the "
        "month's error budget is used up in five days.",
    ),
    "OctetNoDispatcher": (
        f"absent({name('octet_pool_replicas')})",
        "2m",
        "critical",
        "No Dispatcher reports its pools: no new image can start.",
    ),
    "OctetUsageUnrecorded": (
        happened("octet_requests", "10m", outcome="usage_unrecorded"),
        "0m",
        "critical",
        "{{ $value | humanize }} images were generated and not delivered, because usage records "
        "cannot be written.",
    ),
    "OctetOldestWait": (
        f"{most('octet_queue_oldest_seconds', 'pool')} > 60",
        "2m",
        "warning",
        "The oldest queued image of {{ $labels.pool }} has waited {{ $value | humanize }} s.",
    ),
    "OctetReplicasNotReady": (
        f"{most('octet_pool_replicas', 'pool', state='starting')} > 0",
        "15m",
        "warning",
        "{{ $value }} replicas of {{ $labels.pool }} are wanted and have not become ready for 15 "
        "minutes.",
    ),
    "OctetManyStarts": (
        f"{increase('octet_pool_decisions', '1h', 'pool', direction='up')} > 20",
        "0m",
        "warning",
        "{{ $labels.pool }} was scaled up {{ $value | humanize }} times within an hour: its "
        "replicas keep starting cold.",
    ),
    "OctetSlowStart": (
        f"max by (pool) (sum by (pool, replica) ({name('octet_engine_start_seconds')})) > 600",
        "0m",
        "warning",
        "A replica of {{ $labels.pool }} took {{ $value | humanizeDuration }} to start.",
    ),
    "OctetGpuFault": (
        f"{happened('octet_card_xids', '10m', 'uuid, xid')} or "
        f"max by (uuid) (delta({name('octet_card_ecc_errors')}[10m])) > 0",
        "0m",
        "critical",
        "The card {{ $labels.uuid }} reports a fault: Xid {{ $labels.xid }}, or errors of its "
        "memory (ECC).",
    ),
    "OctetNodeCordoned": (
        f"{most('octet_nodes_cordoned', 'node')} > 0",
        "0m",
        "warning",
        "The node {{ $labels.node }} gets no new work.",
    ),
    "OctetOutOfMemory": (
        happened("octet_engine_out_of_memory", "15m", "pool"),
        "0m",
        "warning",
        "{{ $value | humanize }} steps of {{ $labels.pool }} ran out of memory and were repeated "
        "in smaller batches.",
    ),
    "OctetNonFiniteImages": (
        f"{rate('octet_engine_images', 'pool', '15m', outcome='non_finite')} / "
        f"{rate('octet_engine_images', 'pool', '15m')} > 0.01",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of the images of {{ $labels.pool }} have non-finite "
        "numbers.",
    ),
    "OctetTenantsFile": (
        f"{most('octet_tenants_file_faults', 'file')} > 0",
        "1m",
        "warning",
        "{{ $labels.file }} has a fault: the tenants as they were before it are served.",
    ),
    "OctetSpoolFilling": (
        f"{most('octet_spool_bytes', 'NodeAddress')} / "
        f"{most('octet_spool_limit_bytes', 'NodeAddress')} > 0.5",
        "5m",
        "warning",
        "The spool on {{ $labels.NodeAddress }} is {{ $value | humanizePercentage }} full: the "
        "bucket is unreachable or too slow.",
    ),
    "OctetRedisDown": (
        f"{increase('octet_cache_failures', '5m')} > 10",
        "2m",
        "warning",
        "Redis did not answer {{ $value | humanize }} times within 5 minutes: images of repeated "
        "requests are generated again.",
    ),
}


def groups() -> list[dict[str, Any]]:
    """The groups of rules: recorded shares of errors, and alerts."""
    recorded = [
        {
            "record": errors(window),
            "expr": f"({rate('octet_requests', window=window, status='5..')} or vector(0)) / "
            f"{rate('octet_requests', window=window)}",
        }
        for window in WINDOWS
    ]
    alerts = [
        {
            "alert": alert,
            "expr": expr,
            "for": pending,
            "labels": {"severity": severity},
            "annotations": {
                "summary": summary,
                "runbook_url": f"{RUNBOOK}#{alert.lower()}",
            },
        }
        for alert, (expr, pending, severity, summary) in ALERTS.items()
    ]
    return [{"name": "octet-slo", "rules": recorded}, {"name": "octet-alerts", "rules": alerts}]


def files() -> dict[Path, str]:
    """The texts of the files, by path.

    One file holds the rules for Prometheus, the other the same rules for the Prometheus operator.
    """
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "octet"},
        "spec": {"groups": groups()},
    }
    documents: dict[Path, Any] = {
        RULES: {"groups": groups()},
        RULES.with_name("prometheus-rule.yaml"): rule,
    }
    return {
        path: "# Made by python -m k8s.rules\n"
        + yaml.safe_dump(document, sort_keys=False, width=100)
        for path, document in documents.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
