"""The choice of running images that take their next step together.

A *batch* is the images of one call of the transformer. All of them have the same size and text
length, because SD3 has no attention mask. So images of different sizes take turns. A batch has at
most `max_rows` rows. An image has one row, or two with guidance.

Before each step one image is chosen as the leader. An image that was left out of `PATIENCE` batches
in a row is overdue. If any image is overdue, the one that was left out most often leads. Otherwise
the image with the fewest steps left leads, so that images with few steps do not wait for long ones.
The leader and as many images of its kind as fit form the batch; they are added in the same order.

Where most of the running images belong to one owner, and some to others, those of that owner are
*guests*: they must not crowd the others out. They come last, are overdue only after
`GUEST_PATIENCE` batches, and join a batch only if they hardly slow it down. The others join every
batch that a guest leads. In the long run no owner gets more for that: the Dispatcher charges the
time that each image takes, and grants its slots accordingly.

More rows are not always better. A batch is padded to a fixed number of rows, and on a large card a
step of large images takes almost twice as long with twice the rows. A larger batch then delays the
images that could be done sooner, and gains nothing. So from the measured times of steps
(`StepTimes`) the smallest batch is chosen that does almost as many rows per second as any.

Bound: with at most n running images, no image is left out more than `PATIENCE` + n − 1 times in a
row, and no guest more than `GUEST_PATIENCE` + n − 1 times. The reason: only images that were left
out as often or more lead before an overdue image. Each of these leads once and then counts from
zero. Newcomers never catch up with the overdue image.

Pure: standard library only.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

PATIENCE = 4  # batches in a row that leave an image out before it is overdue
GUEST_PATIENCE = 8  # the same for a guest
ENOUGH = 0.99  # of the most rows per second that any batch would do
TRIALS, KEPT = 3, 5  # steps that are measured before their time is known, and that are kept
GUESTS_SLOW = 1.1  # a batch with guests may take so many times as long as without
FORGOTTEN = 1000  # steps of a replica after which a step no longer counts
MOST_TIMES = 1000
CALM_S = 60.0  # time without an out-of-memory error after which batches may grow again


@dataclass(slots=True, kw_only=True, eq=False)
class BatchCandidate:
    """The properties of a running image by which batches are chosen.

    `kind`: only images of the same kind share a batch. `arrival`: the image's number in the order
    of arrival. `max_rows`: the most rows of a batch that this image leads, if fewer than usual.
    `owner`: whose image it is. `passed_over`: how many batches in a row have left the image out.
    """

    kind: Hashable
    rows: int
    steps_left: int
    arrival: int
    max_rows: int | None = None
    owner: str = ""
    passed_over: int = 0

    def order(self, *, guest: bool) -> tuple[bool, int, bool, int, int]:
        """The sort key; the image with the smallest key leads the next batch."""
        overdue = self.passed_over >= (GUEST_PATIENCE if guest else PATIENCE)
        passed_over = -self.passed_over if overdue else 0
        return not overdue, passed_over, guest, self.steps_left, self.arrival


T = TypeVar("T", bound=BatchCandidate)


def next_batch(
    running: Iterable[T],
    max_rows: int,
    fitting: Callable[[list[T], int], int] = lambda batch, _: len(batch),
) -> list[T]:
    """Choose the images that take the next step.

    `fitting`: how many images of the largest possible batch, from its beginning, take the step;
    it is told how many of them, from the beginning, are no guests. The `passed_over` of all images
    that are not chosen grows by 1. Raises `ValueError` if a single image has more than `max_rows`
    rows.
    """
    present = list(running)
    crowd = _crowd(present)
    waiting = sorted(present, key=lambda image: image.order(guest=image.owner == crowd))
    leader, *others = waiting
    others.sort(key=lambda image: image.owner == crowd)  # guests last, otherwise in the same order
    batch = [leader]
    rows_left = min(max_rows, leader.max_rows or max_rows) - leader.rows
    for image in others:
        if image.rows > max_rows:
            raise ValueError(f"an image of {image.rows} rows in batches of {max_rows}")
        if image.rows <= rows_left and image.kind == leader.kind:
            batch.append(image)
            rows_left -= image.rows
    if leader.rows > max_rows:
        raise ValueError(f"an image of {leader.rows} rows in batches of {max_rows}")
    hosts = sum(image.owner != crowd for image in batch)
    if leader.owner == crowd:
        batch = batch[: max(fitting(batch, len(batch)), 1 + hosts)]
    else:
        batch = batch[: fitting(batch, hosts)]
    chosen = set(map(id, batch))
    for image in waiting:
        image.passed_over = 0 if id(image) in chosen else image.passed_over + 1
    return batch


def _crowd(running: Sequence[BatchCandidate]) -> str | None:
    """The owner of most of these images, if others have some too; else None."""
    owners = Counter(image.owner for image in running)
    owner, images = owners.most_common(1)[0]
    return owner if len(owners) > 1 and 2 * images > len(running) else None


class StepTimes:
    """The seconds of recent steps, by the kind of their images and their padded number of rows."""

    def __init__(self) -> None:
        self._steps = 0
        # The seconds of the last steps of each kind, and the numbers of these steps.
        self._times: dict[tuple[Hashable, int], deque[tuple[float, int]]] = {}

    def observe(self, kind: Hashable, padded: int, seconds: float) -> None:
        """Note a step of `padded` rows."""
        self._steps += 1
        if (kind, padded) not in self._times and len(self._times) >= MOST_TIMES:
            self._times.clear()
        times = self._times.setdefault((kind, padded), deque(maxlen=KEPT))
        times.append((seconds, self._steps))

    def seconds(self, kind: Hashable, padded: int) -> float | None:
        """The shortest of the recent steps; None if there were less than `TRIALS`.

        Single steps may be slow for any reason, such as the first one of a shape.
        """
        times = self._times.get((kind, padded), ())
        recent = [seconds for seconds, step in times if self._steps - step < FORGOTTEN]
        return min(recent) if len(recent) >= TRIALS else None

    def fitting(
        self, kind: Hashable, batches: Sequence[tuple[int, int]], hosts: int | None = None
    ) -> int:
        """The index of the batch that should run.

        `batches`: the rows and padded rows of each possible batch, smallest first. This is the
        largest one whose time is not known. If all times are known, it is the smallest one that
        does at least `ENOUGH` of the most rows per second. `hosts`: how many of the batches,
        smallest first, have no guests; the others count only if they take at most `GUESTS_SLOW`
        times as long.
        """
        times = [self.seconds(kind, padded) for _, padded in batches]
        if None in times:
            return len(times) - 1 - times[::-1].index(None)
        known = [t for t in times if t]
        slowest = math.inf if hosts is None else GUESTS_SLOW * known[hosts - 1]
        rates = [
            rows / t if t <= slowest or (hosts and i < hosts) else 0.0
            for i, ((rows, _), t) in enumerate(zip(batches, known, strict=True))
        ]
        return next(i for i, rate in enumerate(rates) if rate >= ENOUGH * max(rates))


class RowBudget:
    """The number of rows that a batch may have, which is lower for a while after memory ran out.

    Each time that `CALM_S` seconds pass without such an event, the budget doubles, up to `most`.
    The budget is never lower than `least`.
    """

    def __init__(self, most: int, least: int) -> None:
        self._most, self._least = most, least
        self._rows = most
        self._since = 0.0

    def rows(self, now: float) -> int:
        """The number of rows that a batch may have at the time `now`."""
        while self._rows < self._most and now - self._since >= CALM_S:
            self._rows = min(2 * self._rows, self._most)
            self._since += CALM_S
        return self._rows

    def shrink(self, rows: int, now: float) -> bool:
        """Halve the budget after a batch of `rows` rows ran out of memory.

        Returns False if no smaller batch is possible.
        """
        self._since = now
        if rows <= self._least:
            return False
        self._rows = max(self._least, min(self._rows, rows) // 2)
        return True
