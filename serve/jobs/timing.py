"""The intervals and waiting times of the processes that run jobs.

Pure: standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTiming:
    """Times in seconds.

    `lease_s`: for how long a claim holds. `renew_s`: between two renewals of it. `poll_s`: between
    two looks for jobs to claim and webhooks to send. `sweep_s`: between two looks for jobs whose
    lease has ended or that have expired, and for batches to read. `forget_s`: between two looks for
    old jobs. `pause_s`: after a fault, before the next attempt. `retry_s`: before a job is claimed
    again that was refused for now.
    """

    lease_s: float = 15.0
    renew_s: float = 5.0
    poll_s: float = 0.2
    sweep_s: float = 1.0
    forget_s: float = 60.0
    pause_s: float = 1.0
    retry_s: float = 2.0


JOB_TIMING = JobTiming()
