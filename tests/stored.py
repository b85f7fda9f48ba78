"""What is in a SQLite database in a folder, and a Dispatcher's arguments for it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from serve.dispatch.dispatcher import Dispatcher
from serve.settings.application import sqlite_url
from serve.store.database import Database
from serve.usage.ledger import records


def store_in(folder: Path) -> dict[str, Any]:
    """The arguments of a `Database` in a folder."""
    return {"url": sqlite_url(folder), "password_file": None, "answer_s": 5.0}


def usage_in(folder: Path, tenant: str | None = None) -> list[dict[str, Any]]:
    """The usage records in the database of a folder."""
    with closing(Database(**store_in(folder))) as database:
        return list(records(database, tenant=tenant))


async def store_opened(dispatcher: Dispatcher) -> Dispatcher:
    """Wait until a Dispatcher has opened its database; return it."""
    while dispatcher.metering.ledger is None:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0.005)
    return dispatcher


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the database's lock, so that nothing can be written."""
    file = sqlite_url(folder).removeprefix("sqlite:///")
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
