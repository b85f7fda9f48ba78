"""A simulated volume whose bandwidth all readers share equally.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


class SharedVolume:
    """Readers get equal parts of the bandwidth, so each takes longer the more there are.

    A counter holds the GiB that a reader would have read if it had started at time 0 and never
    stopped. A reader that starts at count c and reads g GiB is done when the counter reaches c + g.
    So the reader with the smallest c + g is done first.
    """

    def __init__(self, gib_s: float, later: Callable[[float, Callable[[float], None]], None]):
        """`gib_s`: GiB per second for all readers together. `later`: calls a function at a time."""
        self._gib_s, self._later = gib_s, later
        self._readers: list[tuple[float, int, Callable[[float], None]]] = []
        self._count, self._at = 0.0, 0.0
        self._number = self._plan = 0

    def read(self, gib: float, done: Callable[[float], None], now: float) -> int:
        """Read `gib`; call `done` when all is read. Returns the reader's number."""
        self._advance(now)
        self._number += 1
        heapq.heappush(self._readers, (self._count + gib, self._number, done))
        self._plan_next(now)
        return self._number

    def give_up(self, reader: int, now: float) -> None:
        """Let a reader read no more, if it still does."""
        self._advance(now)
        self._readers = [r for r in self._readers if r[1] != reader]
        heapq.heapify(self._readers)
        self._plan_next(now)

    def _advance(self, now: float) -> None:
        if self._readers:
            self._count += (now - self._at) * self._gib_s / len(self._readers)
        self._at = now

    def _plan_next(self, now: float) -> None:
        """Plan the end of the reader that is done first; the plan before becomes void."""
        self._plan += 1
        if self._readers:
            plan, left = self._plan, max(self._readers[0][0] - self._count, 0.0)
            ends = now + left * len(self._readers) / self._gib_s
            self._later(ends, lambda at: self._end(plan, at))

    def _end(self, plan: int, now: float) -> None:
        if plan == self._plan:
            self._advance(now)
            _, _, done = heapq.heappop(self._readers)
            self._plan_next(now)
            done(now)
