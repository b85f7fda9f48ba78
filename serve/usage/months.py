"""Calendar months in UTC, after which budgets begin anew.

Pure: standard library only.
"""

from __future__ import annotations

from datetime import UTC, datetime


def month_of(now: float) -> str:
    """The month of a Unix time, as YYYY-MM."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")


def month_end(now: float) -> float:
    """The Unix time at which the month of `now` ends."""
    utc = datetime.fromtimestamp(now, UTC)
    year, month = divmod(utc.year * 12 + utc.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()
