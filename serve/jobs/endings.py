"""The ends of jobs: state, charge, batch and webhooks change in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, select, update

from ..store.schema import JOBS
from ..usage.ledger import write_usage
from ..usage.months import month_of
from ..usage.record import UsageRecord
from .batch_rows import count_ended
from .counts import CountChanges
from .job import OPEN, End, Job, kind_of
from .outbox import enqueue_event


class Ending(NamedTuple):
    """The end of a job. `fence`: of the claim that ends it; None: nobody has claimed it.

    `result`, `error`: JSON. `usages`: the charges of its images.
    """

    id: str
    fence: int | None
    state: End
    result: str | None = None
    error: str | None = None
    usages: Sequence[UsageRecord] = ()


def end(connection: Connection, ending: Ending, now: float, cluster: str | None = None) -> bool:
    """End a job, charge its images, count it in its batch, and have webhooks told of it.

    `cluster`: from whose leases the charges are taken; None: no other cluster shares the budgets.
    Returns False, and changes nothing, if the job is not claimed with this fence any more. A claim
    that has ended the job already in the same way gets True again, and nothing is done twice.
    """
    row = connection.execute(select(JOBS).where(JOBS.c.id == ending.id)).first()
    if row is None:
        return False
    job = Job(*row)
    if ending.fence is not None and job.fence != ending.fence:
        return False
    expected = "queued" if ending.fence is None else "running"
    if job.state != expected:
        return job.state == ending.state
    _end(connection, job, ending, now)
    if ending.usages:
        usages = [usage._replace(request_id=job.request_id) for usage in ending.usages]
        write_usage(connection, usages, now, month_of(now), cluster)
    return True


def cancel(connection: Connection, job: Job, now: float) -> bool:
    """End a job as cancelled, whoever has claimed it; return False if it has ended already."""
    row = connection.execute(select(JOBS).where(JOBS.c.id == job.id)).one()
    there = Job(*row)
    if there.state not in OPEN:
        return False
    _end(connection, there, Ending(there.id, there.fence, "cancelled"), now)
    return True


def _end(connection: Connection, job: Job, ending: Ending, now: float) -> None:
    """End an open job."""
    values = {
        "state": ending.state,
        "result": ending.result,
        "error": ending.error,
        "ended": now,
        "owner": None,
        "lease_until": None,
    }
    connection.execute(update(JOBS).where(JOBS.c.id == job.id).values(values))
    counts = CountChanges()
    if job.state == "queued":
        counts.queued(kind_of(job), -1, -job.work_s)
    else:
        counts.running(kind_of(job), -1, -job.work_s)
    counts.write(connection)
    if job.batch:
        count_ended(connection, job.batch, ending.state, now)
    else:
        enqueue_event(connection, job.tenant, f"job.{ending.state}", job.id, now)
