"""The store on real SQLite and PostgreSQL: usage records, faults, schema, backup."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from serve.errors import SettingsError
from serve.settings.application import sqlite_url
from serve.store import schema
from serve.store.database import Database, StoreUnavailable
from serve.usage.ledger import UsageLedger, erase, import_folder, records
from serve.usage.record import UsageRecord

from ..builders import usage_record
from ..full_disk import full_disk
from ..postgres_server import PostgresServer
from .databases import DECEMBER, NOW, emptied


def usage(call: int, tenant: str = "acme", work_s: float = 1.5, image: int = 0) -> UsageRecord:
    return usage_record(f"c{call}", image, tenant=tenant, request_id=f"id{call}", work_s=work_s)


def sums(database: Database, now: float = NOW) -> dict[str, float]:
    """The sums that a new process reads."""
    return dict(UsageLedger(database, now).spent)


def test_a_record_is_written_once_and_names_everything(database: Database) -> None:
    ledger = UsageLedger(database, NOW)
    one = usage(1)
    assert ledger.append([one, one], NOW) == [one]
    assert ledger.append([one], NOW) == []
    (record,) = records(database)
    expected = {"id": 1, "time": "2026-11-22T12:00:00.000Z", **one._asdict()}
    assert record == {**expected, "release": version("octet-serve")}
    assert dict(ledger.spent) == sums(database) == {"acme": 1.5}


def test_a_record_is_known_for_ever(database: Database) -> None:
    ledger = UsageLedger(database, NOW)
    ledger.append([usage(1)], NOW)
    for begin in range(2, 3000, 500):
        ledger.append([usage(call) for call in range(begin, begin + 500)], NOW)
    assert UsageLedger(database, NOW).append([usage(1)], NOW) == []


def test_an_append_that_was_committed_unknown_to_its_caller_counts(
    database: Database, url: str
) -> None:
    """Its caller gave it up, and appends the records again."""
    with closing(Database(url)) as other:
        ledger, given_up = UsageLedger(database, NOW), UsageLedger(other, NOW)
        given_up.append([usage(1)], NOW)
        assert ledger.append([usage(1)], NOW) == []
        assert (dict(ledger.spent), ledger.charged_elsewhere()) == ({"acme": 1.5}, {"acme"})


def test_reversals(database: Database) -> None:
    ledger = UsageLedger(database, NOW)
    ledger.append([usage(1)], NOW)
    back = usage(1).reversal()
    assert ledger.append([back, back], NOW) == [back]
    assert ledger.append([usage(2).reversal()], NOW) == []  # its record never came
    assert UsageLedger(database, NOW).append([usage(2)], NOW) == []  # it comes too late
    assert [r["outcome"] for r in records(database)] == ["delivered", "reversed"]
    assert sums(database) == {"acme": 0.0}


def test_a_month_begins_with_nothing_spent(database: Database) -> None:
    ledger = UsageLedger(database, NOW)
    ledger.append([usage(1)], NOW)
    ledger.append([usage(2, work_s=4.0)], DECEMBER)
    assert (ledger.month, dict(ledger.spent)) == ("2026-12", {"acme": 4.0})
    ledger.append([usage(3, work_s=1.0)], NOW)  # the clock was set back
    assert (ledger.month, dict(ledger.spent)) == ("2026-12", {"acme": 5.0})
    assert sums(database, DECEMBER) == {"acme": 5.0}
    assert sums(database) == {"acme": 1.5}


def test_writers_learn_what_the_others_write(url: str, database: Database) -> None:
    with closing(Database(url)) as other:
        one, two = UsageLedger(database, NOW), UsageLedger(other, NOW)
        two.append([usage(1), usage(2, "beta")], NOW)
        assert one.append([usage(1), usage(3)], NOW) == [usage(3)]
        assert dict(one.spent) == {"acme": 3.0, "beta": 1.5}
        assert one.charged_elsewhere() == {"beta"}
        assert one.charged_elsewhere() == set()


def test_writers_in_parallel_write_each_record_once_in_the_order_of_ids(url: str) -> None:
    """Whoever reads on from the last id that it has seen misses nothing."""
    done, seen = threading.Event(), list[int]()

    def write(worker: int) -> list[UsageRecord]:
        with closing(Database(url)) as database:
            ledger = UsageLedger(database, NOW)
            return [u for call in range(40) for u in ledger.append([usage(call)], NOW + worker)]

    def follow() -> None:
        with closing(Database(url)) as database:
            while True:
                last = done.is_set()
                seen.extend(r["id"] for r in records(database, after=seen[-1] if seen else 0))
                if last:
                    return

    Database(url).close()
    with ThreadPoolExecutor(5) as pool:
        following = pool.submit(follow)
        written = [u.call for found in pool.map(write, range(4)) for u in found]
        done.set()
        following.result()
    assert sorted(written) == sorted(f"c{call}" for call in range(40))
    assert seen == list(range(1, 41))


def test_erased_records_leave_no_trace_and_no_id_is_used_again(database: Database) -> None:
    ledger = UsageLedger(database, NOW)
    ledger.append([usage(1, "beta"), usage(2), usage(3)], NOW)
    assert erase(database, "acme") == 2
    assert [r["tenant"] for r in records(database)] == ["beta"]
    assert sums(database) == {"beta": 1.5}
    ledger.append([usage(4)], NOW)
    assert [r["id"] for r in records(database)] == [1, 4]


def test_records_since_a_time_and_of_a_tenant(database: Database) -> None:
    ledger = UsageLedger(database, NOW)
    for hour in range(5):
        ledger.append([usage(hour, "acme" if hour % 2 else "beta")], NOW + 3600 * hour)
    assert [r["call"] for r in records(database, "2026-11-22T14")] == ["c2", "c3", "c4"]
    assert [r["call"] for r in records(database, "2026-11-22T14", "acme")] == ["c3"]
    assert [r["call"] for r in records(database, after=3)] == ["c3", "c4"]


OLD_FILES = {
    "2026-11-01T000000.000000.jsonl": [
        {"sums": {}},
        {"time": "2026-11-30T12:00:00.000Z", **usage(1)._asdict()},
        {"time": "2026-11-30T12:00:00.000Z", **usage(2)._asdict()},
    ],
    "2026-12-01T000000.000000.jsonl": [
        {"sums": {"acme": 3.0}},
        {"time": "2026-12-01T00:00:01.000Z", **usage(2).reversal()._asdict()},
        {"time": "2026-12-01T00:00:01.000Z", **usage(3, "beta")._asdict()},
    ],
}


def test_files_of_an_earlier_release_are_imported_once(database: Database, tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    folder.mkdir()
    for name, entries in OLD_FILES.items():
        for entry in entries:
            entry.pop("key_id", None)  # earlier releases did not have it
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert import_folder(database, folder) == 4
    assert import_folder(database, folder) == 0
    found = [
        {name: value for name, value in record.items() if name not in ("id", "key_id", "release")}
        for record in records(database)
    ]
    assert found == [e for entries in OLD_FILES.values() for e in entries if "sums" not in e]
    assert {record["release"] for record in records(database)} == {None}
    assert sums(database) == {"acme": 3.0}
    assert sums(database, DECEMBER) == {"acme": -1.5, "beta": 1.5}
    with (folder / "2026-12-01T000000.000000.jsonl").open("a") as file:
        line = json.dumps({"time": "2026-12-01T00:00:02.000Z", **usage(4)._asdict()})
        file.write(line + "\n" + line[:20])  # and the process has died
    assert import_folder(database, folder) == 1


def test_a_foreign_line_is_refused_with_its_place(database: Database, tmp_path: Path) -> None:
    for line in ("[]", "{}", "x", '{"call": "c"}'):
        (tmp_path / "2026-11-01T000000.000000.jsonl").write_text('{"sums": {}}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"2026-11-01T000000\.000000\.jsonl:2 is not a usage"):
            import_folder(database, tmp_path)


# -- a model --------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.integers(0, 5),  # the call
        st.integers(0, 1),  # the image
        st.booleans(),  # whether it is a reversal
        st.integers(0, 1),  # the writer
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@given(histories=st.lists(EVENTS, min_size=1, max_size=4))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_histories_end_as_in_a_plain_model(
    kind: str, histories: list[list[tuple[int, int, bool, int]]], request: pytest.FixtureRequest
) -> None:
    """Each append of a history goes to one of two writers; the model is a set and a rule."""
    folder = request.getfixturevalue("tmp_path_factory").mktemp("history")
    address = sqlite_url(folder)
    if kind == "postgresql":
        address = emptied(request.getfixturevalue("postgres"))
    charged, reversed_, void = set[tuple[int, int]](), set[tuple[int, int]](), set[object]()
    with closing(Database(address)) as one, closing(Database(address)) as two:
        writers = UsageLedger(one, NOW), UsageLedger(two, NOW)
        for history in histories:
            usages = [
                usage(call, image=image).reversal() if back else usage(call, image=image)
                for call, image, back, _ in history
            ]
            for call, image, back, _ in history:
                key = call, image
                if key in void:
                    continue
                if not back:
                    charged.add(key)
                elif key in charged:
                    reversed_.add(key)
                else:
                    void.add(key)
            writers[history[0][3] if history else 0].append(usages, NOW)
        found = Counter((r["call"], r["image"], r["outcome"]) for r in records(one))
        expected = {(f"c{c}", i, "delivered") for c, i in charged}
        expected |= {(f"c{c}", i, "reversed") for c, i in reversed_}
        assert found == Counter(expected)
        left = 1.5 * (len(charged) - len(reversed_))
        assert sums(one).get("acme", 0.0) == pytest.approx(left)


# -- faults ---------------------------------------------------------------------------------------


def test_a_server_that_dies_is_an_error_at_once_and_is_used_again(
    postgres: PostgresServer,
) -> None:
    with closing(Database(emptied(postgres))) as database:
        ledger = UsageLedger(database, NOW)
        ledger.append([usage(1)], NOW)
        postgres.kill()
        with pytest.raises(StoreUnavailable, match="refused"):
            ledger.append([usage(2)], NOW)
        postgres.start()
        assert ledger.append([usage(1), usage(2)], NOW) == [usage(2)]
        assert dict(ledger.spent) == {"acme": 3.0}


def test_a_server_that_is_stopped_is_given_up_and_used_again(postgres: PostgresServer) -> None:
    """Whether a commit that was given up has happened is not known; it may be done again."""
    with closing(Database(emptied(postgres), answer_s=0.5)) as database:
        ledger = UsageLedger(database, NOW)
        ledger.append([usage(1)], NOW)
        postgres.pause()
        try:
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match=r"does not answer within 0\.5 s"):
                    ledger.append([usage(2)], NOW)
        finally:
            postgres.resume()
        deadline = time.monotonic() + 60
        while True:  # what was given up may still be connecting
            try:
                ledger.append([usage(2)], NOW)
            except StoreUnavailable:
                assert time.monotonic() < deadline
            else:
                break
        assert [r["call"] for r in records(database)] == ["c1", "c2"]
        assert sums(database) == {"acme": 3.0}


def test_a_full_disk_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with closing(Database(sqlite_url(tmp_path))) as database:
        ledger = UsageLedger(database, NOW)
        ledger.append([usage(1)], NOW)
        with full_disk(), pytest.raises(StoreUnavailable, match=r"full|I/O"):
            ledger.append([usage(call) for call in range(2, 500)], NOW)
        assert ledger.append([usage(1), usage(2)], NOW) == [usage(2)]
        assert [r["call"] for r in records(database)] == ["c1", "c2"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nothing", "is no URL of a database"),
        ("mysql://h/d", "expected sqlite:///FILE or postgresql://"),
        ("sqlite://", "expected sqlite:///FILE or postgresql://"),
    ],
)
def test_other_urls_are_refused(url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Database(url)


def test_no_message_holds_the_password(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret-word\n")
    with pytest.raises(StoreUnavailable) as raised:
        Database("postgresql://u@127.0.0.1:1/d", str(tmp_path / "password"))
    assert "secret-word" not in str(raised.value)


# -- schema and backup ----------------------------------------------------------------------------


def test_an_older_release_writes_to_the_database_of_a_newer_one(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer one has added a column and a table."""
    ledger = UsageLedger(database, NOW)
    ledger.append([usage(1)], NOW)

    def more(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE octet_usage ADD COLUMN colour VARCHAR(64)"))
        connection.execute(text("CREATE TABLE octet_more (a INTEGER)"))

    def version(of: Database) -> int:
        stated = text("SELECT version FROM octet_schema")
        return int(of.read(lambda connection: connection.execute(stated).scalar_one()))

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, more))
    with closing(Database(url)) as newer:
        assert version(newer) == len(schema.STEPS)
        ledger.append([usage(2)], NOW)
        UsageLedger(newer, NOW).append([usage(3)], NOW)
    monkeypatch.undo()
    with closing(Database(url)) as older:
        assert version(older) == len(schema.STEPS) + 1
        assert [r["call"] for r in records(older)] == ["c1", "c2", "c3"]
    if url.startswith("postgresql"):
        database.write(lambda c: c.execute(text("DROP TABLE octet_more")))


def test_an_older_database_gets_the_column_for_presets(database: Database, url: str) -> None:
    UsageLedger(database, NOW).append([usage(1)], NOW)

    def age(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE octet_usage DROP COLUMN preset"))
        connection.execute(text("UPDATE octet_schema SET version = 3"))

    database.write(age)
    with closing(Database(url)) as newer:
        UsageLedger(newer, NOW).append([usage(2)._replace(preset="medium")], NOW)
        assert [r["preset"] for r in records(newer)] == [None, "medium"]


def test_a_backup_is_a_database(tmp_path: Path) -> None:
    with closing(Database(sqlite_url(tmp_path))) as database:
        UsageLedger(database, NOW).append([usage(1)], NOW)
        database.backup(tmp_path / "copy.db")
        assert (tmp_path / "copy.db").stat().st_mode & 0o077 == 0
        with pytest.raises(SettingsError, match="exists already"):
            database.backup(tmp_path / "copy.db")
    with closing(Database(f"sqlite:///{tmp_path}/copy.db")) as copy:
        assert [r["call"] for r in records(copy)] == ["c1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files for others")
def test_a_file_that_root_makes_belongs_to_the_folders_owner(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with closing(Database(sqlite_url(tmp_path))) as database:
        UsageLedger(database, NOW).append([usage(1)], NOW)
        owners = {file.name: file.stat().st_uid for file in tmp_path.iterdir()}
    assert owners == dict.fromkeys(("octet.db", "octet.db-wal", "octet.db-shm"), 65534)


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    Database(sqlite_url(tmp_path / "new")).close()
    assert (tmp_path / "new" / "octet.db").stat().st_mode & 0o077 == 0
