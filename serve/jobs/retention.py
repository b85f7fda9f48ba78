"""Forgetting of old jobs, batches, files and messages, and of all that a tenant has.

Each transaction is short, however much there is, because no other process can write meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, delete, select

from ..store.database import Database
from ..store.schema import BATCHES, DELIVERIES, FILE_PARTS, FILES, JOB_COUNTS, JOBS, WEBHOOKS
from .encoding import StoredRequest, images_of
from .job import Job

SOME = 200  # rows in one transaction
PARTS = 16  # parts of files in one transaction, of a megabyte each
UPLOAD_S = 86400.0  # after which an upload that did not end is forgotten


class Forgotten(NamedTuple):
    """Jobs that are gone: their number, and the names of what they have in the result store."""

    jobs: int
    names: tuple[str, ...]


def forget_jobs(connection: Connection, before: float) -> Forgotten:
    """Forget some jobs that ended before a Unix time, and batches that did so.

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


def forget_file(connection: Connection, now: float) -> bool:
    """Forget a part of a file; returns whether there may be more to forget.

    Files are forgotten that have expired by `now`, whose batch is forgotten, or whose upload has
    not ended within `UPLOAD_S`. A file that a batch still needs stays.
    """
    of_old = FILES.c.batch.is_not(None) & ~(
        select(BATCHES.c.id).where(BATCHES.c.id == FILES.c.batch).exists()
    )
    unfinished = (FILES.c.whole == 0) & (FILES.c.created < now - UPLOAD_S)
    needed = select(BATCHES.c.id).where(
        BATCHES.c.input_file == FILES.c.id, BATCHES.c.ended.is_(None)
    )
    old = (FILES.c.expires <= now) | of_old | unfinished
    gone = select(FILES.c.id).where(old, ~needed.exists()).limit(1)
    id = connection.execute(gone).scalar()
    if id is None:
        return False
    if not _forget_parts(connection, id):
        connection.execute(delete(FILES).where(FILES.c.id == id))
    return True


def _forget_parts(connection: Connection, file: str) -> bool:
    """Delete some parts of a file; returns whether there were any."""
    some = select(FILE_PARTS.c.part).where(FILE_PARTS.c.file == file).limit(PARTS)
    parts = connection.execute(some).scalars().all()
    there = and_(FILE_PARTS.c.file == file, FILE_PARTS.c.part.in_(parts))
    connection.execute(delete(FILE_PARTS).where(there))
    return bool(parts)


def forget_deliveries(connection: Connection, before: float) -> bool:
    """Forget some messages that ended before a Unix time; returns whether there may be more."""
    some = select(DELIVERIES.c.id).where(DELIVERIES.c.ended < before).limit(SOME)
    ids = connection.execute(some).scalars().all()
    connection.execute(delete(DELIVERIES).where(DELIVERIES.c.id.in_(ids)))
    return len(ids) == SOME


def erase(database: Database, tenant: str) -> int:
    """Delete all jobs, batches, files and webhooks of a tenant; return the number of jobs.

    Jobs that run now end without a charge. Delete the tenant's images after this. Raises
    `StoreUnavailable` if the database cannot be used; what was deleted until then is gone.
    """

    def erase_file(connection: Connection) -> bool:
        found = select(FILES.c.id).where(FILES.c.tenant == tenant).limit(1)
        id = connection.execute(found).scalar()
        if id is not None and not _forget_parts(connection, id):
            connection.execute(delete(FILES).where(FILES.c.id == id))
        return id is not None

    def erase_counts(connection: Connection) -> None:
        connection.execute(delete(JOB_COUNTS).where(JOB_COUNTS.c.tenant == tenant))

    jobs = 0
    for table in (WEBHOOKS, DELIVERIES, BATCHES, JOBS):
        erase_some: Callable[[Connection], int] = partial(_erase_some, table=table, tenant=tenant)
        while found := database.write(erase_some):
            jobs += found if table is JOBS else 0
    database.write(erase_counts)
    while database.write(erase_file):
        pass
    return jobs


def _erase_some(connection: Connection, table: Any, tenant: str) -> int:
    """Delete some rows of a tenant; return their number."""
    some = select(table.c.id).where(table.c.tenant == tenant).limit(10 * SOME)
    return connection.execute(delete(table).where(table.c.id.in_(some.scalar_subquery()))).rowcount


def names_of(job: Job) -> list[str]:
    """The names of everything that a job has in the result store."""
    names = [image.name for image in images_of(job.result)] if job.result else []
    if job.request and (pictures := StoredRequest.of(job.request).pictures):
        names += [name for name in pictures if name]
    return names
