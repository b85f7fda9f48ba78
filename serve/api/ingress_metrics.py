"""An Ingress's metrics, as `serve.metric_catalogue` lists them."""

from __future__ import annotations

from ..metric_catalogue import metric
from ..results.store import StoreFault
from .wire.paths import endpoint


class IngressMetrics:
    """Requests, queueing, forecasts, stored images and the result cache."""

    def __init__(self) -> None:
        self._requests, self._seconds = metric("octet_requests"), metric("octet_request_seconds")
        self._queue, self._retried = metric("octet_queue_seconds"), metric("octet_retried")
        self._eta = metric("octet_eta_ratio")
        self._routed, self._shadows = metric("octet_routed_images"), metric("octet_shadow_images")
        self._shadow_ssim = metric("octet_shadow_ssim")
        self._stored = metric("octet_store_seconds")
        self._spool = {of: metric(f"octet_spool_{of}") for of in ("images", "bytes", "limit_bytes")}
        self._store_faults = metric("octet_store_faults")
        self._repeats = metric("octet_cache_requests")
        self._lookup = metric("octet_cache_lookup_seconds")
        self._cache_failures = metric("octet_cache_failures")
        self._held, self._reading = metric("octet_edit_bytes"), metric("octet_edit_read_seconds")

    def ended(self, path: str, model: str, outcome: str, status: int) -> None:
        tags = {"endpoint": endpoint(path), "model": model, "outcome": outcome}
        self._requests.inc(tags={**tags, "status": str(status)})

    def answered(self, path: str, model: str, cache: str, seconds: float) -> None:
        self.ended(path, model, "ok", 200)
        self._repeats.inc(tags={"result": cache})
        tags = {"endpoint": endpoint(path), "model": model, "cache": cache}
        self._seconds.observe(seconds, tags)

    def predicted(self, eta_s: float | None, took_s: float) -> None:
        if eta_s:
            self._eta.observe(took_s / eta_s)

    def queued(self, pool: str, seconds: float) -> None:
        self._queue.observe(seconds, {"pool": pool})

    def retried(self, pool: str, reason: str) -> None:
        self._retried.inc(tags={"pool": pool, "reason": reason})

    def routed(self, model: str, rule: str) -> None:
        self._routed.inc(tags={"model": model, "rule": rule})

    def shadow(self, model: str, outcome: str) -> None:
        self._shadows.inc(tags={"model": model, "outcome": outcome})

    def shadow_ssim(self, model: str, ssim: float) -> None:
        self._shadow_ssim.observe(ssim, {"model": model})

    def stored(self, seconds: float) -> None:
        self._stored.observe(seconds)

    def store_fault(self, before: StoreFault | None, now: StoreFault | None) -> None:
        """Note a changed fault of the result store; None: there is none."""
        for fault, value in ((before, 0), (now, 1)):
            if fault:
                self._store_faults.set(value, {"place": fault.place, "cause": fault.cause})

    def spooled(self, images: int, size: int, limit: int) -> None:
        self._spool["images"].set(images)
        self._spool["bytes"].set(size)
        self._spool["limit_bytes"].set(limit)

    def looked_up(self, seconds: float, *, hit: bool) -> None:
        self._lookup.observe(seconds, {"result": "hit" if hit else "miss"})

    def held(self, size: int) -> None:
        self._held.set(size)

    def read_picture(self, seconds: float) -> None:
        self._reading.observe(seconds)

    def cache_failed(self) -> None:
        self._cache_failures.inc()
