"""A circuit breaker: no calls to a service for a while after it has failed several times.

Time is an argument, in seconds on any steady clock.

Pure: standard library only.
"""

from __future__ import annotations

FAILURES = 3  # in a row, after which the breaker opens
REST_S = 5.0  # for which an open breaker allows no call


class CircuitBreaker:
    """Opens after `FAILURES` failed calls in a row; a success closes it.

    The caller asks `allows` before each call, and reports the outcome by `failed` or `succeeded`.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._rests_until = 0.0

    @property
    def open(self) -> bool:
        """Return whether the breaker is open: the service counts as failing."""
        return self._failures >= FAILURES

    def allows(self, now: float) -> bool:
        """Return whether the service may be called now.

        While the breaker is open, one call is allowed after each rest of `REST_S`. All others are
        refused until that call succeeds.
        """
        if not self.open:
            return True
        if now < self._rests_until:
            return False
        self._rests_until = now + REST_S
        return True

    def failed(self, now: float) -> None:
        """Count a failed call."""
        self._failures += 1
        self._rests_until = now + REST_S

    def succeeded(self) -> None:
        """Count a successful call, which closes the breaker."""
        self._failures = 0
