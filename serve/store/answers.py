"""Answers to requests with an Idempotency-Key, so that a repeated request gets the same answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from sqlalchemy import Connection, and_, delete, insert, or_, select, update

from .database import Database
from .schema import ANSWERS

KEPT_S = 24 * 3600.0


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
    """What is known of a request that was claimed.

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
            mine = {"cluster": claim.cluster, "session": claim.session}
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
            here = row.cluster == claim.cluster
            if row.session in sessions if here else row.until > now:
                return Claimed("running")
            connection.execute(update(ANSWERS).where(*there).values(mine_until))
            return Claimed("yours", row.call)

        return self._database.write(work)

    def finish(self, claim: Claim, answer: Answer | None, now: float) -> None:
        """Remember the answer to a request that was claimed; None: forget the request."""
        mine = (
            ANSWERS.c.tenant == claim.tenant,
            ANSWERS.c.key == claim.key,
            ANSWERS.c.session == claim.session,
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
                "until": now + KEPT_S,
            }
            connection.execute(update(ANSWERS).where(*mine).values(values))

        self._database.write(work)

    def forget_old(self, now: float) -> None:
        """Forget answers that were kept for a day, and requests that nobody has answered."""
        kept = ANSWERS.c.status.is_not(None), ANSWERS.c.until <= now
        given_up = ANSWERS.c.until <= now - KEPT_S
        old = delete(ANSWERS).where(or_(and_(*kept), given_up))
        self._database.write(lambda connection: connection.execute(old))


def _answer(status: int, headers: str, body: bytes) -> Answer:
    given: Mapping[str, str] = json.loads(headers)
    return Answer(status, dict(given), bytes(body))
