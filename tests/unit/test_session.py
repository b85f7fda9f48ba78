"""An Ingress's session against the real Dispatcher, joined in one process instead of by Ray."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve.dispatch import dispatcher as dispatcher_module
from serve.dispatch import session as session_module
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.messages import Heartbeat, Submission
from serve.dispatch.session import DispatchSession
from serve.errors import NoCapacity, QueueFull, RequestIdInUse, Unavailable

from ..in_process import Handle, a_dispatcher


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "RECONNECT_S", 0.01)


def run(test: Callable[[Dispatcher, DispatchSession, Handle], Any], max_queued: int = 9) -> None:
    async def main() -> None:
        dispatcher = a_dispatcher("p", max_queued=max_queued)
        handle = Handle(dispatcher)
        async with asyncio.timeout(5):
            await test(dispatcher, DispatchSession(handle), handle)

    asyncio.run(main())


async def settle() -> None:
    await asyncio.sleep(0.05)


def test_a_slot_is_held_until_its_block_ends() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        order = []

        async def use(name: str) -> None:
            async with session.slot(("p",)) as lease:
                assert lease.pool == "p"
                order.append(f"{name} in")
                await asyncio.sleep(0.01)
                order.append(f"{name} out")

        await asyncio.gather(*(use(name) for name in "abc"))
        assert order == ["a in", "a out", "b in", "b out", "c in", "c out"]

    run(test)


def test_cancelled_waiters_and_holders_leave_no_trace() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        async def hold(name: str) -> None:
            async with session.slot(("p",)):
                await asyncio.sleep(60)

        await dispatcher.report_replica(Heartbeat("p", "r", 2))
        tasks = [asyncio.create_task(hold(str(i))) for i in range(8)]
        await settle()
        assert dispatcher._grants.queue_depth == 6
        for task in tasks:
            task.cancel()
        await settle()
        assert dispatcher._grants.queue_depth == 0
        assert dispatcher._grants.free_slots("p") == 2

    run(test)


def test_cancelled_before_it_was_told_is_never_told() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await settle()

        async def hold() -> None:
            async with session.slot(("p",)):
                pass

        task = asyncio.create_task(hold())
        await asyncio.sleep(0)  # submitted, not yet told
        task.cancel()
        await settle()
        assert dispatcher._grants.queue_depth == 0

    run(test)


def test_a_full_queue_is_an_error_for_the_one_who_came_too_late() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        async def hold(name: str) -> None:
            async with session.slot(("p",)):
                pass

        first = asyncio.create_task(hold("a"))
        await settle()
        with pytest.raises(QueueFull):
            await hold("b")
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        await first

    run(test, max_queued=1)


def test_a_restarted_dispatcher_learns_what_waits_and_what_runs() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        done = asyncio.Event()

        async def hold(name: str) -> str:
            async with session.slot(("p",)):
                await done.wait()
                return name

        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        running = asyncio.create_task(hold("a"))
        waiting = asyncio.create_task(hold("b"))
        await settle()

        fresh = a_dispatcher("p")
        handle.break_off(fresh)
        await fresh.report_replica(Heartbeat("p", "r", 1))
        await settle()
        assert fresh._grants.queue_depth == 1  # b was resubmitted
        assert fresh._grants.free_slots("p") == 0  # a still runs
        done.set()
        assert await asyncio.gather(running, waiting) == ["a", "b"]
        await settle()
        assert fresh._grants.free_slots("p") == 1

    run(test)


def test_a_session_that_expired_is_opened_again() -> None:
    """A paused Ingress comes back: what it still waits for is granted after all."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        waiting = asyncio.create_task(hold(session))
        await settle()
        (name,) = dispatcher._streams
        dispatcher._end(name)
        await settle()
        assert dispatcher._grants.queue_depth == 1
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        assert await waiting == "p"

    async def hold(session: DispatchSession) -> str:
        async with session.slot(("p",)) as lease:
            return lease.pool

    run(test)


def test_a_restarted_dispatcher_first_listens() -> None:
    """Nothing is granted until every session could say what it runs."""

    async def main() -> None:
        dispatcher = a_dispatcher("p", recovery_s=0.2)
        session = DispatchSession(Handle(dispatcher))
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(5), session.slot(("p",)):
            assert asyncio.get_running_loop().time() - began > 0.15

    asyncio.run(main())


def test_a_session_whose_tasks_have_ended_is_unhealthy() -> None:
    async def test(_: Dispatcher, session: DispatchSession, __: Handle) -> None:
        session.check()
        session._tasks[0].cancel()
        await settle()
        with pytest.raises(RuntimeError):
            session.check()

    run(test)


def test_an_id_that_another_ingress_serves_is_in_use_until_it_is_done() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        other = DispatchSession(handle)
        await dispatcher.report_replica(Heartbeat("p", "r", 2))
        async with session.slot(("p",), "id"):
            async with session.slot(("p",), "id"):
                pass  # a second image of the same call
            with pytest.raises(RequestIdInUse):
                async with other.slot(("p",), "id"):
                    pass
        await settle()
        async with other.slot(("p",), "id"):
            pass

    run(test)


def test_what_no_node_can_hold_is_refused_and_not_queued() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await settle()  # the nodes have been read
        with pytest.raises(NoCapacity):
            async with session.slot(("elsewhere",)):
                pass
        await dispatcher.report_replica(Heartbeat("elsewhere", "r", 1))
        async with session.slot(("elsewhere",)):
            pass

    run(test)


def test_waiting_ends_when_the_last_node_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "NODES_S", 0.02)

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        async def hold() -> None:
            async with session.slot(("p",)):
                pass

        waiting = asyncio.create_task(hold())
        await settle()
        assert dispatcher._grants.queue_depth == 1
        dispatcher._read_nodes = list
        with pytest.raises(NoCapacity):
            await waiting
        state = await dispatcher.state()
        found = state["pools"]["p"]
        assert (found["replicas"], found["placeable"]) == (0, False)

    run(test)


def test_resubmitted_entries_were_accepted_before() -> None:
    """A Dispatcher that comes back with a full queue refuses newcomers, not those who waited."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        async def hold() -> str:
            async with session.slot(("p",)) as lease:
                return lease.pool

        waiting = [asyncio.create_task(hold()) for _ in range(3)]
        await settle()
        fresh = a_dispatcher("p", max_queued=1)
        handle.break_off(fresh)
        await settle()
        assert fresh._grants.queue_depth == 3
        with pytest.raises(QueueFull):
            await hold()
        await fresh.report_replica(Heartbeat("p", "r", 3))
        assert await asyncio.gather(*waiting) == ["p"] * 3

    run(test)


def test_a_drained_dispatcher_counts_down_to_nothing() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        async with session.slot(("p",)):
            assert await dispatcher.drain() == 1
            with pytest.raises(Unavailable, match="shutting down"):
                async with session.slot(("p",)):
                    pass
            async with asyncio.timeout(1):
                again = asyncio.create_task(hold(session))
                await settle()
                assert await dispatcher.drain() == 2
        assert await again == "p"
        await settle()
        assert await dispatcher.drain() == 0

    async def hold(session: DispatchSession) -> str:
        async with session.slot(("p",), accepted=True) as lease:
            return lease.pool

    run(test)


def test_draining_waits_for_answers_that_are_still_sent() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        session.begin("id")
        with pytest.raises(RequestIdInUse):
            session.begin("id")
        async with session.slot(("p",), "id"):
            pass
        await settle()
        assert await dispatcher.drain() == 1  # drawn, not yet sent
        session.end("id")
        await settle()
        assert await dispatcher.drain() == 0
        session.begin("id")

    run(test)


def test_a_grant_that_nobody_waits_for_is_given_back() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        await settle()
        await dispatcher.tell(session._name, [Submission("late", ("p",))], [], 0)
        await settle()
        assert dispatcher._grants.free_slots("p") == 1

    run(test)


def test_a_generator_hears_which_leases_nobody_holds() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        async with session.slot(("p",)) as lease:
            ghost = lease._replace(session="gone")
            said = Heartbeat("p", "r", 1)
            assert await dispatcher.report_replica(said, [lease, ghost]) == [ghost]
        await settle()
        assert await dispatcher.report_replica(said, [lease]) == [lease]

    run(test)


def test_a_dispatcher_that_has_heard_of_nothing_yet_is_not_drained() -> None:
    async def main() -> None:
        dispatcher = a_dispatcher("p", recovery_s=0.1)
        assert await dispatcher.drain() == 1
        await asyncio.sleep(0.15)
        assert await dispatcher.drain() == 0

    asyncio.run(main())


def test_heartbeats_say_what_a_pool_has_to_do() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "a", 4, running_work_s=1.5, speed=1.25))
        await dispatcher.report_replica(Heartbeat("p", "b", 2, running_work_s=0.5, speed=0.5))
        assert (await dispatcher.state())["pools"]["p"] == {
            "replicas": 2,
            "slots": 6,
            "running": 0,
            "running_work_s": 2.0,
            "speed": 1.75,
            "placeable": True,
        }

    run(test)


def test_who_watches_hears_its_position() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        heard: dict[str, list[int]] = {"b": [], "c": []}

        async def hold(name: str) -> None:
            queued = heard[name].append if name in heard else None
            async with session.slot(("p",), queued=queued):
                pass

        first = asyncio.create_task(hold("a"))
        others = [asyncio.create_task(hold(name)) for name in "bc"]
        await settle()
        assert heard == {"b": [2], "c": [3]}
        first.cancel()
        await asyncio.sleep(dispatcher_module.HEARTBEAT_S)
        assert heard == {"b": [2, 1], "c": [3, 2]}
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        await asyncio.gather(*others)
        assert dispatcher._grants._watched == {}

    run(test)


def test_a_call_is_cancelled_at_its_own_ingress() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        other, cancelled = DispatchSession(handle), []

        async def hold(at: DispatchSession, id: str) -> None:
            async with at.slot(("p",), id):
                await asyncio.sleep(60)

        session.begin("runs", lambda: cancelled.append("runs"))
        other.begin("waits", lambda: cancelled.append("waits"))
        tasks = [asyncio.create_task(hold(session, "runs"))]
        await settle()
        tasks.append(asyncio.create_task(hold(other, "waits")))
        await settle()
        assert not await dispatcher.cancel("unknown")
        for id in ("waits", "runs"):
            assert await dispatcher.cancel(id)
            await settle()
        assert cancelled == ["waits", "runs"]
        for task in tasks:
            task.cancel()
        await settle()
        assert not await dispatcher.cancel("runs")

    run(test)
