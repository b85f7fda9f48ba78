"""Reading of stored jobs, batches, files and webhooks, in pages, and forgetting of old ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, delete, func, select

from ..store.schema import BATCHES, DELIVERIES, FILE_PARTS, FILES, JOB_COUNTS, JOBS, WEBHOOKS
from .encoding import StoredRequest, images_of
from .job import Job

SOME = 200  # rows that are forgotten in one transaction
MOST_PLACES = 10_000  # jobs before one that are counted


class Forgotten(NamedTuple):
    """Jobs that are gone: their number, and the names of what they have in the result store."""

    jobs: int
    names: tuple[str, ...]


def find_job(connection: Connection, id: str, tenant: str | None = None) -> Job | None:
    """The job with this id; None if there is none, or it is another tenant's."""
    row = connection.execute(select(JOBS).where(JOBS.c.id == id)).first()
    return Job(*row) if row and tenant in (None, row.tenant) else None


def find_jobs(connection: Connection, ids: Sequence[str]) -> list[Job]:
    return [Job(*row) for row in connection.execute(select(JOBS).where(JOBS.c.id.in_(ids)))]


def page(
    connection: Connection,
    table: Table,
    tenant: str | None,
    after: str | None,
    limit: int,
    **only: Any,
) -> Sequence[Any]:
    """The newest rows of a table that has numbers, newest first.

    `tenant`: of this tenant only. `after`: only rows that are older than the one with this id.
    `only`: values that columns must have. Returns up to `limit` + 1 rows, so that the caller sees
    whether there are more.
    """
    found = select(table)
    if tenant is not None:
        found = found.where(table.c.tenant == tenant)
    for name, value in only.items():
        found = found.where(table.c[name] == value)
    if after is not None:
        last = select(table.c.number).where(table.c.id == after).scalar_subquery()
        found = found.where(table.c.number < last)
    return connection.execute(found.order_by(table.c.number.desc()).limit(limit + 1)).all()


def place_of(connection: Connection, job: Job) -> int | None:
    """The place of a job that waits among those of its kind; 1 is the next. None: far behind."""
    before = select(JOBS.c.id).where(
        JOBS.c.state == "queued",
        JOBS.c.tenant == job.tenant,
        JOBS.c.lane == job.lane,
        JOBS.c.model == job.model,
        JOBS.c.precision == job.precision,
        JOBS.c.number < job.number,
    )
    some = before.limit(MOST_PLACES).subquery()
    count: int = connection.execute(select(func.count()).select_from(some)).scalar_one()
    return count + 1 if count < MOST_PLACES else None


def forget_jobs(connection: Connection, before: float) -> Forgotten:
    """Forget some jobs that ended before a Unix time, and batches, files and messages as old.

    The lines of a batch are forgotten when the batch is.
    """
    of_batches = (JOBS.c.batch.is_(None)) | JOBS.c.batch.in_(
        select(BATCHES.c.id).where(BATCHES.c.ended < before).scalar_subquery()
    )
    old = select(JOBS).where(JOBS.c.ended < before, of_batches).limit(SOME)
    jobs = [Job(*row) for row in connection.execute(old)]
    connection.execute(delete(JOBS).where(JOBS.c.id.in_([job.id for job in jobs])))
    if len(jobs) < SOME:
        left = select(JOBS.c.batch).where(JOBS.c.batch == BATCHES.c.id)
        connection.execute(delete(BATCHES).where(BATCHES.c.ended < before, ~left.exists()))
    return Forgotten(len(jobs), tuple(name for job in jobs for name in names_of(job)))


def forget_files(connection: Connection, before: float, now: float) -> int:
    """Forget some files; returns their number.

    They have expired by `now`, or their batch is forgotten, or their upload was begun before
    `before` and never ended.
    """
    of_old = FILES.c.batch.is_not(None) & ~(
        select(BATCHES.c.id).where(BATCHES.c.id == FILES.c.batch).exists()
    )
    unfinished = (FILES.c.whole == 0) & (FILES.c.created < before)
    needed = select(BATCHES.c.id).where(
        BATCHES.c.input_file == FILES.c.id, BATCHES.c.ended.is_(None)
    )
    old = (FILES.c.expires <= now) | of_old | unfinished
    gone = select(FILES.c.id).where(old, ~needed.exists()).limit(SOME)
    ids = connection.execute(gone).scalars().all()
    connection.execute(delete(FILE_PARTS).where(FILE_PARTS.c.file.in_(ids)))
    connection.execute(delete(FILES).where(FILES.c.id.in_(ids)))
    return len(ids)


def forget_deliveries(connection: Connection, before: float) -> None:
    """Forget messages of webhooks that ended before a Unix time, one way or the other."""
    connection.execute(delete(DELIVERIES).where(DELIVERIES.c.ended < before))


def erase(connection: Connection, tenant: str) -> int:
    """Delete all jobs, batches, files and webhooks of a tenant; return the number of jobs.

    Jobs that run now end without a charge. Images are deleted with all images of the tenant.
    """
    files = select(FILES.c.id).where(FILES.c.tenant == tenant).scalar_subquery()
    connection.execute(delete(FILE_PARTS).where(FILE_PARTS.c.file.in_(files)))
    for table in (FILES, BATCHES, WEBHOOKS, DELIVERIES, JOB_COUNTS):
        connection.execute(delete(table).where(table.c.tenant == tenant))
    return connection.execute(delete(JOBS).where(JOBS.c.tenant == tenant)).rowcount


def names_of(job: Job) -> list[str]:
    """The names of everything that a job has in the result store."""
    names = [image.name for image in images_of(job.result)] if job.result else []
    if job.request and (pictures := StoredRequest.of(job.request).pictures):
        names += [name for name in pictures if name]
    return names
