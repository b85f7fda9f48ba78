"""Limits of tenants that several clusters with one database share.

A budget is shared by leases, so it holds exactly (`serve.usage.leases`). Request rates, work rates
and `max_requests` are shared by telling: each second every cluster tells what its tenants have
used, and takes what the others tell from its own limits. So in the second before it hears of the
others, a tenant may use each of these limits once at every cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..usage.months import month_of
from ..usage.record import Used
from .admission import Admission
from .protocol import STORED, AdmissionRequest
from .waiting_calls import WaitingCall, WaitingCalls

if TYPE_CHECKING:
    from ..usage.leases import BudgetLeases

log = logging.getLogger("ray.serve")

VALID_S = 20.0  # for which leases hold after the last beat; the others wait 30 s
REFUSED_S = 1.0  # for which nobody asks again for as much work of a budget as was not left
PAUSE_S = 0.1  # before the next attempt after a fault
IDLE_S = 2.0  # after which the part of a lease is given back that no open call needs


class _RefusedWork(NamedTuple):
    """Work that was not left of a tenant's budget, and until when nobody asks for it again."""

    work_s: float
    until: float


class SharedLimits:
    """This cluster's part of the limits.

    `fault`: why it cannot take part at present; "" if it can.
    """

    def __init__(
        self,
        leases: BudgetLeases,
        admission: Admission,
        decide: Callable[[Iterable[WaitingCall]], None],
        on_fault: Callable[[], None],
        quiet: Callable[[], int | None],
    ) -> None:
        """`decide` is called with the calls that have waited for a lease.

        `on_fault` is called when `fault` changes. `quiet` returns the number of charges so far, if
        all of them are written; else None.
        """
        self._leases, self._admission = leases, admission
        self._decide, self._on_fault, self._quiet = decide, on_fault, quiet
        self._month = month_of(time.time())
        self._asked = asyncio.Event()
        self._refused: dict[str, _RefusedWork] = {}  # by tenant
        self._heard: dict[str, Mapping[str, Used]] = {}  # by cluster: what it has told last
        self._beaten = time.monotonic()
        self.waiting = WaitingCalls()
        self.fault = ""

    def begin(self, leased: Mapping[str, float]) -> None:
        """Begin with the leases of an earlier Dispatcher of this cluster."""
        self._beaten = time.monotonic()
        self._admission.begin_leases(leased)

    def must_wait(self, session: str, request: AdmissionRequest, now: float) -> bool:
        """Return whether a call has to wait for a lease; it then waits here."""
        if request.accepted or request.lane == "acceptance" or self._was_refused(request, now):
            return False
        if now - self._beaten > VALID_S:  # this process was paused: its leases may be gone
            self._admission.begin_leases({})
        if not self._admission.account(request.tenant).lacks(request.work_s):
            return False
        self.waiting.add(session, request, now)
        self._asked.set()
        return True

    async def run(self, every_s: float) -> None:
        """Lease what is asked for, and tell and hear what was used, for ever."""
        told = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(told + every_s - time.monotonic(), 0.0)):
                    await self._asked.wait()
            self._asked.clear()
            try:
                if self.waiting:
                    await self._extend()
                if time.monotonic() >= told + every_s:
                    told = time.monotonic()
                    await self._beat()
            except OSError as error:
                log.error("limits cannot be shared with other clusters: %s", error)
                self._set_fault(str(error))
                self._decide(self.waiting.take())  # they are refused
                await self._join_again(error)
                await asyncio.sleep(PAUSE_S)
            else:
                self._set_fault("")

    async def _extend(self) -> None:
        """Lease the work of the calls that wait, and have them decided on."""
        from ..usage.leases import Need, NeededWork

        month = self._turned()
        works: dict[str, list[NeededWork]] = {}
        asked = list(self.waiting)
        for call in asked:
            request, account = call.request, self._admission.account(call.request.tenant)
            kept_s = 0.0 if request.lane in STORED else account.held + account.accepting
            works.setdefault(request.tenant, []).append(NeededWork(request.work_s, kept_s))
        needs = {}
        for tenant, each in works.items():
            account = self._admission.account(tenant)
            owed_s = max(account.lacks(0.0), 0.0)
            needs[tenant] = Need(owed_s, tuple(each), account.tenant.monthly_work or 0.0)
        granted = await asyncio.to_thread(self._leases.extend, needs, month)
        now = time.monotonic()
        self._beaten = now
        for tenant, work_s in granted.items():
            self._admission.account(tenant).lease(work_s)
        known = {(call.session, call.request.call_id) for call in asked}
        ready = []
        for call in self.waiting.take():
            if (call.session, call.request.call_id) in known:
                ready.append(call)
            else:  # it came meanwhile, and is asked for next
                self.waiting.add(*call)
                self._asked.set()
        for call in ready:
            account = self._admission.account(call.request.tenant)
            if account.lacks(call.request.work_s):
                self._note_refusal(call.request, now)
            self._decide([call])

    def _was_refused(self, request: AdmissionRequest, now: float) -> bool:
        """Return whether so much work of this tenant's budget was not left a moment ago."""
        refused = self._refused.get(request.tenant)
        return bool(refused and refused.until > now and request.work_s >= refused.work_s)

    def _note_refusal(self, request: AdmissionRequest, now: float) -> None:
        self._refused = {name: one for name, one in self._refused.items() if one.until > now}
        before = self._refused.get(request.tenant)
        least = min(before.work_s, request.work_s) if before else request.work_s
        self._refused[request.tenant] = _RefusedWork(least, now + REFUSED_S)

    async def _beat(self) -> None:
        """Tell what was used here, give back what is not needed, and take what others have used."""
        month, now = self._turned(), time.monotonic()
        returned = self._admission.return_leases(now - IDLE_S)
        used = self._admission.used(now)
        charges = self._quiet()
        heard = await asyncio.to_thread(self._leases.beat, used, returned, month)
        self._beaten = now = time.monotonic()
        self._admission.hear_of_others(self._heard, heard.others, now)
        self._heard = dict(heard.others)
        # What is known here may have drifted by transactions that were given up. Without charges
        # meanwhile, the database's numbers are those of now.
        if charges is not None and charges == self._quiet():
            self._admission.begin_leases(heard.leased)

    def _turned(self) -> str:
        """The present month; at its turn all leases end."""
        month = month_of(time.time())
        if month > self._month:
            self._month = month
            self._admission.begin_leases({})
        return self._month

    async def _join_again(self, error: OSError) -> None:
        """Join again if this cluster was away for so long that its leases have ended."""
        from ..usage.leases import ForgottenError, Need

        if isinstance(error, ForgottenError):
            with contextlib.suppress(OSError):  # the next round finds out again
                month = self._turned()
                self.begin(await asyncio.to_thread(self._leases.join, month))
                needs = {
                    name: Need(account.lacks(0.0), (), account.tenant.monthly_work or 0.0)
                    for name, account, _ in self._admission.accounts()
                    if account.lacks(0.0)
                }
                granted = await asyncio.to_thread(self._leases.extend, needs, month)
                for tenant, work_s in granted.items():
                    self._admission.account(tenant).lease(work_s)

    def _set_fault(self, fault: str) -> None:
        if fault != self.fault:
            self.fault = fault
            self._on_fault()
