"""Where commands read and erase usage records: the database of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..settings.application import FrontSettings


class StoredUsage:
    """The usage records in the database of the settings. `place`: the database, for messages."""

    def __init__(self, settings: FrontSettings) -> None:
        """Raises `SettingsError` or `OSError` if there is no database, or it cannot be opened."""
        if settings.database is None:
            raise SettingsError("the settings name no database: set data_folder, or store: url")
        file = settings.database["url"].removeprefix("sqlite:///")
        if settings.database_is_of_one_node and not Path(file).exists():
            raise SettingsError(
                f"{file}: no such database; usage is recorded on the node where the Dispatcher runs"
            )
        from ..store.database import Database  # SQLAlchemy takes half a second to import

        self._open = partial(Database, **settings.database)
        with closing(self._open()) as database:
            self.place = database.name

    def read(self, since: str = "", tenant: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield records from the time `since` on. Raises `OSError`."""
        from ..usage.ledger import records

        with closing(self._open()) as database:
            yield from records(database, since, tenant)

    def erase(self, tenant: str) -> tuple[int, int]:
        """Delete a tenant's records, and its jobs with all that belongs to them.

        Returns the number of records and of jobs. Raises `OSError`.
        """
        from ..jobs import retention
        from ..usage import ledger

        with closing(self._open()) as database:
            jobs = retention.erase(database, tenant)
            return ledger.erase(database, tenant), jobs
