"""When a Generator reports to the Dispatcher: when its heartbeat is due, or at once with news.

Each heartbeat is a call through Ray Serve, which costs the Dispatcher milliseconds. So the
Dispatcher says when the next one is due, later with more Generators. It predicts what happens
meanwhile. What it cannot predict is news: the Generator has another number of slots or another
speed, its card has a fault, an image was stopped, or the Dispatcher itself is a new process that
knows nobody.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ..dispatch.protocol import Heartbeat, StoppedImage

SPEED_NEWS = 0.1  # a change of the speed by more than this part is news


def pause_s(next_s: float) -> float:
    """Seconds until the next heartbeat, which is due in `next_s`: by chance, half of it to all.

    Generators that have begun together, or have noticed the same restart, would otherwise report
    together for ever.
    """
    return next_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


class Reporting:
    """Decides when a Generator reports, by what it has told the Dispatcher last.

    Time is in seconds on any steady clock.
    """

    def __init__(self) -> None:
        self._due_at = -math.inf
        self._told: Heartbeat | None = None
        self.forgotten_times = 0

    def is_due(self, heartbeat: Heartbeat, stopped: Sequence[StoppedImage], now: float) -> bool:
        """Return whether to report now; `stopped`: the images that were not reported yet."""
        told = self._told
        return (
            told is None
            or now >= self._due_at
            or bool(stopped)
            or (heartbeat.slots, heartbeat.fault) != (told.slots, told.fault)
            or abs(heartbeat.speed - told.speed) > SPEED_NEWS * told.speed
        )

    def told(self, heartbeat: Heartbeat, next_s: float, now: float) -> None:
        """Note that the Dispatcher has had a heartbeat; the next one is due in `next_s` seconds."""
        self._due_at, self._told = now + pause_s(next_s), heartbeat

    def forgotten(self) -> None:
        """Note that the Dispatcher may know nothing: it must be told everything."""
        self._told = None
        self.forgotten_times += 1
