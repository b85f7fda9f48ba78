"""Claims of jobs: taken, renewed, given back, and lost. Each function is a part of a transaction.

All times are those of the database's clock, so processes need not agree on the time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from sqlalchemy import Connection, select, update

from ..store.schema import JOB_COUNTS as COUNTS
from ..store.schema import JOBS
from .counts import CountChanges
from .encoding import StoredError
from .endings import Ending, end
from .job import MOST_LOST, Job, Kind, State, kind_of

SOME = 500  # jobs that one statement names
FEW = 100  # jobs that are changed one by one in a transaction
LOST = StoredError(
    500,
    "server_error",
    "job_lost",
    f"the process that ran this job was lost {MOST_LOST} times; the job itself may be the cause",
)


class JobClaim(NamedTuple):
    """A job and the fence of a claim of it."""

    id: str
    fence: int


def claim(
    connection: Connection,
    owner: str,
    room: Mapping[str, int],
    group: Callable[[Kind], str],
    window: Callable[[Kind], int],
    until: float,
    now: float,
) -> list[Job]:
    """Claim jobs that wait, the oldest of each kind first; lines of batches after all others.

    `owner`: this process. `room`: how many jobs may be claimed of a group, and of "all"; a group
    that it does not name has no limit of its own. `group`: returns the group of a kind. `window`:
    returns how many jobs of a kind may run at a time, in all processes together. `until`: when the
    leases end.
    """
    kinds = connection.execute(select(COUNTS).where(COUNTS.c.queued > 0)).all()
    random.shuffle(kinds)  # type: ignore[arg-type]  # so that no kind is always the last
    kinds.sort(key=lambda row: row.lane == "batch")  # type: ignore[attr-defined]
    left = dict(room)
    found: list[Job] = []
    for row in kinds:
        kind = Kind(row.tenant, row.lane, row.model, row.precision)
        groups = [name for name in ("all", group(kind)) if name in left]
        some = min(window(kind) - row.running, SOME, *(left[name] for name in groups))
        if some > 0:
            claimed = _claim(connection, kind, owner, some, until, now)
            found += claimed
            for name in groups:
                left[name] -= len(claimed)
    counts = CountChanges()
    for job in found:
        counts.queued(kind_of(job), -1, -job.work_s)
        counts.running(kind_of(job), 1, job.work_s)
    counts.write(connection)
    return found


def _claim(
    connection: Connection, kind: Kind, owner: str, some: int, until: float, now: float
) -> list[Job]:
    waiting = (
        select(JOBS.c.id)
        .where(
            JOBS.c.state == "queued", *(JOBS.c[name] == of for name, of in kind._asdict().items())
        )
        .where(JOBS.c.not_before <= now)
        .order_by(JOBS.c.number)
        .limit(some)
    )
    values = {"state": "running", "owner": owner, "lease_until": until}
    taken = (
        update(JOBS)
        .where(JOBS.c.id.in_(waiting.scalar_subquery()))
        .values(**values, fence=JOBS.c.fence + 1, started=now)
        .returning(JOBS)
    )
    return sorted((Job(*row) for row in connection.execute(taken)), key=lambda job: job.number)


def renew(
    connection: Connection, claims: Collection[JobClaim], until: float
) -> dict[str, tuple[State, int]]:
    """Renew claims; return the state and fence of those jobs that are no longer claimed by them."""
    fences = dict(claims)
    held: dict[str, tuple[State, int]] = {}
    columns = JOBS.c.id, JOBS.c.state, JOBS.c.fence
    for part in _parts(fences):
        rows = connection.execute(select(*columns).where(JOBS.c.id.in_(part))).all()
        held |= {row.id: (row.state, row.fence) for row in rows}
    mine = [id for id, found in held.items() if found == ("running", fences[id])]
    for part in _parts(mine):
        connection.execute(update(JOBS).where(JOBS.c.id.in_(part)).values(lease_until=until))
    gone: Mapping[str, tuple[State, int]] = dict.fromkeys(fences, ("cancelled", -1))
    return {id: held.get(id, gone[id]) for id in fences if id not in mine}


def give_back(
    connection: Connection, claims: Iterable[JobClaim], not_before: float, now: float, *, lost: bool
) -> None:
    """Queue claimed jobs again; `lost`: their processes did not end as they should.

    A job whose claims were lost `MOST_LOST` times has failed.
    """
    counts = CountChanges()
    for id, fence in claims:
        there = JOBS.c.id == id, JOBS.c.state == "running", JOBS.c.fence == fence
        row = connection.execute(select(JOBS).where(*there)).first()
        if row is None:
            continue
        if lost and row.lost + 1 >= MOST_LOST:
            end(connection, Ending(id, fence, "failed", error=LOST.as_json()), now)
            continue
        values = {"state": "queued", "owner": None, "lease_until": None, "not_before": not_before}
        connection.execute(update(JOBS).where(*there).values(**values, lost=row.lost + lost))
        job = Job(*row)
        counts.queued(kind_of(job), 1, job.work_s)
        counts.running(kind_of(job), -1, -job.work_s)
    counts.write(connection)


def queue_again(connection: Connection, id: str, most_s: float, now: float) -> bool:
    """Queue a failed job again, with the time that it had; returns False if it is none.

    `most_s`: seconds that a job may take at most.
    """
    failed = JOBS.c.id == id, JOBS.c.state == "failed", JOBS.c.batch.is_(None)
    row = connection.execute(select(JOBS).where(*failed)).first()
    if row is None:
        return False
    job = Job(*row)
    values = {"state": "queued", "lost": 0, "error": None, "ended": None, "not_before": now}
    expires = now + min(job.expires - job.created, most_s)
    connection.execute(update(JOBS).where(*failed).values(**values, expires=expires))
    counts = CountChanges()
    counts.queued(kind_of(job), 1, job.work_s)
    counts.write(connection)
    return True


def give_back_unknown(
    connection: Connection, owner: str, known: Collection[str], now: float
) -> None:
    """Queue jobs again that `owner` has claimed without knowing it, because the answer was lost.

    `known`: the ids of the jobs that it runs.
    """
    mine = select(JOBS.c.id, JOBS.c.fence).where(JOBS.c.state == "running", JOBS.c.owner == owner)
    unknown = [JobClaim(*row) for row in connection.execute(mine) if row.id not in known]
    give_back(connection, unknown, now, now, lost=False)


def requeue_lost(connection: Connection, now: float) -> int:
    """Queue some jobs again whose lease has ended; return their number."""
    late = select(JOBS.c.id, JOBS.c.fence)
    late = late.where(JOBS.c.state == "running", JOBS.c.lease_until < now).limit(FEW)
    lost = [JobClaim(*row) for row in connection.execute(late)]
    give_back(connection, lost, now, now, lost=True)
    return len(lost)


def expire_waiting(connection: Connection, now: float) -> int:
    """End some jobs that have expired while they waited; return their number."""
    old = select(JOBS.c.id).where(JOBS.c.state == "queued", JOBS.c.expires <= now).limit(FEW)
    expired = connection.execute(old).scalars().all()
    for id in expired:
        end(connection, Ending(id, None, "expired"), now)
    return len(expired)


def _parts(ids: Iterable[str]) -> Iterable[list[str]]:
    """The ids in parts that one statement can name."""
    names = list(ids)
    return (names[begin : begin + SOME] for begin in range(0, len(names), SOME))
