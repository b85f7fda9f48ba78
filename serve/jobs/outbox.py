"""Writes the messages of webhooks in the transaction that makes them true (an outbox)."""

from __future__ import annotations

import json

from sqlalchemy import Connection, insert, select

from ..store.schema import DELIVERIES, WEBHOOKS
from .job import new_id

EVENTS = (
    *("job.succeeded", "job.failed", "job.cancelled", "job.expired"),
    *("batch.completed", "batch.failed", "batch.cancelled", "batch.expired"),
)


def enqueue_event(connection: Connection, tenant: str, event: str, id: str, now: float) -> None:
    """Have all webhooks of a tenant told of an event of the job or batch with this id.

    The message names the id only: a receiver reads the rest, so it never believes a stranger.
    """
    found = select(WEBHOOKS.c.id, WEBHOOKS.c.events)
    rows = connection.execute(
        found.where(WEBHOOKS.c.tenant == tenant, WEBHOOKS.c.disabled.is_(None))
    )
    body = {"type": event, "created_at": int(now), "object": "event", "data": {"id": id}}
    deliveries = [
        {
            "id": (message := new_id("evt")),
            "endpoint": row.id,
            "tenant": tenant,
            "type": event,
            "body": json.dumps({"id": message, **body}),
            "state": "waiting",
            "attempts": 0,
            "next": now,
            "answer": "",
            "created": now,
        }
        for row in rows
        if not row.events or event in row.events.split()
    ]
    if deliveries:
        connection.execute(insert(DELIVERIES), deliveries)
