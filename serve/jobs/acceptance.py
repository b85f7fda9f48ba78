"""Acceptance of jobs: checked against the tenant's limits and stored, in one transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, func, insert, select

from ..errors import OwnQueueFull, QuotaExceeded
from ..store.schema import JOB_COUNTS, JOBS, SUMS, TENANTS, next_numbers
from ..tenants.limits import known_tenant
from ..usage.months import month_of
from .counts import CountChanges
from .job import Job, NewJob, kind_of

DUST = 1e-6  # seconds of work by which sums of the same numbers may differ


class Allowance(NamedTuple):
    """The jobs and the work that may still be accepted of a tenant.

    `limit`: the most jobs that it may have waiting. `work_s`: what its budget of this month holds
    beside the jobs that wait and run; None: it has no budget.
    """

    jobs: int
    limit: int
    work_s: float | None


def accept(connection: Connection, job: NewJob, most_queued: int, now: float) -> Job:
    """Store a job, or return the one that is stored under its id already.

    `most_queued`: jobs and lines that a tenant may have waiting. `now`: Unix time. Raises
    `OwnQueueFull` if there are as many, and `QuotaExceeded` if the tenant's budget of this month
    does not hold the job's work beside that of the jobs that wait.
    """
    if row := connection.execute(select(JOBS).where(JOBS.c.id == job.id)).first():
        return Job(*row)
    check(connection, job, most_queued, now)
    insert_jobs(connection, [job])
    return Job(*connection.execute(select(JOBS).where(JOBS.c.id == job.id)).one())


def check(connection: Connection, job: NewJob, most_queued: int, now: float) -> None:
    """Raise the error of `accept` for a job that would be refused now."""
    allowed = allowance(connection, job.tenant, most_queued, now)
    if allowed.jobs < 1:
        raise OwnQueueFull("you have as many jobs waiting as you may: try again later")
    if allowed.work_s is not None and job.work_s > allowed.work_s + DUST:
        raise QuotaExceeded("your budget of this month does not hold this job's work")


def allowance(connection: Connection, tenant: str, most_queued: int, now: float) -> Allowance:
    """Compute what may still be accepted of a tenant at the Unix time `now`."""
    limits = select(TENANTS.c.limits).where(TENANTS.c.id == tenant, TENANTS.c.deleted.is_(None))
    text = connection.execute(limits).scalar()
    known = known_tenant(json.loads(text) if text else {})
    columns = JOB_COUNTS.c.queued, JOB_COUNTS.c.queued_work_s, JOB_COUNTS.c.running_work_s
    sums = select(*map(func.sum, columns)).where(JOB_COUNTS.c.tenant == tenant)
    queued, queued_s, running_s = (found or 0 for found in connection.execute(sums).one())
    if known.max_queued_jobs is not None:
        most_queued = min(most_queued, known.max_queued_jobs)
    if known.monthly_work is None:
        return Allowance(most_queued - queued, most_queued, None)
    month = month_of(now)
    spent = select(SUMS.c.work_s).where(SUMS.c.month == month, SUMS.c.tenant == tenant)
    used_s = (connection.execute(spent).scalar() or 0.0) + queued_s + running_s
    return Allowance(most_queued - queued, most_queued, known.monthly_work - used_s)


def may_be_paid(connection: Connection, job: Job, now: float) -> bool:
    """Return whether a tenant's budget of this month holds all its jobs; `job` is running."""
    allowed = allowance(connection, job.tenant, 0, now)
    return allowed.work_s is None or allowed.work_s >= -DUST


def insert_jobs(connection: Connection, jobs: Sequence[NewJob]) -> None:
    """Queue jobs in this order, without any check."""
    before = next_numbers(connection, JOBS.name, len(jobs))
    same = {"state": "queued", "fence": 0, "lost": 0}
    rows = [
        {**job._asdict(), **same, "number": number, "not_before": job.created}
        for number, job in enumerate(jobs, before + 1)
    ]
    connection.execute(insert(JOBS), rows)
    counts = CountChanges()
    for job in jobs:
        counts.queued(kind_of(job), 1, job.work_s)
    counts.write(connection)
