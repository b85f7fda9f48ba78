"""Sends the messages of webhooks, signed as Standard Webhooks 1.0 says."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import aiohttp
from sqlalchemy import Connection
from standardwebhooks import Webhook

from ..store.link import DatabaseLink
from .addresses import Network, checked_socket
from .webhook_rows import (
    DeliveryOutcome,
    Message,
    WebhookEndpoint,
    any_due,
    record_attempt,
    take_due,
)

log = logging.getLogger("ray.serve")

ANSWER_S = 20.0
LEASE_S = 60.0  # after which a message is sent again whose sender has died
MOST = 256  # messages at a time
READ_BYTES = 1024  # of an answer


class WebhookSender:
    """Sends messages in the background, however slow their receivers are."""

    def __init__(
        self,
        database: DatabaseLink,
        networks: Callable[[], Iterable[Network]],
        on_outcome: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`networks`: returns the private networks to which messages may be sent.

        `on_outcome` is called with the outcome of each attempt, see `webhook_rows.record_attempt`.
        Needs a running event loop.
        """
        self._database, self._on_outcome = database, on_outcome
        self._networks = networks
        self._clients: dict[str, aiohttp.ClientSession] = {}  # by scheme
        self._sending: Counter[WebhookEndpoint] = Counter()
        self._slow: set[str] = set()  # endpoints that did not confirm their last message
        self._tasks: set[asyncio.Task[None]] = set()

    async def send_due(self) -> int:
        """Begin to send messages that are due; returns their number.

        Raises `OSError` if the database cannot be used.
        """
        if (most := MOST - len(self._tasks)) <= 0:
            return 0
        database = await self._database.opened()
        sending, slow = dict(self._sending), set(self._slow)  # read by the database's thread

        def take(connection: Connection) -> list[Message]:
            now = database.now(connection)
            return take_due(connection, sending, slow, most, now + LEASE_S, now)

        if not await self._database.read(
            lambda connection: any_due(connection, database.now(connection))
        ):
            return 0

        found = await self._database.write(take)
        for message in found:
            self._sending[message.endpoint] += 1
            task = asyncio.create_task(self._send(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(found)

    async def close(self) -> None:
        """Stop; what was being sent is sent again later."""
        for task in self._tasks:
            task.cancel()
        for client in self._clients.values():
            await client.close()

    async def _send(self, message: Message) -> None:
        try:
            outcome = await self._post(message)
            confirmed = 200 <= outcome.status < 300
            (self._slow.discard if confirmed else self._slow.add)(message.endpoint.id)
            database = await self._database.opened()
            how = await self._database.write(
                lambda connection: record_attempt(
                    connection, message, outcome, database.now(connection)
                )
            )
            self._on_outcome(how)
        except Exception:  # such as the database's: it is sent again when its lease ends
            log.warning("message %s: the outcome is not noted", message.id, exc_info=True)
        finally:
            self._sending[message.endpoint] -= 1
            self._sending += Counter()  # forgets those with none

    async def _post(self, message: Message) -> DeliveryOutcome:
        """Send a message; returns the answer, or status 0 without one."""
        now = datetime.now(UTC)
        signature = Webhook(message.endpoint.secret).sign(message.id, now, message.body)
        headers = {
            "content-type": "application/json",
            "user-agent": "octet-webhooks",
            "webhook-id": message.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signature,
        }
        url = message.endpoint.url
        try:
            async with self._client(url).post(
                url, data=message.body.encode(), headers=headers, allow_redirects=False
            ) as answer:
                await answer.content.read(READ_BYTES)
                return DeliveryOutcome(answer.status, f"{answer.status} {answer.reason}")
        except aiohttp.ClientConnectorError as error:  # its own message leaves out the reason
            return DeliveryOutcome(0, f"no connection: {getattr(error, 'os_error', error)}")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return DeliveryOutcome(0, f"{type(error).__name__}: {error}".rstrip(": "))

    def _client(self, url: str) -> Any:
        """The client for a URL. Without TLS only private networks are allowed."""
        scheme = url.partition(":")[0].lower()
        if scheme not in self._clients:
            sockets = checked_socket(self._networks, private_only=scheme != "https")
            self._clients[scheme] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(socket_factory=sockets, limit=MOST),
                timeout=aiohttp.ClientTimeout(total=ANSWER_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._clients[scheme]
