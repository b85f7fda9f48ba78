"""Grafana dashboards, made from the metrics' table: `python -m k8s.dashboards` writes k8s/grafana.

They use Grafana's own panels and one data source, which is chosen at the top.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .queries import mean, most, quantile, rate, total

OUT = Path(__file__).with_name("grafana")
WIDTH, HEIGHT, PER_ROW = 8, 8, 3
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Panel:
    """`queries`: PromQL and legend; `unit`: Grafana's name of it."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False
    text: str = ""


def quantiles(title: str, histogram: str, by: str = "", text: str = "") -> Panel:
    legend = f"{{{{{by}}}}} " if by else ""
    shown = tuple((quantile(q, histogram, by), f"{legend}p{100 * q:g}") for q in QUANTILES)
    return Panel(title, "s", shown, text=text)


def one(title: str, unit: str, query: str, legend: str, text: str = "", **more: bool) -> Panel:
    return Panel(title, unit, ((query, legend),), text=text, **more)


OVERVIEW = [
    one(
        "Requests by outcome",
        "reqps",
        rate("octet_requests", "outcome"),
        "{{outcome}}",
        stacked=True,
    ),
    Panel(
        "Answered with 5xx",
        "percentunit",
        (
            (
                f"({rate('octet_requests', status='5..')} or vector(0)) / {rate('octet_requests')}",
                "of all requests",
            ),
        ),
        text="What the error budget of the alerts is spent on.",
    ),
    quantiles("Time to the whole answer", "octet_request_seconds", "model"),
    quantiles("Time in the queue", "octet_queue_seconds", "pool"),
    one("Images that wait", "short", most("octet_queue_images", "pool"), "{{pool}}"),
    one("Oldest that waits", "s", most("octet_queue_oldest_seconds", "pool"), "{{pool}}"),
    one(
        "Queued work",
        "s",
        most("octet_queue_work_seconds", "pool"),
        "{{pool}}",
        "Seconds of a reference replica.",
        stacked=True,
    ),
    one("Replicas", "short", most("octet_pool_replicas", "pool, state"), "{{pool}} {{state}}"),
    one("Slots", "short", most("octet_pool_slots", "pool, state"), "{{pool}} {{state}}"),
    one(
        "Images",
        "ops",
        rate("octet_engine_images", "pool, outcome"),
        "{{pool}} {{outcome}}",
        stacked=True,
    ),
    one(
        "Result cache",
        "reqps",
        rate("octet_cache_requests", "result"),
        "{{result}}",
        stacked=True,
    ),
    quantiles("Cache lookups", "octet_cache_lookup_seconds", "result"),
    one("Redis without an answer", "ops", rate("octet_cache_failures"), "failures"),
    quantiles("Time to keep an image", "octet_store_seconds"),
    Panel(
        "Spool",
        "bytes",
        (
            (most("octet_spool_bytes", "NodeAddress"), "{{NodeAddress}}"),
            (most("octet_spool_limit_bytes"), "full"),
        ),
        text="Images that wait for the bucket, of each node.",
    ),
    one(
        "Images in the spool", "short", most("octet_spool_images", "NodeAddress"), "{{NodeAddress}}"
    ),
    one("Drawn again", "ops", rate("octet_retried", "pool, reason"), "{{pool}} {{reason}}"),
]
TENANTS = [
    one(
        "Images",
        "ops",
        rate("octet_tenant_images", "tenant, outcome"),
        "{{tenant}} {{outcome}}",
        stacked=True,
    ),
    one(
        "Work charged",
        "percentunit",
        rate("octet_tenant_work", "tenant"),
        "{{tenant}}",
        "Seconds of a reference replica a second: 100 % is one such replica.",
        stacked=True,
    ),
    one("Refused", "reqps", rate("octet_tenant_refused", "tenant, code"), "{{tenant}} {{code}}"),
    one("Open requests", "short", most("octet_tenant_calls", "tenant"), "{{tenant}}"),
    one("Images that wait", "short", most("octet_tenant_queued", "tenant"), "{{tenant}}"),
    one("Work that waits", "s", most("octet_tenant_queued_work", "tenant"), "{{tenant}}"),
    one("Images that are drawn", "short", most("octet_tenant_running", "tenant"), "{{tenant}}"),
]
CARDS = [
    one("Utilisation", "percent", most("octet_card_utilisation_percent", "uuid"), "{{uuid}}"),
    Panel(
        "Memory",
        "bytes",
        (
            (most("octet_card_memory_used_bytes", "uuid"), "{{uuid}} used"),
            (most("octet_card_memory_total_bytes", "uuid"), "{{uuid}} total"),
        ),
    ),
    one(
        "Memory of replicas",
        "bytes",
        total("octet_replica_memory_bytes", "deployment, kind"),
        "{{deployment}} {{kind}}",
    ),
    one("Power", "watt", most("octet_card_power_watts", "uuid"), "{{uuid}}"),
    one("Temperature", "celsius", most("octet_card_temperature_celsius", "uuid"), "{{uuid}}"),
    Panel(
        "Clocks",
        "rotmhz",
        (
            (most("octet_card_sm_clock_mhz", "uuid"), "{{uuid}} SM"),
            (most("octet_card_memory_clock_mhz", "uuid"), "{{uuid}} memory"),
        ),
    ),
    Panel(
        "Faults",
        "short",
        (
            (most("octet_card_ecc_errors", "uuid"), "{{uuid}} ECC"),
            (rate("octet_card_xids", "uuid, xid"), "{{uuid}} Xid {{xid}} a second"),
        ),
    ),
    one("Replicas", "short", most("octet_pool_replicas", "pool, state"), "{{pool}} {{state}}"),
    one(
        "Decisions",
        "ops",
        rate("octet_pool_decisions", "pool, direction"),
        "{{pool}} {{direction}}",
    ),
]
ENGINE = [
    one("Steps", "ops", rate("octet_engine_steps", "pool"), "{{pool}}"),
    one(
        "Rows in a step",
        "short",
        f"{rate('octet_engine_rows', 'pool')} / {rate('octet_engine_steps', 'pool')}",
        "{{pool}}",
        "How full batches are; an image with guidance takes two.",
    ),
    one(
        "Seconds of a step",
        "s",
        f"{rate('octet_engine_step_seconds', 'pool')} / {rate('octet_engine_steps', 'pool')}",
        "{{pool}}",
    ),
    Panel(
        "Phases, p99",
        "s",
        ((quantile(0.99, "octet_engine_phase_seconds", "pool, phase"), "{{pool}} {{phase}}"),),
    ),
    Panel(
        "Phases, mean",
        "s",
        ((mean("octet_engine_phase_seconds", "pool, phase"), "{{pool}} {{phase}}"),),
        stacked=True,
    ),
    one("Images", "ops", rate("octet_engine_images", "pool, outcome"), "{{pool}} {{outcome}}"),
    one("Without memory", "ops", rate("octet_engine_out_of_memory", "pool"), "{{pool}}"),
    one(
        "Starts",
        "s",
        most("octet_engine_start_seconds", "pool, phase"),
        "{{pool}} {{phase}}",
        "The slowest of those that live.",
        stacked=True,
    ),
    one("Speed", "percentunit", total("octet_engine_speed", "pool"), "{{pool}}"),
    one(
        "Learnt costs",
        "s",
        most("octet_engine_cost_seconds", "pool, coefficient"),
        "{{pool}} {{coefficient}}",
    ),
    Panel(
        "Answer ÷ forecast",
        "short",
        tuple((quantile(q, "octet_eta_ratio"), f"p{100 * q:g}") for q in QUANTILES),
    ),
]
DASHBOARDS = {
    "octet-overview": ("Octet: overview", OVERVIEW),
    "octet-tenants": ("Octet: tenants", TENANTS),
    "octet-cards": ("Octet: GPUs and pools", CARDS),
    "octet-engine": ("Octet: engine", ENGINE),
}


def dashboard(uid: str) -> dict[str, Any]:
    """Grafana's JSON."""
    title, panels = DASHBOARDS[uid]
    source = {"name": "datasource", "label": "Data source", "type": "datasource"}
    return {
        "uid": uid,
        "title": title,
        "tags": ["octet"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{**source, "query": "prometheus"}]},
        "links": [{"type": "dashboards", "tags": ["octet"], "title": "Octet", "asDropdown": True}],
        "panels": [_panel(panel, i) for i, panel in enumerate(panels)],
    }


def _panel(panel: Panel, i: int) -> dict[str, Any]:
    row, column = divmod(i, PER_ROW)
    custom: dict[str, Any] = {"fillOpacity": 25 if panel.stacked else 0, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    return {
        "id": i + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}},
        "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for n, (expr, legend) in enumerate(panel.queries)
        ],
    }


def files() -> dict[Path, str]:
    return {
        OUT / f"{uid}.json": json.dumps(dashboard(uid), indent=1, ensure_ascii=False) + "\n"
        for uid in DASHBOARDS
    }


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
