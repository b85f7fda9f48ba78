"""Charging of images: reserved in the tenant's budget, written by a thread, then confirmed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..usage.months import month_end, month_of
from ..usage.record import UsageRecord
from .admission import Admission
from .dispatcher_metrics import TenantMetrics
from .protocol import TIMING, DispatchEvent, Recorded, StoppedImage

if TYPE_CHECKING:
    from ..usage.ledger import UsageLedger

log = logging.getLogger("ray.serve")


class _Charge(NamedTuple):
    """A usage record that is to be written, and the session that hears of it.

    `held`: the work that is reserved in the tenant's budget until the record is written. `written`:
    whether the session has written the record itself, so that only the sums are to be read.
    """

    session: str
    usage: UsageRecord
    held: float
    written: bool = False


class Metering:
    """Writes the charges of all sessions, and tells each session which ones are written.

    A charge that cannot be written is tried again until it is: its image is not delivered before.
    """

    def __init__(
        self,
        admission: Admission,
        metrics: TenantMetrics,
        deliver: Callable[[Iterable[DispatchEvent]], None],
        on_fault: Callable[[], None] = lambda: None,
        retry_s: float = TIMING.charge_retry_s,
    ) -> None:
        """`deliver`: sends events to their sessions. `on_fault` is called when `fault` changes.

        `retry_s`: how long to wait before charges that could not be written are tried again.
        """
        self.ledger: UsageLedger | None = None
        self.fault = ""  # why charges cannot be written at present
        self._admission, self._metrics, self._deliver = admission, metrics, deliver
        self._on_fault = on_fault
        self._retry_s = retry_s
        self._charges: asyncio.Queue[_Charge] = asyncio.Queue()
        self._held: dict[tuple[str, int], float] = {}  # for cancelled images, by call and index
        self._begun = asyncio.Event()
        self._charged = 0  # charges so far
        self._writing = False
        self._begin_month(month_of(time.time()), {})

    def begin(self, ledger: UsageLedger | None) -> None:
        """Begin to write charges; None: count usage in memory only."""
        self.ledger = ledger
        if ledger:
            self._begin_month(month_of(time.time()), ledger.spent)
        self._begun.set()

    def charge(self, session: str, usage: UsageRecord, *, written: bool = False) -> None:
        """Charge an image that was generated, or take such a charge back.

        `written`: the session has written the record itself; only its tenant's account is left.
        """
        held = 0.0 if usage.outcome == "reversed" else self._admission.hold(session, usage)
        self._put(_Charge(session, usage, held, written))

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
        self._put(_Charge(session, done, held))

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

    def _put(self, charge: _Charge) -> None:
        self._charged += 1
        self._charges.put_nowait(charge)

    def quiet(self) -> int | None:
        """The number of charges so far, if all of them are written; else None."""
        return None if self._writing or self.fault or self._charges.qsize() else self._charged

    async def run(self) -> None:
        """Write charges for ever. Charges that arrive during a write are written together next."""
        await self._begun.wait()
        while True:
            self._writing = False
            batch = [await self._charges.get()]
            self._writing = True
            while not self._charges.empty():
                batch.append(self._charges.get_nowait())
            now = time.time()
            fresh = batch
            if self.ledger:
                usages = [charge.usage for charge in batch if not charge.written]
                try:
                    written = await self.ledger.append_soon(usages, now)
                except OSError as error:
                    self._set_fault(str(error))
                    loop = asyncio.get_running_loop()
                    for charge in batch:
                        loop.call_later(self._retry_s, self._charges.put_nowait, charge)
                    continue
                fresh = _charges_of(written, batch) + [c for c in batch if c.written]
                self._set_fault("")
            self.turn_month(month_of(now))
            self._confirm(batch, fresh)

    def _set_fault(self, fault: str) -> None:
        if fault != self.fault:
            if fault:
                log.error("usage cannot be written, so no image is delivered: %s", fault)
            self.fault = fault
            self._on_fault()

    def _confirm(self, batch: list[_Charge], fresh: list[_Charge]) -> None:
        """Tell sessions what is written, and count the `fresh` charges of a batch.

        A charge is not fresh if it was written already: an earlier Dispatcher wrote it, but ended
        before it could tell the session.
        """
        events: dict[tuple[str, str], Recorded] = {}
        new = {id(charge) for charge in fresh}
        for charge in batch:
            session, usage, held, _ = charge
            self._admission.free(usage.tenant, held)
            if id(charge) not in new and usage.work_s > 0:  # the database has charged the lease
                self._admission.account(usage.tenant).lease(-usage.work_s)
            events[session, usage.call] = Recorded(session, usage.call)
        for session, usage, _, _ in fresh:
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
