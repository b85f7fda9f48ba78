"""The streams of messages from the Dispatcher to its sessions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable

from ..tenants.keys import TenantAccess, TenantChanges
from .protocol import DispatcherStatus, DispatchEvent, SessionMessage


class _Stream:
    """The events, changes of tenants and status that are still to be sent to one session."""

    def __init__(self, tenants: TenantChanges | None, status: DispatcherStatus) -> None:
        self.tenants = tenants
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
        self._tenants: dict[str, TenantAccess | None] | None = None  # None: not known yet

    def __contains__(self, session: str) -> bool:
        return session in self._streams

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def names(self) -> frozenset[str]:
        """The names of the open sessions."""
        return frozenset(self._streams)

    def open(self, session: str, status: DispatcherStatus) -> _Stream:
        """Begin a session's stream; its first message holds the tenants and the status."""
        known = self._tenants
        tenants = None if known is None else TenantChanges(dict(known), whole=True)
        stream = self._streams[session] = _Stream(tenants, status)
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

    def change_tenants(self, changes: TenantChanges) -> None:
        """Send changed tenants to every session."""
        if changes.whole or self._tenants is None:
            self._tenants = {}
        for name, access in changes.tenants.items():
            self._tenants.pop(name, None)
            if access:
                self._tenants[name] = access
        for stream in self._streams.values():
            before = stream.tenants
            if before is None or changes.whole:
                stream.tenants = TenantChanges(dict(changes.tenants), changes.whole)
            else:
                stream.tenants = TenantChanges(before.tenants | changes.tenants, before.whole)
            stream.changed.set()

    def set_status(self, status: DispatcherStatus) -> None:
        """Send the Dispatcher's status to every session."""
        for stream in self._streams.values():
            stream.status = status
            stream.changed.set()
