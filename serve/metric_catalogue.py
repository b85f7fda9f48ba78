"""Every metric that Octet exports, in one table, which code, docs and dashboards share.

Ray exports them on every node as `ray_octet_…` with tags for application, deployment and replica;
counters end in `_total`. Texts are ASCII, because Ray refuses others.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

# Quantiles are drawn from these: neighbours differ by 60 %, so a p99 is right within that.
LATENCY_S = tuple(round(0.005 * 1.6**i, 3) for i in range(24))
LOOKUP_S = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.15, 0.3, 1.0, 3.0)
RATIOS = (0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0, 4.0)
CARD = ("card", "uuid")
PHASES = "text, denoise, decode, encode"
NVML = "what a card or partition does not have is missing"


class Metric(NamedTuple):
    """`tags` have few values each; `buckets`: upper bounds of a histogram."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, dict[str, Metric]] = {
    "Requests, at an Ingress": {
        "octet_requests": Metric(
            "counter",
            "Requests for images by outcome: ok, the error's code, or client_gone (499); without "
            "a model if they were not understood.",
            ("model", "outcome", "status"),
        ),
        "octet_request_seconds": Metric(
            "histogram",
            "From an understood request to its whole answer, by what the result cache did.",
            ("model", "cache"),
            LATENCY_S,
        ),
        "octet_queue_seconds": Metric(
            "histogram", "From a request to the grant of an attempt.", ("pool",), LATENCY_S
        ),
        "octet_retried": Metric(
            "counter",
            "Attempts after which an image was drawn again: not_begun, replica_lost, non_finite.",
            ("pool", "reason"),
        ),
        "octet_eta_ratio": Metric(
            "histogram",
            "Time that an answer took over what was predicted when it was accepted.",
            (),
            RATIOS,
        ),
    },
    "Images that are kept": {
        "octet_store_seconds": Metric(
            "histogram", "Until an image was kept for its URL or the cache.", (), LATENCY_S
        ),
        "octet_spool_images": Metric("gauge", "Images that wait in this node's spool."),
        "octet_spool_bytes": Metric("gauge", "Bytes that wait in this node's spool."),
        "octet_spool_limit_bytes": Metric("gauge", "Bytes with which the spool counts as full."),
        "octet_cache_requests": Metric(
            "counter", "What the result cache did: hit, miss, shared, off.", ("result",)
        ),
        "octet_cache_lookup_seconds": Metric(
            "histogram",
            "Until the result cache said hit, with the images read, or miss.",
            ("result",),
            LOOKUP_S,
        ),
        "octet_cache_failures": Metric("counter", "Times that Redis did not answer in time."),
    },
    "Queue and pools, at the Dispatcher": {
        "octet_queue_images": Metric(
            "gauge", "Images that wait, at the first of their pools.", ("model", "pool")
        ),
        "octet_queue_work_seconds": Metric(
            "gauge", "Their work, in seconds of a reference replica.", ("model", "pool")
        ),
        "octet_queue_oldest_seconds": Metric(
            "gauge", "Since when the first of them waits.", ("model", "pool")
        ),
        "octet_pool_replicas": Metric(
            "gauge", "Replicas: wanted, ready, starting.", ("pool", "state")
        ),
        "octet_pool_slots": Metric("gauge", "Slots: free, running.", ("pool", "state")),
        "octet_pool_decisions": Metric(
            "counter",
            "Decisions that changed how many replicas are wanted: up, down.",
            ("pool", "direction"),
        ),
    },
    "Tenants, at the Dispatcher": {
        "octet_tenant_calls": Metric(
            "gauge",
            "Open requests. The 20 tenants with most are named, at most 100 while the Dispatcher "
            "lives; all others are _other.",
            ("tenant",),
        ),
        "octet_tenant_queued": Metric("gauge", "Images that wait.", ("tenant",)),
        "octet_tenant_queued_work": Metric(
            "gauge", "Their work, in seconds of a reference replica.", ("tenant",)
        ),
        "octet_tenant_running": Metric("gauge", "Images that are drawn.", ("tenant",)),
        "octet_tenant_work": Metric(
            "counter",
            "Work that was charged, in seconds of a reference replica.",
            ("tenant", "outcome"),
        ),
        "octet_tenant_images": Metric(
            "counter",
            "Images: delivered or cancelled, which are charged, and hit or shared.",
            ("tenant", "outcome"),
        ),
        "octet_tenant_refused": Metric(
            "counter", "Requests that were refused, by the error's code.", ("tenant", "code")
        ),
    },
    "Generators": {
        "octet_engine_images": Metric(
            "counter", "Images: drawn, cancelled, non_finite, failed.", ("pool", "outcome")
        ),
        "octet_engine_phase_seconds": Metric(
            "histogram", f"Of an image: {PHASES}.", ("pool", "phase"), LATENCY_S
        ),
        "octet_engine_steps": Metric("counter", "Calls of the transformer.", ("pool",)),
        "octet_engine_rows": Metric("counter", "Rows in them, without padding.", ("pool",)),
        "octet_engine_step_seconds": Metric("counter", "Seconds spent in them.", ("pool",)),
        "octet_engine_out_of_memory": Metric(
            "counter", "Steps and decodes for which memory did not suffice.", ("pool",)
        ),
        "octet_engine_start_seconds": Metric(
            "gauge",
            "Of this replica's start: checkpoint, load, text, warm-up.",
            ("pool", "phase"),
        ),
        "octet_engine_speed": Metric(
            "gauge", "Work of a reference replica done in a second.", ("pool",)
        ),
        "octet_engine_cost_seconds": Metric(
            "gauge",
            "What images cost here, as learnt: serve/cost.py.",
            ("pool", "coefficient"),
        ),
    },
    "Cards, as each of their replicas reads them every ten seconds": {
        "octet_replica_memory_bytes": Metric(
            "gauge", "Of this replica: promised, allocated, reserved, peak.", (*CARD, "kind")
        ),
        "octet_card_utilisation_percent": Metric(
            "gauge", f"Share of time in which a kernel ran; {NVML}.", CARD
        ),
        "octet_card_memory_used_bytes": Metric("gauge", "That all processes take.", CARD),
        "octet_card_memory_total_bytes": Metric("gauge", "Of the card or partition.", CARD),
        "octet_card_power_watts": Metric("gauge", "Power drawn.", CARD),
        "octet_card_temperature_celsius": Metric("gauge", "Of the GPU.", CARD),
        "octet_card_sm_clock_mhz": Metric("gauge", "Of the multiprocessors.", CARD),
        "octet_card_memory_clock_mhz": Metric("gauge", "Of the memory.", CARD),
        "octet_card_ecc_errors": Metric(
            "gauge", "That could not be corrected since the driver was loaded.", CARD
        ),
        "octet_card_xids": Metric("counter", "Faults that the driver reported.", (*CARD, "xid")),
    },
}
ALL = {name: metric for part in METRICS.values() for name, metric in part.items()}


def metric(name: str) -> Any:
    """Ray's counter, gauge or histogram of this name."""
    from ray.serve import metrics

    found = ALL[name]
    if found.kind == "histogram":
        buckets = list(found.buckets)
        return metrics.Histogram(name, found.text, boundaries=buckets, tag_keys=found.tags)
    kind = metrics.Counter if found.kind == "counter" else metrics.Gauge
    return kind(name, found.text, tag_keys=found.tags)


def exported(name: str) -> str:
    """As Prometheus reads it; a histogram's parts add `_bucket`, `_sum` and `_count`."""
    return f"ray_{name}_total" if ALL[name].kind == "counter" else f"ray_{name}"


def table() -> str:
    """In Markdown, for the docs."""
    lines = []
    for part, metrics in METRICS.items():
        lines += [f"{part}:", "", "| metric | tags | |", "|---|---|---|"]
        for name, found in metrics.items():
            kind = "histogram: " if found.kind == "histogram" else ""
            lines.append(f"| `{exported(name)}` | {', '.join(found.tags)} | {kind}{found.text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201 - for docs/metrics.md
