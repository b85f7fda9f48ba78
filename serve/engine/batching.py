"""The choice of running images that take their next step together.

A *batch* is one call of the transformer. Its images have the same size and text length (SD3 has no
attention mask) and together at most `max_rows` rows; guidance doubles an image's rows. Images of
different sizes therefore take turns.

Before each step one image leads. An image that was passed over `PATIENCE` times in a row is
overdue. If any is overdue, the one passed over most often leads; otherwise the one with the fewest
steps left, so that few-step images do not wait behind long ones. The batch is the leader and as
many images of its kind as fit, in the same order.

Bound: with at most n running images, no image is passed over more than `PATIENCE` + n − 1 times in
a row. Only images passed over as often or more lead before an overdue one; each of them leads once
and then counts from zero, and newcomers never catch up with it.

Pure: standard library only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

PATIENCE = 4
CALM_S = 60.0  # without an out-of-memory error, after which batches may grow again


@dataclass(slots=True, kw_only=True, eq=False)
class BatchCandidate:
    """An image as the choice of a batch sees it; only images of one `kind` share a batch.

    `max_rows` bounds the batches that the image leads, beside the common bound.
    """

    kind: Hashable
    rows: int
    steps_left: int
    arrival: int
    max_rows: int | None = None
    passed_over: int = 0

    @property
    def order(self) -> tuple[bool, int, int, int]:
        """The sort key: the leader of the next batch is the smallest."""
        overdue = self.passed_over >= PATIENCE
        return not overdue, -self.passed_over if overdue else 0, self.steps_left, self.arrival


T = TypeVar("T", bound=BatchCandidate)


def next_batch(running: Iterable[T], max_rows: int) -> list[T]:
    """The images that take the next step; the other images count as passed over once more.

    Raises `ValueError` for an image that alone has more than `max_rows` rows.
    """
    waiting = sorted(running, key=lambda image: image.order)
    batch: list[T] = []
    rows_left = max_rows
    for image in waiting:
        if image.rows > max_rows:
            raise ValueError(f"an image of {image.rows} rows in batches of {max_rows}")
        if not batch:
            rows_left = min(rows_left, image.max_rows or rows_left)
        if image.rows <= rows_left and (not batch or image.kind == batch[0].kind):
            batch.append(image)
            rows_left -= image.rows
            image.passed_over = 0
        else:
            image.passed_over += 1
    return batch


class RowBudget:
    """How many rows a batch may have: fewer for a while after memory ran out.

    After `CALM_S` without such an event the budget doubles, up to `most` again.
    """

    def __init__(self, most: int, least: int) -> None:
        self._most, self._least = most, least
        self._rows = most
        self._since = 0.0

    def rows(self, now: float) -> int:
        """The rows that a batch may have now."""
        while self._rows < self._most and now - self._since >= CALM_S:
            self._rows = min(2 * self._rows, self._most)
            self._since += CALM_S
        return self._rows

    def shrink(self, rows: int, now: float) -> bool:
        """Halve the budget after a batch of `rows` ran out of memory.

        False if a smaller batch is not possible.
        """
        self._since = now
        if rows <= self._least:
            return False
        self._rows = max(self._least, min(self._rows, rows) // 2)
        return True
