"""A circuit breaker: a service that fails is left alone for a while. Time is an argument.

Pure: standard library only.
"""

from __future__ import annotations

FAILURES = 3  # in a row
REST_S = 5.0


class CircuitBreaker:
    def __init__(self) -> None:
        self._failures = 0
        self._rests_until = 0.0

    @property
    def open(self) -> bool:
        return self._failures >= FAILURES

    def allows(self, now: float) -> bool:
        """Whether to try; after a rest one may, and the others wait for what comes of it."""
        if not self.open:
            return True
        if now < self._rests_until:
            return False
        self._rests_until = now + REST_S
        return True

    def failed(self, now: float) -> None:
        self._failures += 1
        self._rests_until = now + REST_S

    def succeeded(self) -> None:
        self._failures = 0
