"""Webhook endpoints and messages in the database. Each function is a part of a transaction."""

from __future__ import annotations

import base64
import secrets
from collections import Counter
from typing import NamedTuple

from sqlalchemy import Connection, delete, func, insert, select, update

from ..store.schema import DELIVERIES, WEBHOOKS, next_numbers
from .job import new_id

# Seconds after each failed attempt until the next one: three days in all.
PAUSES_S = (5, 60, 300, 1800, 7200, 18000, 36000, 50400, 64800, 82800)
MOST_ENDPOINTS = 20  # of a tenant
SECRET_BYTES = 32
GONE = 410
SHOWN = 200  # characters of an answer that are kept


class WebhookEndpoint(NamedTuple):
    """Where a tenant wants to hear of events.

    `events`: their types, separated by spaces; empty: all. `secret`: whsec_… in base64. `disabled`:
    why nothing is sent there any more. `created`: Unix time.
    """

    id: str
    number: int
    tenant: str
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


def add_endpoint(
    connection: Connection, tenant: str, url: str, events: str, now: float
) -> WebhookEndpoint | None:
    """Add an endpoint with a new secret; None if the tenant has `MOST_ENDPOINTS` already."""
    mine = select(func.count()).select_from(WEBHOOKS).where(WEBHOOKS.c.tenant == tenant)
    if connection.execute(mine).scalar_one() >= MOST_ENDPOINTS:
        return None
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
    number = next_numbers(connection, WEBHOOKS.name) + 1
    made = WebhookEndpoint(new_id("we"), number, tenant, url, events, secret, now, None)
    connection.execute(insert(WEBHOOKS).values(**made._asdict()))
    return made


def find_endpoint(connection: Connection, id: str, tenant: str) -> WebhookEndpoint | None:
    there = WEBHOOKS.c.id == id, WEBHOOKS.c.tenant == tenant
    row = connection.execute(select(WEBHOOKS).where(*there)).first()
    return WebhookEndpoint(*row) if row else None


def remove_endpoint(connection: Connection, id: str) -> None:
    """Delete an endpoint, and everything that was to be sent there."""
    connection.execute(delete(DELIVERIES).where(DELIVERIES.c.endpoint == id))
    connection.execute(delete(WEBHOOKS).where(WEBHOOKS.c.id == id))


def take_due(
    connection: Connection, sending: Counter[str], most: int, each: int, until: float, now: float
) -> list[Message]:
    """Take messages that are due, at most `most`, so that no other process sends them.

    `sending`: by endpoint, how many messages this process is sending; at most `each` may be sent to
    one at a time, so that a slow one does not delay the others. `until`: when they are due again,
    if this process dies.
    """
    due = DELIVERIES.c.state == "waiting", DELIVERIES.c.next <= now
    waiting = select(DELIVERIES.c.endpoint).where(*due).group_by(DELIVERIES.c.endpoint)
    found: list[Message] = []
    for id in connection.execute(waiting).scalars().all():
        some = min(each - sending[id], most - len(found))
        row = connection.execute(select(WEBHOOKS).where(WEBHOOKS.c.id == id)).first()
        if some <= 0 or row is None:
            continue
        of = select(DELIVERIES.c.id).where(*due, DELIVERIES.c.endpoint == id)
        first = of.order_by(DELIVERIES.c.next).limit(some).scalar_subquery()
        taken = (
            update(DELIVERIES)
            .where(DELIVERIES.c.id.in_(first))
            .values(next=until, attempts=DELIVERIES.c.attempts + 1)
            .returning(DELIVERIES.c.id, DELIVERIES.c.body, DELIVERIES.c.attempts)
        )
        endpoint = WebhookEndpoint(*row)
        found += [
            Message(one.id, endpoint, one.body, one.attempts) for one in connection.execute(taken)
        ]
    return found


def note(connection: Connection, message: Message, outcome: DeliveryOutcome, now: float) -> str:
    """Note how an attempt ended; returns "delivered", "waiting", "dead", or "disabled".

    An endpoint that answers 410 is disabled, with everything that waits for it.
    """
    there = DELIVERIES.c.id == message.id, DELIVERIES.c.attempts == message.attempts
    values = {"answer": outcome.answer[:SHOWN]}
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


def send_again(connection: Connection, id: str, now: float) -> bool:
    """Have a dead message sent again; returns False if there is none with this id."""
    there = DELIVERIES.c.id == id, DELIVERIES.c.state == "dead"
    fresh = {"state": "waiting", "attempts": 0, "next": now, "ended": None}
    return bool(connection.execute(update(DELIVERIES).where(*there).values(**fresh)).rowcount)
