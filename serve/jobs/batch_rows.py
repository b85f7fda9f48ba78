"""Batches in the database. Each function is a part of a transaction.

The lines of a batch become jobs a few at a time, and the place in the file moves on in the same
transaction: so reading goes on where it stopped, whatever dies meanwhile.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from sqlalchemy import Connection, Select, case, func, insert, select, update

from ..store.schema import BATCHES, FILES, JOBS, next_numbers
from .counts import CountChanges
from .job import Kind, NewJob, new_id
from .outbox import enqueue_event

BatchState = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
STATES: tuple[BatchState, ...] = get_args(BatchState)
READ = "validating", "in_progress", "cancelling"  # states in which the file is still needed
WINDOW_S = 24 * 3600.0  # that a batch may take
SOME = 500  # lines that wait and are cancelled in one transaction
FEW = 100  # lines that run and are cancelled, one by one


class Batch(NamedTuple):
    """A batch as it is stored. Times are Unix times by the database's clock.

    `times`: JSON, when it came into each state. `errors`: JSON, why its file cannot be used.
    `next_line`, `next_part`, `next_byte`: where reading of its file goes on. `lease_until`: until
    then a process reads it.
    """

    id: str
    number: int
    tenant: str
    key_id: str
    endpoint: str
    input_file: str
    metadata: str
    output_expires_s: int | None
    state: BatchState
    times: str
    errors: str
    total: int
    completed: int
    failed: int
    ended_lines: int
    next_line: int
    next_part: int
    next_byte: int
    lease_until: float
    created: float
    expires: float
    ended: float | None


class NewLine(NamedTuple):
    """A line of a batch as a job; `state`: "queued", or how it has ended with the `error`."""

    job: NewJob
    state: Literal["queued", "failed", "expired", "cancelled"] = "queued"
    error: str | None = None


class Place(NamedTuple):
    """A place in a batch's file: a line from 1, and where it begins."""

    line: int
    part: int
    byte: int


def new_batch(
    id: str,
    tenant: str,
    key_id: str,
    endpoint: str,
    input_file: str,
    now: float,
    *,
    metadata: str = "{}",
    output_expires_s: int | None = None,
) -> Batch:
    """A batch that begins at the Unix time `now`, before its file is read."""
    return Batch(
        id=id,
        number=0,
        tenant=tenant,
        key_id=key_id,
        endpoint=endpoint,
        input_file=input_file,
        metadata=metadata,
        output_expires_s=output_expires_s,
        state="validating",
        times=json.dumps({"validating": now}),
        errors="[]",
        total=0,
        completed=0,
        failed=0,
        ended_lines=0,
        next_line=1,
        next_part=0,
        next_byte=0,
        lease_until=0.0,
        created=now,
        expires=now + WINDOW_S,
        ended=None,
    )


def create(connection: Connection, batch: Batch) -> Batch:
    """Store a batch."""
    number = next_numbers(connection, BATCHES.name) + 1
    stored = batch._replace(number=number)
    connection.execute(insert(BATCHES).values(**stored._asdict()))
    return stored


def find(connection: Connection, id: str) -> Batch | None:
    row = connection.execute(select(BATCHES).where(BATCHES.c.id == id)).first()
    return Batch(*row) if row else None


def unread_lines(connection: Connection, tenant: str) -> int:
    """Count the lines of a tenant's open batches that have not become jobs yet."""
    lines = case(
        (BATCHES.c.state == "validating", FILES.c.lines),
        else_=BATCHES.c.total - BATCHES.c.next_line + 1,
    )
    mine = BATCHES.c.tenant == tenant, BATCHES.c.ended.is_(None), BATCHES.c.state.in_(READ)
    found = select(func.sum(lines)).join(FILES, FILES.c.id == BATCHES.c.input_file).where(*mine)
    return int(connection.execute(found).scalar() or 0)


def reads(connection: Connection, file: str) -> bool:
    """Return whether a batch that has not ended needs a file."""
    open_batches = select(BATCHES.c.id).where(BATCHES.c.input_file == file)
    return connection.execute(open_batches.where(BATCHES.c.ended.is_(None))).first() is not None


def take_reading(connection: Connection, until: float, now: float) -> Batch | None:
    """Lease the reading of a batch whose file is not read to its end; None: there is none."""
    unread = (BATCHES.c.state == "validating") | (BATCHES.c.next_line <= BATCHES.c.total)
    open_ones = BATCHES.c.ended.is_(None), BATCHES.c.state.in_(READ)
    due = select(BATCHES).where(*open_ones, unread, BATCHES.c.lease_until < now)
    # The one that has waited longest, so that one which cannot go on does not hold up the others.
    order = BATCHES.c.lease_until, BATCHES.c.number
    row = connection.execute(due.order_by(*order).limit(1)).first()
    if row is None:
        return None
    lease_reading(connection, row.id, until)
    return Batch(*row)


def lease_reading(connection: Connection, id: str, until: float) -> None:
    """Keep others from reading a batch's file until then."""
    connection.execute(update(BATCHES).where(BATCHES.c.id == id).values(lease_until=until))


def begin(connection: Connection, id: str, lines: int, until: float, now: float) -> None:
    """Begin a batch whose file was found valid, with so many lines."""
    batch = find(connection, id)
    if batch and batch.state == "validating":
        set_state(connection, batch, "in_progress", now, total=lines, lease_until=until)


def refuse(
    connection: Connection, id: str, errors: Sequence[Mapping[str, Any]], now: float
) -> None:
    """End a batch whose file cannot be used."""
    batch = find(connection, id)
    if batch and batch.state == "validating":
        set_state(connection, batch, "failed", now, errors=json.dumps(errors), ended=now)
        enqueue_event(connection, batch.tenant, "batch.failed", id, now)


def add_lines(
    connection: Connection,
    batch: Batch,
    lines: Sequence[NewLine],
    after: Place,
    until: float,
    now: float,
) -> Batch | None:
    """Store lines of a batch, and note that reading goes on at `after`; returns the batch then.

    Returns None, and stores nothing, if another process has read these lines meanwhile.
    """
    there = find(connection, batch.id)
    if there is None or there.next_line != batch.next_line or there.state not in READ:
        return None
    before = next_numbers(connection, JOBS.name, len(lines))
    counts, ended = CountChanges(), Counter[str]()
    rows = []
    for number, (job, state, error) in enumerate(lines, before + 1):
        over = state != "queued"
        more = {"state": state, "error": error, "ended": now if over else None}
        same = {"fence": 0, "lost": 0, "not_before": job.created, "number": number}
        rows.append({**job._asdict(), **more, **same})
        if over:
            ended[state] += 1
        else:
            kind = Kind(job.tenant, job.lane, job.model, job.precision)
            counts.queued(kind, 1, job.work_s)
    connection.execute(insert(JOBS), rows)
    counts.write(connection)
    values = {"next_line": after.line, "next_part": after.part, "next_byte": after.byte}
    connection.execute(
        update(BATCHES).where(BATCHES.c.id == batch.id).values(**values, lease_until=until)
    )
    for how, count in ended.items():
        count_ended(connection, batch.id, how, now, count)
    return find(connection, batch.id)


def count_ended(connection: Connection, id: str, state: str, now: float, lines: int = 1) -> None:
    """Count lines that have ended; with the last one the batch ends."""
    counted = {"succeeded": BATCHES.c.completed, "failed": BATCHES.c.failed}.get(state)
    more = {counted.name: counted + lines} if counted is not None else {}
    connection.execute(
        update(BATCHES)
        .where(BATCHES.c.id == id)
        .values(ended_lines=BATCHES.c.ended_lines + lines, **more)
    )
    batch = find(connection, id)
    if batch and batch.ended is None and batch.ended_lines == batch.total > 0:
        _finish(connection, batch, now)


def _finish(connection: Connection, batch: Batch, now: float) -> None:
    """End a batch whose lines have all ended, and make its files."""
    state: BatchState = "completed"
    if batch.state == "cancelling":
        state = "cancelled"
    elif batch.completed + batch.failed < batch.total and now >= batch.expires:
        state = "expired"
    expires = None if batch.output_expires_s is None else now + batch.output_expires_s
    made = [("output", batch.completed), ("error", batch.total - batch.completed)]
    for kind, lines in made:
        if lines:
            row = {
                "id": new_id("file"),
                "number": next_numbers(connection, FILES.name) + 1,
                "tenant": batch.tenant,
                "name": f"{batch.id}_{kind}.jsonl",
                "purpose": "batch_output",
                "bytes": None,
                "lines": lines,
                "kind": kind,
                "batch": batch.id,
                "whole": 1,
                "created": now,
                "expires": expires,
            }
            connection.execute(insert(FILES).values(row))
    if state != "cancelled":
        batch = set_state(connection, batch, "finalizing", now)
    set_state(connection, batch, state, now, ended=now)
    enqueue_event(connection, batch.tenant, f"batch.{state}", batch.id, now)


def ask_to_cancel(connection: Connection, batch: Batch, now: float) -> bool:
    """Begin to cancel a batch, of which `cancel_some` does the rest; False: it has ended."""
    there = find(connection, batch.id)
    if there is None or there.ended is not None:
        return False
    if there.state == "validating":
        batch = set_state(connection, there, "cancelling", now)
        set_state(connection, batch, "cancelled", now, ended=now)
        enqueue_event(connection, batch.tenant, "batch.cancelled", batch.id, now)
    elif there.state == "in_progress":
        set_state(connection, there, "cancelling", now)
    return True


def cancel_some(connection: Connection, now: float) -> int:
    """Cancel some lines that wait, of batches that are being cancelled; returns their number."""
    found = 0
    for id in connection.execute(_cancelling()).scalars().all():
        if found >= SOME:
            break
        waiting = select(JOBS.c.id).where(JOBS.c.batch == id, JOBS.c.state == "queued")
        waiting = waiting.limit(SOME - found)
        ended = (
            update(JOBS)
            .where(JOBS.c.id.in_(waiting.scalar_subquery()))
            .values(state="cancelled", ended=now)
            .returning(JOBS.c.tenant, JOBS.c.lane, JOBS.c.model, JOBS.c.precision, JOBS.c.work_s)
        )
        rows = connection.execute(ended).all()
        counts = CountChanges()
        for *kind, work_s in rows:
            counts.queued(Kind(*kind), -1, -work_s)
        counts.write(connection)
        if rows:
            count_ended(connection, id, "cancelled", now, len(rows))
        found += len(rows)
    return found


def running_to_cancel(connection: Connection) -> Collection[str]:
    """The ids of running lines whose batches are being cancelled, a few of them."""
    of = _cancelling().scalar_subquery()
    lines = select(JOBS.c.id).where(JOBS.c.batch.in_(of), JOBS.c.state == "running").limit(FEW)
    return connection.execute(lines).scalars().all()


def _cancelling() -> Select[Any]:
    return select(BATCHES.c.id).where(BATCHES.c.ended.is_(None), BATCHES.c.state == "cancelling")


def set_state(
    connection: Connection, batch: Batch, state: BatchState, now: float, **more: Any
) -> Batch:
    """Bring a batch into a state, and change further columns."""
    times = json.dumps({**json.loads(batch.times), state: now})
    values = {"state": state, "times": times, **more}
    connection.execute(update(BATCHES).where(BATCHES.c.id == batch.id).values(values))
    return batch._replace(**values)
