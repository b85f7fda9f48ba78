"""Alerts as a PrometheusRule's groups: `python -m k8s.rules` writes them into k8s/prometheus.

Each alert's runbook is a heading of docs/runbook.md. The error budget is that of requests answered
with 5xx: what a client did wrong, or left, is none of it. Two windows each, as the Site Reliability
Workbook has them (chapter 5, "Alerting on SLOs").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .queries import happened, increase, most, name, rate

RULES = Path(__file__).parent / "prometheus" / "rules.yaml"
RUNBOOK = "docs/runbook.md"
OBJECTIVE = 0.995  # of requests without 5xx, in 30 days
FAST, SLOW = 14.4, 6.0  # the budget of 30 days is gone in two days, or in five
WINDOWS = "5m", "30m", "1h", "6h"


def errors(window: str) -> str:
    return f"octet:errors:ratio_rate{window}"


def burns(long: str, short: str, speed: float) -> str:
    limit = f"{speed * (1 - OBJECTIVE):.4g}"
    return f"{errors(long)} > {limit} and {errors(short)} > {limit}"


ALERTS: dict[str, tuple[str, str, str, str]] = {  # expression, for, severity, what it means
    "OctetErrorBudgetFast": (
        burns("1h", "5m", FAST),
        "2m",
        "critical",
        "{{ $value | humanizePercentage }} of requests are answered with 5xx: at this rate the "
        "month's budget is gone in two days.",
    ),
    "OctetErrorBudgetSlow": (
        burns("6h", "30m", SLOW),
        "15m",
        "warning",
        "{{ $value | humanizePercentage }} of requests are answered with 5xx: at this rate the "
        "month's budget is gone in five days.",
    ),
    "OctetNoDispatcher": (
        f"absent({name('octet_pool_replicas')})",
        "2m",
        "critical",
        "Nobody reports pools: no new image is granted.",
    ),
    "OctetUsageUnrecorded": (
        happened("octet_requests", "10m", outcome="usage_unrecorded"),
        "0m",
        "critical",
        "{{ $value | humanize }} images were drawn and not delivered, because usage cannot be "
        "written.",
    ),
    "OctetOldestWait": (
        f"{most('octet_queue_oldest_seconds', 'pool')} > 60",
        "2m",
        "warning",
        "The first of those that wait for {{ $labels.pool }} has waited {{ $value | humanize }} s.",
    ),
    "OctetReplicasNotReady": (
        f"{most('octet_pool_replicas', 'pool', state='starting')} > 0",
        "15m",
        "warning",
        "{{ $value }} replicas of {{ $labels.pool }} are wanted and do not come.",
    ),
    "OctetManyStarts": (
        f"{increase('octet_pool_decisions', '1h', 'pool', direction='up')} > 20",
        "0m",
        "warning",
        "{{ $labels.pool }} was enlarged {{ $value | humanize }} times in an hour: cold starts "
        "without end.",
    ),
    "OctetSlowStart": (
        f"max by (pool) (sum by (pool, replica) ({name('octet_engine_start_seconds')})) > 600",
        "0m",
        "warning",
        "A start of {{ $labels.pool }} took {{ $value | humanizeDuration }}.",
    ),
    "OctetGpuFault": (
        f"{happened('octet_card_xids', '10m', 'uuid, xid')} or "
        f"max by (uuid) (delta({name('octet_card_ecc_errors')}[10m])) > 0",
        "0m",
        "critical",
        "The card {{ $labels.uuid }} reports a fault: Xid {{ $labels.xid }}, or its memory.",
    ),
    "OctetOutOfMemory": (
        happened("octet_engine_out_of_memory", "15m", "pool"),
        "0m",
        "warning",
        "Memory did not suffice for {{ $value | humanize }} steps of {{ $labels.pool }}; they were "
        "repeated in smaller batches.",
    ),
    "OctetNonFiniteImages": (
        f"{rate('octet_engine_images', 'pool', '15m', outcome='non_finite')} / "
        f"{rate('octet_engine_images', 'pool', '15m')} > 0.01",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of the images of {{ $labels.pool }} are not finite.",
    ),
    "OctetSpoolFilling": (
        f"{most('octet_spool_bytes', 'NodeAddress')} / "
        f"{most('octet_spool_limit_bytes', 'NodeAddress')} > 0.5",
        "5m",
        "warning",
        "The spool on {{ $labels.NodeAddress }} is {{ $value | humanizePercentage }} full: the "
        "bucket is away or too slow.",
    ),
    "OctetRedisDown": (
        f"{increase('octet_cache_failures', '5m')} > 10",
        "2m",
        "warning",
        "Redis did not answer {{ $value | humanize }} times: repeated requests are drawn.",
    ),
}


def groups() -> list[dict[str, Any]]:
    """Of a PrometheusRule, and of a file of rules."""
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
    """Rules for Prometheus, and the same for its operator."""
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
        path: "# Made by python -m k8s.rules\n" + yaml.safe_dump(what, sort_keys=False, width=100)
        for path, what in documents.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
