"""The catalogue of all metrics that Octet exports, shared by code, docs and dashboards.

Ray exports the metrics on every node as `ray_octet_…`, with tags for application, deployment and
replica. Counters end in `_total`. Texts are ASCII, because Ray refuses other characters.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

# Neighbouring bounds differ by 60 %, so a p99 that is computed from them is right within 60 %.
LATENCY_S = tuple(round(0.005 * 1.6**i, 3) for i in range(24))
LOOKUP_S = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.15, 0.3, 1.0, 3.0)
SSIM = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 1.0)
RATIOS = (0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0, 4.0)
CARD = ("card", "uuid")
PHASES = "text, latents (edits only), denoise, decode, encode"
NVML = "readings that a card or partition does not offer are missing"


class Metric(NamedTuple):
    """One metric: its kind, its help text and its tags, which must have few values each.

    `buckets`: the upper bounds of a histogram's buckets.
    """

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, dict[str, Metric]] = {
    "Requests, at an Ingress": {
        "octet_requests": Metric(
            "counter",
            "Requests for images by endpoint (generations, edits) and outcome: ok, the error's "
            "code, or client_gone (499). The model is empty if the request was not valid, and the "
            "endpoint for other paths.",
            ("endpoint", "model", "outcome", "status"),
        ),
        "octet_request_seconds": Metric(
            "histogram",
            "Seconds from a valid request to its complete answer, by the result cache's part: hit, "
            "miss, shared, off.",
            ("endpoint", "model", "cache"),
            LATENCY_S,
        ),
        "octet_queue_seconds": Metric(
            "histogram",
            "Seconds from a request to the grant of an attempt.",
            ("pool",),
            LATENCY_S,
        ),
        "octet_retried": Metric(
            "counter",
            "Attempts after which an image was generated again, by reason: not_begun, "
            "replica_lost, non_finite.",
            ("pool", "reason"),
        ),
        "octet_eta_ratio": Metric(
            "histogram",
            "Time that an answer took, divided by the time that was predicted at its admission.",
            (),
            RATIOS,
        ),
    },
    "Routing and shadows, at an Ingress": {
        "octet_routed_images": Metric(
            "counter",
            "Images that a rule of `routing` sent to 16-bit pools, by the rule's name; also those "
            "of jobs.",
            ("model", "rule"),
        ),
        "octet_shadow_images": Metric(
            "counter",
            "FP8 images that were chosen to be generated again in 16 bit, by outcome: compared, "
            "skipped (too many waited), no_room (no idle capacity for long enough), failed.",
            ("model", "outcome"),
        ),
        "octet_shadow_ssim": Metric(
            "histogram",
            "SSIM of FP8 images to the same images in 16 bit.",
            ("model",),
            SSIM,
        ),
    },
    "Pictures to edit, at an Ingress": {
        "octet_edit_bytes": Metric(
            "gauge",
            "Bytes of bodies, pictures and masks that are held for open requests.",
        ),
        "octet_edit_read_seconds": Metric(
            "histogram",
            "Seconds to read the picture and mask of a request, with the wait for others.",
            (),
            LATENCY_S,
        ),
    },
    "Result store and result cache, at an Ingress": {
        "octet_store_seconds": Metric(
            "histogram", "Seconds to store an image for its URL or the cache.", (), LATENCY_S
        ),
        "octet_store_faults": Metric(
            "gauge",
            "1 while images cannot be put into their bucket or folder, by the kind of fault.",
            ("place", "cause"),
        ),
        "octet_spool_images": Metric("gauge", "Images that wait in this node's spool."),
        "octet_spool_bytes": Metric("gauge", "Bytes that wait in this node's spool."),
        "octet_spool_limit_bytes": Metric("gauge", "Bytes at which this node's spool is full."),
        "octet_cache_requests": Metric(
            "counter",
            "Answered requests by the result cache's part: hit, miss, shared, off.",
            ("result",),
        ),
        "octet_cache_lookup_seconds": Metric(
            "histogram",
            "Seconds of a look-up in the result cache, including the reading of the images: hit, "
            "miss.",
            ("result",),
            LOOKUP_S,
        ),
        "octet_cache_failures": Metric(
            "counter", "Commands that Redis did not answer in time or answered with an error."
        ),
    },
    "Queue and pools, at the Dispatcher": {
        "octet_queue_images": Metric(
            "gauge",
            "Images that wait; each is counted at its preferred pool.",
            ("model", "pool"),
        ),
        "octet_queue_work_seconds": Metric(
            "gauge",
            "Work of the waiting images, in seconds of a reference replica.",
            ("model", "pool"),
        ),
        "octet_queue_oldest_seconds": Metric(
            "gauge", "Seconds that the oldest waiting image has waited.", ("model", "pool")
        ),
        "octet_pool_replicas": Metric(
            "gauge", "Replicas by state: wanted, ready, starting.", ("pool", "state")
        ),
        "octet_pool_slots": Metric("gauge", "Slots by state: free, running.", ("pool", "state")),
        "octet_pool_decisions": Metric(
            "counter",
            "Decisions that changed the wanted number of replicas, by direction: up, down.",
            ("pool", "direction"),
        ),
    },
    "The Dispatcher itself": {
        "octet_dispatcher_lag_seconds": Metric(
            "gauge", "How late its last periodic work began, because its event loop was busy."
        ),
        "octet_dispatcher_messages": Metric(
            "counter",
            "Messages: updates from Ingresses, heartbeats of Generators, and those sent to "
            "Ingresses.",
            ("kind",),
        ),
        "octet_dispatcher_sessions": Metric("gauge", "Ingresses that are connected."),
        "octet_dispatcher_recovering": Metric(
            "gauge", "1 after a start, until it knows what its Ingresses have."
        ),
    },
    "Tenants, at the Dispatcher": {
        "octet_tenant_calls": Metric(
            "gauge",
            "Open requests. Only the 20 tenants with most recent work are named, and at most 100 "
            "while a Dispatcher runs; all others together are _other.",
            ("tenant",),
        ),
        "octet_tenant_queued": Metric("gauge", "Images that wait.", ("tenant",)),
        "octet_tenant_queued_work": Metric(
            "gauge", "Work of the waiting images, in seconds of a reference replica.", ("tenant",)
        ),
        "octet_tenant_running": Metric("gauge", "Images that are being generated.", ("tenant",)),
        "octet_tenant_work": Metric(
            "counter",
            "Charged work, in seconds of a reference replica, by the image's outcome; "
            "for reversed, the work that was given back.",
            ("tenant", "outcome"),
        ),
        "octet_tenant_images": Metric(
            "counter",
            "Images by outcome: delivered and cancelled are charged, hit and shared are not; "
            "reversed gives a charge back.",
            ("tenant", "outcome"),
        ),
        "octet_tenant_refused": Metric(
            "counter", "Refused requests, by the error's code.", ("tenant", "code")
        ),
        "octet_nodes_cordoned": Metric(
            "gauge", "1 for each node that gets no new work, by Ray's id of it.", ("node",)
        ),
        "octet_database_fault": Metric(
            "gauge",
            "1 while the database of tenants and usage cannot be used, so new work is refused.",
        ),
        "octet_tenants_file_faults": Metric(
            "gauge",
            "1 while a file of tenants or keys cannot be used, so its last valid contents are.",
            ("file",),
        ),
    },
    "Jobs and webhooks, at the processes that run them": {
        "octet_job_claims": Metric("counter", "Jobs that were claimed."),
        "octet_job_ends": Metric(
            "counter",
            "Runs of claimed jobs by lane (job, batch) and outcome: succeeded, failed, cancelled, "
            "expired; given_back (to be claimed again), fenced (the claim was lost). Jobs that end "
            "while they wait are not counted.",
            ("lane", "outcome"),
        ),
        "octet_job_claims_lost": Metric(
            "counter", "Claims whose leases ended, because their process died or was paused."
        ),
        "octet_jobs_paused": Metric(
            "gauge", "1 while no job is claimed, because the store of images is full."
        ),
        "octet_webhook_attempts": Metric(
            "counter",
            "Attempts to send a message, by outcome: delivered, waiting (for another attempt), "
            "dead (the last one failed), disabled (the endpoint answered 410).",
            ("outcome",),
        ),
    },
    "Jobs that wait, at the Dispatcher": {
        "octet_jobs_waiting": Metric(
            "gauge",
            "Jobs and lines of batches that wait in the database, by preferred pool and lane.",
            ("pool", "lane"),
        ),
        "octet_jobs_waiting_work_seconds": Metric(
            "gauge",
            "Work of the jobs that wait, in seconds of a reference replica.",
            ("pool", "lane"),
        ),
    },
    "Generators": {
        "octet_engine_images": Metric(
            "counter",
            "Images by outcome: drawn (finished), cancelled, non_finite, failed.",
            ("pool", "outcome"),
        ),
        "octet_engine_phase_seconds": Metric(
            "histogram", f"Seconds of an image's phases: {PHASES}.", ("pool", "phase"), LATENCY_S
        ),
        "octet_engine_steps": Metric("counter", "Calls of the transformer.", ("pool",)),
        "octet_engine_rows": Metric(
            "counter", "Rows in the calls of the transformer, without padding.", ("pool",)
        ),
        "octet_engine_step_seconds": Metric(
            "counter", "Seconds spent in calls of the transformer.", ("pool",)
        ),
        "octet_engine_out_of_memory": Metric(
            "counter", "Steps and decodes that ran out of memory.", ("pool",)
        ),
        "octet_engine_start_seconds": Metric(
            "gauge",
            "Seconds of the phases of this replica's start: import, pull, copy, verify, load, "
            "text, lock (waiting for another that compiles the same code), warm-up.",
            ("pool", "phase"),
        ),
        "octet_engine_speed": Metric(
            "gauge",
            "Speed of this replica: seconds of a reference replica's work done in a second.",
            ("pool",),
        ),
        "octet_engine_cost_seconds": Metric(
            "gauge",
            "Learned coefficients of the cost of images on this replica (cluster/cost.py).",
            ("pool", "coefficient"),
        ),
    },
    "Cards, read every ten seconds by each of their replicas": {
        "octet_replica_memory_bytes": Metric(
            "gauge",
            "Card memory of this replica: promised, allocated, reserved, peak.",
            (*CARD, "kind"),
        ),
        "octet_card_utilisation_percent": Metric(
            "gauge", f"Share of time in which a kernel ran; {NVML}.", CARD
        ),
        "octet_card_memory_used_bytes": Metric(
            "gauge", "Card memory that all processes use.", CARD
        ),
        "octet_card_memory_total_bytes": Metric(
            "gauge", "Total memory of the card or partition.", CARD
        ),
        "octet_card_power_watts": Metric("gauge", "Power consumption of the card.", CARD),
        "octet_card_temperature_celsius": Metric("gauge", "Temperature of the GPU.", CARD),
        "octet_card_sm_clock_mhz": Metric(
            "gauge", "Clock rate of the streaming multiprocessors.", CARD
        ),
        "octet_card_memory_clock_mhz": Metric("gauge", "Clock rate of the memory.", CARD),
        "octet_card_ecc_errors": Metric(
            "gauge", "Uncorrected memory errors (ECC) since the driver was loaded.", CARD
        ),
        "octet_card_xids": Metric(
            "counter", "Faults (Xid) that the driver reported.", (*CARD, "xid")
        ),
    },
}
ALL = {name: metric for part in METRICS.values() for name, metric in part.items()}


def metric(name: str) -> Any:
    """Make Ray's counter, gauge or histogram for a metric of the catalogue."""
    from ray.serve import metrics

    found = ALL[name]
    if found.kind == "histogram":
        buckets = list(found.buckets)
        return metrics.Histogram(name, found.text, boundaries=buckets, tag_keys=found.tags)
    kind = metrics.Counter if found.kind == "counter" else metrics.Gauge
    return kind(name, found.text, tag_keys=found.tags)


def exported(name: str) -> str:
    """The name of a metric in Prometheus; a histogram adds `_bucket`, `_sum` and `_count`."""
    return f"ray_{name}_total" if ALL[name].kind == "counter" else f"ray_{name}"


def table() -> str:
    """The catalogue as Markdown tables, for docs/metrics.md."""
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
