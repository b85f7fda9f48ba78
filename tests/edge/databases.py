"""Times and databases that tests of the store share."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime

from serve.store import schema
from serve.store.database import Database

from ..postgres_server import PostgresServer

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC).timestamp()


def emptied(server: PostgresServer) -> str:
    """The URL of a server whose database has no tables of Octet's."""
    with closing(Database(server.url)) as database:
        database.write(schema.METADATA.drop_all)
    return server.url
