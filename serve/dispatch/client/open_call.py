"""A client's call at an Ingress, from its admission to its answer: see `session`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

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

if TYPE_CHECKING:
    from .session import DispatchSession

RECORD_S = 30.0  # for usage to be on disk, a restart of the Dispatcher included

Queued = Callable[[int], None]


class Wish(NamedTuple):
    """One image of a call: the pools it may run in, its work, and whether its place is wanted."""

    pools: Pools
    work_s: float
    watched: bool = False


class CallClient(Protocol):
    """Who made a call."""

    def cancel(self) -> None:
        """Another call asks for its end."""

    @property
    def unwanted(self) -> bool:
        """Its client has ended it, or is gone."""


@dataclass(slots=True)
class HeldSlot:
    """A slot that is held; say before it ends what came of it, if that is known.

    `took_s`: the work that it took; 0 if nothing was drawn. `cancelled`: what is charged in part,
    if the client ends it.
    """

    lease: Lease
    took_s: float | None = None
    cancelled: UsageRecord | None = None


@dataclass(slots=True)
class Entry:
    asked: QueuedImage
    granted: asyncio.Future[str]
    queued: Queued | None = None
    held: bool = False  # somebody waits for it or uses it, and will release it
    position: int = 0  # as it was last heard
    pool: str | None = None  # once it runs


@dataclass(slots=True)
class Recording:
    """Usages that are to be on disk."""

    usages: tuple[UsageRecord, ...]
    done: asyncio.Future[None]


@dataclass(slots=True, eq=False)
class OpenCall:
    """A client's call from its admission until `close`."""

    session: DispatchSession
    opening: AdmissionRequest
    client: CallClient
    verdict: asyncio.Future[AdmissionDecision]
    entries: dict[str, Entry] = field(default_factory=dict)
    recording: Recording | None = None
    drawn: list[UsageRecord] = field(default_factory=list)
    closed: bool = False
    eta_s: float | None = None
    standings: tuple[RateLimitStatus, ...] = ()

    async def admitted(self) -> None:
        """Wait for the verdict. Raises what `refusals` has."""
        verdict = await self.verdict
        if error := refusal(verdict):
            raise error
        self.eta_s, self.standings = verdict.eta_s, verdict.standings

    @asynccontextmanager
    async def slot(
        self, image: int, pools: Pools | None = None, queued: Queued | None = None
    ) -> AsyncIterator[HeldSlot]:
        """Wait for a slot for one of the images and hold it.

        The first time it is the one that was queued with the call, then another one in `pools`.
        While it waits, `queued` is told its position whenever that changes (1: next).

        Raises `NoCapacity`. Leaving the block, or being cancelled while waiting, gives the slot
        back.
        """
        first = self.opening.entries[image]
        entry = self.entries.get(first.entry) or self.session.submit(
            self, first._replace(pools=pools or first.pools)
        )
        entry.queued, entry.held = queued, True
        if queued and entry.position:
            queued(entry.position)
        name = entry.asked.entry
        slot = None
        try:
            slot = HeldSlot(Lease(self.session.name, name, await entry.granted))
            yield slot
        finally:
            self.session.release(
                self, Release(name, slot.took_s, slot.cancelled) if slot else Release(name, 0.0)
            )

    async def record(self, usages: Sequence[UsageRecord]) -> None:
        """Wait until what is charged is on disk. Raises `UsageUnrecorded`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.recording = Recording(tuple(usages), done)
        self.session.record(self)
        try:
            async with asyncio.timeout(RECORD_S):
                await done
        except TimeoutError:
            raise UsageUnrecorded("the image could not be accounted in time") from None
        self.drawn.clear()

    def close(self) -> None:
        """The answer has been sent, or never will be. To say so twice does no harm.

        What was drawn and not recorded, because its client did not wait for it, is charged.
        """
        self.session.close(self)
