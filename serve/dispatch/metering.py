"""Charging of images: reserved in the tenant's budget, written by a thread, then confirmed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, Protocol

from ..usage.ledger import month_end, month_of
from ..usage.record import UsageRecord
from .admission import Admission
from .dispatcher_metrics import TenantMetrics
from .protocol import TIMING, DispatchEvent, Recorded, StoppedImage

log = logging.getLogger("ray.serve")


class _Charge(NamedTuple):
    """A usage record that is to be written, and the session that hears of it.

    `held`: the work that is reserved in the tenant's budget until the record is written.
    """

    session: str
    usage: UsageRecord
    held: float


class Ledger(Protocol):
    """Where charges are written: `UsageLedger` or `SqlLedger`, whose methods these are."""

    month: str
    spent: Counter[str]

    def append(self, usages: Iterable[UsageRecord], now: float) -> list[UsageRecord]: ...

    def charged_elsewhere(self) -> set[str]: ...

    def close(self) -> None: ...


class Metering:
    """Writes the charges of all sessions, and tells each session which ones are on disk."""

    def __init__(
        self,
        admission: Admission,
        ledger: Ledger | None,
        metrics: TenantMetrics,
        deliver: Callable[[Iterable[DispatchEvent]], None],
        on_fault: Callable[[], None] = lambda: None,
        retry_s: float = TIMING.charge_retry_s,
    ) -> None:
        """`ledger`: where charges are written. Without one, usage is counted in memory only.

        `deliver`: sends events to their sessions. `on_fault` is called when `fault` changes.
        `retry_s`: how long to wait before a charge of a
        cancelled image, or a reversal, that could not be written is tried again.
        """
        self.ledger = ledger
        self.fault = ""  # why charges cannot be written at present
        self._admission, self._metrics, self._deliver = admission, metrics, deliver
        self._on_fault = on_fault
        self._retry_s = retry_s
        self._charges: asyncio.Queue[_Charge] = asyncio.Queue()
        self._held: dict[tuple[str, int], float] = {}  # for cancelled images, by call and index
        self._begin_month(month_of(time.time()), ledger.spent if ledger else {})

    def charge(self, session: str, usage: UsageRecord) -> None:
        """Charge an image that was generated, or take such a charge back."""
        held = 0.0 if usage.outcome == "reversed" else self._admission.hold(session, usage)
        self._charges.put_nowait(_Charge(session, usage, held))

    def cancelled(
        self, session: str, usage: UsageRecord, report: StoppedImage | Literal["awaited"] | None
    ) -> None:
        """Charge a cancelled image, as soon as its Generator has reported how many steps it did.

        `usage`: the full charge. `report`: the Generator's report; "awaited" if it is still to
        come, and then the full charge is held; None if the image never ran, and costs nothing.
        """
        if report:
            self._held[usage.call, usage.image] = self._admission.hold(session, usage)
        if isinstance(report, StoppedImage):
            self.stopped(session, usage, report)

    def stopped(self, session: str, usage: UsageRecord, report: StoppedImage) -> None:
        """Charge a cancelled image for the part of its steps that was done."""
        if not report.steps:
            self.waive(usage)
            return
        held = self._held.pop((usage.call, usage.image), 0.0)
        work_s = round(usage.work_s * report.steps / usage.steps, 6)
        done = usage._replace(steps=report.steps, work_s=work_s, outcome="cancelled")
        self._charges.put_nowait(_Charge(session, done, held))

    def waive(self, usage: UsageRecord) -> None:
        """Charge nothing for a cancelled image."""
        held = self._held.pop((usage.call, usage.image), 0.0)
        self._admission.free(usage.tenant, held)

    def turn_month(self, month: str) -> None:
        """Begin all budgets anew if `month` (YYYY-MM) is later than the current month."""
        if month > self._month:
            self._begin_month(month, {})

    def _begin_month(self, month: str, spent: Mapping[str, float]) -> None:
        now = time.time()
        self._month = month
        self._admission.begin_month(spent, time.monotonic() + month_end(now) - now)

    async def run(self) -> None:
        """Write charges for ever. Charges that arrive during a write are written together next."""
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
                except OSError as error:
                    log.error("usage cannot be written: images are not delivered", exc_info=True)
                    fresh = None
                    self._set_fault(str(error))
                else:
                    fresh = _charges_of(written, batch)
                    self._set_fault("")
            self.turn_month(month_of(now))
            self._confirm(batch, fresh)

    def _set_fault(self, fault: str) -> None:
        if fault != self.fault:
            self.fault = fault
            self._on_fault()

    def _confirm(self, batch: list[_Charge], fresh: list[_Charge] | None) -> None:
        """Tell sessions what is on disk, and count the `fresh` charges of a batch.

        `fresh` is None if the write failed. A charge is not fresh if it was on disk already: an
        earlier Dispatcher wrote it, but ended before it could tell the session.
        """
        events: dict[tuple[str, str], Recorded] = {}
        for charge in batch:
            session, usage = charge.session, charge.usage
            if fresh is None and usage.outcome in ("cancelled", "reversed"):
                again = self._charges.put_nowait
                asyncio.get_running_loop().call_later(self._retry_s, again, charge)
                continue
            self._admission.free(usage.tenant, charge.held)
            events[session, usage.call] = Recorded(session, usage.call, fresh is not None)
        for session, usage, _ in fresh or ():
            spent: float | None = self.ledger.spent[usage.tenant] if self.ledger else None
            if self.ledger and self.ledger.month < self._month:  # written in the month before
                spent = self._admission.account(usage.tenant).spent
            self._admission.spend(session, usage, spent, time.monotonic())
            self._metrics.charged(usage)
        if self.ledger and self.ledger.month == self._month:
            for tenant in self.ledger.charged_elsewhere():
                self._admission.account(tenant).spent = self.ledger.spent[tenant]
        self._deliver(events.values())


def _charges_of(usages: Iterable[UsageRecord], batch: Iterable[_Charge]) -> list[_Charge]:
    """The charges of a batch whose records are among `usages`; each record counts once."""
    left = set(usages)
    found = []
    for charge in batch:
        if charge.usage in left:
            left.discard(charge.usage)
            found.append(charge)
    return found
