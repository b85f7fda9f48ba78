"""What tenants are charged: one line of JSON for each image, on disk before its answer begins.

Files in a folder, named by when they were begun; the newest is written to. Each begins with the
sums of its calendar month (UTC) so far, so a start reads one file, however long the month. A record
that was told twice is written once. A file's last line is cut off if it is not whole: such a record
was never confirmed, so no image was delivered for it.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .messages import Usage

FILE_BYTES = 64 * 2**20
KNOWN = 100_000  # records that would be recognised if they were told again
SUMS = "sums"


class UsageLedger:
    """The one writer of a folder. Calls block: use a thread, one at a time."""

    def __init__(self, folder: Path, now: float, file_bytes: int = FILE_BYTES) -> None:
        """Raises `OSError`, and `ValueError` for a file with a line that is not ours."""
        self._folder, self._file_bytes = folder, file_bytes
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._file: Any = None
        self.month = month_of(now)
        self.spent: Counter[str] = Counter()  # work of each tenant in `month`
        folder.mkdir(parents=True, exist_ok=True)
        files = usage_files(folder)
        if files:
            _cut_torn_line(files[-1])
        for file in files[-2:]:
            self._learn(file, counting=file is files[-1])
        if files and month_of(_begun(files[-1])) == self.month:
            self._file = files[-1].open("ab", buffering=0)
        else:
            self._begin_file(now)

    def append(self, usages: Iterable[Usage], now: float) -> list[Usage]:
        """Write what is not yet written, and wait until the disk has it; returns that.

        Raises `OSError`; what was not confirmed may be told again.
        """
        if month_of(now) != self.month:
            self.month, self.spent = month_of(now), Counter()
            self._begin_file(now)
        fresh = {
            (usage.call, usage.image): usage
            for usage in usages
            if (usage.call, usage.image) not in self._known
        }
        lines = [_line({"time": _stamp(now), **usage._asdict()}) for usage in fresh.values()]
        if lines:
            self._write(b"".join(lines))
        for key, usage in fresh.items():
            self._remember(key)
            self.spent[usage.tenant] += usage.work_s  # type: ignore[assignment]  # floats
        if self._file.tell() > self._file_bytes:
            self._begin_file(now)
        return list(fresh.values())

    def close(self) -> None:
        self._file.close()

    def _begin_file(self, now: float) -> None:
        if self._file:
            self._file.close()
        name = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H%M%S.%f")
        self._file = (self._folder / f"{name}.jsonl").open("ab", buffering=0)
        self._write(_line({SUMS: self.spent, "month": self.month}))
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # else the file itself may be gone after a power cut
        finally:
            os.close(folder)

    def _write(self, lines: bytes) -> None:
        """All of it or nothing."""
        end = self._file.tell()
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def _learn(self, file: Path, *, counting: bool) -> None:
        for entry in _entries(file):
            if SUMS in entry:
                if counting and entry["month"] == self.month:
                    self.spent = Counter(entry[SUMS])
                continue
            self._remember((entry["call"], entry["image"]))
            if counting and entry["time"].startswith(self.month):
                self.spent[entry["tenant"]] += entry["work_s"]

    def _remember(self, key: tuple[str, int]) -> None:
        self._known[key] = None
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)


def month_of(now: float) -> str:
    """YYYY-MM in UTC."""
    return time.strftime("%Y-%m", time.gmtime(now))


def month_end(now: float) -> float:
    """When the month ends, Unix time."""
    utc = datetime.fromtimestamp(now, UTC)
    year, month = divmod(utc.year * 12 + utc.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def usage_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def read_usage(
    folder: Path, since: str = "", tenant: str | None = None
) -> Iterator[dict[str, Any]]:
    """Records from a time on, oldest first; `since` as YYYY-MM-DD or longer."""
    files = usage_files(folder)
    for file, following in zip(files, [*files[1:], None], strict=True):
        if following and following.stem < since.replace(":", ""):
            continue
        for entry in _entries(file):
            if SUMS not in entry and entry["time"] >= since and tenant in (None, entry["tenant"]):
                yield entry


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # it is being written
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(f"{file}:{number} is not a usage record") from None


def _cut_torn_line(file: Path) -> None:
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _begun(file: Path) -> float:
    begun = datetime.strptime(file.stem, "%Y-%m-%dT%H%M%S.%f")
    return begun.replace(tzinfo=UTC).timestamp()
