"""Answers to requests with an Idempotency-Key, so that a repeated request gets the same answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, and_, bindparam, delete, insert, or_, select, update

from .database import Database
from .schema import ANSWERS, USAGE, VOIDS

KEPT_S = 24 * 3600.0
MOST_BYTES = 256 * 2**20  # of a tenant's answers; beyond them the oldest are forgotten
SOME = 200  # old answers that are forgotten in one transaction


class Claim(NamedTuple):
    """A request that wants to be answered once.

    `digest`: SHA-256 of the request, hexadecimal. `call`: the id of the call that is to generate
    its images. `cluster`, `session`: who answers it. `takes_s`: how long that may take.
    """

    tenant: str
    key: str
    digest: str
    call: str
    cluster: str
    session: str
    takes_s: float


class Answer(NamedTuple):
    """An answer over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes


class Claimed(NamedTuple):
    """The result of a claim.

    "yours": it is to be answered now, by the call `call`. "running": it is being answered.
    "other": another request had this key. "answered": `answer` is its answer.
    """

    state: Literal["yours", "running", "other", "answered"]
    call: str = ""
    answer: Answer | None = None


class Answers:
    """The answers of all tenants. Methods block: call them in a thread.

    Each raises `StoreUnavailable`, an `OSError`, if the database cannot be used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, claim: Claim, now: float, sessions: Collection[str]) -> Claimed:
        """Claim a request, or learn that somebody else has answered it or does so.

        `now`: Unix time. `sessions`: those of this cluster that are open. A request whose Ingress
        has died is answered again, by a call of the same id: so its images are charged once.
        """

        def work(connection: Connection) -> Claimed:
            there = ANSWERS.c.tenant == claim.tenant, ANSWERS.c.key == claim.key
            row = connection.execute(select(ANSWERS).where(*there)).first()
            mine = {"claim": claim.call, "cluster": claim.cluster, "session": claim.session}
            mine_until = {**mine, "until": now + claim.takes_s}
            if row is None or (row.status is not None and row.until <= now):
                connection.execute(delete(ANSWERS).where(*there))
                fresh = {"tenant": claim.tenant, "key": claim.key, "digest": claim.digest}
                values = {**fresh, "call": claim.call, **mine_until}
                connection.execute(insert(ANSWERS).values(values))
                return Claimed("yours", claim.call)
            if row.digest != claim.digest:
                return Claimed("other")
            if row.status is not None:
                return Claimed("answered", row.call, _answer(row.status, row.headers, row.body))
            is_open = row.session in sessions or row.cluster != claim.cluster
            if is_open and row.until > now:
                return Claimed("running")
            # Its images may be charged already, unless that was taken back: then never again.
            call = claim.call if _taken_back(connection, row.call) else row.call
            values = {**mine_until, "call": call}
            connection.execute(update(ANSWERS).where(*there).values(values))
            return Claimed("yours", call)

        return self._database.write(work)

    def finish(self, claim: Claim, answer: Answer | None, now: float) -> None:
        """Remember the answer to a request that was claimed; None: forget the request."""
        mine = (
            ANSWERS.c.tenant == claim.tenant,
            ANSWERS.c.key == claim.key,
            ANSWERS.c.claim == claim.call,
            ANSWERS.c.status.is_(None),
        )

        def work(connection: Connection) -> None:
            if answer is None:
                connection.execute(delete(ANSWERS).where(*mine))
                return
            values = {
                "status": answer.status,
                "headers": json.dumps(answer.headers),
                "body": answer.body,
                "bytes": len(answer.body),
                "until": now + KEPT_S,
            }
            connection.execute(update(ANSWERS).where(*mine).values(values))
            _make_room(connection, claim.tenant)

        self._database.write(work)

    def forget_old(self, now: float) -> bool:
        """Forget some of the answers that were kept for a day; return whether there may be more.

        Requests that nobody has answered for a day are forgotten too.
        """
        kept = ANSWERS.c.status.is_not(None), ANSWERS.c.until <= now
        old = or_(and_(*kept), ANSWERS.c.until <= now - KEPT_S)
        some = select(ANSWERS.c.tenant, ANSWERS.c.key).where(old).limit(SOME)

        def work(connection: Connection) -> bool:
            found = connection.execute(some).all()
            _delete(connection, found)
            return len(found) == SOME

        return self._database.write(work)


def _taken_back(connection: Connection, call: str) -> bool:
    """Return whether a charge of a call was taken back, written or not."""
    voids = select(VOIDS.c.call).where(VOIDS.c.call == call)
    reversed_ = select(USAGE.c.call).where(USAGE.c.call == call, USAGE.c.reversal == 1)
    return connection.execute(voids.union_all(reversed_)).first() is not None


def _make_room(connection: Connection, tenant: str) -> None:
    """Forget a tenant's oldest answers beyond `MOST_BYTES`."""
    answered = ANSWERS.c.tenant == tenant, ANSWERS.c.status.is_not(None)
    columns = ANSWERS.c.tenant, ANSWERS.c.key, ANSWERS.c.bytes
    newest = select(*columns).where(*answered).order_by(ANSWERS.c.until.desc())
    total, gone = 0, []
    for row in connection.execute(newest):
        total += row.bytes or 0
        if total > MOST_BYTES:
            gone.append(row)
    _delete(connection, gone)


def _delete(connection: Connection, rows: Sequence[Any]) -> None:
    if rows:
        there = ANSWERS.c.tenant == bindparam("of"), ANSWERS.c.key == bindparam("with_key")
        named = [{"of": row.tenant, "with_key": row.key} for row in rows]
        connection.execute(delete(ANSWERS).where(*there), named)


def _answer(status: int, headers: str, body: bytes) -> Answer:
    given: Mapping[str, str] = json.loads(headers)
    return Answer(status, dict(given), bytes(body))
