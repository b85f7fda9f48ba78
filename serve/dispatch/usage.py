"""What tenants are charged: one line of JSON for each image, on disk before its answer begins.

Files in a folder, named by when they were begun; the newest is written to, by one process alone.
Each begins with the sums of its calendar month (UTC) so far, so a start reads one file, however
long the month. A record that was told twice is written once. A file's last line is cut off if it is
not whole: such a record was never confirmed, so no image was delivered for it.
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

from ..files import sync_folder, write_whole
from .messages import Usage

log = logging.getLogger("ray.serve")

FILE_BYTES = 64 * 2**20
KNOWN = 100_000  # records that would be recognised if they were told again
LOCKED_S = 10.0  # the process before this one has let go by then
SUMS = "sums"
NAMES = "????-??-??T??????.??????.jsonl"
NAMED = "%Y-%m-%dT%H%M%S.%f"


class UsageLedger:
    """The one writer of a folder. Calls block: use a thread, one at a time."""

    def __init__(self, folder: Path, now: float, file_bytes: int = FILE_BYTES) -> None:
        """Raises `OSError`, and `ValueError` for a file with a line that is not ours."""
        self._folder, self._file_bytes = folder, file_bytes
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._file: Any = None
        self.month = month_of(now)
        self.spent: Counter[str] = Counter()  # work of each tenant in `month`
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _locked(folder)
        files = usage_files(folder)
        if files:
            _cut_torn_line(files[-1])
        for file in files[-2:]:
            self._learn(file)
        if files:
            self._file = files[-1].open("ab", buffering=0)
        if not files or month_of(_begun(files[-1]).timestamp()) != self.month:
            self._begin_file(now)

    def append(self, usages: Iterable[Usage], now: float) -> list[Usage]:
        """Write what is not yet written, and wait until the disk has it; returns that.

        Raises `OSError`; what was not confirmed may be told again.
        """
        if month_of(now) > self.month:
            self.month, self.spent = month_of(now), Counter()
            self._rotate(now)
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
            self.spent[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
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
            self._write(opened, _line({SUMS: self.spent, "month": self.month}))
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
                self.spent = Counter(entry[SUMS] if entry["month"] == self.month else {})
                continue
            self._remember((entry["call"], entry["image"]))
            if entry["time"].startswith(self.month):
                self.spent[entry["tenant"]] += entry["work_s"]

    def _remember(self, key: tuple[str, int]) -> None:
        self._known[key] = None
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)


def _locked(folder: Path, wait_s: float | None = None) -> int:
    """The folder's lock, held until it is closed. Raises `OSError` if another process has it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    until = time.monotonic() + (LOCKED_S if wait_s is None else wait_s)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(lock)
                raise OSError(f"{folder}: another process writes usage here") from None
            time.sleep(0.1)
        else:
            return lock


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


def erase_usage(folder: Path, tenant: str) -> tuple[int, int]:
    """Delete a tenant's records; returns how many, and how many lines are left in the file in use.

    That one belongs to the Dispatcher as long as it runs, and begins with the month's sums. Raises
    `OSError`, and `ValueError` for a line that is not ours.
    """
    erased = sum(_erase(file, tenant) for file in usage_files(folder)[:-1])
    try:
        lock = _locked(folder, wait_s=0.0)
    except OSError:
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
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # it is being written
            try:
                entry = json.loads(line)
                if SUMS not in entry:
                    Usage(**{name: entry[name] for name in Usage._fields})
                    entry["time"][0]
            except (ValueError, KeyError, TypeError, IndexError):
                raise ValueError(f"{file}:{number} is not a usage record") from None
            yield entry


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
