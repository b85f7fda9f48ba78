"""Calls on which the Dispatcher cannot decide yet.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from .protocol import AdmissionRequest


class WaitingCall(NamedTuple):
    """A call of a session, and when it came, on any steady clock."""

    session: str
    request: AdmissionRequest
    came: float

    def at(self, now: float) -> AdmissionRequest:
        """The request with the time that it has waited here."""
        return self.request._replace(waited_s=self.request.waited_s + now - self.came)


class WaitingCalls:
    """Calls in the order in which they came."""

    def __init__(self) -> None:
        self._calls: list[WaitingCall] = []

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[WaitingCall]:
        return iter(self._calls)

    def add(self, session: str, request: AdmissionRequest, now: float) -> None:
        """Let a call wait."""
        self._calls.append(WaitingCall(session, request, now))

    def forget(self, session: str, call_ids: Collection[str] | None = None) -> None:
        """Forget calls of a session that have ended; None: all of them."""
        self._calls = [
            call
            for call in self._calls
            if call.session != session
            or (call_ids is not None and call.request.call_id not in call_ids)
        ]

    def take(self) -> list[WaitingCall]:
        """All calls that wait; they wait here no longer."""
        found, self._calls = self._calls, []
        return found
