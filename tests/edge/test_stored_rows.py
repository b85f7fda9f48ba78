"""Claims, batches, files and webhooks in a real database, without the processes that use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, select, update

from serve.jobs import batch_rows, files
from serve.jobs.acceptance import insert_jobs
from serve.jobs.batch_rows import NewLine, Place
from serve.jobs.claims import claim, queue_again
from serve.jobs.job import Kind, NewJob
from serve.jobs.outbox import enqueue_event
from serve.jobs.queries import find_job
from serve.jobs.webhook_rows import (
    OLDEST_S,
    EndpointChange,
    WebhookEndpoint,
    add_endpoint,
    change_endpoint,
    give_up_old,
    new_secret,
    take_due,
)
from serve.settings.application import sqlite_url
from serve.store.database import Database
from serve.store.schema import DELIVERIES, JOBS

A_JOB = NewJob(
    id="",
    tenant="acme",
    lane="job",
    endpoint="generations",
    model="m",
    precision="auto",
    work_s=1.0,
    images=1,
    request="{}",
    digest="",
    request_id="r",
    key_id="",
    created=0.0,
    expires=100.0,
)
A_BATCH = batch_rows.new_batch("batch_1", "acme", "", "/v1/images/generations", "file_1", 0.0)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(sqlite_url(tmp_path))) as database:
        yield database


def begin_batch(database: Database, id: str, tenant: str, lines: int) -> None:
    """Store a batch with so many lines, all of which wait."""
    batch = A_BATCH._replace(id=id, tenant=tenant, state="in_progress", total=lines)
    job = A_JOB._replace(tenant=tenant, lane="batch", batch=id, custom_id="x")
    made = [NewLine(job._replace(id=f"{id}_{i}", line=i)) for i in range(1, lines + 1)]

    def store(connection: Connection) -> None:
        stored = batch_rows.create(connection, batch)
        batch_rows.add_lines(connection, stored, made, Place(lines + 1, 0, 0), 0.0, 0.0)

    database.write(store)


def test_lines_of_many_batches_leave_room_for_jobs(database: Database) -> None:
    for number in range(10):
        begin_batch(database, f"batch_{number}", f"tenant-{number}", 4)
    jobs = [A_JOB._replace(id=f"job_{number}") for number in range(3)]
    database.write(lambda connection: insert_jobs(connection, jobs))

    def claimed(room: dict[str, int]) -> Counter[str]:
        found = database.write(
            lambda connection: claim(
                connection, "me", room, lambda kind: kind.lane, lambda kind: 4, 15.0, 0.0
            )
        )
        return Counter(job.lane for job in found)

    assert claimed({"all": 2, "batch": 1}) == {"job": 2}
    assert claimed({"all": 20, "batch": 5}) == {"job": 1, "batch": 5}
    assert claimed({"all": 20, "batch": 0}) == {}


def test_kinds_that_no_replica_can_run_take_only_their_part(database: Database) -> None:
    jobs = [A_JOB._replace(id=f"job_{i}", tenant=f"t{i}", model="idle") for i in range(9)]
    jobs.append(A_JOB._replace(id="job_9"))
    database.write(lambda connection: insert_jobs(connection, jobs))

    def group(kind: Kind) -> str:
        return "idle" if kind.model == "idle" else kind.lane

    room = {"all": 8, "idle": 2}
    found = database.write(
        lambda connection: claim(connection, "me", room, group, lambda kind: 4, 15.0, 0.0)
    )
    assert Counter(job.model for job in found) == {"idle": 2, "m": 1}


def test_lines_are_cancelled_a_few_at_a_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_rows, "SOME", 5)
    for id in ("batch_1", "batch_2"):
        begin_batch(database, id, "acme", 4)
        there = database.read(partial(batch_rows.find, id=id))
        assert there is not None
        database.write(partial(batch_rows.ask_to_cancel, batch=there, now=1.0))
    cancelled = [
        database.write(lambda connection: batch_rows.cancel_some(connection, 1.0)) for _ in range(3)
    ]
    assert cancelled == [5, 3, 0]
    for id in ("batch_1", "batch_2"):
        batch = database.read(partial(batch_rows.find, id=id))
        assert batch
        assert (batch.state, batch.ended_lines) == ("cancelled", 4)


def test_a_job_that_is_queued_again_gets_no_more_than_the_longest_time(database: Database) -> None:
    database.write(lambda connection: insert_jobs(connection, [A_JOB._replace(id="job_1")]))
    for now in (50.0, 500.0):
        failed = update(JOBS).values(state="failed", ended=now)
        database.write(partial(Connection.execute, statement=failed))
        assert database.write(partial(queue_again, id="job_1", most_s=100.0, now=now))
        job = database.read(lambda connection: find_job(connection, "job_1"))
        assert job
        assert job.expires == now + 100.0


def test_uploads_at_the_same_time_do_not_exceed_the_limit(database: Database) -> None:
    both = [files.new_upload("acme", "lines", 60.0) for _ in range(2)]
    for one in both:
        database.write(partial(files.begin, now=0.0, file=one))
    ended = [
        database.write(partial(files.finish, begun=one, size=60, lines=1, most=100)) for one in both
    ]
    assert [bool(file) for file in ended] == [True, False]
    assert database.read(lambda connection: files.stored_bytes(connection, "acme")) == 60


def an_endpoint(database: Database, tenant: str = "acme") -> WebhookEndpoint:
    given = EndpointChange("", "https://x.example", "")
    made = database.write(lambda connection: add_endpoint(connection, tenant, given, 0.0))
    assert made is not None
    return made


def test_a_change_of_an_endpoint_keeps_a_secret_that_was_made_meanwhile(
    database: Database,
) -> None:
    id = an_endpoint(database).id
    rotated = database.write(lambda connection: new_secret(connection, id, "acme"))
    change = EndpointChange(name="new")
    changed = database.write(lambda connection: change_endpoint(connection, id, "acme", change))
    assert rotated
    assert changed
    assert (changed.secret, changed.name) == (rotated.secret, "new")
    assert database.write(lambda c: change_endpoint(c, id, "another", change)) is None


def test_slow_endpoints_get_few_messages_at_a_time(database: Database) -> None:
    slow = {an_endpoint(database).id for _ in range(4)}
    an_endpoint(database, "other")
    for tenant in ("acme", "other"):
        for number in range(5):
            database.write(
                partial(
                    enqueue_event, tenant=tenant, event="job.succeeded", id=f"job_{number}", now=0.0
                )
            )
    taken = database.write(lambda c: take_due(c, {}, slow, 64, 60.0, 1.0))
    assert Counter(message.endpoint.tenant for message in taken) == {"acme": 2, "other": 4}


def test_messages_are_given_up_when_they_are_old(database: Database) -> None:
    an_endpoint(database)
    for number, at in enumerate((0.0, 1000.0)):
        database.write(
            partial(enqueue_event, tenant="acme", event="job.succeeded", id=f"job_{number}", now=at)
        )
    database.write(lambda connection: give_up_old(connection, OLDEST_S + 1.0))
    states = select(DELIVERIES.c.state).order_by(DELIVERIES.c.created)
    found = database.read(lambda connection: connection.execute(states).scalars().all())
    assert found == ["dead", "waiting"]
