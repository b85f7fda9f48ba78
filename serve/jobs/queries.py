"""Queries of stored jobs, and lists in pages. Each function is a part of a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Table, func, select

from ..store.schema import JOBS
from .job import Job

MOST_PLACES = 10_000  # jobs before one that are counted


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
