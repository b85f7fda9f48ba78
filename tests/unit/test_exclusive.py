"""The lock with which a deterministic image runs alone."""

import asyncio

from serve.engine.exclusive import SharedExclusiveLock


def test_an_exclusive_holder_and_the_shared_holders_wait_for_each_other() -> None:
    async def main() -> None:
        lock, order, leave = SharedExclusiveLock(), [], asyncio.Event()

        async def enter(name: str, alone: bool) -> None:
            async with lock.held(exclusively=alone):
                order.append(f"{name} in")
                if name == "a":
                    await leave.wait()
                await asyncio.sleep(0.01)
                order.append(f"{name} out")

        async with asyncio.timeout(5):
            tasks = [asyncio.create_task(enter("a", alone=False))]
            await asyncio.sleep(0)
            tasks += [asyncio.create_task(enter(n, alone=n.isupper())) for n in ("X", "b", "Y")]
            given_up = asyncio.create_task(enter("Z", alone=True))
            await asyncio.sleep(0.01)
            assert (order, lock.exclusive) == (["a in"], 3)
            given_up.cancel()
            leave.set()
            await asyncio.gather(*tasks)
        assert order[:2] == ["a in", "a out"]
        assert sorted([order[2:4], order[4:6], order[6:8]]) == [
            [f"{name} in", f"{name} out"] for name in "XYb"
        ]
        assert order[-1] == "b out"
        assert lock.exclusive == 0
        async with asyncio.timeout(5), lock.held(exclusively=True):
            pass

    asyncio.run(main())
