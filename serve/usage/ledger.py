"""The ledger of usage records in the store: a row for each charged image, and sums by month.

A record is committed before the response with its image begins. A record that is appended twice is
written once, however much later. A reversal is written only if its record is there; a record that
comes after its reversal is not written. The sums of tenants change in the same transaction.

Several processes may write, as when a Dispatcher moves to another node or a new cluster takes over
from an old one: their transactions come one after the other, and each reads what the others wrote.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    BindParameter,
    Connection,
    RowMapping,
    bindparam,
    delete,
    insert,
    literal,
    select,
    union_all,
)
from sqlalchemy.dialects import postgresql, sqlite

from ..store.database import Database
from ..store.schema import ANSWERS, IMPORTS, SUMS, USAGE, VOIDS, next_numbers
from ..store.times import timestamp
from .json_lines import read_usage, usage_files
from .leases import charge_lease
from .months import month_of
from .record import UsageRecord

RELEASE = version("octet-serve")
CALLS = 500  # that one statement names
PAGE = 1000  # records that are read at a time
MONTH = len("2026-11")  # characters of a time that state its month
VOIDS_KEPT_S = 24 * 3600.0  # a record comes seconds after its reversal, or never


class _Key(NamedTuple):
    """The key of a row, which no other row has."""

    call: str
    image: int
    reversal: int


class _Written(NamedTuple):
    """The records that an append has written in a month, and the id of the last one of all.

    `sums`: rows of sums that have changed; None if nobody else has written since the last append.
    """

    month: str
    fresh: list[UsageRecord]
    last: int
    sums: Sequence[Any] | None


class UsagePage(NamedTuple):
    """Records in the order of their ids, and whether there are more."""

    records: list[dict[str, Any]]
    has_more: bool


class UsageLedger:
    """One writer of the usage in a database.

    All methods but `append_soon` block: call them in a thread, one at a time.

    `spent` is the work that each tenant was charged in `month`. It includes the records of other
    writers up to the last append.
    """

    def __init__(self, database: Database, now: float, cluster: str | None = None) -> None:
        """Read the sums of the month of `now`, in Unix time.

        `cluster`: charges are taken from the leases of this cluster, if it has any. Raises
        `StoreUnavailable`, an `OSError`, if the database cannot be read.
        """
        self._database, self._cluster = database, cluster
        self._last_id = 0  # of the newest record in `spent`
        self._elsewhere: set[str] = set()
        self.month = month_of(now)
        self.spent: Counter[str] = Counter()
        sums = database.read(lambda connection: self._sums(connection, self.month, 0))
        self._learn(sums, ())
        self._last_id = max((row.last_id for row in sums), default=0)

    def append(self, usages: Iterable[UsageRecord], now: float) -> list[UsageRecord]:
        """Write the records that are new, wait until they are committed, and return them.

        `now`: the time of the records, in Unix time. Raises `StoreUnavailable`, an `OSError`, if
        they could not be written or it is not known; the caller may then append them again.
        """
        return self._learned(self._database.write(self._writing(usages, now)))

    async def append_soon(self, usages: Iterable[UsageRecord], now: float) -> list[UsageRecord]:
        """Like `append`, for an event loop, which goes on meanwhile.

        Without records it only reads what other writers have charged.
        """
        given, write = list(usages), self._database.write_soon
        if not given:
            write = self._database.read_soon
        return self._learned(await write(self._writing(given, now)))

    def charged_elsewhere(self) -> set[str]:
        """The tenants that other writers have charged since the last call of this method."""
        found, self._elsewhere = self._elsewhere, set()
        return found

    def page(self, after: int, limit: int, tenant: str | None) -> UsagePage:
        """The next records, at most `limit`, behind the one with the id `after`.

        `tenant`: those of this tenant only. Raises `StoreUnavailable` if the database cannot be
        read.
        """
        rows = self._database.read(
            lambda connection: _rows(connection, "", tenant, after, limit + 1)
        )
        return UsagePage([dict(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _writing(
        self, usages: Iterable[UsageRecord], now: float
    ) -> Callable[[Connection], _Written]:
        """The transaction that writes records."""
        given, month = list(usages), max(self.month, month_of(now))

        def write(connection: Connection) -> _Written:
            fresh, last = write_usage(connection, given, now, month, self._cluster)
            last = last or self._last_id
            # Without other writers since the last append, and if that has not committed after it
            # was given up, the sums are known.
            alone = last - len(fresh) == self._last_id and 0 < len(fresh) == len(given)
            since = self._last_id if month == self.month else 0
            sums = None if alone and month == self.month else self._sums(connection, month, since)
            last = max([last, *(row.last_id for row in sums or ())])
            return _Written(month, fresh, last, sums)

        return write

    def _learned(self, written: _Written) -> list[UsageRecord]:
        """Note the sums after a write, and return the records that it has written."""
        month, fresh, last, sums = written
        if month > self.month:
            self.month, self.spent = month, Counter()
        if sums is None:
            for tenant, work_s in _work_by_tenant(fresh).items():
                self.spent[tenant] += work_s  # type: ignore[assignment]  # floats
        else:
            self._learn(sums, {usage.tenant for usage in fresh})
        self._last_id = last
        return fresh

    def _sums(self, connection: Connection, month: str, since: int) -> Sequence[Any]:
        """The rows (tenant, work_s, last_id) of a month that changed after the record `since`."""
        found = select(SUMS.c.tenant, SUMS.c.work_s, SUMS.c.last_id)
        return connection.execute(
            found.where(SUMS.c.month == month, SUMS.c.last_id > since)
        ).fetchall()

    def _learn(self, sums: Iterable[Any], ours: Iterable[str]) -> None:
        for tenant, work_s, _ in sums:
            self.spent[tenant] = work_s
            if tenant not in ours:
                self._elsewhere.add(tenant)


def write_usage(
    connection: Connection,
    usages: Sequence[UsageRecord],
    now: float,
    month: str,
    cluster: str | None,
) -> tuple[list[UsageRecord], int]:
    """Write the records that are new, in the caller's transaction.

    `month`: whose sums they are added to. `cluster`: from whose leases they are taken; None: no
    other cluster shares the budgets. Returns the records that are new, and the id of the last of
    them; 0 if there are none.
    """
    fresh = _fresh(connection, usages, now)
    if not fresh:
        return [], 0
    last = _insert(connection, fresh, [timestamp(now)] * len(fresh), RELEASE)
    _add_to_sums(connection, month, fresh.values(), last)
    if cluster:
        charge_lease(connection, cluster, month, _work_by_tenant(fresh.values()))
    return list(fresh.values()), last


def _fresh(
    connection: Connection, usages: Sequence[UsageRecord], now: float
) -> dict[_Key, UsageRecord]:
    """The records that are to be written, by their keys."""
    known = _known(connection, {usage.call for usage in usages})
    fresh: dict[_Key, UsageRecord] = {}
    for usage in usages:
        key = _Key(usage.call, usage.image, int(usage.outcome == "reversed"))
        record = key._replace(reversal=0)
        if key in known or key in fresh:
            continue
        if key.reversal and record not in known and record not in fresh:
            _void(connection, key, now)
            known |= {key, record}  # so that the record is not written when it comes
            continue
        fresh[key] = usage
    return fresh


_VOID = 2  # in place of `reversal`: neither the record nor its reversal is ever written
_CALLS: BindParameter[Any] = bindparam("calls", expanding=True)
_WRITTEN_OR_VOID = union_all(
    select(USAGE.c.call, USAGE.c.image, USAGE.c.reversal).where(USAGE.c.call.in_(_CALLS)),
    select(VOIDS.c.call, VOIDS.c.image, literal(_VOID)).where(VOIDS.c.call.in_(_CALLS)),
)


def _known(connection: Connection, calls: Iterable[str]) -> set[_Key]:
    """The keys of these calls that are written, or must not be."""
    found: set[_Key] = set()
    names = sorted(calls)
    for begin in range(0, len(names), CALLS):
        for call, image, reversal in connection.execute(
            _WRITTEN_OR_VOID, {"calls": names[begin : begin + CALLS]}
        ):
            if reversal == _VOID:
                found |= {_Key(call, image, 0), _Key(call, image, 1)}
            else:
                found.add(_Key(call, image, reversal))
    return found


def _void(connection: Connection, key: _Key, now: float) -> None:
    """Note a reversal that came before its record."""
    connection.execute(delete(VOIDS).where(VOIDS.c.time < timestamp(now - VOIDS_KEPT_S)))
    row = {"call": key.call, "image": key.image, "time": timestamp(now)}
    connection.execute(insert(VOIDS).values(row))


def _insert(
    connection: Connection,
    fresh: Mapping[_Key, UsageRecord],
    stamps: Sequence[str],
    release: str | None,
) -> int:
    """Insert records with their times `stamps`; return the id of the last one.

    `release`: of Octet that generated the images; None if it is not known.

    The ids follow each other, because no other process can write meanwhile.
    """
    before = next_numbers(connection, USAGE.name, len(fresh))
    rows = enumerate(zip(fresh.items(), stamps, strict=True), before + 1)
    connection.execute(
        insert(USAGE),
        [
            {
                "id": id,
                "time": stamp,
                "reversal": key.reversal,
                "release": release,
                **usage._asdict(),
            }
            for id, ((key, usage), stamp) in rows
        ],
    )
    return before + len(fresh)


def _add_to_sums(
    connection: Connection, month: str, usages: Iterable[UsageRecord], last: int
) -> None:
    """Add records to the sums of a month. `last`: the id of the newest of them."""
    usages = list(usages)
    images: Counter[str] = Counter()
    for usage in usages:
        images[usage.tenant] += -1 if usage.outcome == "reversed" else 1
    work = _work_by_tenant(usages)
    connection.execute(
        _ADD[connection.dialect.name],
        [
            {"month": month, "tenant": name, "images": n, "work_s": work[name], "last_id": last}
            for name, n in images.items()
        ],
    )


def _adding(fresh: sqlite.Insert | postgresql.Insert) -> sqlite.Insert | postgresql.Insert:
    """The statement that adds to sums, or begins them."""
    more = {
        "images": SUMS.c.images + fresh.excluded.images,
        "work_s": SUMS.c.work_s + fresh.excluded.work_s,
        "last_id": fresh.excluded.last_id,
    }
    return fresh.on_conflict_do_update(index_elements=[SUMS.c.month, SUMS.c.tenant], set_=more)


# By dialect; made once, because making a statement costs more than executing it.
_ADD = {"sqlite": _adding(sqlite.insert(SUMS)), "postgresql": _adding(postgresql.insert(SUMS))}


def _work_by_tenant(usages: Iterable[UsageRecord]) -> dict[str, float]:
    work: dict[str, float] = defaultdict(float)
    for usage in usages:
        work[usage.tenant] += usage.work_s
    return dict(work)


def records(
    database: Database, since: str = "", tenant: str | None = None, after: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield records as plain data, oldest first, each with its `id`.

    Skips those before `since`, a time as the records state it or the beginning of one, and those up
    to the id `after`. `tenant`: yield the records of this tenant only. Raises `StoreUnavailable` if
    the database cannot be read.
    """
    while True:
        read = partial(_rows, since=since, tenant=tenant, after=after, limit=PAGE)
        rows = database.read(read)
        for row in rows:
            yield dict(row)
        if len(rows) < PAGE:
            return
        after = rows[-1]["id"]


def _rows(
    connection: Connection, since: str, tenant: str | None, after: int, limit: int
) -> Sequence[RowMapping]:
    """Records behind the id `after`, in the order of their ids, at most `limit`."""
    columns = [column for column in USAGE.c if column is not USAGE.c.reversal]
    found = select(*columns).where(USAGE.c.id > after)
    if since:
        found = found.where(USAGE.c.time >= since)
    if tenant is not None:
        found = found.where(USAGE.c.tenant == tenant)
    return connection.execute(found.order_by(USAGE.c.id).limit(limit)).mappings().all()


def import_folder(database: Database, folder: Path) -> int:
    """Write the records of earlier releases' files, with their own times; return how many were new.

    A file that has not grown since it was imported is not read again, and a record that is written
    already is left alone. Raises `StoreUnavailable` if the database cannot be written, `OSError` or
    `ValueError` for a file that cannot be read; what was imported until then stays.
    """
    rows = database.read(lambda connection: connection.execute(select(IMPORTS)).fetchall())
    done: dict[str, int] = dict(rows)
    count = 0
    for file in usage_files(folder):
        name, size = str(file.resolve()), file.stat().st_size
        if done.get(name) == size:
            continue
        count += _import_file(database, file)
        database.write(partial(_note_import, row={"file": name, "bytes": size}))
    return count


def _note_import(connection: Connection, row: dict[str, Any]) -> None:
    connection.execute(delete(IMPORTS).where(IMPORTS.c.file == row["file"]))
    connection.execute(insert(IMPORTS).values(row))


def _import_file(database: Database, file: Path) -> int:
    """Write the records of one file; return how many were new."""
    count, part = 0, list[Mapping[str, Any]]()

    def write(connection: Connection) -> int:
        known = [{k: r[k] for k in UsageRecord._fields if k in r} for r in part]
        usages = [UsageRecord(**values) for values in known]
        times = {id(usage): str(r["time"]) for usage, r in zip(usages, part, strict=True)}
        fresh = _fresh(connection, usages, 0.0)
        if fresh:
            stamps = [times[id(usage)] for usage in fresh.values()]
            last = _insert(connection, fresh, stamps, None)
            for month in sorted({stamp[:MONTH] for stamp in stamps}):
                of_month = [u for u in fresh.values() if times[id(u)][:MONTH] == month]
                _add_to_sums(connection, month, of_month, last)
        return len(fresh)

    for record in read_usage(file):
        part.append(record)
        if len(part) == PAGE:
            count += database.write(write)
            part.clear()
    return count + (database.write(write) if part else 0)


def erase(database: Database, tenant: str) -> int:
    """Delete a tenant's records, sums and remembered answers; return the number of records.

    Raises `StoreUnavailable` if the database cannot be written.
    """

    def write(connection: Connection) -> int:
        connection.execute(delete(SUMS).where(SUMS.c.tenant == tenant))
        connection.execute(delete(ANSWERS).where(ANSWERS.c.tenant == tenant))
        return connection.execute(delete(USAGE).where(USAGE.c.tenant == tenant)).rowcount

    return database.write(write)
