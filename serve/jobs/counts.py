"""Counts jobs that wait and run, by kind; kept beside the jobs, because counting takes long."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from ..store.schema import JOB_COUNTS as COUNTS
from .job import Kind


class _Change(NamedTuple):
    queued: int = 0
    queued_work_s: float = 0.0
    running: int = 0
    running_work_s: float = 0.0


class CountChanges:
    """Changes of the counts, collected in a transaction and written at its end by `write`."""

    def __init__(self) -> None:
        self._changes: defaultdict[Kind, _Change] = defaultdict(_Change)

    def queued(self, kind: Kind, jobs: int, work_s: float) -> None:
        """Count jobs that are queued; negative numbers: that are no longer."""
        before = self._changes[kind]
        self._changes[kind] = before._replace(
            queued=before.queued + jobs, queued_work_s=before.queued_work_s + work_s
        )

    def running(self, kind: Kind, jobs: int, work_s: float) -> None:
        """Count jobs that are running; negative numbers: that are no longer."""
        before = self._changes[kind]
        self._changes[kind] = before._replace(
            running=before.running + jobs, running_work_s=before.running_work_s + work_s
        )

    def write(self, connection: Connection) -> None:
        rows = [kind._asdict() | change._asdict() for kind, change in self._changes.items()]
        if rows:
            connection.execute(_ADD[connection.dialect.name], rows)


def _adding(fresh: sqlite.Insert | postgresql.Insert) -> sqlite.Insert | postgresql.Insert:
    """The statement that adds to counts, or begins them."""
    kind = [COUNTS.c[name] for name in Kind._fields]
    more = {name: COUNTS.c[name] + fresh.excluded[name] for name in _Change._fields}
    return fresh.on_conflict_do_update(index_elements=kind, set_=more)


# By dialect; made once, because making a statement costs more than executing it.
_ADD = {"sqlite": _adding(sqlite.insert(COUNTS)), "postgresql": _adding(postgresql.insert(COUNTS))}


def forget_empty(connection: Connection) -> None:
    """Delete the counts of kinds that have no job."""
    connection.execute(delete(COUNTS).where(COUNTS.c.queued == 0, COUNTS.c.running == 0))


def any_waiting(connection: Connection) -> bool:
    """Return whether any job waits."""
    return connection.execute(_WAITING).first() is not None


_WAITING = select(COUNTS.c.tenant).where(COUNTS.c.queued > 0).limit(1)
