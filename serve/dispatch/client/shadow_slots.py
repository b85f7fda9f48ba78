"""An Ingress's shadows: images that it generates again while their pools are idle."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from ..protocol import Lease, Pools, QueuedImage, Release, ShadowGranted, ShadowStopped

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _ShadowSlot:
    image: QueuedImage
    granted: asyncio.Future[Lease]
    stopped: asyncio.Future[None]


class ShadowSlots:
    """The shadows of one session; `changed` is called when there is something to send."""

    def __init__(self, session: str, changed: Callable[[], None]) -> None:
        self._session, self._changed = session, changed
        self._numbers = count(1)
        self._slots: dict[str, _ShadowSlot] = {}
        self._asked: list[QueuedImage] = []  # not sent yet
        self._ended: list[Release] = []

    async def run(self, pools: Pools, work: Callable[[Lease], Awaitable[T]]) -> T | None:
        """Wait until one of the pools is idle, and run `work` then.

        Returns None if others needed the pool before the work was done; the work is cancelled then.
        """
        loop = asyncio.get_running_loop()
        image = QueuedImage(pools, id=f"shadow-{next(self._numbers)}")
        slot = _ShadowSlot(image, loop.create_future(), loop.create_future())
        self._slots[image.id] = slot
        self._asked.append(image)
        self._changed()
        running: asyncio.Future[T] | None = None
        try:
            running = asyncio.ensure_future(work(await slot.granted))
            first: set[asyncio.Future[Any]] = {running, slot.stopped}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            return running.result() if running.done() else None
        finally:
            if running and not running.done():
                running.cancel()
                await asyncio.wait({running})
            self._slots.pop(image.id, None)
            self._asked = [asked for asked in self._asked if asked is not image]
            self._ended.append(Release(image.id, 0.0))
            self._changed()

    def hear(self, event: ShadowGranted | ShadowStopped) -> None:
        """Apply the grant or the stop of a shadow."""
        slot = self._slots.get(event.image_id)
        if slot is None:
            return
        if isinstance(event, ShadowStopped):
            if not slot.stopped.done():
                slot.stopped.set_result(None)
        elif not slot.granted.done():
            slot.granted.set_result(Lease(*event))

    def take(self) -> tuple[tuple[QueuedImage, ...], tuple[Release, ...]]:
        """Return the shadows to ask for and those that have ended, since the last call."""
        asked, ended = tuple(self._asked), tuple(self._ended)
        self._asked.clear()
        self._ended.clear()
        return asked, ended

    def begin_session(self) -> None:
        """Stop running shadows and ask again for waiting ones: a new Dispatcher knows none."""
        self._ended.clear()
        for slot in self._slots.values():
            if slot.granted.done():
                self.hear(ShadowStopped(self._session, slot.image.id))
        self._asked = [one.image for one in self._slots.values() if not one.granted.done()]
