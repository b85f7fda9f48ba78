"""The ledger of usage records: one line of JSON for each image.

A record is on disk (fsynced) before the response with its image begins.

The ledger is a folder of files, each named by the time at which it was begun. Records are appended
to the newest file. Each file begins with the sums of its calendar month (UTC) so far. So a start
reads only the newest two files, however long the month is. A record that is appended twice is
written once. A reversal is written only if its record is there; a record that comes after its
reversal is not written. If the last line of a file is incomplete, it is cut off: its record was
never confirmed, so no image was delivered for it.

Several processes may write at a time, as when a Dispatcher moves to another node or a new cluster
takes over from an old one. Before a process writes, it takes the folder's lock and reads what the
others have written. So its sums include the records of all writers, and it recognises a record that
another process has written already.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from ..atomic_file import replace_file, sync_folder
from .record import UsageRecord

log = logging.getLogger("ray.serve")

FILE_BYTES = 64 * 2**20
KNOWN = 100_000  # newest records, which are recognised if they are appended again
LOCK_S = 10.0  # how long to wait for the lock; no write holds it for longer
SUMS = "sums"  # the key by which a line of sums differs from a record
NAMES = "????-??-??T??????.??????.jsonl"  # the names of files, as a glob pattern
NAMED = "%Y-%m-%dT%H%M%S.%f"  # the same without the extension, for strftime


class _Key(NamedTuple):
    """The key of a record, which no other record has."""

    call: str
    image: int
    reversal: bool


class UsageLedger:
    """One writer of a ledger folder. Methods block: call them in a thread, one at a time.

    `spent` is the work that each tenant was charged in `month`. It includes the records of the
    other writers that this one has read so far.
    """

    def __init__(
        self, folder: Path, now: float, file_bytes: int = FILE_BYTES, lock_s: float = LOCK_S
    ) -> None:
        """Read the sums of the month of `now`, in Unix time; begin a file if that month has none.

        `file_bytes`: a new file is begun once the current one is larger. `lock_s`: how long to wait
        for the folder's lock, in seconds. Raises `OSError` if the folder cannot be used or stays
        locked, and `ValueError` for a line that is not a usage record.
        """
        self._folder, self._file_bytes, self._lock_s = folder, file_bytes, lock_s
        self._known: OrderedDict[_Key, None] = OrderedDict()
        self._path: Path | None = None  # the newest file
        self._file: Any = None  # the newest file, open for appending
        self._end = 0  # bytes of the newest file that this object has read or written
        self._elsewhere: set[str] = set()  # tenants that other writers have charged
        self.month = month_of(now)
        self.spent: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(self._folder, self._lock_s):
            self._catch_up()
            if not self._path or month_of(_begun(self._path).timestamp()) != self.month:
                self._begin_file(now)
        self._elsewhere.clear()

    def append(self, usages: Iterable[UsageRecord], now: float) -> list[UsageRecord]:
        """Write the records that are new, wait until they are on disk, and return them.

        `now`: the time of the records, in Unix time. Raises `OSError` if the records could not be
        written; the caller may then append them again.
        """
        with _locked(self._folder, self._lock_s):
            try:
                self._catch_up()
            except ValueError as error:
                raise OSError(str(error)) from error
            if month_of(now) > self.month:
                self.month, self.spent = month_of(now), Counter()
                self._rotate(now)
            elif self._path and not self._path.exists():  # the file was moved away
                self._begin_file(now)
            fresh = self._fresh(usages)
            lines = [_line({"time": _stamp(now), **usage._asdict()}) for usage in fresh.values()]
            if lines:
                self._end += self._write(self._file, b"".join(lines))
            for key, usage in fresh.items():
                self._remember(key)
                self.spent[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
            if self._end > self._file_bytes:
                self._rotate(now)
        return list(fresh.values())

    def _fresh(self, usages: Iterable[UsageRecord]) -> dict[_Key, UsageRecord]:
        """The records that are to be written, by their keys."""
        fresh: dict[_Key, UsageRecord] = {}
        for usage in usages:
            key = _Key(usage.call, usage.image, usage.outcome == "reversed")
            record = key._replace(reversal=False)
            if key in self._known or key in fresh:
                continue
            if key.reversal and record not in self._known and record not in fresh:
                self._remember(record)  # it must not be written any more
                continue
            fresh[key] = usage
        return fresh

    def charged_elsewhere(self) -> set[str]:
        """Return the tenants that other writers have charged, and forget them.

        So each call returns the tenants of the records that were read since the last call.
        """
        tenants, self._elsewhere = self._elsewhere, set()
        return tenants

    def close(self) -> None:
        """Close the file; nothing can be appended any more."""
        self._file.close()

    def _catch_up(self) -> None:
        """Read the lines that were written since the last call.

        The first call reads the newest two files.
        """
        files = usage_files(self._folder)
        for path in files[-2:] if self._path is None else [f for f in files if f >= self._path]:
            if path != self._path or self._was_replaced():
                self._open(path)
            for entry, end in _lines(path, self._end):
                self._learn(entry)
                self._end = end
        if self._file and os.fstat(self._file.fileno()).st_size > self._end:
            self._file.truncate(self._end)  # an incomplete line, whose writer was killed

    def _was_replaced(self) -> bool:
        """Return whether a new file has the name of the open one, as after records were erased."""
        assert self._path  # noqa: S101 - for the type checker
        present, opened = self._path.stat(), os.fstat(self._file.fileno())
        return present.st_ino != opened.st_ino or present.st_size < self._end

    def _open(self, path: Path) -> None:
        opened = path.open("ab", buffering=0)
        if self._file:
            self._file.close()
        self._path, self._file, self._end = path, opened, 0

    def _learn(self, entry: dict[str, Any]) -> None:
        """Count a line that this object has read and not written itself: sums, or a record."""
        month = entry["month"] if SUMS in entry else entry["time"][: len(self.month)]
        if month > self.month:
            self.month, self.spent = month, Counter()
        if SUMS in entry:
            self.spent = Counter(entry[SUMS] if month == self.month else {})
            self._elsewhere.update(self.spent)
            return
        self._remember(_Key(entry["call"], entry["image"], entry["outcome"] == "reversed"))
        if month == self.month:
            self.spent[entry["tenant"]] += entry["work_s"]
            self._elsewhere.add(entry["tenant"])

    def _rotate(self, now: float) -> None:
        """Begin a new file; if that fails, go on with the old one.

        The old file may hold the records of two months, because every line states its time.
        """
        try:
            self._begin_file(now)
        except OSError:
            log.warning("usage: cannot begin a new file; writing to the old one", exc_info=True)

    def _begin_file(self, now: float) -> None:
        """Begin a new file with one line, the sums.

        The file has a temporary name until that line is on disk.
        """
        begun = datetime.fromtimestamp(now, UTC)
        if files := usage_files(self._folder):  # the clock may have been set back
            begun = max(begun, _begun(files[-1]) + timedelta(microseconds=1))
        part, path = self._folder / "part", self._folder / f"{begun.strftime(NAMED)}.jsonl"
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab", buffering=0) as file:
            end = self._write(file, _line({SUMS: self.spent, "month": self.month}))
        part.rename(path)
        self._open(path)
        self._end = end
        sync_folder(self._folder)

    def _write(self, file: Any, lines: bytes) -> int:
        """Append all lines or none, and fsync them; return the number of bytes.

        Raises `OSError` if the disk is full or fails.
        """
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
        return len(lines)

    def _remember(self, key: _Key) -> None:
        self._known[key] = None
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)


@contextlib.contextmanager
def _locked(folder: Path, lock_s: float) -> Iterator[None]:
    """Hold the folder's lock. Raises `OSError` if another process holds it for `lock_s` seconds."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + lock_s
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(
                        f"{folder}: another process has held the lock for more than {lock_s:g} s"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def month_of(now: float) -> str:
    """The month of a Unix time, as YYYY-MM in UTC."""
    return time.strftime("%Y-%m", time.gmtime(now))


def month_end(now: float) -> float:
    """The Unix time at which the month of `now` ends, in UTC."""
    utc = datetime.fromtimestamp(now, UTC)
    year, month = divmod(utc.year * 12 + utc.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def usage_files(folder: Path) -> list[Path]:
    """The files of a ledger folder, oldest first."""
    return sorted(folder.glob(NAMES))


def read_usage(
    folder: Path, since: str = "", tenant: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield records as plain data, oldest first.

    Records before `since` are skipped. `since` is a time as the records state it, such as
    2026-11-22T12:00:00.000Z, or the beginning of such a time, such as 2026-11. `tenant`: yield the
    records of this tenant only. Raises `OSError` if a file cannot be read, and `ValueError` for a
    line that is not a usage record.
    """
    files = usage_files(folder)
    for file, following in zip_longest(files, files[1:]):
        if following and following.stem < since.replace(":", ""):
            continue
        for entry in _entries(file):
            if SUMS not in entry and entry["time"] >= since and tenant in (None, entry["tenant"]):
                yield entry


def erase_usage(folder: Path, tenant: str) -> int:
    """Delete a tenant's records and sums; return the number of deleted records.

    Raises `OSError` if a file cannot be read or written, or the folder stays locked. Raises
    `ValueError` for a line that is not a usage record.
    """
    old = usage_files(folder)[:-1]
    erased = sum(_erase(file, tenant) for file in old)
    with _locked(folder, LOCK_S):  # for the newest files, to which other processes may write
        return erased + sum(_erase(file, tenant) for file in usage_files(folder)[len(old) :])


def _erase(file: Path, tenant: str) -> int:
    kept, erased, in_sums = [], 0, False
    for entry in _entries(file):
        if SUMS in entry:
            in_sums = entry[SUMS].pop(tenant, None) is not None
        elif entry["tenant"] == tenant:
            erased += 1
            continue
        kept.append(_line(entry))
    if erased or in_sums:
        replace_file(file, *kept, sync=True, keep_owner=True)
    return erased


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    return (entry for entry, _ in _lines(file))


def _lines(file: Path, begin: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each complete line as data, and the position in the file at which it ends.

    `begin`: the position at which to begin. Raises `ValueError` for a line that is not a usage
    record.
    """
    with file.open("rb") as lines:
        end = lines.seek(begin)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # the line is being written
            try:
                entry = json.loads(line)
                if SUMS not in entry:
                    UsageRecord(**{name: entry[name] for name in UsageRecord._fields})
                    entry["time"][0]
            except (ValueError, KeyError, TypeError, IndexError):
                raise ValueError(f"{file}:{number} is not a usage record") from None
            end += len(line)
            yield entry, end


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _begun(file: Path) -> datetime:
    return datetime.strptime(file.stem, NAMED).replace(tzinfo=UTC)
