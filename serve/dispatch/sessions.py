"""The streams of messages from the Dispatcher to its sessions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable

from ..tenants.keys import TenantDirectory
from .protocol import DispatcherStatus, DispatchEvent, SessionMessage


class _Stream:
    """The events, directory of tenants and status that are still to be sent to one session."""

    def __init__(self, tenants: TenantDirectory, status: DispatcherStatus) -> None:
        self.tenants: TenantDirectory | None = tenants
        self.status: DispatcherStatus | None = status
        self.events: list[DispatchEvent] = []
        self.changed = asyncio.Event()
        self.changed.set()
        self.ended = False


class SessionStreams:
    """One stream for each open session; events that wait together are sent as one message."""

    def __init__(self, messages: Counter[str]) -> None:
        """`messages`: counts the messages that are sent, as `sent`."""
        self._messages = messages
        self._streams: dict[str, _Stream] = {}
        self._tenants: TenantDirectory = {}

    def __contains__(self, session: str) -> bool:
        return session in self._streams

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, session: str, status: DispatcherStatus) -> _Stream:
        """Begin a session's stream; its first message holds the tenants and the status."""
        stream = self._streams[session] = _Stream(self._tenants, status)
        return stream

    def close(self, session: str) -> None:
        """End a session's stream once the waiting events have been sent."""
        if stream := self._streams.pop(session, None):
            stream.ended = True
            stream.changed.set()

    def is_open(self, session: str, stream: _Stream) -> bool:
        """Return whether the session is open and this is its current stream, not a replaced one."""
        return self._streams.get(session) is stream

    async def messages(self, stream: _Stream) -> AsyncIterator[SessionMessage]:
        """The messages of a stream until it is closed."""
        while not stream.ended:
            await stream.changed.wait()
            stream.changed.clear()
            tenants, stream.tenants = stream.tenants, None
            status, stream.status = stream.status, None
            events, stream.events = stream.events, []
            if events or tenants is not None or status:
                self._messages["sent"] += 1
                yield SessionMessage(tuple(events), tenants, status)

    def deliver(self, events: Iterable[DispatchEvent]) -> None:
        """Queue events for their sessions; those of sessions that have ended are dropped."""
        for event in events:
            if stream := self._streams.get(event.session):
                stream.events.append(event)
                stream.changed.set()

    def take(self, session: str) -> tuple[DispatchEvent, ...]:
        """Return the events that wait for a session, and take them from its stream."""
        if (stream := self._streams.get(session)) is None:
            return ()
        events, stream.events = stream.events, []
        return tuple(events)

    def set_tenants(self, tenants: TenantDirectory) -> None:
        """Send a changed directory of tenants to every session."""
        self._tenants = tenants
        for stream in self._streams.values():
            stream.tenants = tenants
            stream.changed.set()

    def set_status(self, status: DispatcherStatus) -> None:
        """Send the Dispatcher's status to every session."""
        for stream in self._streams.values():
            stream.status = status
            stream.changed.set()
