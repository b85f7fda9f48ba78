"""The query of lists: where a page begins, and how many entries it has.

Pure: standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...errors import InvalidRequest, did_you_mean

MOST = 100  # entries of a page
DEFAULT = 20


class PageQuery(NamedTuple):
    """Which entries of a list: behind the entry with the id `after`, at most `limit`."""

    after: str | None
    limit: int
    only: dict[str, str]


def parse_page(query: Mapping[str, str], *only: str, most: int = MOST) -> PageQuery:
    """Parse the query of a list; `only`: further parameters that it may have.

    Raises `InvalidRequest` for an unknown parameter, or a `limit` that is not from 1 to `most`.
    """
    known = "after", "limit", *only
    for name, value in query.items():
        if name in known and not (value.isascii() and value.isprintable()):
            raise InvalidRequest(f"{name} must be printable ASCII", param=name)
        if name not in known:
            raise InvalidRequest(
                f"unknown parameter '{name[:80]}': {did_you_mean(name, known)}", param=name[:80]
            )
    text = query.get("limit", str(min(DEFAULT, most)))
    if not (text.isdecimal() and len(text) < 9 and 1 <= int(text) <= most):
        raise InvalidRequest(f"limit '{text[:80]}' must be from 1 to {most}", param="limit")
    return PageQuery(
        query.get("after") or None, int(text), {name: query[name] for name in only if name in query}
    )
