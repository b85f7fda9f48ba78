"""Computing in a thread that ends afterwards."""

import asyncio
import threading

import pytest

from serve.engine.apart import apart


def test_the_thread_that_computed_ends() -> None:
    async def computed() -> threading.Thread:
        return await apart(threading.current_thread)

    thread = asyncio.run(computed())
    assert thread is not threading.current_thread()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(apart(lambda: 1 / 0))


def test_a_cancelled_caller_does_not_wait_for_the_thread() -> None:
    started, may_end = threading.Event(), threading.Event()

    def compute() -> None:
        started.set()
        may_end.wait(60)

    async def cancelled() -> None:
        task = asyncio.create_task(apart(compute))
        await asyncio.to_thread(started.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not may_end.is_set()
        may_end.set()

    asyncio.run(cancelled())
