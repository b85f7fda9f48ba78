"""The Dispatcher's link to the store: opened, followed for changes, and its present fault.

The store is opened in the background and tried again until it answers. So a Dispatcher that starts
while the database is away says what is wrong, refuses new work, and needs no restart.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..errors import OctetError, SettingsError
from ..tenants.keys import TenantChanges
from ..tenants.tenant import Tenant
from ..tenants.watched_files import WatchedFiles
from ..usage.months import month_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ..store.answers import Answer, Answers, Claim, Claimed
    from ..store.database import Database
    from ..tenants.administration import Administration
    from ..tenants.registry import TenantRegistry
    from ..usage.leases import BudgetLeases
    from ..usage.ledger import UsageLedger

log = logging.getLogger("ray.serve")

T = TypeVar("T")

OLD_USAGE = "usage"  # the folder in the data folder where earlier releases kept usage records
SWEEP_S = 600.0  # between two searches for old answers
MOST_CLAIMS = 8  # transactions for Idempotency-Keys at a time, so that charges need not wait
PAUSE_S = 60.0  # between two notes in the database that a key is used


class _OpenStore(NamedTuple):
    """The opened database, and what reads and writes it."""

    database: Database
    administration: Administration
    registry: TenantRegistry
    ledger: UsageLedger
    answers: Answers
    cluster: str
    leases: BudgetLeases | None  # None: no other cluster can use this database
    leased: dict[str, float]


class StoreLink:
    """The database of tenants and usage, and what this Dispatcher knows of it.

    `fault`: why the database or the tenants' files cannot be used at present; "" if they can.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        data_folder: Path | None,
        tenants_folder: Path | None,
        cluster: Callable[[], str],
        on_open: Callable[[UsageLedger, BudgetLeases | None, dict[str, float]], None],
        on_tenants: Callable[[TenantChanges, dict[str, Tenant]], None],
        on_fault: Callable[[], None],
    ) -> None:
        """`arguments`: of the `Database`.

        `data_folder`: where earlier releases have kept usage records, which are then imported.
        `tenants_folder`: the folder whose files are applied at the start and when they change.
        `cluster`: returns an id that no other cluster has. `on_open` is called once the database
        answers: with the ledger, and with the leases and what is leased if clusters may share the
        database. `on_tenants` is called with the changes and all tenants whenever tenants or keys
        change, and `on_fault` when `fault` changes.
        """
        self._arguments = arguments
        self._old_usage = data_folder / OLD_USAGE if data_folder else None
        self._files = WatchedFiles(tenants_folder) if tenants_folder else None
        self._files_changed = False  # and are not applied yet
        self._cluster = cluster
        self._on_open, self._on_tenants, self._on_fault = on_open, on_tenants, on_fault
        self._following: set[asyncio.Task[None]] = set()
        self._claims = asyncio.Semaphore(MOST_CLAIMS)
        self._lock = asyncio.Lock()  # one reading of tenants at a time
        self._store: _OpenStore | None = None
        self._swept = 0.0
        self._used: dict[str, float] = {}  # by id of the key, when it was used; not noted yet
        self._noted: dict[str, float] = {}  # the same, as it was noted last
        self.fault = ""

    @property
    def file_faults(self) -> dict[str, str]:
        """The faults of the tenants' files, by their names."""
        return self._files.faults if self._files else {}

    async def run(self, every_s: float) -> None:
        """Open the database, and then follow its tenants, for ever."""
        while True:
            await self._tried(self._open() if self._store is None else self.follow())
            await asyncio.sleep(every_s)

    async def follow(self) -> None:
        """Read the files and the tenants that have changed, and pass the changes on.

        Whoever waits for this may be cancelled; the work goes on, so that no change is lost. Raises
        `OSError` if the database cannot be used.
        """
        task = asyncio.create_task(self._follow())
        self._following.add(task)
        task.add_done_callback(self._following.discard)
        await asyncio.shield(task)

    async def _follow(self) -> None:
        if (store := self._store) is None:
            return
        async with self._lock:
            faults = dict(self.file_faults)
            try:
                for work in (self._note_uses, self._apply_files, self._forget_answers):
                    await self._read_tenants(store)  # first, so that nothing delays a revocation
                    await asyncio.to_thread(work, store)
                await self._read_tenants(store)
            finally:
                if faults != self.file_faults:
                    self._on_fault()

    async def _read_tenants(self, store: _OpenStore) -> None:
        if changes := await asyncio.to_thread(store.registry.read):
            self._on_tenants(changes, store.registry.tenants)

    def key_used(self, id: str, when: float) -> None:
        """Note that the key with this id was used at the Unix time `when`."""
        if when - self._noted.get(id, 0.0) >= PAUSE_S:
            self._used[id] = when

    async def administer(self, operation: str, arguments: dict[str, Any]) -> Any:
        """Call a method of `Administration`; return its result, or the `OctetError` that it raises.

        What it changes is passed on when this returns. Raises `OSError` if the database cannot be
        used; the change may then have been made nevertheless.
        """
        method = getattr(self._opened_store().administration, operation)
        try:
            found = await asyncio.to_thread(lambda: method(**arguments))
        except OctetError as error:
            return error
        if "actor" in arguments:  # it was a change
            await self.follow()
        return found

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Call `work` in a transaction that only reads. Raises `OSError` without the database."""
        return await self._opened_store().database.read_soon(work)

    async def claim(self, claim: Claim, sessions: Collection[str]) -> Claimed:
        """Claim a request with an Idempotency-Key; see `Answers.claim`."""
        store = self._opened_store()
        mine = claim._replace(cluster=store.cluster)
        async with self._claims:
            return await asyncio.to_thread(store.answers.claim, mine, time.time(), sessions)

    async def answered(self, claim: Claim, answer: Answer | None) -> None:
        """Remember the answer to a claimed request; see `Answers.finish`."""
        store = self._opened_store()
        async with self._claims:
            await asyncio.to_thread(store.answers.finish, claim, answer, time.time())

    def _opened_store(self) -> _OpenStore:
        """Return the opened store. Raises `OSError` before the database has answered."""
        if self._store is None:
            raise OSError(self.fault or "the database is being opened")
        return self._store

    def close(self) -> None:
        """Close the database."""
        store, self._store = self._store, None
        if store:
            store.database.close()

    async def _tried(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, and note whether there is a fault."""
        fault = ""
        try:
            await work
        except (OSError, ValueError, SettingsError) as error:
            fault = str(error)
            if fault != self.fault:
                log.error("the database cannot be used: %s", fault)
        if fault != self.fault:
            self.fault = fault
            self._on_fault()

    async def _open(self) -> None:
        self._store = store = await asyncio.to_thread(self._opened)
        self._on_tenants(store.registry.whole, store.registry.tenants)
        self._on_open(store.ledger, store.leases, store.leased)
        if self.file_faults:
            self._on_fault()

    def _opened(self) -> _OpenStore:
        """Open the database, import old usage, and read tenants and sums."""
        from ..store.answers import Answers
        from ..store.database import Database  # SQLAlchemy takes half a second to import
        from ..tenants.administration import Administration
        from ..tenants.registry import TenantRegistry
        from ..usage.leases import BudgetLeases
        from ..usage.ledger import UsageLedger, import_folder

        database = Database(**self._arguments)
        try:
            if self._old_usage and (count := import_folder(database, self._old_usage)):
                log.info("%d usage records of an earlier release were imported", count)
            now = time.time()
            cluster, leases, leased = self._cluster(), None, {}
            if database.is_shared:
                leases = BudgetLeases(database, cluster, uuid.uuid4().hex)
                leased = leases.join(month_of(now))
            store = _OpenStore(
                database,
                Administration(database, time.time),
                TenantRegistry(database),
                UsageLedger(database, now, cluster if leases else None),
                Answers(database),
                cluster,
                leases,
                leased,
            )
            self._apply_files(store)
            store.registry.read()
            return store
        except BaseException:
            database.close()
            raise

    def _note_uses(self, store: _OpenStore) -> None:
        if used := self._used:
            self._used = {}
            store.administration.note_use(used)
            self._noted |= used

    def _forget_answers(self, store: _OpenStore) -> None:
        now = time.time()
        if now - self._swept >= SWEEP_S and not store.answers.forget_old(now):
            self._swept = now  # nothing old is left

    def _apply_files(self, store: _OpenStore) -> None:
        """Apply the tenants' files to the database if they have changed."""
        if self._files is None:
            return
        self._files_changed |= self._files.read()
        if self._files_changed and self._files.tenants is not None:
            found = store.administration.apply(
                "tenants_folder", self._files.tenants, self._files.keys
            )
            log.info("the tenants' files were applied: %d differences", len(found))
            self._files_changed = False
