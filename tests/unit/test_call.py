"""A call ends by its deadline, by a cancellation from outside, or with its client."""

import asyncio

import pytest

from serve.api.call import Call
from serve.errors import DeadlineExceeded, RequestCancelled


async def forever(ended: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        ended.append("work")


def test_a_deadline_ends_the_work() -> None:
    ended: list[str] = []
    with pytest.raises(DeadlineExceeded, match="not done in 0"):
        asyncio.run(Call(0.01).run(forever(ended)))
    assert ended == ["work"]


@pytest.mark.parametrize("early", [True, False])
def test_cancelled_from_outside(early: bool) -> None:
    ended: list[str] = []

    async def main() -> None:
        call = Call(60)
        if early:
            call.cancel()
        running = asyncio.create_task(call.run(forever(ended)))
        await asyncio.sleep(0.01)
        call.cancel()
        await running

    with pytest.raises(RequestCancelled):
        asyncio.run(main())
    assert ended == ([] if early else ["work"])


def test_a_client_that_goes_is_no_cancelled_request() -> None:
    ended: list[str] = []

    async def main() -> None:
        running = asyncio.create_task(Call(60).run(forever(ended)))
        await asyncio.sleep(0.01)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert ended == ["work"]


def test_errors_and_timeouts_of_the_work_are_its_own() -> None:
    async def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(Call(60).run(late()))
