"""The tables of the store, and the steps that bring an older database to them.

A step only adds: tables, and columns with a default. So an older release can go on writing to a
database that a newer one has brought up to date, for the time of an upgrade.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    insert,
    inspect,
    select,
    text,
    update,
)

METADATA = MetaData()

VERSIONS = Table(
    "octet_schema", METADATA, Column("version", Integer, primary_key=True, autoincrement=False)
)

# The last number that was given out, by name. It never falls, even if rows are deleted.
COUNTERS = Table(
    "octet_counters",
    METADATA,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

# One row for each charge and each reversal. `id` grows in the order of commits, without a gap that
# is filled later, so that whoever reads on from an id misses nothing.
USAGE = Table(
    "octet_usage",
    METADATA,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("time", String(24), nullable=False),  # 2026-11-22T20:36:36.156Z
    Column("call", String(64), nullable=False),
    Column("image", Integer, nullable=False),
    Column("reversal", Integer, nullable=False),  # 0: a charge; 1: the charge is taken back
    Column("tenant", String(63), nullable=False),
    Column("request_id", String(200), nullable=False),
    Column("model", String(200), nullable=False),
    Column("precision", String(16), nullable=False),
    Column("size", String(16), nullable=False),
    Column("steps", Integer, nullable=False),
    Column("work_s", Float(53), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("key_id", String(12)),  # of the API key that asked for the image
    Column("release", String(32)),  # of Octet that wrote the record
    Column("preset", String(32)),  # of the model's settings, by which the image was cheaper
    UniqueConstraint("call", "image", "reversal"),
    Index("octet_usage_tenant_id", "tenant", "id"),
    Index("octet_usage_time", "time"),
)

# Charges that were taken back before they came: they are never written.
VOIDS = Table(
    "octet_voids",
    METADATA,
    Column("call", String(64), nullable=False),
    Column("image", Integer, nullable=False),
    Column("time", String(24), nullable=False),
    PrimaryKeyConstraint("call", "image"),
)

# The sums of a tenant's month, changed in the transaction that writes the records.
SUMS = Table(
    "octet_usage_sums",
    METADATA,
    Column("month", String(7), nullable=False),  # 2026-11
    Column("tenant", String(63), nullable=False),
    Column("images", BigInteger, nullable=False),
    Column("work_s", Float(53), nullable=False),
    Column("last_id", BigInteger, nullable=False),  # of the newest record in the sums
    PrimaryKeyConstraint("month", "tenant"),
)


# One row for each tenant. `changed` is the number of the change that wrote the row last; a deleted
# tenant keeps its row, so that whoever reads the changes learns of it.
TENANTS = Table(
    "octet_tenants",
    METADATA,
    Column("id", String(63), primary_key=True),
    Column("limits", Text, nullable=False),  # JSON: the fields of a `Tenant` that are given
    Column("managed_by", String(8), nullable=False),  # "api" or "file"
    Column("created", String(24), nullable=False),
    Column("deleted", String(24)),
    Column("changed", BigInteger, nullable=False),
    Index("octet_tenants_changed", "changed"),
)

# One row for each API key, of which only the SHA-256 is kept.
KEYS = Table(
    "octet_keys",
    METADATA,
    Column("id", String(12), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("scopes", String(64), nullable=False),  # separated by spaces
    Column("managed_by", String(8), nullable=False),
    Column("created", String(24), nullable=False),
    Column("expires", String(24)),
    Column("revoked", String(24)),
    Column("last_used", String(24)),
    Column("changed", BigInteger, nullable=False),
    Index("octet_keys_tenant", "tenant"),
    Index("octet_keys_changed", "changed"),
)

# One row for each change of a tenant or a key; rows are only ever added.
AUDIT = Table(
    "octet_audit",
    METADATA,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("time", String(24), nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(32), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("key_id", String(12)),
    Column("details", Text, nullable=False),  # JSON
)

# The files of usage records that were imported, and how much of each.
IMPORTS = Table(
    "octet_imports",
    METADATA,
    Column("file", String(200), primary_key=True),
    Column("bytes", BigInteger, nullable=False),
)


# The clusters that use the database: which Dispatcher each has, when it was heard of last by the
# database's clock, and what its tenants have used.
CLUSTERS = Table(
    "octet_clusters",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("incarnation", String(64), nullable=False),
    Column("seen", Float(53), nullable=False),
    Column("counts", Text, nullable=False),  # JSON
)

# The work that each cluster may still spend of a tenant's budget.
LEASES = Table(
    "octet_budget_leases",
    METADATA,
    Column("month", String(7), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("cluster", String(64), nullable=False),
    Column("work_s", Float(53), nullable=False),
    PrimaryKeyConstraint("month", "tenant", "cluster"),
)


# What was answered to requests with an Idempotency-Key, until it is forgotten.
ANSWERS = Table(
    "octet_answers",
    METADATA,
    Column("tenant", String(63), nullable=False),
    Column("key", String(255), nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the request
    Column("call", String(64), nullable=False),  # the call that generates the images
    Column("claim", String(64), nullable=False),  # who answers it, among all who have asked
    Column("cluster", String(64), nullable=False),
    Column("session", String(64), nullable=False),  # of the Ingress that answers
    Column("until", Float(53), nullable=False),  # Unix time at which it is given up, or forgotten
    Column("status", Integer),  # null: it is not answered yet
    Column("headers", Text),  # JSON
    Column("body", LargeBinary),
    Column("bytes", Integer),  # of the body
    PrimaryKeyConstraint("tenant", "key"),
    Index("octet_answers_until", "until"),
)


def _partial(name: str, where: str, *columns: str) -> Index:
    """An index of the rows for which `where` holds."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


# One row for each job and each line of a batch, until it is forgotten. `number` grows in the order
# in which jobs were accepted. Times are Unix times by the database's clock.
JOBS = Table(
    "octet_jobs",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("lane", String(8), nullable=False),  # "job" or "batch"
    Column("endpoint", String(16), nullable=False),  # "generations" or "edits"
    Column("model", String(200), nullable=False),
    Column("precision", String(8), nullable=False),  # as the client asks for it
    Column("work_s", Float(53), nullable=False),  # the work of all its images, as predicted
    Column("images", Integer, nullable=False),
    Column("request", Text, nullable=False),  # JSON, see serve.jobs.encoding
    Column("digest", String(64), nullable=False),  # SHA-256 of the request with an Idempotency-Key
    Column("request_id", String(200), nullable=False),
    Column("key_id", String(12), nullable=False),
    Column("batch", String(40)),
    Column("line", Integer),  # of the batch's file, from 1
    Column("custom_id", String(512)),
    Column("state", String(10), nullable=False),
    Column("fence", Integer, nullable=False),  # how often it was claimed
    Column("owner", String(32)),  # the process that runs it
    Column("lease_until", Float(53)),
    Column("lost", Integer, nullable=False),  # how often it was claimed and then given up
    Column("not_before", Float(53), nullable=False),  # before that nobody claims it
    Column("created", Float(53), nullable=False),
    Column("started", Float(53)),
    Column("ended", Float(53)),
    Column("expires", Float(53), nullable=False),  # when it must have ended
    Column("result", Text),  # JSON: where its images are, and how they were generated
    Column("error", Text),  # JSON: the error with which it ended
    UniqueConstraint("batch", "line"),
    Index("octet_jobs_tenant", "tenant", "number"),
    Index("octet_jobs_ended", "ended"),
    _partial(
        "octet_jobs_waiting", "state = 'queued'", "tenant", "lane", "model", "precision", "number"
    ),
    _partial("octet_jobs_alone", "lane = 'job'", "tenant", "number"),
    _partial("octet_jobs_by_state", "lane = 'job'", "tenant", "state", "number"),
    _partial("octet_jobs_expiring", "state = 'queued'", "expires"),
    _partial("octet_jobs_running", "state = 'running'", "lease_until"),
)

# How many jobs of one kind wait and run, changed in the transactions that change the jobs.
JOB_COUNTS = Table(
    "octet_job_counts",
    METADATA,
    Column("tenant", String(63), nullable=False),
    Column("lane", String(8), nullable=False),
    Column("model", String(200), nullable=False),
    Column("precision", String(8), nullable=False),
    Column("queued", Integer, nullable=False),
    Column("queued_work_s", Float(53), nullable=False),
    Column("running", Integer, nullable=False),
    Column("running_work_s", Float(53), nullable=False),
    PrimaryKeyConstraint("tenant", "lane", "model", "precision"),
)

# Files that tenants have uploaded, in parts; the files that batches make are written when they are
# read, so they have no parts.
FILES = Table(
    "octet_files",
    METADATA,
    Column("id", String(48), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("name", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger),  # null: not known before it is read
    Column("lines", BigInteger, nullable=False),
    Column("kind", String(8), nullable=False),  # "upload", or "output" or "error" of a batch
    Column("batch", String(40)),  # that has made it
    Column("whole", Integer, nullable=False),  # 1: all parts are there
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53)),
    Index("octet_files_tenant", "tenant", "number"),
    Index("octet_files_expires", "expires"),
    Index("octet_files_batch", "batch"),
)
FILE_PARTS = Table(
    "octet_file_parts",
    METADATA,
    Column("file", String(48), nullable=False),
    Column("part", Integer, nullable=False),
    Column("content", LargeBinary, nullable=False),
    PrimaryKeyConstraint("file", "part"),
)

# One row for each batch. Its lines are jobs.
BATCHES = Table(
    "octet_batches",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("key_id", String(12), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", String(48), nullable=False),
    Column("metadata", Text, nullable=False),  # JSON
    Column("output_expires_s", Integer),
    Column("state", String(12), nullable=False),
    Column("times", Text, nullable=False),  # JSON: the Unix time of each state
    Column("errors", Text, nullable=False),  # JSON: why the file cannot be used
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("ended_lines", Integer, nullable=False),
    Column("next_line", Integer, nullable=False),  # of the file, that is to become a job
    Column("next_part", Integer, nullable=False),  # of the file, where that line begins,
    Column("next_byte", Integer, nullable=False),  # and the place in the part
    Column("lease_until", Float(53), nullable=False),  # of the process that reads the file
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False),
    Column("ended", Float(53)),
    Index("octet_batches_tenant", "tenant", "number"),
    Index("octet_batches_ended", "ended"),
    Index("octet_batches_file", "input_file"),
    _partial("octet_batches_open", "ended IS NULL", "state"),
)

# Where tenants want to hear of events, and what is still to be sent there.
WEBHOOKS = Table(
    "octet_webhook_endpoints",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("name", String(255), nullable=False),
    Column("url", Text, nullable=False),
    Column("events", Text, nullable=False),  # separated by spaces; empty: all
    Column("secret", String(64), nullable=False),
    Column("created", Float(53), nullable=False),
    Column("disabled", String(200)),  # why nothing is sent there any more
    Index("octet_webhooks_tenant", "tenant", "number"),
)
DELIVERIES = Table(
    "octet_webhook_deliveries",
    METADATA,
    Column("id", String(48), primary_key=True),
    Column("endpoint", String(40), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("type", String(32), nullable=False),
    Column("body", Text, nullable=False),  # JSON, as it is sent
    Column("state", String(10), nullable=False),  # "waiting", "delivered" or "dead"
    Column("attempts", Integer, nullable=False),
    Column("next", Float(53), nullable=False),  # when it is due, or its sender's lease ends
    Column("answer", String(200), nullable=False),  # to the last attempt
    Column("created", Float(53), nullable=False),
    Column("ended", Float(53)),
    Index("octet_deliveries_endpoint", "endpoint"),
    Index("octet_deliveries_ended", "ended"),
    _partial("octet_deliveries_due", "state = 'waiting'", "next"),
    _partial("octet_deliveries_old", "state = 'waiting'", "created"),
)


# Made once, because making a statement costs more than executing it.
_TAKE = (
    update(COUNTERS)
    .where(COUNTERS.c.name == bindparam("counter"))
    .values(value=COUNTERS.c.value + bindparam("count"))
    .returning(COUNTERS.c.value)
)


def next_numbers(connection: Connection, name: str, count: int = 1) -> int:
    """Take `count` numbers of the counter `name`; return the number before the first of them.

    Call it in a transaction that writes: then the numbers follow each other.
    """
    last: int = connection.execute(_TAKE, {"counter": name, "count": count}).scalar_one()
    return last - count


def _first_tables(connection: Connection) -> None:
    METADATA.create_all(connection, tables=[COUNTERS, USAGE, VOIDS, SUMS])
    connection.execute(insert(COUNTERS).values(name=USAGE.name, value=0))


def _tenants_and_clusters(connection: Connection) -> None:
    METADATA.create_all(
        connection, tables=[TENANTS, KEYS, AUDIT, IMPORTS, CLUSTERS, LEASES, ANSWERS]
    )
    connection.execute(insert(COUNTERS), [{"name": t.name, "value": 0} for t in (TENANTS, AUDIT)])
    _add_usage_columns(connection, USAGE.c.key_id, USAGE.c.release)


def _jobs(connection: Connection) -> None:
    numbered = [JOBS, FILES, BATCHES, WEBHOOKS]
    METADATA.create_all(connection, tables=[*numbered, JOB_COUNTS, FILE_PARTS, DELIVERIES])
    connection.execute(insert(COUNTERS), [{"name": t.name, "value": 0} for t in numbered])


def _presets(connection: Connection) -> None:
    _add_usage_columns(connection, USAGE.c.preset)


def _add_usage_columns(connection: Connection, *columns: Column[Any]) -> None:
    """Add the columns that the table of usage records does not have yet."""
    there = {column["name"] for column in inspect(connection).get_columns(USAGE.name)}
    for column in columns:
        if column.name not in there:
            kind = column.type.compile(connection.dialect)
            connection.execute(text(f"ALTER TABLE {USAGE.name} ADD COLUMN {column.name} {kind}"))


# Step n brings a database from version n to n + 1.
STEPS = (_first_tables, _tenants_and_clusters, _jobs, _presets)


def bring_up_to_date(connection: Connection) -> int:
    """Bring the database to the newest version, and return the version that it then has.

    Call it in a transaction that no other process can have at the same time. A database that is
    newer than this release stays as it is.
    """
    if not inspect(connection).has_table(VERSIONS.name):
        METADATA.create_all(connection, tables=[VERSIONS])
        connection.execute(insert(VERSIONS).values(version=0))
    found: int = connection.execute(select(VERSIONS.c.version)).scalar_one()
    for step in STEPS[found:]:
        step(connection)
    if found < len(STEPS):
        connection.execute(VERSIONS.update().values(version=len(STEPS)))
    return max(found, len(STEPS))
