"""The ledger: whole lines, each record once, and right sums after any end of the process."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.usage.ledger import (
    UsageLedger,
    erase_usage,
    month_end,
    month_of,
    read_usage,
    usage_files,
)
from serve.usage.record import UsageRecord

from ..builders import usage_record
from ..full_disk import full_disk

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC).timestamp()


def usage(call: int, tenant: str = "acme", work_s: float = 1.5, image: int = 0) -> UsageRecord:
    return usage_record(f"c{call}", image, tenant=tenant, request_id=f"id{call}", work_s=work_s)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[UsageLedger]:
    ledger = UsageLedger(tmp_path, NOW, file_bytes=2000)
    yield ledger
    ledger.close()


def spent(folder: Path, now: float = NOW) -> dict[str, float]:
    """The sums that a new process reads after a sudden end of the last one."""
    copy = folder.parent / f"{folder.name}-copy"
    shutil.copytree(folder, copy)
    try:
        with closing(UsageLedger(copy, now)) as again:
            return dict(again.spent)
    finally:
        shutil.rmtree(copy)


def test_a_record_names_tenant_image_and_work(ledger: UsageLedger, tmp_path: Path) -> None:
    ledger.append([usage(1)], NOW)
    (record,) = read_usage(tmp_path)
    assert record == {
        "time": "2026-11-22T12:00:00.000Z",
        "call": "c1",
        "image": 0,
        "tenant": "acme",
        "request_id": "id1",
        "model": "m",
        "precision": "fp8",
        "size": "64x64",
        "steps": 10,
        "work_s": 1.5,
        "outcome": "delivered",
    }


def test_a_record_sent_twice_is_written_once(ledger: UsageLedger, tmp_path: Path) -> None:
    assert ledger.append([usage(1), usage(1), usage(1, image=1)], NOW) == [
        usage(1),
        usage(1, image=1),
    ]
    assert ledger.append([usage(1), usage(2)], NOW) == [usage(2)]
    assert spent(tmp_path) == {"acme": 4.5}
    ledger.close()
    with closing(UsageLedger(tmp_path, NOW)) as again:
        assert again.append([usage(1), usage(2)], NOW) == []


def test_a_reversal_takes_a_record_back_once(ledger: UsageLedger, tmp_path: Path) -> None:
    ledger.append([usage(1), usage(2)], NOW)
    assert ledger.append([usage(1).reversal(), usage(1).reversal()], NOW) == [usage(1).reversal()]
    assert spent(tmp_path) == {"acme": 1.5}
    ledger.close()
    with closing(UsageLedger(tmp_path, NOW)) as again:
        assert again.append([usage(1).reversal(), usage(1)], NOW) == []
        assert again.spent == {"acme": 1.5}


def test_a_record_that_comes_after_its_reversal_is_not_written(
    ledger: UsageLedger, tmp_path: Path
) -> None:
    assert ledger.append([usage(1).reversal()], NOW) == []
    assert ledger.append([usage(1)], NOW) == []
    assert not list(read_usage(tmp_path))


def test_sums_are_found_again_over_many_files(ledger: UsageLedger, tmp_path: Path) -> None:
    for i in range(50):
        ledger.append([usage(i, "acme" if i % 2 else "umbrella")], NOW + i)
    assert len(usage_files(tmp_path)) > 3
    assert spent(tmp_path) == dict(ledger.spent) == {"acme": 37.5, "umbrella": 37.5}
    for old in usage_files(tmp_path)[:-1]:
        old.unlink()  # archived
    assert spent(tmp_path) == {"acme": 37.5, "umbrella": 37.5}


def test_a_torn_line_is_cut_off_and_its_record_may_come_again(tmp_path: Path) -> None:
    with closing(UsageLedger(tmp_path, NOW)) as ledger:
        ledger.append([usage(1), usage(2)], NOW)
    (file,) = usage_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    assert [r["call"] for r in read_usage(tmp_path)] == ["c1"]
    with closing(UsageLedger(tmp_path, NOW)) as again:
        assert dict(again.spent) == {"acme": 1.5}
        again.append([usage(2)], NOW)
    assert [r["call"] for r in read_usage(tmp_path)] == ["c1", "c2"]
    for line in file.read_text().splitlines():
        json.loads(line)


def test_every_cut_of_the_file_is_a_ledger(tmp_path: Path) -> None:
    with closing(UsageLedger(tmp_path, NOW)) as ledger:
        for i in range(3):
            ledger.append([usage(i)], NOW)
    with closing(UsageLedger(tmp_path, NOW, file_bytes=1)) as ledger:
        ledger.append([usage(3)], NOW)  # in a new file
    with closing(UsageLedger(tmp_path, NOW)) as ledger:
        ledger.append([usage(4)], NOW)
    _, file = usage_files(tmp_path)
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        assert spent(tmp_path)["acme"] == 6.0 + 1.5 * whole[first:end].count(b"\n")


def test_a_new_month_begins_with_nothing_spent(ledger: UsageLedger, tmp_path: Path) -> None:
    ledger.append([usage(1)], NOW)
    ledger.append([usage(2)], DECEMBER)
    assert (ledger.month, dict(ledger.spent)) == ("2026-12", {"acme": 1.5})
    assert spent(tmp_path, DECEMBER) == {"acme": 1.5}
    assert spent(tmp_path, DECEMBER + 40 * 86400) == {}
    assert (month_of(DECEMBER - 1), month_of(DECEMBER)) == ("2026-11", "2026-12")
    assert month_end(NOW) == DECEMBER
    assert month_of(month_end(DECEMBER)) == "2027-01"


def test_usage_since_a_time_and_of_a_tenant(tmp_path: Path) -> None:
    with closing(UsageLedger(tmp_path, NOW, file_bytes=300)) as ledger:
        for hour in range(10):
            ledger.append([usage(hour, "acme" if hour % 2 else "umbrella")], NOW + 3600 * hour)
    found = [r["call"] for r in read_usage(tmp_path, "2026-11-22T18:30", "acme")]
    assert found == ["c7", "c9"]
    assert len(list(read_usage(tmp_path, "2026-11-23"))) == 0
    assert len(list(read_usage(tmp_path, "2026-11-22"))) == 10


def test_a_tenants_records_are_erased_also_from_the_file_that_is_written(
    ledger: UsageLedger, tmp_path: Path
) -> None:
    for call in range(30):
        ledger.append([usage(2 * call), usage(2 * call + 1, "other")], NOW)
    assert len(usage_files(tmp_path)) > 3
    before = [r for r in read_usage(tmp_path) if r["tenant"] == "other"]
    assert erase_usage(tmp_path, "acme") == 30
    assert list(read_usage(tmp_path)) == before
    assert "acme" not in "".join(file.read_text() for file in usage_files(tmp_path))
    assert ledger.append([usage(0), usage(99)], NOW) == [usage(99)]
    assert ledger.spent == {"other": 45.0, "acme": 1.5}
    assert spent(tmp_path) == {"other": 45.0, "acme": 1.5}


def test_a_full_disk_leaves_no_half_of_a_record(ledger: UsageLedger, tmp_path: Path) -> None:
    ledger.append([usage(1)], NOW)
    (file,) = usage_files(tmp_path)
    with full_disk(file.stat().st_size + 10), pytest.raises(OSError, match="No space"):
        ledger.append([usage(2)], NOW)  # ten bytes of the record are written
    assert ledger.append([usage(2)], NOW) == [usage(2)]
    assert [r["call"] for r in read_usage(tmp_path)] == ["c1", "c2"]


def test_a_foreign_file_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "backup.jsonl").write_text("not a usage file")
    file = tmp_path / "2026-11-22T120000.000000.jsonl"
    for line in ("x", "5", "null", "{}", '{"time": 1}'):
        file.write_text('{"sums":{},"month":"2026-11"}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"jsonl:2 is not a usage record"):
            list(read_usage(tmp_path))


def test_a_file_that_cannot_be_begun_holds_nothing_up(ledger: UsageLedger, tmp_path: Path) -> None:
    in_the_way = tmp_path / "part"
    in_the_way.mkdir()
    for i in range(30):
        assert ledger.append([usage(i)], NOW)
    assert ledger.append([usage(99)], DECEMBER)
    in_the_way.rmdir()
    assert len(usage_files(tmp_path)) == 1
    assert spent(tmp_path, NOW) == {"acme": 1.5}  # with a clock that is behind
    assert spent(tmp_path, DECEMBER) == dict(ledger.spent) == {"acme": 1.5}
    ledger.append([usage(100)], DECEMBER)
    assert len(usage_files(tmp_path)) == 2
    assert spent(tmp_path, DECEMBER) == {"acme": 3.0}


def test_a_clock_that_is_set_back_loses_nothing(ledger: UsageLedger, tmp_path: Path) -> None:
    for i in range(40):
        ledger.append([usage(i)], NOW - 100 * i)
    assert len(usage_files(tmp_path)) > 3
    assert spent(tmp_path) == {"acme": 60.0}


def test_two_ledgers_on_one_folder_read_each_others_records(
    ledger: UsageLedger, tmp_path: Path
) -> None:
    """Two ledgers write at the same time when a Dispatcher moves or a cluster takes over."""
    ledger.append([usage(1), usage(2, "umbrella")], NOW)
    with closing(UsageLedger(tmp_path, NOW)) as second:
        assert second.spent == {"acme": 1.5, "umbrella": 1.5}
        assert second.charged_elsewhere() == set()
        ledger.append([usage(3)], NOW + 1)
        assert second.append([usage(1), usage(3), usage(4)], NOW + 2) == [usage(4)]
        assert second.spent == {"acme": 4.5, "umbrella": 1.5}
        assert second.charged_elsewhere() == {"acme"}
        assert second.charged_elsewhere() == set()
        assert ledger.append([usage(4)], NOW + 3) == []
        assert ledger.spent == second.spent
        for i in range(5, 50):  # both write, into several files
            (ledger if i % 3 else second).append([usage(i)], NOW + i)
        assert second.append([usage(i) for i in range(60)], NOW + 60) == [
            usage(0),
            *(usage(i) for i in range(50, 60)),
        ]
        ledger.append([], NOW)
        assert ledger.spent == second.spent == {"acme": 58 * 1.5 + 1.5, "umbrella": 1.5}
    calls = [r["call"] for r in read_usage(tmp_path)]
    assert sorted(calls) == sorted(f"c{i}" for i in range(60))
    assert spent(tmp_path) == ledger.spent


def test_writers_in_parallel_write_each_record_once(tmp_path: Path) -> None:
    def write(number: int) -> int:
        with closing(UsageLedger(tmp_path, NOW, file_bytes=4000)) as ledger:
            return sum(len(ledger.append([usage(call)], NOW)) for call in range(40))

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(write, range(4))) == 40
    assert sorted(r["call"] for r in read_usage(tmp_path)) == sorted(f"c{i}" for i in range(40))
    assert spent(tmp_path) == {"acme": 60.0}


def test_another_writer_turns_the_month(ledger: UsageLedger, tmp_path: Path) -> None:
    with closing(UsageLedger(tmp_path, NOW)) as second:
        second.append([usage(1)], NOW)
        second.append([usage(2)], DECEMBER)
        ledger.append([usage(3)], DECEMBER - 1)  # with a clock that is behind
        assert (ledger.month, dict(ledger.spent)) == ("2026-12", {"acme": 3.0})
        assert len(usage_files(tmp_path)) == 2
        second.append([], DECEMBER)
        assert dict(second.spent) == {"acme": 1.5}  # the record that its writer put into December


def test_a_half_written_line_of_another_writer_is_cut_off(
    ledger: UsageLedger, tmp_path: Path
) -> None:
    ledger.append([usage(1)], NOW)
    (file,) = usage_files(tmp_path)
    with file.open("ab") as other:
        other.write(b'{"time": "2026-1')
    assert ledger.append([usage(2)], NOW) == [usage(2)]
    assert spent(tmp_path) == {"acme": 3.0}


def test_a_file_that_was_moved_away_is_not_written_to(ledger: UsageLedger, tmp_path: Path) -> None:
    ledger.append([usage(1)], NOW)
    (file,) = usage_files(tmp_path)
    archive = tmp_path / "2026-archive"
    archive.mkdir()
    file.rename(archive / file.name)
    assert ledger.append([usage(1), usage(2)], NOW) == [usage(2)]
    assert spent(tmp_path) == dict(ledger.spent) == {"acme": 3.0}


def test_a_lock_that_is_never_released_is_an_error_and_no_more(tmp_path: Path) -> None:
    ledger = UsageLedger(tmp_path, NOW, lock_s=0.05)
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="has held the lock"):
            ledger.append([usage(1)], NOW)
    assert ledger.append([usage(1)], NOW) == [usage(1)]
    ledger.close()


def test_a_foreign_line_in_the_file_is_an_error_and_no_more(
    ledger: UsageLedger, tmp_path: Path
) -> None:
    (file,) = usage_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole + b"{}\n")
    with pytest.raises(OSError, match="is not a usage record"):
        ledger.append([usage(1)], NOW)
    file.write_bytes(whole)
    assert ledger.append([usage(1)], NOW) == [usage(1)]


def test_only_the_owner_can_read_usage_files(ledger: UsageLedger, tmp_path: Path) -> None:
    assert {file.stat().st_mode & 0o077 for file in tmp_path.iterdir()} == {0}
