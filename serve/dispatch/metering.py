"""What images cost: held of their tenant's budget, written by a thread, confirmed when on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from ..usage.ledger import UsageLedger, month_end, month_of
from ..usage.record import UsageRecord
from .admission import Admission
from .dispatcher_metrics import TenantMetrics
from .protocol import Outcome, StoppedImage

log = logging.getLogger("ray.serve")

AGAIN_S = 1.0  # until a charge is tried again that could not be written


class _Charge(NamedTuple):
    """A record of a session; `held`: of its tenant's budget until it is written."""

    session: str
    usage: UsageRecord
    held: float


class Metering:
    """Charges of sessions; `deliver` hears which calls' records were written, and which not."""

    def __init__(
        self,
        admission: Admission,
        ledger: UsageLedger | None,
        metrics: TenantMetrics,
        deliver: Callable[[Iterable[Outcome]], None],
    ) -> None:
        """Without a `ledger` usage is counted until this process ends."""
        self.ledger = ledger
        self._admission, self._metrics, self._deliver = admission, metrics, deliver
        self._charges: asyncio.Queue[_Charge] = asyncio.Queue()
        self._cancelled: dict[tuple[str, int], float] = {}  # held for it, by call and image
        self._begin_month(month_of(time.time()), ledger.spent if ledger else {})

    def charge(self, session: str, usage: UsageRecord) -> None:
        """An image that was drawn."""
        self._charges.put_nowait(_Charge(session, usage, self._admission.hold(session, usage)))

    def cancelled(
        self, session: str, usage: UsageRecord, said: StoppedImage | Literal["awaited"] | None
    ) -> None:
        """An image that its client did not want to the end; `said`: what its Generator has."""
        if said:
            self._cancelled[usage.call, usage.image] = self._admission.hold(session, usage)
        if isinstance(said, StoppedImage):
            self.stopped(session, usage, said)

    def stopped(self, session: str, usage: UsageRecord, said: StoppedImage) -> None:
        """Charge the steps that were done of a cancelled image."""
        if not said.steps:
            self.give_up(usage)
            return
        held = self._cancelled.pop((usage.call, usage.image), 0.0)
        work_s = round(usage.work_s * said.steps / usage.steps, 6)
        done = usage._replace(steps=said.steps, work_s=work_s, outcome="cancelled")
        self._charges.put_nowait(_Charge(session, done, held))

    def give_up(self, usage: UsageRecord) -> None:
        """Nothing is charged for a cancelled image."""
        held = self._cancelled.pop((usage.call, usage.image), 0.0)
        self._admission.free(usage.tenant, held)

    def turn_month(self, month: str) -> None:
        """Budgets begin anew if it is a later one; what is written meanwhile counts itself."""
        if month > self._month:
            self._begin_month(month, {})

    def _begin_month(self, month: str, spent: Mapping[str, float]) -> None:
        now = time.time()
        self._month = month
        self._admission.begin_month(spent, time.monotonic() + month_end(now) - now)

    async def run(self) -> None:
        """Write, for ever, as many records at a time as have come."""
        while True:
            batch = [await self._charges.get()]
            while not self._charges.empty():
                batch.append(self._charges.get_nowait())
            now = time.time()
            fresh: list[_Charge] | None = batch
            if self.ledger:
                try:
                    usages = [charge.usage for charge in batch]
                    written = await asyncio.to_thread(self.ledger.append, usages, now)
                except OSError:
                    log.error("usage cannot be written: images are not delivered", exc_info=True)
                    fresh = None
                else:
                    fresh = _of(written, batch)
            self.turn_month(month_of(now))
            self._tell(batch, fresh)

    def _tell(self, batch: list[_Charge], fresh: list[_Charge] | None) -> None:
        """Confirm what is on disk, of which `fresh` is new; None: it could not be written."""
        told: dict[tuple[str, str], Outcome] = {}
        for charge in batch:
            session, usage = charge.session, charge.usage
            if fresh is None and usage.outcome == "cancelled":
                again = self._charges.put_nowait
                asyncio.get_running_loop().call_later(AGAIN_S, again, charge)
                continue
            self._admission.free(usage.tenant, charge.held)
            told[session, usage.call] = Outcome(
                session, usage.call, None, "unrecorded" if fresh is None else "recorded"
            )
        for session, usage, _ in fresh or ():
            spent: float | None = self.ledger.spent[usage.tenant] if self.ledger else None
            if self.ledger and self.ledger.month < self._month:  # it was written before the turn
                spent = self._admission.account(usage.tenant).spent
            self._admission.spend(session, usage, spent, time.monotonic())
            self._metrics.charged(usage)
        if self.ledger and self.ledger.month == self._month:
            for tenant in self.ledger.charged_elsewhere():
                self._admission.account(tenant).spent = self.ledger.spent[tenant]
        self._deliver(told.values())


def _of(usages: Iterable[UsageRecord], batch: Iterable[_Charge]) -> list[_Charge]:
    """The charges of usages, each once."""
    left = set(usages)
    found = []
    for charge in batch:
        if charge.usage in left:
            left.discard(charge.usage)
            found.append(charge)
    return found
