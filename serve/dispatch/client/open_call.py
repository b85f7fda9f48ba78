"""A client's call at an Ingress, from its admission to its answer.

`session` holds the connection to the Dispatcher. A request uses that connection only through an
`OpenCall` of this file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import UsageUnrecorded
from ...usage.record import UsageRecord
from ..protocol import (
    AdmissionDecision,
    AdmissionRequest,
    Lease,
    Pools,
    QueuedImage,
    RateLimitStatus,
    Release,
)
from .refusals import refusal

OnPosition = Callable[[int], None]


class CallClient(Protocol):
    """The client that a call belongs to."""

    def cancel(self) -> None:
        """End the call's work, because the tenant has cancelled it by another request."""

    @property
    def unwanted(self) -> bool:
        """Return whether the client has ended the call, and pays for the steps that were done."""


class CallSession(Protocol):
    """The part of a session that an open call uses."""

    name: str

    def submit(self, call: OpenCall, image: QueuedImage) -> PendingGrant:
        """Queue a further attempt at an image."""

    def release(self, call: OpenCall, release: Release) -> None:
        """Take an image out of the queue, or give back its slot."""

    def record(self, call: OpenCall) -> None:
        """Send the call's usage records to the Dispatcher, which writes them."""

    def withdraw(self, call: OpenCall) -> None:
        """Take back the usage records that the call has sent, even if they are written later."""

    def close(self, call: OpenCall) -> None:
        """End the call."""


@dataclass(slots=True)
class HeldSlot:
    """A slot that an image holds. Before the slot is given back, its holder sets the other fields.

    `took_s`: the work that the image took; 0 if nothing was generated; None if that is not known.
    `cancelled`: the image's full charge, if the client cancelled the image. The tenant then pays in
    proportion to the steps that were done. `lost`: whether the replica died while it ran the image.
    `refused`: whether the replica did not begin it.
    """

    lease: Lease
    took_s: float | None = None
    cancelled: UsageRecord | None = None
    lost: bool = False
    refused: bool = False


@dataclass(slots=True)
class PendingGrant:
    """An image that waits for its grant, or holds the slot of its `lease`.

    `claimed`: whether a task waits for the grant or uses the slot; that task then gives it back.
    `position`: the place in the queue as last reported; 0 before the first report.
    `on_position`: is called with each new position.
    """

    image: QueuedImage
    granted: asyncio.Future[Lease]
    on_position: OnPosition | None = None
    claimed: bool = False
    position: int = 0
    lease: Lease | None = None


@dataclass(slots=True)
class Recording:
    """Usage records that the Dispatcher writes, or that are `written` already.

    `answered`: whether the Dispatcher has told that they are written and counted.
    """

    usages: tuple[UsageRecord, ...]
    done: asyncio.Future[None]
    answered: bool = False
    written: bool = False


@dataclass(slots=True, eq=False)
class OpenCall:
    """A client's call, from the request for its admission until `close`.

    `record_s`: how long `record` may take. `began`: the event loop's time when the client's request
    began. `grants`: the call's images that wait or hold a slot, by image id. `recording`: the usage
    records that were sent last. `generated`: the charges of images that are done but not yet
    recorded. `leader_done`: set when the equal call is done that this one follows; None if this
    call follows none.
    """

    session: CallSession
    request: AdmissionRequest
    client: CallClient
    decision: asyncio.Future[AdmissionDecision]
    record_s: float
    began: float
    grants: dict[str, PendingGrant] = field(default_factory=dict)
    recording: Recording | None = None
    generated: list[UsageRecord] = field(default_factory=list)
    closed: bool = False
    leader_done: asyncio.Event | None = None
    eta_s: float | None = None
    rate_limits: tuple[RateLimitStatus, ...] = ()

    async def admitted(self) -> None:
        """Wait for the Dispatcher's decision.

        If the call is refused, raises the `OctetError` that `refusals` has for the reason.
        """
        decision = await self.decision
        if error := refusal(decision):
            raise error
        self.eta_s, self.rate_limits = decision.eta_s, decision.rate_limits

    async def leader_finished(self) -> bool:
        """Wait until the equal call is done that this one follows.

        Returns False, without waiting, if this call follows none.
        """
        if self.leader_done is None:
            return False
        await self.leader_done.wait()
        return True

    @property
    def unanswered(self) -> Recording | None:
        """The usage records that were sent, if the Dispatcher has not told their outcome."""
        return self.recording if self.recording and not self.recording.answered else None

    @asynccontextmanager
    async def slot(
        self,
        index: int,
        pools: Pools | None = None,
        on_position: OnPosition | None = None,
        *,
        alone: bool = False,
    ) -> AsyncIterator[HeldSlot]:
        """Wait for a slot for image `index` of the call, and hold it until the block ends.

        The image was queued when the call was admitted; the first use of `slot` waits for that
        place. Each later use for the same image is a further attempt, which is queued anew for
        `pools`, and `alone` says whether it must run alone. While the image waits, `on_position` is
        called with its position whenever that changes (1: next).

        The slot is given back when the block is left, or when the wait is cancelled. Raises
        `NoCapacity` if no pool of the image has a replica or a node that could hold one.
        """
        first = self.request.images[index]
        pending = self.grants.get(first.id) or self.session.submit(
            self, first._replace(pools=pools or first.pools, alone=alone)
        )
        pending.on_position, pending.claimed = on_position, True
        if on_position and pending.position:
            on_position(pending.position)
        image_id = pending.image.id
        slot = None
        try:
            slot = HeldSlot(await pending.granted)
            yield slot
        finally:
            release = Release(image_id, 0.0)
            if slot:
                release = Release(image_id, slot.took_s, slot.cancelled, slot.lost, slot.refused)
            self.session.release(self, release)

    async def record(self, usages: Sequence[UsageRecord]) -> None:
        """Have the Dispatcher write these usage records, and wait until they are written.

        Their field `call` is filled in here. Raises `UsageUnrecorded` if they cannot be written, or
        not within `record_s` seconds.
        """
        records = tuple(usage._replace(call=self.request.call_id) for usage in usages)
        self.recording = Recording(records, asyncio.get_running_loop().create_future())
        self.session.record(self)
        await self.recorded()

    async def count(self, usages: Sequence[UsageRecord]) -> None:
        """Have the Dispatcher count usage records that are written already, and wait for that."""
        self.generated.clear()
        done = asyncio.get_running_loop().create_future()
        self.recording = Recording(tuple(usages), done, written=True)
        self.session.record(self)
        await done

    async def recorded(self) -> None:
        """Wait until the usage records are written that were sent by `record` or with the call.

        Raises `UsageUnrecorded` if they cannot be written, or not within `record_s` seconds.
        """
        if self.recording is None:
            raise RuntimeError("no usage records were sent")
        try:
            async with asyncio.timeout(self.record_s):
                await self.recording.done
        except TimeoutError:
            # The client hears that it is not charged, so a record that is written later must not
            # count.
            self.session.withdraw(self)
            self.generated.clear()
            raise UsageUnrecorded("the image's usage could not be recorded in time") from None
        self.generated.clear()

    def close(self) -> None:
        """End the call, whether or not its answer was sent. Closing a call twice does no harm.

        If the client cancelled or disconnected after images were generated, but before they were
        recorded, these images are charged.
        """
        self.session.close(self)
