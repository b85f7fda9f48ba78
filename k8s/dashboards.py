"""Grafana dashboards of Octet's metrics: `python -m k8s.dashboards` writes them into k8s/grafana.

The dashboards need no plugins. At the top of each dashboard its data source can be chosen, and on
Kubernetes the namespace and the cluster.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.metric_catalogue import exported

from .queries import CLUSTER, Queries

OUT = Path(__file__).with_name("grafana")
WIDTH, HEIGHT, PER_ROW = 8, 8, 3
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
QUANTILES = (0.5, 0.9, 0.99)
# Variables at the top of a dashboard, by the label that they select.
ANY = exported("octet_pool_replicas")  # a metric that every cluster has
VARIABLES = dict(zip(CLUSTER, ("namespace", "cluster"), strict=True))
CHOSEN = ",".join(f'{label}=~"${variable}"' for label, variable in VARIABLES.items())
CHOICE = Queries(CHOSEN)
mean, most, quantile, rate, total = (
    CHOICE.mean,
    CHOICE.most,
    CHOICE.quantile,
    CHOICE.rate,
    CHOICE.total,
)


@dataclass(frozen=True)
class Panel:
    """A panel of a dashboard.

    `unit`: Grafana's name of the unit. `queries`: pairs of a PromQL query and its legend. `text`:
    the panel's description.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False
    text: str = ""


def quantiles(title: str, histogram: str, by: str = "", text: str = "") -> Panel:
    """A panel with the p50, p90 and p99 of a histogram in seconds.

    `by`: the tag by which the histogram is split into several lines; "" for none.
    """
    legend = f"{{{{{by}}}}} " if by else ""
    shown = tuple((quantile(q, histogram, by), f"{legend}p{100 * q:g}") for q in QUANTILES)
    return Panel(title, "s", shown, text=text)


def pods(series: str) -> str:
    """The number of Octet's pods in a state, by kube-state-metrics; `PODS` selects the pods."""
    chosen = series.replace("PODS", 'namespace=~"$namespace",pod=~"octet-.*"')
    return f"sum ({chosen})"


def one(title: str, unit: str, query: str, legend: str, text: str = "", **more: bool) -> Panel:
    """A panel with one query; `more`: further fields of `Panel`."""
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
        text="These requests use up the error budget of the alerts.",
    ),
    quantiles("Time to the full answer", "octet_request_seconds", "model"),
    one("Requests by endpoint", "reqps", rate("octet_requests", "endpoint"), "{{endpoint}}"),
    quantiles("Time in the queue", "octet_queue_seconds", "pool"),
    one("Queued images", "short", most("octet_queue_images", "pool"), "{{pool}}"),
    one("The Dispatcher's lag", "s", most("octet_dispatcher_lag_seconds"), "lag"),
    one("The Dispatcher's messages", "ops", rate("octet_dispatcher_messages", "kind"), "{{kind}}"),
    Panel(
        "The Dispatcher's sessions",
        "short",
        (
            (most("octet_dispatcher_sessions"), "connected Ingresses"),
            (most("octet_dispatcher_recovering"), "recovering"),
        ),
    ),
    one("Cordoned nodes", "short", most("octet_nodes_cordoned", "node"), "{{node}}"),
    one("Longest wait in the queue", "s", most("octet_queue_oldest_seconds", "pool"), "{{pool}}"),
    one(
        "Queued work",
        "s",
        most("octet_queue_work_seconds", "pool"),
        "{{pool}}",
        "In seconds of a reference replica.",
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
    one("Redis requests without an answer", "ops", rate("octet_cache_failures"), "failures"),
    quantiles("Time to store an image", "octet_store_seconds"),
    quantiles("Time to read a picture to edit", "octet_edit_read_seconds"),
    one(
        "Pictures to edit",
        "bytes",
        most("octet_edit_bytes", "NodeAddress"),
        "{{NodeAddress}}",
        "Bytes of bodies, pictures and masks that the node's Ingress with the most holds.",
    ),
    Panel(
        "Spool",
        "bytes",
        (
            (most("octet_spool_bytes", "NodeAddress"), "{{NodeAddress}}"),
            (most("octet_spool_limit_bytes"), "limit"),
        ),
        text="Images on each node that wait to be uploaded to the bucket.",
    ),
    one(
        "Images in the spool", "short", most("octet_spool_images", "NodeAddress"), "{{NodeAddress}}"
    ),
    one(
        "Faults of the image store",
        "short",
        most("octet_store_faults", "NodeAddress, place, cause"),
        "{{NodeAddress}} {{place}} {{cause}}",
    ),
    Panel(
        "SSIM of FP8 to 16 bit",
        "none",
        (
            (quantile(0.5, "octet_shadow_ssim", "model"), "{{model}} median"),
            (quantile(0.05, "octet_shadow_ssim", "model"), "{{model}} 5th percentile"),
        ),
    ),
    one(
        "Images generated again in 16 bit to compare",
        "ops",
        rate("octet_shadow_images", "model, outcome"),
        "{{model}} {{outcome}}",
    ),
    one(
        "Images routed to 16 bit",
        "ops",
        rate("octet_routed_images", "model, rule"),
        "{{model}} {{rule}}",
    ),
    one(
        "Images generated again",
        "ops",
        rate("octet_retried", "pool, reason"),
        "{{pool}} {{reason}}",
    ),
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
        "In seconds of a reference replica per second: 100 % is one such replica.",
        stacked=True,
    ),
    one(
        "Refused requests",
        "reqps",
        rate("octet_tenant_refused", "tenant, code"),
        "{{tenant}} {{code}}",
    ),
    one("Open requests", "short", most("octet_tenant_calls", "tenant"), "{{tenant}}"),
    one("Database fault", "short", most("octet_database_fault"), "fault"),
    one("Faulty tenants' files", "short", most("octet_tenants_file_faults", "file"), "{{file}}"),
    one("Queued images", "short", most("octet_tenant_queued", "tenant"), "{{tenant}}"),
    one("Queued work", "s", most("octet_tenant_queued_work", "tenant"), "{{tenant}}"),
    one("Running images", "short", most("octet_tenant_running", "tenant"), "{{tenant}}"),
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
            (rate("octet_card_xids", "uuid, xid"), "{{uuid}} Xid {{xid}} per second"),
        ),
    ),
    one("Replicas", "short", most("octet_pool_replicas", "pool, state"), "{{pool}} {{state}}"),
    one(
        "Scaling decisions",
        "ops",
        rate("octet_pool_decisions", "pool, direction"),
        "{{pool}} {{direction}}",
    ),
]
ENGINE = [
    one("Steps", "ops", rate("octet_engine_steps", "pool"), "{{pool}}"),
    one(
        "Rows per step",
        "short",
        f"{rate('octet_engine_rows', 'pool')} / {rate('octet_engine_steps', 'pool')}",
        "{{pool}}",
        "How full the batches are. An image with guidance takes two rows.",
    ),
    one(
        "Time per step",
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
    Panel(
        "Cold starts, on Kubernetes",
        "short",
        (
            (pods('kube_pod_status_phase{PODS,phase="Pending"}'), "pods that wait or pull"),
            (
                pods('kube_pod_init_container_status_running{PODS,container="pull"}'),
                "pods that pull",
            ),
            (most("octet_pool_replicas", "pool, state"), "{{pool}} {{state}}"),
        ),
        text="Wanted replicas need a pod, its weights, and then a start of their own.",
    ),
    one("Out of memory", "ops", rate("octet_engine_out_of_memory", "pool"), "{{pool}}"),
    one(
        "Start time",
        "s",
        most("octet_engine_start_seconds", "pool, phase"),
        "{{pool}} {{phase}}",
        "For each phase, the longest time among the running replicas.",
        stacked=True,
    ),
    one("Speed", "percentunit", total("octet_engine_speed", "pool"), "{{pool}}"),
    one(
        "Learned cost coefficients",
        "s",
        most("octet_engine_cost_seconds", "pool, coefficient"),
        "{{pool}} {{coefficient}}",
    ),
    Panel(
        "Actual ÷ predicted time",
        "short",
        tuple((quantile(q, "octet_eta_ratio"), f"p{100 * q:g}") for q in QUANTILES),
    ),
]
JOBS = [
    one("Jobs that wait", "short", most("octet_jobs_waiting", "pool, lane"), "{{pool}} {{lane}}"),
    one(
        "Work that waits",
        "s",
        most("octet_jobs_waiting_work_seconds", "pool, lane"),
        "{{pool}} {{lane}}",
        "In seconds of a reference replica.",
        stacked=True,
    ),
    one("Claims", "ops", rate("octet_job_claims"), "claimed"),
    one(
        "Runs by outcome",
        "ops",
        rate("octet_job_ends", "lane, outcome"),
        "{{lane}} {{outcome}}",
        "`given_back` is claimed again; with `fenced` the claim was lost meanwhile.",
        stacked=True,
    ),
    one("Lost claims", "ops", rate("octet_job_claims_lost"), "lost"),
    one("Paused", "short", most("octet_jobs_paused"), "paused"),
    one(
        "Webhooks by outcome",
        "ops",
        rate("octet_webhook_attempts", "outcome"),
        "{{outcome}}",
        stacked=True,
    ),
]
DASHBOARDS = {
    "octet-overview": ("Octet: overview", OVERVIEW),
    "octet-tenants": ("Octet: tenants", TENANTS),
    "octet-jobs": ("Octet: jobs and webhooks", JOBS),
    "octet-cards": ("Octet: GPUs and pools", CARDS),
    "octet-engine": ("Octet: engine", ENGINE),
}


def dashboard(uid: str) -> dict[str, Any]:
    """The dashboard in Grafana's JSON model; `uid`: a key of `DASHBOARDS`."""
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
        "templating": {
            "list": [
                {**source, "query": "prometheus"},
                *(_variable(label, name) for label, name in VARIABLES.items()),
            ]
        },
        "links": [{"type": "dashboards", "tags": ["octet"], "title": "Octet", "asDropdown": True}],
        "panels": [_panel(panel, i) for i, panel in enumerate(panels)],
    }


def _variable(label: str, name: str) -> dict[str, Any]:
    """A choice of the values that a label has; all of them, also none, at first."""
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values({ANY}, {label})",
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
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
    """The texts of the dashboards, by the path of the file."""
    return {
        OUT / f"{uid}.json": json.dumps(dashboard(uid), indent=1, ensure_ascii=False) + "\n"
        for uid in DASHBOARDS
    }


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
