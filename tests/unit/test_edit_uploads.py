"""The pictures that an Ingress holds and reads for edits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest

from serve.api.edit_uploads import EditUploads, HeldPicture
from serve.api.ingress_metrics import IngressMetrics
from serve.edit_pixels import EditPixels
from serve.errors import Unavailable


def uploads(max_bytes: int = 100) -> EditUploads:
    return EditUploads(lambda: max_bytes, IngressMetrics())


def inside_a_loop(test: Callable[[], None]) -> None:
    async def main() -> None:
        test()

    asyncio.run(main())


def test_a_tenant_may_hold_as_much_as_is_free() -> None:
    """Of 120 bytes the first tenant gets a half, and the second a half of the rest."""

    def test() -> None:
        held = uploads(120)
        first, second = HeldPicture(held, "a"), HeldPicture(held, "b")
        first.add(60)
        with pytest.raises(Unavailable) as refused:
            HeldPicture(held, "a").add(1)
        assert refused.value.headers["retry-after"] == "2"
        second.add(30)
        with pytest.raises(Unavailable):
            second.check(1)
        assert held.held == 90
        first.release()
        first.release()
        second.add(30)
        second.release()
        assert held.held == 0

    inside_a_loop(test)


def test_pixels_take_the_place_of_their_body() -> None:
    def test() -> None:
        held = uploads(200)
        small, large = (EditPixels(np.zeros((n, 2, 3), np.uint8)) for n in (4, 20))
        picture = HeldPicture(held, "a")
        picture.add(100)
        picture.keep(small)
        assert (held.held, picture.pixels) == (24, small)
        with pytest.raises(Unavailable):
            picture.keep(large)
        assert held.held == 24
        picture.release()
        assert (held.held, picture.pixels) == (0, None)

    inside_a_loop(test)


def test_tenants_take_turns_and_one_picture_is_read_at_a_time() -> None:
    held, read, go_on = uploads(), list[str](), threading.Event()
    reading = [0]

    def reader(name: str) -> str:
        reading[0] += 1
        assert reading[0] == 1
        go_on.wait(10)
        read.append(name)
        reading[0] -= 1
        return name

    async def main() -> list[str]:
        names = ["busy-1", "busy-2", "busy-3", "other-1", "other-2"]
        tasks = []
        for name in names:
            work = held.read(name.partition("-")[0], lambda name=name: reader(name))  # type: ignore[misc]
            tasks.append(asyncio.create_task(work))
            await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*tasks)

    asyncio.run(main())
    assert read == ["busy-1", "other-1", "busy-2", "other-2", "busy-3"]
    assert not held._turns


def test_a_client_that_leaves_gives_up_its_turn() -> None:
    held, go_on = uploads(), threading.Event()

    async def main() -> str:
        first = asyncio.create_task(held.read("t", lambda: go_on.wait(10)))
        leaving = asyncio.create_task(held.read("t", lambda: "left"))
        last = asyncio.create_task(held.read("t", lambda: "last"))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert not first.done()
        go_on.set()
        await first
        return await last

    assert asyncio.run(main()) == "last"
    assert not held._turns


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_leaves_while_its_picture_is_read_holds_it_until_then(fails: bool) -> None:
    """Nothing can stop the thread. What it has counts until it is done, and nobody else is read."""
    held, running, go_on, order = uploads(), threading.Event(), threading.Event(), list[str]()

    def slow() -> None:
        running.set()
        go_on.wait(10)
        order.append("slow")
        if fails:
            raise ValueError

    async def main() -> None:
        leaving = asyncio.create_task(held.read("t", slow))
        await asyncio.to_thread(running.wait, 10)
        others = [asyncio.create_task(held.read(t, lambda: order.append("other"))) for t in "tu"]
        for _ in range(2):
            leaving.cancel()
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in (leaving, *others))
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.gather(*others)

    asyncio.run(main())
    assert order == ["slow", "other", "other"]
    assert not held._turns
