"""The pictures that an Ingress holds and reads for edits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.api.edit_uploads import EditUploads
from serve.api.ingress_metrics import IngressMetrics
from serve.errors import Unavailable


def uploads(max_bytes: int = 100) -> EditUploads:
    return EditUploads(lambda: max_bytes, IngressMetrics())


def test_bytes_are_held_up_to_the_limit_and_let_go() -> None:
    held = uploads()
    with held.holding() as hold, held.holding() as other:
        hold(40)
        other(60)
        with pytest.raises(Unavailable):
            hold(1)
        assert held.held == 100
    assert held.held == 0


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
        go_on.set()
        await first
        return await last

    assert asyncio.run(main()) == "last"
    assert not held._turns
