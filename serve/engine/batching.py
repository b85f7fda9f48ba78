"""Which of the running images take their next step together.

A *batch* is one call of the transformer: its images have the same size and text length (SD3 has no
attention mask) and together at most `max_rows` rows; guidance doubles an image's rows. Images of
different sizes therefore take turns.

The policy, before each step: an image that was passed over `PATIENCE` times in a row is overdue. If
any is, the one passed over most often leads; else the one with the fewest steps left, so that
few-step images are not stuck behind long ones. The batch is the leader and as many images of its
kind as fit, in the same order.

Bound: with at most n images running, nobody is passed over more than `PATIENCE` + n − 1 times in a
row. Only those passed over as often or more lead before an overdue image; each of them leads once
and then counts from zero, and newcomers never catch up with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

PATIENCE = 4
CALM_S = 60.0


@dataclass(slots=True)
class BatchCandidate:
    """What the choice needs to know of an image; only those of one `kind` share a batch.

    `max_rows` bounds the batches that it leads, beside the common bound.
    """

    kind: Hashable
    rows: int
    steps_left: int
    arrival: int
    max_rows: int | None = None
    passed_over: int = 0

    @property
    def _order(self) -> tuple[bool, int, int, int]:
        overdue = self.passed_over >= PATIENCE
        return not overdue, -self.passed_over if overdue else 0, self.steps_left, self.arrival


def next_batch(running: Iterable[BatchCandidate], max_rows: int) -> list[BatchCandidate]:
    """The images that take the next step; counts for the others that they were passed over.

    Raises `ValueError` for an image that alone has more than `max_rows` rows.
    """
    waiting = sorted(running, key=lambda image: image._order)
    batch: list[BatchCandidate] = []
    room = max_rows
    for image in waiting:
        if image.rows > max_rows:
            raise ValueError(f"an image of {image.rows} rows in batches of {max_rows}")
        if not batch:
            room = min(room, image.max_rows or room)
        if image.rows <= room and (not batch or image.kind == batch[0].kind):
            batch.append(image)
            room -= image.rows
            image.passed_over = 0
        else:
            image.passed_over += 1
    return batch


class RowBudget:
    """How many rows a batch may have: fewer for a while after the memory did not suffice.

    After `CALM_S` without such an event the budget doubles, up to `most` again.
    """

    def __init__(self, most: int, least: int) -> None:
        self._most, self._least = most, least
        self._rows = most
        self._since = 0.0

    def rows(self, now: float) -> int:
        while self._rows < self._most and now - self._since >= CALM_S:
            self._rows = min(2 * self._rows, self._most)
            self._since += CALM_S
        return self._rows

    def shrink(self, rows: int, now: float) -> bool:
        """A batch of `rows` was too much; False if a smaller one is not possible."""
        self._since = now
        if rows <= self._least:
            return False
        self._rows = max(self._least, min(self._rows, rows) // 2)
        return True
