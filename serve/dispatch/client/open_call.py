"""A client's call at an Ingress, from its admission to its answer.

`session` holds the connection to the Dispatcher; this file is what a request sees of it.
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
        """End the call's work: another call has asked for that."""

    @property
    def unwanted(self) -> bool:
        """Whether the client has ended the call, or is gone."""


class CallSession(Protocol):
    """The part of a session that an open call uses."""

    name: str

    def submit(self, call: OpenCall, image: QueuedImage) -> PendingGrant:
        """Queue a further attempt at an image."""

    def release(self, call: OpenCall, release: Release) -> None:
        """Let go of an image, whether it waits or runs."""

    def record(self, call: OpenCall) -> None:
        """Have the call's usage records written."""

    def close(self, call: OpenCall) -> None:
        """End the call."""


@dataclass(slots=True)
class HeldSlot:
    """A slot that is held; its holder says before it ends what came of it, if that is known.

    `took_s`: the work that the image took; 0 if nothing was generated. `cancelled`: the image's
    full charge, if the client cancelled it: its tenant pays for the steps that were done.
    """

    lease: Lease
    took_s: float | None = None
    cancelled: UsageRecord | None = None


@dataclass(slots=True)
class PendingGrant:
    """An image that waits for its grant, or holds a slot of `pool`.

    `claimed`: a task waits for the grant or uses the slot, and will release it. `position`: the
    place in the queue as last heard.
    """

    image: QueuedImage
    granted: asyncio.Future[str]
    on_position: OnPosition | None = None
    claimed: bool = False
    position: int = 0
    pool: str | None = None


@dataclass(slots=True)
class Recording:
    """Usage records that are being written."""

    usages: tuple[UsageRecord, ...]
    done: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class OpenCall:
    """A client's call from its admission until `close`.

    `grants`: by image id. `generated`: the charges of images that are done and not yet recorded.
    """

    session: CallSession
    request: AdmissionRequest
    client: CallClient
    decision: asyncio.Future[AdmissionDecision]
    record_s: float
    grants: dict[str, PendingGrant] = field(default_factory=dict)
    recording: Recording | None = None
    generated: list[UsageRecord] = field(default_factory=list)
    closed: bool = False
    eta_s: float | None = None
    rate_limits: tuple[RateLimitStatus, ...] = ()

    async def admitted(self) -> None:
        """Wait for the Dispatcher's decision. Raises the error of `refusals` if it is a refusal."""
        decision = await self.decision
        if error := refusal(decision):
            raise error
        self.eta_s, self.rate_limits = decision.eta_s, decision.rate_limits

    @asynccontextmanager
    async def slot(
        self, index: int, pools: Pools | None = None, on_position: OnPosition | None = None
    ) -> AsyncIterator[HeldSlot]:
        """Wait for a slot for image `index` of the call, and hold it until the block ends.

        The first time this is the place in the queue that the image got with the call; later times
        are further attempts, in `pools`. While the image waits, `on_position` hears its position
        whenever that changes (1: next).

        Raises `NoCapacity`. Leaving the block, or being cancelled while waiting, gives the slot
        back.
        """
        first = self.request.images[index]
        pending = self.grants.get(first.id) or self.session.submit(
            self, first._replace(pools=pools or first.pools)
        )
        pending.on_position, pending.claimed = on_position, True
        if on_position and pending.position:
            on_position(pending.position)
        image_id = pending.image.id
        slot = None
        try:
            slot = HeldSlot(Lease(self.session.name, image_id, await pending.granted))
            yield slot
        finally:
            self.session.release(
                self,
                Release(image_id, slot.took_s, slot.cancelled) if slot else Release(image_id, 0.0),
            )

    async def record(self, usages: Sequence[UsageRecord]) -> None:
        """Have these usage records written, and wait until they are on disk.

        Raises `UsageUnrecorded` if this takes longer than `record_s`.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.recording = Recording(tuple(usages), done)
        self.session.record(self)
        try:
            async with asyncio.timeout(self.record_s):
                await done
        except TimeoutError:
            raise UsageUnrecorded("the image's usage could not be recorded in time") from None
        self.generated.clear()

    def close(self) -> None:
        """End the call: its answer was sent, or never will be. Closing it twice does no harm.

        Images that were generated and not recorded, because the client did not wait for them, are
        charged.
        """
        self.session.close(self)
