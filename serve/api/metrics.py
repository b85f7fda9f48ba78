"""What an Ingress counts; Ray exports it with the names `ray_octet_…` on every node."""

from __future__ import annotations

from ray.serve import metrics

ETA_RATIO = 0.25, 0.5, 0.8, 0.9, 1, 1.1, 1.25, 2, 4
LOOKUP_S = 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.15, 0.3, 1, 3
WAIT_S = 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100


class FrontMetrics:
    def __init__(self) -> None:
        self._queue = metrics.Histogram(
            "octet_queue_seconds",
            "Seconds from a request to the grant of an attempt.",
            boundaries=list(WAIT_S),
            tag_keys=("pool",),
        )
        self._retried = metrics.Counter(
            "octet_retried",
            "Attempts after which an image was drawn again: not_begun, replica_lost, non_finite.",
            tag_keys=("pool", "reason"),
        )

        self._eta = metrics.Histogram(
            "octet_eta_ratio",
            "Time that an answer took, over what was predicted when it was accepted.",
            boundaries=list(ETA_RATIO),
        )

        self._stored = metrics.Histogram(
            "octet_store_seconds",
            "Seconds until an image was kept for its URL.",
            boundaries=list(WAIT_S),
        )
        self._spool = {
            of: metrics.Gauge(f"octet_spool_{of}", f"{what} in this node's spool.")
            for of, what in (("images", "Images that wait"), ("bytes", "Bytes that wait"))
        }

        self._repeats = metrics.Counter(
            "octet_cache_requests",
            "Requests by what the result cache did for them: hit, miss, shared, off.",
            tag_keys=("result",),
        )
        self._lookup = metrics.Histogram(
            "octet_cache_lookup_seconds",
            "Seconds that the result cache took to say whether it has a request's images.",
            boundaries=list(LOOKUP_S),
            tag_keys=("result",),
        )
        self._cache_failures = metrics.Counter(
            "octet_cache_failures", "Times that Redis did not answer in time."
        )

    def repeated(self, result: str) -> None:
        self._repeats.inc(tags={"result": result})

    def looked_up(self, seconds: float, *, hit: bool) -> None:
        self._lookup.observe(seconds, {"result": "hit" if hit else "miss"})

    def cache_failed(self) -> None:
        self._cache_failures.inc()

    def stored(self, seconds: float) -> None:
        self._stored.observe(seconds)

    def spooled(self, images: int, size: int) -> None:
        self._spool["images"].set(images)
        self._spool["bytes"].set(size)

    def answered(self, eta_s: float | None, took_s: float) -> None:
        if eta_s:
            self._eta.observe(took_s / eta_s)

    def queued(self, pool: str, seconds: float) -> None:
        self._queue.observe(seconds, {"pool": pool})

    def retried(self, pool: str, reason: str) -> None:
        self._retried.inc(tags={"pool": pool, "reason": reason})
