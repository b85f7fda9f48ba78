"""The ends of a call: its deadline, a cancellation from outside, or its client's disconnect."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from serve.dispatch.client.client_call import ClientCall
from serve.errors import DeadlineExceeded, RequestCancelled


async def forever(ended: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        ended.append("work")


async def run(timeout_s: float, work: Coroutine[Any, Any, None]) -> None:
    await ClientCall(timeout_s).run(work)


def test_a_deadline_ends_the_work() -> None:
    ended: list[str] = []
    with pytest.raises(DeadlineExceeded, match="not done in 0"):
        asyncio.run(run(0.01, forever(ended)))
    assert ended == ["work"]


@pytest.mark.parametrize("early", [True, False])
def test_a_call_can_be_cancelled_before_and_during_its_work(early: bool) -> None:
    ended: list[str] = []

    async def main() -> None:
        call = ClientCall(60)
        if early:
            call.cancel()
        running = asyncio.create_task(call.run(forever(ended)))
        await asyncio.sleep(0.01)
        call.cancel()
        await running

    with pytest.raises(RequestCancelled):
        asyncio.run(main())
    assert ended == ([] if early else ["work"])


def test_a_client_that_disconnects_raises_no_request_cancelled() -> None:
    ended: list[str] = []

    async def main() -> None:
        running = asyncio.create_task(ClientCall(60).run(forever(ended)))
        await asyncio.sleep(0.01)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert ended == ["work"]


def test_errors_and_timeouts_of_the_work_pass_through() -> None:
    async def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(run(60, late()))


def test_the_deadline_counts_all_that_is_done_for_a_call() -> None:
    async def main() -> None:
        call = ClientCall(0.05)
        await call.run(asyncio.sleep(0.03))
        await call.run(asyncio.sleep(0.03))

    with pytest.raises(DeadlineExceeded):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("ends", "unwanted"),
    [
        ("deadline", False),
        ("own deadline", True),
        ("error", False),
        ("cancelled", True),
        ("client", True),
    ],
)
def test_ended_work_knows_whether_its_client_still_wants_it(ends: str, unwanted: bool) -> None:
    found: list[bool] = []

    async def main() -> None:
        call = ClientCall(0.02 if "deadline" in ends else 60, shortened=ends == "own deadline")

        async def work() -> None:
            try:
                if ends == "error":
                    raise ZeroDivisionError
                await asyncio.sleep(60)
            finally:
                found.append(call.unwanted)

        running = asyncio.create_task(call.run(work()))
        await asyncio.sleep(0.01)
        if ends == "cancelled":
            call.cancel()
        if ends == "client":
            running.cancel()
        await asyncio.wait([running])
        assert running.cancelled() or running.exception()

    asyncio.run(main())
    assert found == [unwanted]
