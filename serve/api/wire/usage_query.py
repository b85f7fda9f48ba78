"""The query of `GET /admin/v1/usage`: which records are asked for.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...errors import InvalidRequest, did_you_mean

MOST = 1000  # records of a page
DEFAULT = 100
LAST_ID = 2**63 - 1


class UsageQuery(NamedTuple):
    """The records behind the one with the id `after`, at most `limit`; None: of all tenants."""

    after: int = 0
    limit: int = DEFAULT
    tenant: str | None = None


def parse_usage_query(query: Mapping[str, str]) -> UsageQuery:
    """Parse the parameters of the URL. Raises `InvalidRequest` for an unknown or invalid one."""
    for name in query:
        if name not in UsageQuery._fields:
            hint = did_you_mean(name, UsageQuery._fields)
            raise InvalidRequest(f"unknown parameter '{name}': {hint}", param=name)
    return UsageQuery(
        after=_whole(query, "after", 0, 0, LAST_ID),
        limit=_whole(query, "limit", DEFAULT, 1, MOST),
        tenant=query.get("tenant"),
    )


def _whole(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise InvalidRequest(
            f"{name} '{text[:40]}' must be a whole number from {least} to {most}", param=name
        )
    return int(text)
