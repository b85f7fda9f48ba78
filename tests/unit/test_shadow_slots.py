"""An Ingress's shadows: when their work runs, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from serve.dispatch.client.shadow_slots import ShadowSlots
from serve.dispatch.protocol import Lease, QueuedImage, ShadowGranted, ShadowStopped

POOLS = ("m-fp16",)


class Shadow:
    """A shadow whose work ends when it is told to; `sent`: how often it had news to send."""

    def __init__(self) -> None:
        self.sent = 0
        self.slots = ShadowSlots("s", self._changed)
        self.leases: list[Lease] = []
        self.cancelled = False
        self.finish = asyncio.Event()

    def _changed(self) -> None:
        self.sent += 1

    async def work(self, lease: Lease) -> str:
        self.leases.append(lease)
        try:
            await self.finish.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "image"

    async def asked(self) -> tuple[asyncio.Task[str | None], QueuedImage]:
        """Begin to run the work; return the task and the image that is asked for."""
        task = asyncio.create_task(self.slots.run(POOLS, self.work))
        await asyncio.sleep(0)
        ((image,), _) = self.slots.take()
        return task, image

    async def begun(self) -> tuple[asyncio.Task[str | None], QueuedImage]:
        task, image = await self.asked()
        self.slots.hear(ShadowGranted("s", image.id, "m-fp16", "r"))
        while not self.leases:  # noqa: ASYNC110 - the task needs a few turns
            await asyncio.sleep(0)
        return task, image


def run(work: Coroutine[None, None, None]) -> None:
    asyncio.run(work)


def test_the_work_begins_with_the_grant_and_its_slot_is_given_back() -> None:
    async def main() -> None:
        shadow = Shadow()
        task, image = await shadow.begun()
        assert image.pools == POOLS
        assert shadow.leases == [Lease("s", image.id, "m-fp16", "r")]
        shadow.finish.set()
        assert await task == "image"
        asked, ended = shadow.slots.take()
        assert (asked, [release.image_id for release in ended]) == ((), [image.id])

    run(main())


def test_work_that_must_stop_is_cancelled() -> None:
    async def main() -> None:
        shadow = Shadow()
        task, image = await shadow.begun()
        shadow.slots.hear(ShadowStopped("s", image.id))
        assert await task is None
        assert shadow.cancelled

    run(main())


def test_who_no_longer_waits_gives_its_place_back() -> None:
    async def main() -> None:
        shadow = Shadow()
        task = asyncio.create_task(shadow.slots.run(POOLS, shadow.work))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        asked, ended = shadow.slots.take()
        assert (asked, len(ended)) == ((), 1)
        assert not shadow.leases

    run(main())


def test_a_new_session_stops_what_runs_and_asks_again_for_what_waits() -> None:
    async def main() -> None:
        shadow, sent = Shadow(), 0
        running, _ = await shadow.begun()
        waiting, image = await shadow.asked()
        sent = shadow.sent
        shadow.slots.begin_session()
        assert await running is None
        ((again,), _) = shadow.slots.take()
        assert again.id == image.id
        assert shadow.sent > sent
        waiting.cancel()
        await asyncio.wait({waiting})

    run(main())


def test_an_error_of_the_work_is_raised() -> None:
    async def main() -> None:
        shadow = Shadow()

        async def fail(_: Lease) -> str:
            raise ValueError("broken")

        task = asyncio.create_task(shadow.slots.run(POOLS, fail))
        await asyncio.sleep(0)
        ((image,), _) = shadow.slots.take()
        shadow.slots.hear(ShadowGranted("s", image.id, "m-fp16", "r"))
        await asyncio.wait({task})
        assert isinstance(task.exception(), ValueError)

    run(main())
