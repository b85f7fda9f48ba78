"""Where commands read and erase usage records: files of a folder, or the store of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..settings.application import FrontSettings
from ..usage.ledger import erase_usage, read_usage, usage_files


class FolderUsage:
    """The records in the files of a folder. `place`: the folder, for messages."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.place = folder, str(folder)

    def check(self) -> None:
        """Raise `SettingsError` if no usage was recorded here."""
        if not self._folder.is_dir():
            raise SettingsError(
                f"{self.place}: no such folder; usage is recorded on the node where the Dispatcher "
                "runs"
            )
        if not usage_files(self._folder):
            raise SettingsError(
                f"{self.place}: no usage was recorded there; name the folder `usage_folder` of the "
                "settings, or the folder `usage` in `data_folder`"
            )

    def read(self, since: str = "", tenant: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield records from the time `since` on. Raises `OSError` or `ValueError`."""
        if self._folder.is_dir():
            yield from read_usage(self._folder, since, tenant)

    def erase(self, tenant: str) -> int:
        """Delete a tenant's records; return their number. Raises `OSError` or `ValueError`."""
        return erase_usage(self._folder, tenant) if self._folder.is_dir() else 0


class StoreUsage:
    """The records in a database. `place`: its URL without password, for messages."""

    def __init__(self, store: dict[str, Any]) -> None:
        """`store`: the arguments of the `Database`. Raises what its constructor raises."""
        from ..store.database import Database  # SQLAlchemy takes half a second to import

        self._open = partial(Database, **store)
        with closing(self._open()) as database:
            self.place = database.name

    def check(self) -> None:
        """Do nothing: the constructor has connected."""

    def read(self, since: str = "", tenant: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield records from the time `since` on. Raises `OSError`."""
        from ..usage.sql_ledger import records

        with closing(self._open()) as database:
            yield from records(database, since, tenant)

    def erase(self, tenant: str) -> int:
        """Delete a tenant's records; return their number. Raises `OSError`."""
        from ..usage.sql_ledger import erase

        with closing(self._open()) as database:
            return erase(database, tenant)


def usage_source(settings: FrontSettings) -> FolderUsage | StoreUsage | None:
    """Where the settings keep usage; None if they keep none.

    Raises `SettingsError` or `OSError` if the database cannot be opened.
    """
    if settings.store:
        return StoreUsage(settings.store.model_dump())
    folder = settings.usage_path
    return FolderUsage(Path(folder).expanduser()) if folder else None
