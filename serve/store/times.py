"""Times as the tables and the admin API state them: 2026-11-22T20:36:36.156Z, in UTC.

Pure: standard library only.
"""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(now: float) -> str:
    """The text of a Unix time. Texts sort like their times."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def unix_time(text: str) -> float:
    """The Unix time of an ISO 8601 text; without an offset it is in UTC.

    Raises `ValueError` for any other text.
    """
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
