"""The metrics of jobs and webhooks, as `serve.metric_catalogue` lists them."""

from __future__ import annotations

from ..metric_catalogue import metric
from .job import Job


class JobsMetrics:
    """Claims, ends and losses of jobs, and outcomes of webhooks; also the waits of their images."""

    def __init__(self) -> None:
        self._queue, self._retried = metric("octet_queue_seconds"), metric("octet_retried")
        self._routed = metric("octet_routed_images")
        self._claims, self._ends = metric("octet_job_claims"), metric("octet_job_ends")
        self._lost, self._paused = metric("octet_job_claims_lost"), metric("octet_jobs_paused")
        self._webhooks = metric("octet_webhook_attempts")

    def queued(self, pool: str, seconds: float) -> None:
        self._queue.observe(seconds, {"pool": pool})

    def retried(self, pool: str, reason: str) -> None:
        self._retried.inc(tags={"pool": pool, "reason": reason})

    def routed(self, model: str, rule: str) -> None:
        self._routed.inc(tags={"model": model, "rule": rule})

    def claimed(self, jobs: int) -> None:
        if jobs:
            self._claims.inc(jobs)

    def ended(self, job: Job, how: str) -> None:
        """Count how a run of a job has ended here: its state, "given_back" or "fenced"."""
        self._ends.inc(tags={"lane": job.lane, "outcome": how})

    def lost(self, jobs: int) -> None:
        """Count claims whose leases have ended."""
        if jobs:
            self._lost.inc(jobs)

    def paused(self, *, full: bool) -> None:
        self._paused.set(int(full))

    def sent(self, outcome: str) -> None:
        self._webhooks.inc(tags={"outcome": outcome})
