"""`octet jobs`: list, show, retry and cancel jobs in the database of the settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..errors import SettingsError
from ..settings.file import load_settings
from .terminal import AsJson, ConfigFile, console, examples

if TYPE_CHECKING:
    from ..jobs.batch_rows import Batch
    from ..jobs.job import Job
    from ..store.database import Database

app = typer.Typer(help="List, show, retry and cancel jobs and batches.", no_args_is_help=True)

JobOrBatch = Annotated[
    str, typer.Argument(metavar="ID", help="Id of a job or a batch.", show_default=False)
]
JobOrMessage = Annotated[
    str, typer.Argument(metavar="ID", help="Id of a job or a message.", show_default=False)
]
LOST = "%job_lost%"


class JobState(StrEnum):
    """The states of jobs."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@app.command(
    "list",
    epilog=examples(
        "octet jobs list octet.yaml", "octet jobs list octet.yaml --tenant acme --state failed"
    ),
)
def list_jobs(
    config: ConfigFile,
    tenant: Annotated[str | None, typer.Option(help="Jobs of this tenant; default: all.")] = None,
    state: Annotated[JobState | None, typer.Option(help="Jobs in this state.")] = None,
    batch: Annotated[str | None, typer.Option(help="Lines of this batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most jobs to list.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List jobs in the database of CONFIG, the newest first."""
    from ..jobs.job import Job
    from ..jobs.queries import page
    from ..store.schema import JOBS

    only = {"state": state and state.value, "batch": batch}
    given = {name: value for name, value in only.items() if value}
    with _database(config) as database:
        rows = database.read(lambda c: page(c, JOBS, tenant, None, limit, **given))[:limit]
    jobs = [Job(*row) for row in rows]
    if as_json:
        typer.echo(json.dumps([_facts(job) for job in jobs], indent=1))
        return
    names = ("id", "tenant", "lane", "state", "model", "created", "error")
    table = Table(*(Column(name, overflow="fold") for name in names))
    for job in jobs:
        facts = _facts(job)
        table.add_row(*(escape(str(facts[name] or "")) for name in names))
    Console().print(table)


@app.command(
    epilog=examples("octet jobs show octet.yaml job_5f", "octet jobs show octet.yaml batch_5f")
)
def show(config: ConfigFile, id: JobOrBatch) -> None:
    """Print a job or a batch as JSON, without what its tenant has written."""
    from ..jobs.batch_rows import find
    from ..jobs.queries import find_job

    with _database(config) as database:
        if job := database.read(lambda c: find_job(c, id)):
            typer.echo(json.dumps(_facts(job), indent=1))
        elif batch := database.read(lambda c: find(c, id)):
            typer.echo(json.dumps(_batch_facts(batch), indent=1))
        else:
            raise _unknown(id, database)


@app.command(
    epilog=examples("octet jobs retry octet.yaml job_5f", "octet jobs retry octet.yaml evt_5f")
)
def retry(config: ConfigFile, id: JobOrMessage) -> None:
    """Queue a failed job again, or send a message again that its webhook did not take."""
    from ..jobs.claims import queue_again
    from ..jobs.queries import find_job
    from ..jobs.webhook_rows import send_again

    most_s = load_settings(config).jobs.max_age_s
    with _database(config) as database:
        if database.write(lambda c: send_again(c, id, database.now(c))):
            console.print(f"{id}: will be sent again", highlight=False)
        elif database.write(lambda c: queue_again(c, id, most_s, database.now(c))):
            console.print(f"{id}: is queued again", highlight=False)
        elif job := database.read(lambda c: find_job(c, id)):
            if job.batch:
                raise SettingsError(f"{id} is a line of {job.batch}: put it into a new batch")
            raise SettingsError(f"{id} is {job.state}: only failed jobs are queued again")
        else:
            raise _unknown(id, database)


@app.command(
    epilog=examples("octet jobs cancel octet.yaml job_5f", "octet jobs cancel octet.yaml batch_5f")
)
def cancel(config: ConfigFile, id: JobOrBatch) -> None:
    """Cancel a job or a batch. A job that runs stops within seconds; its steps are charged."""
    from ..jobs.batch_rows import ask_to_cancel, find
    from ..jobs.endings import cancel
    from ..jobs.queries import find_job

    with _database(config) as database:
        if job := database.read(lambda c: find_job(c, id)):
            if job.batch:
                raise SettingsError(f"{id} is a line of {job.batch}: cancel the batch")
            done = database.write(lambda c: cancel(c, job, database.now(c)))
        elif batch := database.read(lambda c: find(c, id)):
            done = database.write(lambda c: ask_to_cancel(c, batch, database.now(c)))
        else:
            raise _unknown(id, database)
    if not done:
        raise SettingsError(f"{id} has ended already")
    console.print(f"{id}: is being cancelled", highlight=False)


@app.command(epilog=examples("octet jobs dead octet.yaml", "octet jobs dead octet.yaml --json"))
def dead(config: ConfigFile, as_json: AsJson = False) -> None:
    """List jobs whose processes died three times, and messages that no webhook took."""
    from sqlalchemy import select

    from ..jobs.job import Job
    from ..store.schema import DELIVERIES, JOBS, WEBHOOKS

    lost = select(JOBS).where(JOBS.c.state == "failed", JOBS.c.error.like(LOST))
    columns = DELIVERIES.c.id, DELIVERIES.c.tenant, DELIVERIES.c.created, DELIVERIES.c.answer
    unsent = select(*columns, WEBHOOKS.c.url).where(DELIVERIES.c.state == "dead")
    unsent = unsent.join(WEBHOOKS, WEBHOOKS.c.id == DELIVERIES.c.endpoint, isouter=True)
    with _database(config) as database:
        jobs = [Job(*row) for row in database.read(lambda c: c.execute(lost).all())]
        messages = database.read(lambda c: c.execute(unsent).all())
    found = [
        *(
            {"id": j.id, "tenant": j.tenant, "created": _time(j.created), "why": "lost"}
            for j in jobs
        ),
        *(
            {
                "id": m.id,
                "tenant": m.tenant,
                "created": _time(m.created),
                "why": f"{m.url}: {m.answer}",
            }
            for m in messages
        ),
    ]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    if not found:
        console.print("no job was lost, and every message was delivered")
        return
    table = Table(*(Column(name, overflow="fold") for name in found[0]))
    for one in found:
        table.add_row(*(escape(str(value)) for value in one.values()))
    Console().print(table)


@contextmanager
def _database(config: Any) -> Iterator[Database]:
    """The database of the settings, for the block."""
    settings = load_settings(config)
    if settings.database is None:
        raise SettingsError(f"{config}: it names no database: set data_folder, or store: url")
    from ..store.database import Database  # SQLAlchemy takes half a second to import

    database = Database(**settings.database)
    try:
        yield database
    finally:
        database.close()


def _facts(job: Job) -> dict[str, Any]:
    """Describe a job for an operator, without what its tenant has written."""
    from ..jobs.encoding import StoredError

    facts = job._asdict()
    for name in ("request", "result", "custom_id"):
        del facts[name]
    for name in ("created", "started", "ended", "expires", "not_before", "lease_until"):
        facts[name] = _time(facts[name])
    facts["error"] = StoredError.read(job.error).code if job.error else None
    return facts


def _batch_facts(batch: Batch) -> dict[str, Any]:
    """Describe a batch for an operator, without what its tenant has written."""
    facts = batch._asdict()
    for name in ("metadata", "errors"):
        del facts[name]
    facts["times"] = {state: _time(at) for state, at in json.loads(batch.times).items()}
    for name in ("created", "expires", "ended", "lease_until"):
        facts[name] = _time(facts[name])
    return facts


def _time(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unknown(id: str, database: Database) -> SettingsError:
    return SettingsError(f"{database.name}: nothing there has the id '{id}'")
