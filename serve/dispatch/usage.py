"""What tenants are charged: one line of JSON for each image, on disk before its answer begins.

Files in a folder, named by when they were begun; the newest is written to, by one process alone.
Each begins with the sums of its calendar month (UTC) so far, so a start reads one file, however
long the month. A record that was told twice is written once. A file's last line is cut off if it is
not whole: such a record was never confirmed, so no image was delivered for it.

While another process writes there, as when a Dispatcher moves to another node or a new cluster
takes over from an old one, a process writes to a folder of its own within it: 2, 3 and so on. Each
reads what the others write, so sums are of all, and a record is known whoever wrote it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import itertools
import json
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..files import sync_folder, write_whole
from .messages import Usage

log = logging.getLogger("ray.serve")

FILE_BYTES = 64 * 2**20
KNOWN = 100_000  # records that would be recognised if they were told again
SUMS = "sums"
NAMES = "????-??-??T??????.??????.jsonl"
NAMED = "%Y-%m-%dT%H%M%S.%f"


class UsageLedger:
    """The one writer of its files. Calls block: use a thread, one at a time."""

    def __init__(self, folder: Path, now: float, file_bytes: int = FILE_BYTES) -> None:
        """Raises `OSError`, and `ValueError` for a file with a line that is not ours."""
        self._root, self._file_bytes = folder, file_bytes
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._file: Any = None
        self.month = month_of(now)
        self._spent: Counter[str] = Counter()  # work of each tenant in `month`, written here
        self._others: dict[Path, _Other] = {}
        self._folder, self._lock = _free_folder(folder)
        self._look_at_others()
        files = usage_files(self._folder)
        if files:
            _cut_torn_line(files[-1])
        for file in files[-2:]:
            self._learn(file)
        if files:
            self._file = files[-1].open("ab", buffering=0)
        if not files or month_of(_begun(files[-1]).timestamp()) != self.month:
            self._begin_file(now)

    @property
    def spent(self) -> Counter[str]:
        """Work of each tenant in `month`, by all writers."""
        others = [other.spent for other in self._others.values() if other.month == self.month]
        return sum(others, self._spent) if others else self._spent

    def append(self, usages: Iterable[Usage], now: float) -> list[Usage]:
        """Write what is not yet written, and wait until the disk has it; returns that.

        Raises `OSError`; what was not confirmed may be told again.
        """
        if month_of(now) > self.month:
            self.month, self._spent = month_of(now), Counter()
            self._rotate(now)
        self._look_at_others()
        fresh = {
            (usage.call, usage.image): usage
            for usage in usages
            if (usage.call, usage.image) not in self._known
        }
        lines = [_line({"time": _stamp(now), **usage._asdict()}) for usage in fresh.values()]
        if lines:
            self._write(self._file, b"".join(lines))
        for key, usage in fresh.items():
            self._remember(key)
            self._spent[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
        if os.fstat(self._file.fileno()).st_size > self._file_bytes:
            self._rotate(now)
        return list(fresh.values())

    def close(self) -> None:
        self._file.close()
        os.close(self._lock)

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
        part = self._folder / "part"
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        opened = os.fdopen(file, "ab", buffering=0)
        try:
            self._write(opened, _line({SUMS: self._spent, "month": self.month}))
            part.rename(self._folder / f"{begun.strftime(NAMED)}.jsonl")
        except OSError:
            opened.close()
            raise
        if self._file:
            self._file.close()
        self._file = opened
        sync_folder(self._folder)

    def _write(self, file: Any, lines: bytes) -> None:
        """All of it or nothing."""
        end = os.fstat(file.fileno()).st_size
        try:
            if file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise

    def _learn(self, file: Path) -> None:
        for entry in _entries(file):
            if SUMS in entry:
                self._spent = Counter(entry[SUMS] if entry["month"] == self.month else {})
                continue
            self._remember((entry["call"], entry["image"]))
            if entry["time"].startswith(self.month):
                self._spent[entry["tenant"]] += entry["work_s"]

    def _look_at_others(self) -> None:
        for folder in _folders(self._root):
            if folder != self._folder:
                other = self._others.setdefault(folder, _Other(folder))
                for key in other.news():
                    self._remember(key)

    def _remember(self, key: tuple[str, int]) -> None:
        self._known[key] = None
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)


class _Other:
    """The files of another writer, which may grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Path | None = None
        self._end = 0  # of what was read of it
        self.month = ""
        self.spent: Counter[str] = Counter()  # in `month`

    def news(self) -> Iterator[tuple[str, int]]:
        """Calls and images of records since it was last asked; at first of the last two files."""
        files = usage_files(self._folder)
        if self._file is None:
            files = files[-2:]
        for file in files:
            if self._file is None or file > self._file:
                self._file, self._end = file, 0
            if file == self._file:
                yield from self._read(file)

    def _read(self, file: Path) -> Iterator[tuple[str, int]]:
        if file.stat().st_size < self._end:  # records were erased
            self._end = 0
        for entry, end in _lines(file, self._end):
            self._end = end
            if SUMS in entry:
                self.month, self.spent = entry["month"], Counter(entry[SUMS])
                continue
            yield entry["call"], entry["image"]
            if not entry["time"].startswith(self.month):
                self.month, self.spent = entry["time"][: len(self.month)], Counter()
            self.spent[entry["tenant"]] += entry["work_s"]


def _free_folder(folder: Path) -> tuple[Path, int]:
    """The first that nobody writes to, and its lock, which is held until it is closed."""
    for number in itertools.count(1):
        own = folder if number == 1 else folder / str(number)
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (lock := _locked(own)) is not None:
            return own, lock
    raise AssertionError("numbers do not end")


def _locked(folder: Path) -> int | None:
    """The folder's lock; None if another process has it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _folders(folder: Path) -> list[Path]:
    """Of all writers."""
    return [folder, *sorted(sub for sub in folder.glob("[0-9]*") if sub.is_dir())]


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
    found = (_read_usage(own, since, tenant) for own in _folders(folder))
    return heapq.merge(*found, key=lambda entry: entry["time"])


def _read_usage(folder: Path, since: str, tenant: str | None) -> Iterator[dict[str, Any]]:
    files = usage_files(folder)
    for file, following in zip(files, [*files[1:], None], strict=True):
        if following and following.stem < since.replace(":", ""):
            continue
        for entry in _entries(file):
            if SUMS not in entry and entry["time"] >= since and tenant in (None, entry["tenant"]):
                yield entry


def erase_usage(folder: Path, tenant: str) -> tuple[int, int]:
    """Delete a tenant's records; returns how many, and how many lines are left in the file in use.

    That one belongs to the Dispatcher as long as it runs, and begins with the month's sums. Raises
    `OSError`, and `ValueError` for a line that is not ours.
    """
    found = [_erase_usage(own, tenant) for own in _folders(folder)]
    return sum(erased for erased, _ in found), sum(left for _, left in found)


def _erase_usage(folder: Path, tenant: str) -> tuple[int, int]:
    erased = sum(_erase(file, tenant) for file in usage_files(folder)[:-1])
    if (lock := _locked(folder)) is None:
        newest = (entry for file in usage_files(folder)[-1:] for entry in _entries(file))
        return erased, sum(e.get("tenant") == tenant or tenant in e.get(SUMS, ()) for e in newest)
    try:
        return erased + sum(_erase(file, tenant) for file in usage_files(folder)[-1:]), 0
    finally:
        os.close(lock)


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
        owner = file.stat()
        write_whole(file, *kept, sync=True)
        with contextlib.suppress(PermissionError):  # else the server could not read what root wrote
            os.chown(file, owner.st_uid, owner.st_gid)
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
            end += len(line)
            try:
                entry = json.loads(line)
                if SUMS not in entry:
                    Usage(**{name: entry[name] for name in Usage._fields})
                    entry["time"][0]
            except (ValueError, KeyError, TypeError, IndexError):
                raise ValueError(f"{file}:{number} is not a usage record") from None
            yield entry, end


def _cut_torn_line(file: Path) -> None:
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _begun(file: Path) -> datetime:
    return datetime.strptime(file.stem, NAMED).replace(tzinfo=UTC)
