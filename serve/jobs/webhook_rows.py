"""Webhook endpoints and messages in the database. Each function is a part of a transaction."""

from __future__ import annotations

import base64
import random
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from sqlalchemy import Connection, delete, func, insert, select, update

from ..store.schema import DELIVERIES, WEBHOOKS, next_numbers
from .job import new_id

# Seconds after each failed attempt until the next one: three days in all.
PAUSES_S = (5, 60, 300, 1800, 7200, 18000, 36000, 50400, 64800, 82800)
OLDEST_S = 4 * 86400  # after which a message is given up, however often it was sent
OF_ENDPOINT, OF_TENANT = 4, 8  # messages that one process sends at a time
OF_SLOW_ENDPOINT, OF_SLOW_TENANT = 1, 2  # the same, to endpoints that did not confirm the last one
MOST_ENDPOINTS = 20  # of a tenant
SECRET_BYTES = 32
GONE = 410
GIVEN_UP = 200  # messages that are given up in one transaction
SHOWN = 200  # characters of an answer that are kept


class WebhookEndpoint(NamedTuple):
    """A URL of a tenant that hears of events.

    `events`: their types, separated by spaces; empty: all. `secret`: whsec_… in base64. `disabled`:
    why nothing is sent there any more. `created`: Unix time.
    """

    id: str
    number: int
    tenant: str
    name: str
    url: str
    events: str
    secret: str
    created: float
    disabled: str | None


class Message(NamedTuple):
    """A message that is due. `attempts`: how many were begun, with this one."""

    id: str
    endpoint: WebhookEndpoint
    body: str
    attempts: int


class DeliveryOutcome(NamedTuple):
    """The answer to a message: its status, or 0 without an answer; and what is kept of it."""

    status: int
    answer: str


class EndpointChange(NamedTuple):
    """New values of an endpoint; None: as before. `events` as in `WebhookEndpoint`."""

    name: str | None = None
    url: str | None = None
    events: str | None = None


def add_endpoint(
    connection: Connection, tenant: str, given: EndpointChange, now: float
) -> WebhookEndpoint | None:
    """Add an endpoint with a new secret; None if the tenant has `MOST_ENDPOINTS` already."""
    mine = select(func.count()).select_from(WEBHOOKS).where(WEBHOOKS.c.tenant == tenant)
    if connection.execute(mine).scalar_one() >= MOST_ENDPOINTS:
        return None
    made = WebhookEndpoint(
        id=new_id("we"),
        number=next_numbers(connection, WEBHOOKS.name) + 1,
        tenant=tenant,
        name=given.name or "",
        url=given.url or "",
        events=given.events or "",
        secret=_new_secret(),
        created=now,
        disabled=None,
    )
    connection.execute(insert(WEBHOOKS).values(**made._asdict()))
    return made


def change_endpoint(
    connection: Connection, id: str, tenant: str, change: EndpointChange
) -> WebhookEndpoint | None:
    """Change a tenant's endpoint; one that was disabled is sent to again. None: there is none."""
    given = {name: value for name, value in change._asdict().items() if value is not None}
    return _updated(connection, id, tenant, {**given, "disabled": None})


def new_secret(connection: Connection, id: str, tenant: str) -> WebhookEndpoint | None:
    """Give an endpoint a new secret, with which all further messages are signed."""
    return _updated(connection, id, tenant, {"secret": _new_secret()})


def _updated(
    connection: Connection, id: str, tenant: str, values: Mapping[str, str | None]
) -> WebhookEndpoint | None:
    there = WEBHOOKS.c.id == id, WEBHOOKS.c.tenant == tenant
    changed = update(WEBHOOKS).where(*there).values(**values).returning(WEBHOOKS)
    row = connection.execute(changed).first()
    return WebhookEndpoint(*row) if row else None


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def find_endpoint(connection: Connection, id: str, tenant: str) -> WebhookEndpoint | None:
    there = WEBHOOKS.c.id == id, WEBHOOKS.c.tenant == tenant
    row = connection.execute(select(WEBHOOKS).where(*there)).first()
    return WebhookEndpoint(*row) if row else None


def remove_endpoint(connection: Connection, id: str) -> None:
    """Delete an endpoint, and everything that was to be sent there."""
    connection.execute(delete(DELIVERIES).where(DELIVERIES.c.endpoint == id))
    connection.execute(delete(WEBHOOKS).where(WEBHOOKS.c.id == id))


def any_due(connection: Connection, now: float) -> bool:
    """Return whether a message is due."""
    due = DELIVERIES.c.state == "waiting", DELIVERIES.c.next <= now
    return connection.execute(select(DELIVERIES.c.id).where(*due).limit(1)).first() is not None


def take_due(
    connection: Connection,
    sending: Mapping[WebhookEndpoint, int],
    slow: Collection[str],
    most: int,
    until: float,
    now: float,
) -> list[Message]:
    """Take messages that are due, at most `most`, so that no other process sends them.

    `sending`: how many messages this process is sending to each endpoint. `slow`: the ids of those
    that did not confirm their last message. At most `OF_ENDPOINT` are sent to one at a time and
    `OF_TENANT` to those of a tenant, and fewer to slow ones, so that they do not delay the others.
    `until`: when the messages are due again, if this process dies.
    """
    due = DELIVERIES.c.state == "waiting", DELIVERIES.c.next <= now
    waiting = select(WEBHOOKS).where(
        WEBHOOKS.c.id.in_(select(DELIVERIES.c.endpoint).where(*due).distinct().scalar_subquery())
    )
    endpoints = [WebhookEndpoint(*row) for row in connection.execute(waiting)]
    random.shuffle(endpoints)  # so that none is always the last
    by_endpoint, by_tenant = Counter[str](), Counter[str]()
    for endpoint, count in sending.items():
        by_endpoint[endpoint.id] += count
        by_tenant[endpoint.tenant] += count
    found: list[Message] = []
    for endpoint in endpoints:
        is_slow = endpoint.id in slow
        some = min(
            (OF_SLOW_ENDPOINT if is_slow else OF_ENDPOINT) - by_endpoint[endpoint.id],
            (OF_SLOW_TENANT if is_slow else OF_TENANT) - by_tenant[endpoint.tenant],
            most - len(found),
        )
        if some <= 0:
            continue
        of = select(DELIVERIES.c.id).where(*due, DELIVERIES.c.endpoint == endpoint.id)
        first = of.order_by(DELIVERIES.c.next).limit(some).scalar_subquery()
        taken = (
            update(DELIVERIES)
            .where(DELIVERIES.c.id.in_(first))
            .values(next=until, attempts=DELIVERIES.c.attempts + 1)
            .returning(DELIVERIES.c.id, DELIVERIES.c.body, DELIVERIES.c.attempts)
        )
        rows = connection.execute(taken).all()
        found += [Message(row.id, endpoint, row.body, row.attempts) for row in rows]
        by_tenant[endpoint.tenant] += len(rows)
    return found


def record_attempt(
    connection: Connection, message: Message, outcome: DeliveryOutcome, now: float
) -> str:
    """Record how an attempt ended; returns "delivered", "waiting", "dead", or "disabled".

    An endpoint that answers 410 is disabled, with everything that waits for it.
    """
    there = DELIVERIES.c.id == message.id, DELIVERIES.c.attempts == message.attempts
    answer = outcome.answer.encode("ascii", "replace").decode().replace("\0", "?")
    values = {"answer": answer[:SHOWN]}
    if 200 <= outcome.status < 300:
        state = {"state": "delivered", "ended": now}
        connection.execute(update(DELIVERIES).where(*there).values(**values, **state))
        return "delivered"
    if outcome.status == GONE:
        why = "it answered 410 Gone"
        gone = WEBHOOKS.c.id == message.endpoint.id
        connection.execute(update(WEBHOOKS).where(gone).values(disabled=why))
        waiting = DELIVERIES.c.endpoint == message.endpoint.id, DELIVERIES.c.state == "waiting"
        dead = {"state": "dead", "ended": now}
        connection.execute(update(DELIVERIES).where(*waiting).values(**values, **dead))
        return "disabled"
    if message.attempts > len(PAUSES_S):
        dead = {"state": "dead", "ended": now}
        connection.execute(update(DELIVERIES).where(*there).values(**values, **dead))
        return "dead"
    next_s = now + PAUSES_S[message.attempts - 1]
    connection.execute(update(DELIVERIES).where(*there).values(**values, next=next_s))
    return "waiting"


def give_up_old(connection: Connection, now: float) -> bool:
    """Give up some messages that are too old; returns whether there may be more.

    A server that answers slowly gets messages one after another, so some may never be sent.
    """
    old = select(DELIVERIES.c.id).where(
        DELIVERIES.c.state == "waiting", DELIVERIES.c.created < now - OLDEST_S
    )
    some = old.limit(GIVEN_UP).scalar_subquery()
    dead = {"state": "dead", "ended": now}
    given_up = update(DELIVERIES).where(DELIVERIES.c.id.in_(some)).values(**dead)
    return connection.execute(given_up).rowcount == GIVEN_UP


def send_again(connection: Connection, id: str, now: float) -> bool:
    """Have a dead message sent again; returns False if there is none with this id."""
    there = DELIVERIES.c.id == id, DELIVERIES.c.state == "dead"
    fresh = {"state": "waiting", "attempts": 0, "next": now, "created": now, "ended": None}
    return bool(connection.execute(update(DELIVERIES).where(*there).values(**fresh)).rowcount)
