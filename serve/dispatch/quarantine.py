"""Requests that have killed replicas, and are therefore refused for a while.

Time is an argument, in seconds on any steady clock.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from .protocol import QuarantinedRequest

QUARANTINE_S = 600.0
MOST = 1000  # of the requests that are remembered


class Quarantine:
    """The requests that are refused at all Ingresses, each until it expires or is lifted."""

    def __init__(self) -> None:
        self._expires: dict[QuarantinedRequest, float] = {}

    def add(self, request: QuarantinedRequest, now: float) -> None:
        """Refuse equal requests from now on; the oldest entry goes if there are too many."""
        self._expires.pop(request, None)
        self._expires[request] = now + QUARANTINE_S
        if len(self._expires) > MOST:
            del self._expires[next(iter(self._expires))]

    def lift(self, id: str) -> None:
        """Let a request pass again; does nothing if it is not in quarantine."""
        self._expires = {r: expires for r, expires in self._expires.items() if r.id != id}

    def present(self, now: float) -> tuple[QuarantinedRequest, ...]:
        """The requests that are refused now."""
        self._expires = {r: expires for r, expires in self._expires.items() if expires > now}
        return tuple(self._expires)
