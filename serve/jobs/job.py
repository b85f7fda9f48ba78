"""A job: one request whose images are generated without an open connection.

    queued → running → succeeded, failed, cancelled or expired
       ↑________|

A job is *claimed* by a process, which holds a lease on it and renews that again and again. If the
lease ends, the job is queued again. Each claim raises the job's *fence*, and a job is ended only by
its last claim: so a process that was paused for long cannot end a job that another one has.

Pure: standard library only.
"""

from __future__ import annotations

import uuid
from typing import Literal, NamedTuple

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
End = Literal["succeeded", "failed", "cancelled", "expired"]
OPEN: tuple[State, ...] = ("queued", "running")
JobLane = Literal["job", "batch"]
MOST_LOST = 3  # claims that may be lost before the job itself counts as the cause


class NewJob(NamedTuple):
    """A job as it is accepted; the fields are those of `Job`."""

    id: str
    tenant: str
    lane: JobLane
    endpoint: str
    model: str
    precision: str
    work_s: float
    images: int
    request: str
    digest: str
    request_id: str
    key_id: str
    created: float
    expires: float
    batch: str | None = None
    line: int | None = None
    custom_id: str | None = None


class Job(NamedTuple):
    """A job as it is stored. Times are Unix times by the database's clock.

    `number`: grows in the order of acceptance. `lane`: "job", or "batch" for a line of a batch.
    `work_s`: the predicted work of all its `images`. `digest`: SHA-256 of the request as it was
    sent, if it had an Idempotency-Key. `request`, `result`, `error`: JSON, see
    `encoding`. `line`: of the batch's file, from 1. `lost`: how many claims were given up.
    `not_before`: when it may be claimed. `expires`: when it must have ended.
    """

    id: str
    number: int
    tenant: str
    lane: JobLane
    endpoint: str
    model: str
    precision: str
    work_s: float
    images: int
    request: str
    digest: str
    request_id: str
    key_id: str
    batch: str | None
    line: int | None
    custom_id: str | None
    state: State
    fence: int
    owner: str | None
    lease_until: float | None
    lost: int
    not_before: float
    created: float
    started: float | None
    ended: float | None
    expires: float
    result: str | None
    error: str | None

    @property
    def call_id(self) -> str:
        """The id of the call that its present claim opens; no other call has it."""
        return f"{self.id}.{self.fence}"


class Kind(NamedTuple):
    """The properties that jobs share which queue together."""

    tenant: str
    lane: str
    model: str
    precision: str


def kind_of(job: NewJob | Job) -> Kind:
    return Kind(job.tenant, job.lane, job.model, job.precision)


def new_id(prefix: str) -> str:
    """A new id that nobody can guess, such as job_9f…; `prefix` without the line below."""
    return f"{prefix}_{uuid.uuid4().hex}"
