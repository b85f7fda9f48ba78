"""Usage records in files of JSON lines, as earlier releases kept them, to import them.

A folder holds files that are named by the time at which each was begun. A line is a record, or the
sums of a month so far, which are not read.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .record import UsageRecord

SUMS = "sums"  # the key by which a line of sums differs from a record
NAMES = "????-??-??T??????.??????.jsonl"  # the names of files, as a glob pattern
FIELDS = [name for name in UsageRecord._fields if name not in UsageRecord._field_defaults]


def usage_files(folder: Path) -> list[Path]:
    """The files of usage records in a folder, oldest first."""
    return sorted(folder.glob(NAMES))


def read_usage(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file as plain data, oldest first.

    A last line that is not complete is left out: no image was delivered for it. Raises `OSError` if
    the file cannot be read, and `ValueError` for a line that is not a usage record.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                if SUMS in entry:
                    continue
                for name in (*FIELDS, "time"):
                    entry[name]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}:{number} is not a usage record") from None
            yield entry
