"""The database of the store: SQLite in a folder by default, PostgreSQL by URL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from ..errors import SettingsError
from .schema import bring_up_to_date

ANSWER_S = 5.0
# A process that is stopped, or whose machine is gone, must not hold the lock: PostgreSQL ends its
# session after so long.
_SESSION = " ".join(
    f"-c {name}={value}"
    for name, value in {
        "idle_in_transaction_session_timeout": "10s",
        "tcp_keepalives_idle": 5,
        "tcp_keepalives_interval": 5,
        "tcp_keepalives_count": 2,
    }.items()
)
LOCK = 0x0C7E7  # the key of the advisory lock that PostgreSQL's writers take
T = TypeVar("T")


class StoreUnavailable(OSError):
    """The database does not answer in time, or cannot do what it is asked; the message says why."""


class Database:
    """A database and its transactions.

    Methods block, except those whose names end in `_soon`: call them in a thread.

    A transaction that writes is the only one of all processes that does. So the numbers that it
    reads are still true when it commits.
    """

    def __init__(
        self, url: str, password_file: str | None = None, answer_s: float = ANSWER_S
    ) -> None:
        """Connect, and bring the tables up to date.

        `url`: sqlite:///FILE or postgresql://USER@HOST:PORT/NAME. `password_file`: a file with the
        password. `answer_s`: seconds after which a transaction is given up. Raises `SettingsError`
        for another URL or a file that cannot be read, and `StoreUnavailable` if the database cannot
        be used.
        """
        self._answer_s = answer_s
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise SettingsError(f"'{url}' is no URL of a database: {_ALLOWED}") from None
        self.name = parsed.render_as_string(hide_password=True)
        if password_file:
            parsed = parsed.set(password=_password(Path(password_file)))
        options: dict[str, Any]
        if parsed.drivername == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _keep_private(Path(parsed.database))
            options = {"connect_args": {"timeout": answer_s, "check_same_thread": False}}
        elif parsed.drivername in ("postgresql", "postgresql+psycopg"):
            parsed = parsed.set(drivername="postgresql+psycopg")
            limits = {"connect_timeout": max(2, round(answer_s / 2)), "options": _SESSION}
            options = {"connect_args": limits}
        else:
            raise SettingsError(f"'{self.name}' is no URL of a database: {_ALLOWED}")
        self._is_sqlite = parsed.drivername == "sqlite"
        try:
            self._engine = create_engine(parsed, poolclass=NullPool, **options)
        except ModuleNotFoundError:
            raise SettingsError(
                f"{self.name} needs psycopg, which is not installed here: "
                "pip install 'psycopg[binary]'"
            ) from None
        if self._is_sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._broken = False  # whether the present transaction was given up
        self._connection: Connection | None = None  # kept by the thread between transactions
        self.write(bring_up_to_date)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Call `work` in a transaction that may write, and return its result.

        Raises `StoreUnavailable` if the database fails or does not answer in time. Whether it has
        committed is then unknown, so `work` must be something that may be done again.
        """
        return self._run(work, locked=True)

    async def write_soon(self, work: Callable[[Connection], T]) -> T:
        """Like `write`, for an event loop, which goes on meanwhile."""
        return await self._run_soon(work, locked=True)

    async def read_soon(self, work: Callable[[Connection], T]) -> T:
        """Like `read`, for an event loop, which goes on meanwhile."""
        return await self._run_soon(work, locked=False)

    async def _run_soon(self, work: Callable[[Connection], T], *, locked: bool) -> T:
        with self._failures_named():
            running = self._thread.submit(self._transaction, work, locked)
            try:
                async with asyncio.timeout(self._answer_s) as limit:
                    return await asyncio.wrap_future(running)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise self._given_up(running) from None

    def read(self, work: Callable[[Connection], T]) -> T:
        """Call `work` in a transaction that only reads; otherwise like `write`."""
        return self._run(work, locked=False)

    @property
    def is_shared(self) -> bool:
        """Return whether several clusters may use this database."""
        return not self._is_sqlite

    def now(self, connection: Connection) -> float:
        """The Unix time by the database's clock; SQLite has the clock of its machine."""
        if self._is_sqlite:
            return time.time()
        clock = text("SELECT extract(epoch FROM clock_timestamp())")
        return float(connection.execute(clock).scalar_one())

    def backup(self, file: Path) -> None:
        """Copy a SQLite database to a new file, while it is used.

        Raises `SettingsError` for PostgreSQL, which has tools of its own, and for a file that
        exists.
        """
        if not self._is_sqlite:
            raise SettingsError(f"{self.name}: back it up with pg_dump")
        if file.exists():
            raise SettingsError(f"{file} exists already: name a new file")
        _keep_private(file)
        with self._failures_named(), self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text("VACUUM INTO :file"), {"file": str(file)})

    def close(self) -> None:
        """Close the connection; the database can no longer be used."""
        self._thread.submit(self._disconnect).result()
        self._thread.shutdown()
        self._engine.dispose()

    def _run(self, work: Callable[[Connection], T], *, locked: bool) -> T:
        with self._failures_named():
            running = self._thread.submit(self._transaction, work, locked)
            try:
                return running.result(self._answer_s)
            except LateError:
                raise self._given_up(running) from None

    def _given_up(self, running: Future[Any]) -> StoreUnavailable:
        """Give up a transaction that takes too long; return the error that says so."""
        # A database that is stopped keeps the thread waiting, whatever its own time-outs are.
        # Without its connection the thread gets an error, and is free again.
        if not running.cancel():  # it does not wait behind another transaction, so it runs
            self._broken = True
            self._break_connection()
        return StoreUnavailable(f"{self.name} does not answer within {self._answer_s:g} s")

    def _transaction(self, work: Callable[[Connection], T], locked: bool) -> T:
        self._broken = False
        try:
            connection = self._begin(locked)
        except DBAPIError:
            if self._connection is None:
                raise
            self._disconnect()
            if self._broken:  # it was given up, so nobody waits for it any more
                raise
            # The connection was kept, and the database has been restarted since.
            connection = self._begin(locked)
        try:
            found = work(connection)
            connection.commit()
        except BaseException:
            self._disconnect()
            raise
        return found

    def _begin(self, locked: bool) -> Connection:
        """Begin a transaction; if it is `locked`, no other process can write until it ends."""
        if (connection := self._connection) is None:
            connection = self._engine.connect()
            self._connection = connection
        if self._is_sqlite:
            connection.execute(text("BEGIN IMMEDIATE" if locked else "BEGIN"))
        elif locked:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        else:
            connection.execute(text("SELECT 1"))
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                connection.invalidate()
                connection.close()

    def _break_connection(self) -> None:
        connection = self._connection
        if connection is None or self._is_sqlite:
            return
        with contextlib.suppress(Exception):  # the thread may be closing it at this moment
            driver: Any = connection.connection.driver_connection
            handle = os.dup(driver.fileno())
            with socket.socket(fileno=handle) as link:
                link.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Raise the database's errors in the block as `StoreUnavailable`."""
        try:
            yield
        except DBAPIError as error:
            raise StoreUnavailable(f"{self.name}: {' '.join(str(error.orig).split())}") from error
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"{self.name}: {error}") from error


_ALLOWED = "expected sqlite:///FILE or postgresql://USER@HOST:PORT/NAME"


def _password(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: the password cannot be read: {error}") from None


def _prepare_sqlite(connection: Any, _: object) -> None:
    """Make commits durable, let readers read while somebody writes, and let Octet begin itself."""
    connection.isolation_level = None  # sqlite3 would begin transactions later than they are named
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


def _keep_private(file: Path) -> None:
    """Make an empty file that only its owner can read, if there is none.

    Its owner is that of the folder, so that a server can use what root has made for it.
    """
    with contextlib.suppress(FileExistsError):
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        folder = file.parent.stat()
        with contextlib.suppress(PermissionError):
            os.fchown(handle, folder.st_uid, folder.st_gid)
        os.close(handle)
