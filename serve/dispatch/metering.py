"""Usage on its way to the disk: one thread writes, as many records at a time as have come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .messages import Usage
from .usage import UsageLedger, month_of

log = logging.getLogger("ray.serve")


class Charge(NamedTuple):
    """A record of a session; `held`: of its tenant's budget until it is written."""

    session: str
    usage: Usage
    held: float


class Metering:
    """`written` hears of every batch: its charges, those that are new, and the month they fell in.

    What could not be written is told with None in the place of the new ones.
    """

    def __init__(
        self,
        ledger: UsageLedger | None,
        written: Callable[[list[Charge], list[Charge] | None, str], None],
    ) -> None:
        """Without a `ledger` usage is counted until this process ends."""
        self.ledger, self._written = ledger, written
        self._charges: asyncio.Queue[Charge] = asyncio.Queue()

    def add(self, charge: Charge) -> None:
        self._charges.put_nowait(charge)

    async def run(self) -> None:
        """For ever."""
        while True:
            batch = [await self._charges.get()]
            while not self._charges.empty():
                batch.append(self._charges.get_nowait())
            now = time.time()
            fresh: list[Charge] | None = batch
            if self.ledger:
                try:
                    usages = [charge.usage for charge in batch]
                    written = await asyncio.to_thread(self.ledger.append, usages, now)
                except OSError:
                    log.error("usage cannot be written: images are not delivered", exc_info=True)
                    fresh = None
                else:
                    fresh = _of(written, batch)
            self._written(batch, fresh, month_of(now))


def _of(usages: Iterable[Usage], batch: Iterable[Charge]) -> list[Charge]:
    """The charges of usages, each once."""
    left = set(usages)
    found = []
    for charge in batch:
        if charge.usage in left:
            left.discard(charge.usage)
            found.append(charge)
    return found
