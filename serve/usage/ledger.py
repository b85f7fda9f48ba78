"""What tenants are charged: one line of JSON for each image, on disk before its answer begins.

Files in a folder, named by when they were begun; the newest is written to. Each begins with the
sums of its calendar month (UTC) so far, so a start reads the newest two, however long the month. A
record that was told twice is written once. A file's last line is cut off if it is not whole: such a
record was never confirmed, so no image was delivered for it.

Several processes may write at a time, as when a Dispatcher moves to another node or a new cluster
takes over from an old one. Each looks, under the folder's lock, at what the others have written
before it writes: sums are of all, and a record is known whoever wrote it.
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
from pathlib import Path
from typing import Any

from ..atomic_file import replace_file, sync_folder
from .record import UsageRecord

log = logging.getLogger("ray.serve")

FILE_BYTES = 64 * 2**20
KNOWN = 100_000  # records that would be recognised if they were told again
LOCKED_S = 10.0  # nobody writes for longer
SUMS = "sums"
NAMES = "????-??-??T??????.??????.jsonl"
NAMED = "%Y-%m-%dT%H%M%S.%f"


class UsageLedger:
    """One of the writers of a folder. Calls block: use a thread, one at a time."""

    def __init__(self, folder: Path, now: float, file_bytes: int = FILE_BYTES) -> None:
        """Raises `OSError`, and `ValueError` for a file with a line that is not ours."""
        self._folder, self._file_bytes = folder, file_bytes
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._path: Path | None = None  # of the newest file
        self._file: Any = None
        self._end = 0  # of what is known of it
        self._elsewhere: set[str] = set()
        self.month = month_of(now)
        self.spent: Counter[str] = Counter()  # work of each tenant in `month`
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder):
            self._catch_up()
            if not self._path or month_of(_begun(self._path).timestamp()) != self.month:
                self._begin_file(now)
        self._elsewhere.clear()

    def append(self, usages: Iterable[UsageRecord], now: float) -> list[UsageRecord]:
        """Write what is not yet written, and wait until the disk has it; returns that.

        Raises `OSError`; what was not confirmed may be told again.
        """
        with _locked(self._folder):
            try:
                self._catch_up()
            except ValueError as error:
                raise OSError(str(error)) from error
            if month_of(now) > self.month:
                self.month, self.spent = month_of(now), Counter()
                self._rotate(now)
            elif self._path and not self._path.exists():  # moved away
                self._begin_file(now)
            fresh = {
                (usage.call, usage.image): usage
                for usage in usages
                if (usage.call, usage.image) not in self._known
            }
            lines = [_line({"time": _stamp(now), **usage._asdict()}) for usage in fresh.values()]
            if lines:
                self._end += self._write(self._file, b"".join(lines))
            for key, usage in fresh.items():
                self._remember(key)
                self.spent[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
            if self._end > self._file_bytes:
                self._rotate(now)
        return list(fresh.values())

    def charged_elsewhere(self) -> set[str]:
        """Tenants of records that others have written, as far as it was seen since last asked."""
        tenants, self._elsewhere = self._elsewhere, set()
        return tenants

    def close(self) -> None:
        self._file.close()

    def _catch_up(self) -> None:
        """Learn what was written since the last time; at first, the newest two files."""
        files = usage_files(self._folder)
        for path in files[-2:] if self._path is None else [f for f in files if f >= self._path]:
            if path != self._path or self._was_replaced():
                self._open(path)
            for entry, end in _lines(path, self._end):
                self._learn(entry)
                self._end = end
        if self._file and os.fstat(self._file.fileno()).st_size > self._end:
            self._file.truncate(self._end)  # a torn line, of one that was ended in the middle of it

    def _was_replaced(self) -> bool:
        """Records were erased from the file, which is another one then."""
        assert self._path  # noqa: S101 - for the type checker
        there, ours = self._path.stat(), os.fstat(self._file.fileno())
        return there.st_ino != ours.st_ino or there.st_size < self._end

    def _open(self, path: Path) -> None:
        opened = path.open("ab", buffering=0)
        if self._file:
            self._file.close()
        self._path, self._file, self._end = path, opened, 0

    def _learn(self, entry: dict[str, Any]) -> None:
        month = entry["month"] if SUMS in entry else entry["time"][: len(self.month)]
        if month > self.month:
            self.month, self.spent = month, Counter()
        if SUMS in entry:
            self.spent = Counter(entry[SUMS] if month == self.month else {})
            self._elsewhere.update(self.spent)
            return
        self._remember((entry["call"], entry["image"]))
        if month == self.month:
            self.spent[entry["tenant"]] += entry["work_s"]
            self._elsewhere.add(entry["tenant"])

    def _rotate(self, now: float) -> None:
        """Go on in the file there is if another one cannot be begun: its lines say their month."""
        try:
            self._begin_file(now)
        except OSError:
            log.warning("usage: no new file; going on in the old one", exc_info=True)

    def _begin_file(self, now: float) -> None:
        """Under its own name only when its first line is on disk."""
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
        """All of it or nothing; returns how much."""
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
        return len(lines)

    def _remember(self, key: tuple[str, int]) -> None:
        self._known[key] = None
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else writes. Raises `OSError` if somebody does not let go."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + LOCKED_S
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(f"{folder}: another process does not let go of it") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def month_of(now: float) -> str:
    """YYYY-MM in UTC."""
    return time.strftime("%Y-%m", time.gmtime(now))


def month_end(now: float) -> float:
    """When the month ends, Unix time."""
    utc = datetime.fromtimestamp(now, UTC)
    year, month = divmod(utc.year * 12 + utc.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def usage_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(NAMES))


def read_usage(
    folder: Path, since: str = "", tenant: str | None = None
) -> Iterator[dict[str, Any]]:
    """Records from a time on, oldest first; `since` as they have it, or the beginning of that.

    Raises `OSError`, and `ValueError` for a line that is not ours.
    """
    files = usage_files(folder)
    for file, following in zip(files, [*files[1:], None], strict=True):
        if following and following.stem < since.replace(":", ""):
            continue
        for entry in _entries(file):
            if SUMS not in entry and entry["time"] >= since and tenant in (None, entry["tenant"]):
                yield entry


def erase_usage(folder: Path, tenant: str) -> int:
    """Delete a tenant's records; returns how many there were.

    Raises `OSError`, and `ValueError` for a line that is not ours.
    """
    old = usage_files(folder)[:-1]
    erased = sum(_erase(file, tenant) for file in old)
    with _locked(folder):  # what is written to, or was until now
        return erased + sum(_erase(file, tenant) for file in usage_files(folder)[len(old) :])


def _erase(file: Path, tenant: str) -> int:
    kept, erased, named = [], 0, False
    for entry in _entries(file):
        if SUMS in entry:
            named = entry[SUMS].pop(tenant, None) is not None
        elif entry["tenant"] == tenant:
            erased += 1
            continue
        kept.append(_line(entry))
    if erased or named:
        replace_file(file, *kept, sync=True, keep_owner=True)
    return erased


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    return (entry for entry, _ in _lines(file))


def _lines(file: Path, begin: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """What whole lines say, and where each ends."""
    with file.open("rb") as lines:
        end = lines.seek(begin)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # it is being written
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
