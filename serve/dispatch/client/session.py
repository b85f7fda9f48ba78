"""An Ingress's side of its session with the Dispatcher.

    call = session.open(tenant, request_id, wishes, timeout_s, client)
    await call.admitted()  # or it is refused
    async with call.slot(0) as slot:
        ...  # a slot of `slot.lease.pool` is ours until the block ends
    await call.record(usages)  # on disk now
    call.close()

News is coalesced: while one message is under way the next collects. If the Dispatcher restarts, a
new session says which calls are open, what they still wait for and what runs, so running images
are not touched.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ...errors import NoCapacity, UsageUnrecorded
from ...tenants.keys import TenantDirectory
from ...usage.record import UsageRecord
from ..protocol import (
    HEARTBEAT_S,
    AdmissionDecision,
    AdmissionRequest,
    Outcome,
    QueuedImage,
    Release,
    RunningImage,
    SessionUpdate,
)
from .open_call import CallClient, Entry, OpenCall, Wish
from .refusals import NO_CAPACITY

log = logging.getLogger("ray.serve")

RECONNECT_S = 0.5


class DispatchSession:
    """`dispatcher` is a handle with the methods of `Dispatcher`; use inside a running loop."""

    def __init__(self, dispatcher: Any) -> None:
        self.directory: TenantDirectory | None = None  # of tenants, once it was told
        self.name = uuid.uuid4().hex
        self._dispatcher = dispatcher
        self._numbers = itertools.count()
        self._calls: dict[str, OpenCall] = {}
        self._entries: dict[str, Entry] = {}  # of all calls
        # What was not yet told.
        self._new_calls: dict[str, OpenCall] = {}
        self._new_entries: dict[str, Entry] = {}
        self._new_usages: dict[str, OpenCall] = {}
        self._usages: list[UsageRecord] = []  # of calls that are closed
        self._releases: list[Release] = []
        self._ended: list[str] = []
        self._news = asyncio.Event()
        self._open = False
        self._stream: Any = None
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._talk())]

    def check(self) -> None:
        """Raise `RuntimeError` if the session can no longer work."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("the session with the dispatcher has ended")

    def open(
        self,
        tenant: str,
        request_id: str,
        wishes: Sequence[Wish],
        timeout_s: float,
        client: CallClient,
    ) -> OpenCall:
        """Ask for a call to be admitted and its images queued; `close` has to follow, always."""
        loop = asyncio.get_running_loop()
        name = f"{self.name[:12]}-{next(self._numbers)}"
        entries = tuple(
            QueuedImage(str(next(self._numbers)), name, wish.pools, wish.work_s, wish.watched)
            for wish in wishes
        )
        work_s = sum(wish.work_s for wish in wishes)
        opening = AdmissionRequest(name, tenant, request_id, entries, timeout_s, work_s)
        call = OpenCall(self, opening, client, loop.create_future())
        for entry in entries:
            call.entries[entry.entry] = Entry(entry, loop.create_future())
        self._entries.update(call.entries)
        self._calls[name] = self._new_calls[name] = call
        self._news.set()
        return call

    # -- of a call ------------------------------------------------------------------------------

    def submit(self, call: OpenCall, asked: QueuedImage) -> Entry:
        name = str(next(self._numbers))
        entry = Entry(asked._replace(entry=name), asyncio.get_running_loop().create_future())
        call.entries[name] = self._entries[name] = self._new_entries[name] = entry
        self._news.set()
        return entry

    def release(self, call: OpenCall, release: Release) -> None:
        call.entries.pop(release.entry, None)
        known = self._entries.pop(release.entry, None)
        if known and not self._new_entries.pop(release.entry, None):
            self._releases.append(release)
            self._news.set()
        if call.closed and not call.entries:
            self._end(call)

    def record(self, call: OpenCall) -> None:
        self._new_usages[call.opening.call] = call
        self._news.set()

    def close(self, call: OpenCall) -> None:
        if call.closed:
            return
        call.closed = True
        name = call.opening.call
        if name in self._new_calls or name not in self._calls:  # not told, or refused
            self._forget(call)
            return
        for entry in [name for name, entry in call.entries.items() if not entry.held]:
            self.release(call, Release(entry, 0.0))
        if not call.entries:
            self._end(call)

    def _end(self, call: OpenCall) -> None:
        """A closed call holds nothing any more."""
        name = call.opening.call
        if self._calls.get(name) is not call:
            return
        untold = name in self._new_usages or call.recording is None
        if call.drawn and untold and call.client.unwanted:
            self._usages += [usage._replace(outcome="cancelled") for usage in call.drawn]
        self._forget(call)
        self._ended.append(name)
        self._news.set()

    def _forget(self, call: OpenCall) -> None:
        name = call.opening.call
        for pending in (self._calls, self._new_calls, self._new_usages):
            pending.pop(name, None)
        for entry in call.entries:
            self._entries.pop(entry, None)
            self._new_entries.pop(entry, None)

    # -- the session ----------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Keep a session open and hand what it tells to those who wait."""
        while True:
            calls, running = self._state()
            try:
                self._stream = self._dispatcher.session.options(stream=True).remote(
                    self.name, calls, running
                )
                async for told in self._stream:
                    self._open = True
                    self._news.set()
                    if isinstance(told, dict):
                        self.directory = told
                        continue
                    for one in told:
                        self._hear(one)
                log.warning("the dispatcher ended the session; opening it again")
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # it was this task that was cancelled, and not the call
                log.warning("the session's call was cancelled; opening it again")
            except Exception:  # whatever it is, an Ingress without a session is of no use
                log.warning("the dispatcher is not reachable; trying again", exc_info=True)
            self._open = False
            await asyncio.sleep(RECONNECT_S)

    def _state(self) -> tuple[list[AdmissionRequest], list[RunningImage]]:
        """All that a Dispatcher has to know of us; what has no verdict yet is told later."""
        self._releases.clear()
        self._ended.clear()
        self._new_entries.clear()
        calls, running = [], []
        for name, call in self._calls.items():
            if call.recording:
                self._new_usages[name] = call
            if not call.verdict.done():
                self._new_calls[name] = call
                continue
            for entry in call.entries.values():
                if entry.pool:
                    asked = entry.asked
                    tenant = call.opening.tenant
                    running.append(
                        RunningImage(asked.entry, name, tenant, entry.pool, asked.work_s)
                    )
            waiting = tuple(entry.asked for entry in call.entries.values() if not entry.pool)
            calls.append(call.opening._replace(entries=waiting, accepted=True))
        return calls, running

    def _collect(self) -> SessionUpdate:
        """What was not yet told."""
        recordings = [call.recording for call in self._new_usages.values() if call.recording]
        news = SessionUpdate(
            usages=(
                *self._usages,
                *(usage for recording in recordings for usage in recording.usages),
            ),
            releases=tuple(self._releases),
            ended=tuple(self._ended),
            openings=tuple(call.opening for call in self._new_calls.values()),
            submits=tuple(entry.asked for entry in self._new_entries.values()),
        )
        for told in (self._new_usages, self._new_calls, self._new_entries):
            told.clear()
        self._releases.clear()
        self._ended.clear()
        self._usages.clear()
        return news

    def _hear(self, told: Outcome | AdmissionDecision) -> None:
        if isinstance(told, AdmissionDecision):
            call = self._calls.get(told.call)
            if call is None and not told.refusal:  # it was closed while it was told
                self._ended.append(told.call)
                self._news.set()
            elif call and not call.verdict.done():
                call.verdict.set_result(told)
                if told.refusal:
                    self._forget(call)
        elif told.kind in ("cancelled", "recorded", "unrecorded"):
            if call := self._calls.get(told.entry):
                self._hear_of_call(call, told)
        else:
            self._hear_of_entry(told)

    def _hear_of_call(self, call: OpenCall, told: Outcome) -> None:
        if told.kind == "cancelled":
            call.client.cancel()
        elif call.recording:
            recording, call.recording = call.recording, None
            call.opening = call.opening._replace(work_s=0.0)
            if recording.done.done():
                return
            if told.kind == "recorded":
                recording.done.set_result(None)
            else:
                recording.done.set_exception(UsageUnrecorded("the image could not be accounted"))

    def _hear_of_entry(self, told: Outcome) -> None:
        entry = self._entries.get(told.entry)
        if entry is None:
            if told.pool:  # whoever waited is gone; to say so twice does no harm
                self._releases.append(Release(told.entry, 0.0))
                self._news.set()
        elif told.kind == "queued":
            entry.position = told.position
            if entry.queued:
                entry.queued(told.position)
        elif not entry.granted.done():
            if told.pool is None:
                entry.granted.set_exception(NoCapacity(NO_CAPACITY))
            else:
                entry.pool = told.pool
                entry.granted.set_result(told.pool)

    async def _talk(self) -> None:
        """Tell what is new, or at least that we live, once per heartbeat."""
        while True:
            with suppress(TimeoutError):  # wait_for may swallow a cancellation before Python 3.12
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
            self._news.clear()
            if not self._open:
                continue
            news = self._collect()
            try:
                understood = await self._dispatcher.tell.remote(self.name, news)
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # it was this task that was cancelled, and not the call
                understood = False
            except Exception:  # Ray's errors have no common class; the cure is the same for all
                log.warning("could not reach the dispatcher", exc_info=True)
                understood = False
            if not understood:  # `_listen` then opens a session that knows the whole state
                self._usages += [u for u in news.usages if u.outcome == "cancelled"]
                with suppress(Exception):
                    self._stream.cancel()
