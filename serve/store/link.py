"""A process's connection to the database, which is opened at its first use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import SettingsError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .database import Database
    from .grouped_writes import GroupedWrites

T = TypeVar("T")

PAUSE_S = 1.0  # for which a failed attempt to open the database answers for the next ones


class DatabaseLink:
    """The database, for an event loop. Its methods raise `OSError` if it cannot be used."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: of the `Database`."""
        self._arguments = arguments
        self._opening: asyncio.Task[Database] | None = None  # the last attempt
        self._failed_at = -PAUSE_S
        self._database: Database | None = None
        self._writes: GroupedWrites | None = None

    async def opened(self) -> Database:
        """Return the database. All who wait share one attempt to open it."""
        if self._database is None:
            now = asyncio.get_running_loop().time()
            if self._opening is None or (self._opening.done() and now - self._failed_at >= PAUSE_S):
                self._opening = asyncio.create_task(self._open_soon())
            self._database = await asyncio.shield(self._opening)
        return self._database

    async def _open_soon(self) -> Database:
        try:
            return await asyncio.to_thread(self._open)
        except OSError:
            self._failed_at = asyncio.get_running_loop().time()
            raise

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Call `work` in a transaction that only reads; see `Database.read`."""
        return await (await self.opened()).read_soon(work)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Call `work` in a transaction with other writers; see `GroupedWrites.write`."""
        from .grouped_writes import GroupedWrites

        database = await self.opened()
        if self._writes is None:
            self._writes = GroupedWrites(database)
        return await self._writes.write(work)

    def close(self) -> None:
        """Close the database."""
        database, self._database = self._database, None
        if database:
            database.close()

    def _open(self) -> Database:
        from .database import Database  # SQLAlchemy takes half a second to import

        try:
            return Database(**self._arguments)
        except SettingsError as error:  # for example, a file with a password that is not there
            raise OSError(str(error)) from error
