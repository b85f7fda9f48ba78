"""Acceptance of jobs: checked against the tenant's limits and stored, in one transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, func, insert, select

from ..errors import OwnQueueFull, QuotaExceeded
from ..store.schema import JOB_COUNTS, JOBS, LEASES, SUMS, TENANTS, next_numbers
from ..tenants.limits import known_tenant
from ..usage.months import month_of
from .counts import CountChanges
from .job import Job, NewJob, kind_of

DUST = 1e-6  # seconds of work by which sums of the same numbers may differ


class Allowance(NamedTuple):
    """What a tenant may still have accepted; None: no limit. `work_s`: of its monthly budget."""

    jobs: int
    work_s: float | None


def accept(connection: Connection, job: NewJob, most_queued: int, now: float) -> Job:
    """Store a job, or return the one that is stored under its id already.

    `most_queued`: jobs and lines that a tenant may have waiting. `now`: Unix time. Raises
    `OwnQueueFull` if there are as many, and `QuotaExceeded` if the tenant's budget of this month
    does not hold the job's work beside that of the jobs that wait.
    """
    if row := connection.execute(select(JOBS).where(JOBS.c.id == job.id)).first():
        return Job(*row)
    allowed = allowance(connection, job.tenant, most_queued, now)
    if allowed.jobs < 1:
        raise OwnQueueFull("you have as many jobs waiting as you may: try again later")
    if allowed.work_s is not None and job.work_s > allowed.work_s + DUST:
        raise QuotaExceeded("your budget of this month does not hold this job's work")
    insert_jobs(connection, [job])
    return Job(*connection.execute(select(JOBS).where(JOBS.c.id == job.id)).one())


def allowance(connection: Connection, tenant: str, most_queued: int, now: float) -> Allowance:
    """What a tenant may still have accepted at the Unix time `now`."""
    limits = select(TENANTS.c.limits).where(TENANTS.c.id == tenant, TENANTS.c.deleted.is_(None))
    text = connection.execute(limits).scalar()
    known = known_tenant(json.loads(text) if text else {})
    sums = func.sum(JOB_COUNTS.c.queued), func.sum(JOB_COUNTS.c.queued_work_s)
    waiting = connection.execute(select(*sums).where(JOB_COUNTS.c.tenant == tenant)).one()
    queued, held_s = waiting[0] or 0, waiting[1] or 0.0
    if known.max_queued_jobs is not None:
        most_queued = min(most_queued, known.max_queued_jobs)
    if known.monthly_work is None:
        return Allowance(most_queued - queued, None)
    month = month_of(now)
    spent = select(SUMS.c.work_s).where(SUMS.c.month == month, SUMS.c.tenant == tenant)
    leases = LEASES.c.month == month, LEASES.c.tenant == tenant
    leased = select(func.sum(LEASES.c.work_s)).where(*leases)
    used_s = (connection.execute(spent).scalar() or 0.0) + held_s
    used_s += connection.execute(leased).scalar() or 0.0
    return Allowance(most_queued - queued, known.monthly_work - used_s)


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
