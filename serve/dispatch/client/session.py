"""An Ingress's session with the Dispatcher.

    call = session.open(tenant, request_id, images, timeout_s, client)
    await call.admitted()             # raises if the call is refused
    async with call.slot(0) as slot:
        ...                           # a slot of `slot.lease.pool` is held until the block ends
    await call.record(usages)         # the usage records are written now
    call.close()

Updates are coalesced: while one update is being sent, everything new is collected for the next. If
the Dispatcher restarts, the session is opened again and reports its open calls, waiting images and
running images. So the new Dispatcher knows of them, and running images go on undisturbed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ...errors import Evicted, NoCapacity
from ...tenants.keys import TenantDirectory
from ...usage.record import UsageRecord
from ..protocol import (
    TIMING,
    AdmissionDecision,
    AdmissionRequest,
    CallAnswer,
    CallProgress,
    CallQuery,
    Cancelled,
    DispatcherStatus,
    DispatchEvent,
    Granted,
    Lane,
    Lease,
    Position,
    QuarantinedRequest,
    QueuedImage,
    Recorded,
    Refused,
    Release,
    ResultFinished,
    RunningImage,
    SessionUpdate,
    ShadowGranted,
    ShadowStopped,
    Timing,
)
from .open_call import CallClient, OpenCall, PendingGrant, Recording
from .refusals import EVICTED, NO_CAPACITY
from .shadow_slots import ShadowSlots

log = logging.getLogger("ray.serve")

OF_CLOSED_CALLS = "cancelled", "reversed"  # records that no open call sends once more
KEY_USE_S = 60.0  # between two reports that a key is used
MOST_QUERIES = 1000  # that may wait for the Dispatcher's answer


class DispatchSession:
    """The Ingress's end of a session; must be made inside a running event loop.

    `dispatcher`: a Ray Serve handle with the methods of `Dispatcher`.
    """

    def __init__(self, dispatcher: Any, timing: Timing = TIMING) -> None:
        self.tenants: TenantDirectory | None = None  # once the Dispatcher has sent it
        self.name = uuid.uuid4().hex
        self._dispatcher, self._timing = dispatcher, timing
        self._numbers = itertools.count()
        self._calls: dict[str, OpenCall] = {}
        self._grants: dict[str, PendingGrant] = {}  # of all calls, by image id
        # What the next update will hold.
        self._new_calls: dict[str, OpenCall] = {}
        self._new_grants: dict[str, PendingGrant] = {}
        self._new_recordings: dict[str, OpenCall] = {}
        self._usages: list[UsageRecord] = []  # that belong to no open call
        self._progress: dict[str, CallProgress] = {}  # by call, as it has changed
        self._releases: list[Release] = []
        self._ended: list[str] = []
        self._finished: list[str] = []
        self._new_quarantined: list[QuarantinedRequest] = []
        self._lifted: list[str] = []
        self._faults: dict[str, str] = {}  # in every update, so that a new Dispatcher hears them
        self._keys_used: dict[str, float] = {}  # since the last update, by id of the key
        self._use_told: dict[str, float] = {}  # the use that the Dispatcher was told last
        self._new_queries: set[CallQuery] = set()
        # Queries that the Dispatcher has not answered; equal ones share an answer.
        self._asked: dict[CallQuery, asyncio.Future[CallAnswer]] = {}
        self.quarantined: frozenset[str] = frozenset()  # ids of requests that are refused
        self._status: DispatcherStatus | None = None
        self._status_at = 0.0
        self._changed = asyncio.Event()
        self.shadows = ShadowSlots(self.name, self._changed.set)
        self._open = False
        self._stream: Any = None
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._talk())]

    def check(self) -> None:
        """Raise `RuntimeError` if one of the session's tasks has ended, so that it cannot go on."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("the session with the dispatcher has ended")

    def set_fault(self, part: str, fault: str) -> None:
        """Report what does not work at this Ingress; an empty `fault`: it works again."""
        self._faults.pop(part, None)
        if fault:
            self._faults[part] = fault
        self._changed.set()

    def key_used(self, id: str, now: float) -> None:
        """Report with the next update that an API key was used at the Unix time `now`."""
        if now - self._use_told.get(id, 0.0) >= KEY_USE_S:
            self._use_told[id] = self._keys_used[id] = now

    @property
    def pending_images(self) -> int:
        """The number of images that wait for a grant or hold a slot."""
        return len(self._grants)

    def open(
        self,
        tenant: str,
        request_id: str,
        images: Sequence[QueuedImage],
        timeout_s: float,
        client: CallClient,
        waited_s: float = 0.0,
        usages: Sequence[UsageRecord] = (),
        result_key: str = "",
        key_id: str = "",
        call_id: str = "",
        lane: Lane = "request",
        work_s: float | None = None,
    ) -> OpenCall:
        """Ask the Dispatcher to admit a call and to queue its images.

        Returns at once; `OpenCall.admitted` waits for the decision. `timeout_s`: seconds from the
        call's beginning, `waited_s` seconds ago, to its deadline. `client` hears if the call is
        cancelled. `usages`: records that are written if the call is admitted, without a further
        message; `OpenCall.recorded` waits for that. Their field `call` is filled in here.
        `result_key`: under which the images will be in the result cache that all Ingresses share;
        if the call is admitted, `finish` must be called for it. `key_id`: of the client's API key.
        `call_id`: an id that no other call has, if the caller has chosen one. `lane`: how the call
        has come; `work_s`: what it may cost, if its images are not named here. The caller must
        always close the call.
        """
        loop = asyncio.get_running_loop()
        call_id = call_id or f"{self.name[:12]}-{next(self._numbers)}"
        named = tuple(
            image._replace(id=str(next(self._numbers)), call_id=call_id) for image in images
        )
        if work_s is None:
            work_s = sum(image.work_s for image in named)
        records = tuple(usage._replace(call=call_id) for usage in usages)
        request = AdmissionRequest(
            call_id,
            tenant,
            request_id,
            named,
            timeout_s,
            work_s,
            usages=records,
            result_key=result_key,
            key_id=key_id,
            lane=lane,
        )
        call = OpenCall(
            self,
            request,
            client,
            loop.create_future(),
            self._timing.record_s,
            began=loop.time() - waited_s,
        )
        if records:
            call.recording = Recording(records, loop.create_future())
        for image in named:
            call.grants[image.id] = PendingGrant(image, loop.create_future())
        self._grants.update(call.grants)
        self._calls[call_id] = self._new_calls[call_id] = call
        self._changed.set()
        return call

    async def ask(self, query: CallQuery) -> CallAnswer | None:
        """Ask the Dispatcher about a tenant's call, whichever Ingress has it.

        Returns None if the Dispatcher leaves many queries without an answer.
        """
        if query not in self._asked:
            if len(self._asked) >= MOST_QUERIES:
                return None
            self._asked[query] = asyncio.get_running_loop().create_future()
            self._new_queries.add(query)
            self._changed.set()
        return await asyncio.shield(self._asked[query])

    def tell_progress(self, progress: CallProgress) -> None:
        """Tell the Dispatcher with the next update how far a call is."""
        self._progress[progress.call_id] = progress

    def quarantine(self, request: QuarantinedRequest) -> None:
        """Have all Ingresses refuse equal requests for a while."""
        self._new_quarantined.append(request)
        self._changed.set()

    def lift_quarantine(self, id: str) -> None:
        """Let a request in quarantine pass again, at all Ingresses."""
        self._lifted.append(id)
        self._changed.set()

    def finish(self, result_key: str) -> None:
        """Tell equal calls at other Ingresses to look for the images in the result cache now."""
        self._finished.append(result_key)
        self._changed.set()

    def status(self) -> tuple[DispatcherStatus | None, float]:
        """The Dispatcher's last status, and its age in seconds.

        None if there was no status within `session_lease_s`.
        """
        age_s = asyncio.get_running_loop().time() - self._status_at
        known = self._status if age_s <= self._timing.session_lease_s else None
        return known, age_s

    # -- what a call asks for -------------------------------------------------------------------

    def submit(self, call: OpenCall, image: QueuedImage) -> PendingGrant:
        """Queue a further attempt at an image, which keeps the arrival of the first one."""
        loop = asyncio.get_running_loop()
        waited_s = loop.time() - call.began
        image = image._replace(id=str(next(self._numbers)), waited_s=waited_s)
        pending = PendingGrant(image, loop.create_future())
        call.grants[image.id] = self._grants[image.id] = self._new_grants[image.id] = pending
        self._changed.set()
        return pending

    def release(self, call: OpenCall, release: Release) -> None:
        """Take an image out of the queue, or give back its slot."""
        call.grants.pop(release.image_id, None)
        known = self._grants.pop(release.image_id, None)
        if known and not self._new_grants.pop(release.image_id, None):
            self._releases.append(release)
            self._changed.set()
        if call.closed and not call.grants:
            self._end(call)

    def record(self, call: OpenCall) -> None:
        """Send the call's usage records to the Dispatcher with the next update."""
        self._new_recordings[call.request.call_id] = call
        self._changed.set()

    def withdraw(self, call: OpenCall) -> None:
        """Take back the call's usage records, which may have been sent or even written.

        Records that wait to be sent may have been sent to an earlier Dispatcher.
        """
        self._new_recordings.pop(call.request.call_id, None)
        if call.unanswered:
            self._usages += [usage.reversal() for usage in call.unanswered.usages]
            self._changed.set()
        call.recording = None

    def close(self, call: OpenCall) -> None:
        """End a call, and release its images that no task waits for or uses."""
        if call.closed:
            return
        call.closed = True
        call_id = call.request.call_id
        if call_id in self._new_calls or call_id not in self._calls:  # not yet sent, or refused
            self._forget(call)
            return
        for image_id in [name for name, grant in call.grants.items() if not grant.claimed]:
            self.release(call, Release(image_id, 0.0))
        if not call.grants:
            self._end(call)

    def _end(self, call: OpenCall) -> None:
        """Report that a closed call has ended; none of its images waits or runs any more."""
        call_id = call.request.call_id
        if self._calls.get(call_id) is not call:
            return
        unrecorded = call_id in self._new_recordings or call.unanswered is None
        if call.generated and unrecorded and call.client.unwanted:
            self._usages += [usage._replace(outcome="cancelled") for usage in call.generated]
        self._forget(call)
        self._ended.append(call_id)
        self._changed.set()

    def _forget(self, call: OpenCall) -> None:
        call_id = call.request.call_id
        for pending in (self._calls, self._new_calls, self._new_recordings):
            pending.pop(call_id, None)
        for image_id in call.grants:
            self._grants.pop(image_id, None)
            self._new_grants.pop(image_id, None)

    # -- the Dispatcher's messages --------------------------------------------------------------

    async def _listen(self) -> None:
        """Keep the session open, and pass its events to the calls that wait for them."""
        while True:
            calls, running = self._state()
            try:
                self._stream = self._dispatcher.session.options(stream=True).remote(
                    self.name, calls, running
                )
                async for message in self._stream:
                    if not self._open:
                        self._open = True
                        self._changed.set()  # sends what has waited for the session
                    if message.tenants is not None:
                        if self.tenants is None:
                            self.tenants = TenantDirectory()
                        self.tenants.change(message.tenants)
                    if message.status:
                        self._status = message.status
                        self.quarantined = frozenset(r.id for r in message.status.quarantined)
                        self._status_at = asyncio.get_running_loop().time()
                    for event in message.events:
                        self._hear(event)
                log.warning("the dispatcher ended the session; opening it again")
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # this task was cancelled, and not the call
                log.warning("the session's call was cancelled; opening it again")
            except Exception:  # an Ingress without a session is of no use: always try again
                log.warning("the dispatcher is not reachable; trying again", exc_info=True)
            self._open = False
            await asyncio.sleep(self._timing.reconnect_s)

    def _state(self) -> tuple[list[AdmissionRequest], list[RunningImage]]:
        """Return the open calls and the running images that a new Dispatcher has to know.

        A call on which the Dispatcher has not decided is not among them: it is sent again with the
        next update.
        """
        self._releases.clear()
        self._ended.clear()
        self.shadows.begin_session()
        self._finished.clear()  # with the session all its result keys have ended
        self._new_grants.clear()
        self._new_queries.update(self._asked)
        calls, running = [], []
        now = asyncio.get_running_loop().time()
        for call_id, call in self._calls.items():
            if not call.decision.done():
                self._new_calls[call_id] = call
                continue
            if call.unanswered:
                self._new_recordings[call_id] = call
            for grant in call.grants.values():
                if lease := grant.lease:
                    image, flow = grant.image, call.request.flow
                    running.append(
                        RunningImage(
                            image.id,
                            call_id,
                            flow,
                            lease.pool,
                            image.work_s,
                            lease.replica,
                            image.size,
                        )
                    )
            waiting = tuple(
                grant.image._replace(waited_s=now - call.began)
                for grant in call.grants.values()
                if not grant.lease
            )
            calls.append(
                call.request._replace(
                    images=waiting, accepted=True, usages=(), waited_s=now - call.began
                )
            )
        return calls, running

    def _hear(self, event: DispatchEvent) -> None:
        match event:
            case AdmissionDecision():
                self._hear_decision(event)
            case Granted():
                self._hear_grant(event)
            case Refused(image_id=image_id, reason=reason):
                grant = self._grants.get(image_id)
                if grant and not grant.granted.done():
                    evicted = reason == "evicted"
                    error = Evicted(EVICTED) if evicted else NoCapacity(NO_CAPACITY)
                    grant.granted.set_exception(error)
            case Position(image_id=image_id, position=position):
                grant = self._grants.get(image_id)
                # A position from the stream may be older than a grant from the answer to an update.
                if grant and not grant.granted.done():
                    grant.position = position
                    if grant.on_position:
                        grant.on_position(position)
            case Cancelled(call_id=call_id):
                if call := self._calls.get(call_id):
                    call.client.cancel()
            case ResultFinished(call_id=call_id):
                if (call := self._calls.get(call_id)) and call.leader_done:
                    call.leader_done.set()
            case ShadowGranted() | ShadowStopped():
                self.shadows.hear(event)
            case CallAnswer(query=query):
                if asked := self._asked.pop(query, None):
                    asked.set_result(event)
            case Recorded(call_id=call_id):
                if call := self._calls.get(call_id):
                    self._hear_recorded(call)

    def _hear_decision(self, decision: AdmissionDecision) -> None:
        call = self._calls.get(decision.call_id)
        if call is None and not decision.refusal:  # the call was closed meanwhile
            self._ended.append(decision.call_id)
            self._changed.set()
        elif call and not call.decision.done():
            if decision.follows:
                self._follow(call)
            call.decision.set_result(decision)
            if decision.refusal:
                self._forget(call)

    def _follow(self, call: OpenCall) -> None:
        """Note that the images of a call are not queued, because it follows an equal call."""
        for image_id in call.grants:
            del self._grants[image_id]
        call.grants.clear()
        call.request = call.request._replace(images=(), work_s=0.0, follows=True)
        call.leader_done = asyncio.Event()

    def _hear_grant(self, event: Granted) -> None:
        grant = self._grants.get(event.image_id)
        if grant is None:  # nobody waits any more; releasing a slot twice does no harm
            self._releases.append(Release(event.image_id, 0.0))
            self._changed.set()
        elif not grant.granted.done():
            grant.lease = Lease(*event)
            grant.granted.set_result(grant.lease)

    def _hear_recorded(self, call: OpenCall) -> None:
        if (recording := call.unanswered) is None:
            return
        recording.answered = True
        call.request = call.request._replace(work_s=0.0)
        if not recording.done.done():
            recording.done.set_result(None)

    # -- updates to the Dispatcher --------------------------------------------------------------

    async def _talk(self) -> None:
        """Send an update whenever something is new, and at least once per heartbeat."""
        while True:
            with suppress(TimeoutError):  # wait_for may swallow a cancellation before Python 3.12
                async with asyncio.timeout(self._timing.heartbeat_s):
                    await self._changed.wait()
            self._changed.clear()
            if not self._open:
                continue
            update, stream, events = self._collect(), self._stream, None
            try:
                events = await self._dispatcher.tell.remote(self.name, update)
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # this task was cancelled, and not the call
            except Exception:  # Ray's errors have no common class; the cure is the same for all
                log.warning("could not reach the dispatcher", exc_info=True)
            if self._stream is stream:  # events of an earlier session do not count any more
                for event in events or ():
                    self._hear(event)
            if events is None:  # `_listen` then opens a session that knows the whole state
                self._usages += [u for u in update.usages if u.outcome in OF_CLOSED_CALLS]
                self._new_quarantined += update.quarantined
                self._lifted += update.lifted
                with suppress(Exception):
                    self._stream.cancel()

    def _collect(self) -> SessionUpdate:
        """Move everything that is new into one update."""
        now = asyncio.get_running_loop().time()
        recordings = [r for call in self._new_recordings.values() if (r := call.unanswered)]
        shadows, ended_shadows = self.shadows.take()
        update = SessionUpdate(
            usages=(*self._usages, *(u for r in recordings if not r.written for u in r.usages)),
            written=tuple(u for r in recordings if r.written for u in r.usages),
            releases=(*self._releases, *ended_shadows),
            ended_calls=tuple(self._ended),
            finished_results=tuple(self._finished),
            admissions=tuple(
                call.request._replace(waited_s=now - call.began)
                for call in self._new_calls.values()
            ),
            retries=tuple(grant.image for grant in self._new_grants.values()),
            queries=tuple(self._new_queries),
            quarantined=tuple(self._new_quarantined),
            lifted=tuple(self._lifted),
            faults=tuple(self._faults.items()),
            keys_used=tuple(self._keys_used.items()),
            progress=tuple(self._progress.values()),
            shadows=shadows,
        )
        self._keys_used.clear()
        self._progress.clear()
        for sent in (self._new_recordings, self._new_calls, self._new_grants):
            sent.clear()
        self._releases.clear()
        self._ended.clear()
        self._finished.clear()
        self._usages.clear()
        self._new_queries.clear()
        self._new_quarantined.clear()
        self._lifted.clear()
        return update
