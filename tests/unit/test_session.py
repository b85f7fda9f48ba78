"""An Ingress's session with the real Dispatcher, joined in one process instead of by Ray."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.placement import Node
from serve.dispatch.client.open_call import HeldSlot, OpenCall
from serve.dispatch.client.session import DispatchSession
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.protocol import (
    CallQuery,
    CallState,
    Heartbeat,
    HeartbeatReply,
    Lease,
    QueuedImage,
    RunningImage,
    StoppedImage,
)
from serve.errors import (
    Evicted,
    NoCapacity,
    QueueFull,
    RequestIdInUse,
    Unavailable,
    UsageUnrecorded,
)
from serve.store.database import Database
from serve.usage.ledger import UsageLedger
from serve.usage.record import UsageRecord

from ..builders import queued_image, usage_record
from ..full_disk import full_disk
from ..in_process import PROMPT, Client, Handle, a_dispatcher
from ..stored import locked, store_in, store_opened, usage_in
from ..wait import wait_for

ONE = (queued_image(),)


def run(test: Callable[[Dispatcher, DispatchSession, Handle], Any], **options: Any) -> None:
    async def main() -> None:
        dispatcher = a_dispatcher("p", "elsewhere", **options)
        handle = Handle(dispatcher)
        try:
            async with asyncio.timeout(5):
                if dispatcher.store:
                    await store_opened(dispatcher)
                session = DispatchSession(handle, options.get("timing", PROMPT))
                await test(dispatcher, session, handle)
        finally:
            if dispatcher.store:
                dispatcher.store.close()

    asyncio.run(main())


async def settle() -> None:
    """Let everything happen that follows from what was done.

    Many short pauses: on a busy machine the event loop may wake from a long one before it has run
    all that was due meanwhile.
    """
    for _ in range(20):
        await asyncio.sleep(0.0025)


@asynccontextmanager
async def opened(
    session: DispatchSession,
    id: str = "",
    images: tuple[QueuedImage, ...] = ONE,
    client: Client | None = None,
    tenant: str = "t",
) -> AsyncIterator[OpenCall]:
    call = session.open(tenant, id or uuid.uuid4().hex, images, 60, client or Client())
    try:
        await call.admitted()
        yield call
    finally:
        call.close()


@asynccontextmanager
async def slot(session: DispatchSession, id: str = "", **options: Any) -> AsyncIterator[HeldSlot]:
    async with opened(session, id, **options) as call, call.slot(0) as held:
        yield held


async def hold(session: DispatchSession, until: asyncio.Event | None = None, id: str = "") -> str:
    async with slot(session, id) as held:
        if until:
            await until.wait()
        return held.lease.pool


async def state_of(
    session: DispatchSession, request_id: str, *, tenant: str = "t", cancel: bool = False
) -> CallState | None:
    answer = await session.ask(CallQuery(tenant, request_id, cancel))
    assert answer
    assert answer.certain
    return answer.state


def usage(call: OpenCall, image: int = 0) -> UsageRecord:
    return usage_record(call.request.call_id, image)


def test_a_slot_is_held_until_its_block_ends() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        order: list[str] = []

        async def use(name: str) -> None:
            async with slot(session) as held:
                assert held.lease.pool == "p"
                order.append(f"{name} in")
                await asyncio.sleep(0.01)
                order.append(f"{name} out")

        await asyncio.gather(*(use(name) for name in "abc"))
        assert order == ["a in", "a out", "b in", "b out", "c in", "c out"]

    run(test)


def test_cancelled_waiters_and_holders_leave_no_trace() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 2))
        tasks = [asyncio.create_task(hold(session, asyncio.Event())) for _ in range(8)]
        await settle()
        assert dispatcher.grants.queue_depth == 6
        for task in tasks:
            task.cancel()
        await settle()
        assert dispatcher.grants.queue_depth == 0
        assert dispatcher.grants.free_slots("p") == 2
        assert dispatcher.admission.open_calls == 0
        assert dispatcher.admission.account("t").reserved == 0
        assert session.pending_images == 0

    run(test)


def test_an_image_cancelled_before_it_is_sent_is_never_queued() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await settle()
        task = asyncio.create_task(hold(session))
        await asyncio.sleep(0)  # submitted, not yet sent
        task.cancel()
        await settle()
        assert dispatcher.grants.queue_depth == 0

    run(test)


def test_a_call_that_finds_the_queue_full_is_refused() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        first = asyncio.create_task(hold(session))
        await settle()
        with pytest.raises(QueueFull):
            await hold(session)
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        await first

    run(test, max_queued=1)


def test_a_newcomer_takes_the_place_of_the_longest_backlogs_newest_call() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        async with (
            opened(session) as first,
            opened(session, images=ONE * 2) as newest,
            opened(session, tenant="newcomer") as call,
        ):
            with pytest.raises(Evicted):
                async with newest.slot(1):
                    pass
            assert dispatcher.grants.queue_depth == 2  # a call leaves as a whole
            newest.close()
            await dispatcher.report_replica(Heartbeat("p", "r", 2))
            async with first.slot(0), call.slot(0):
                pass
        await settle()
        assert dispatcher.admission.open_calls == 0
        assert dispatcher.admission.account("t").reserved == 0

    run(test, max_queued=3)


def test_a_call_is_admitted_as_a_whole() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        with pytest.raises(QueueFull):
            async with opened(session, images=ONE * 3):
                pass
        async with opened(session, images=ONE * 2) as call:
            await settle()
            assert dispatcher.grants.queue_depth == 2
            await dispatcher.report_replica(Heartbeat("p", "r", 2))
            async with call.slot(0) as one, call.slot(1) as other:
                assert one.lease != other.lease
        await settle()
        assert dispatcher.grants.free_slots("p") == 2

    run(test, max_queued=2)


def test_a_restarted_dispatcher_learns_waiting_and_running_images() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        done = asyncio.Event()
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        running = asyncio.create_task(hold(session, done))
        waiting = asyncio.create_task(hold(session, done))
        await settle()

        fresh = a_dispatcher("p")
        handle.break_off(fresh)
        await fresh.report_replica(Heartbeat("p", "r", 1))
        await settle()
        assert fresh.grants.queue_depth == 1  # the waiting image was submitted again
        assert fresh.grants.free_slots("p") == 0  # the running image keeps its slot
        assert fresh.admission.open_calls == 2
        assert fresh.admission.account("t").reserved == 2.0
        done.set()
        assert [await running, await waiting] == ["p", "p"]
        await settle()
        assert fresh.grants.free_slots("p") == 1
        assert fresh.admission.account("t").reserved == 0.0

    run(test)


def test_faults_of_all_ingresses_are_in_the_status_until_they_end() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        other = DispatchSession(handle, PROMPT)
        session.set_fault("store of a", "bucket b: NoSuchBucket")
        other.set_fault("store of c", "disk full")
        await settle()
        both = {"store of a": "bucket b: NoSuchBucket", "store of c": "disk full"}
        assert (await dispatcher.state()).faults == both
        status, _ = other.status()
        assert status
        assert status.faults == both  # each Ingress knows those of the others

        fresh = a_dispatcher("p")
        handle.break_off(fresh)
        await settle()
        assert (await fresh.state()).faults == both
        session.set_fault("store of a", "")
        await settle()
        assert (await fresh.state()).faults == {"store of c": "disk full"}
        fresh.end_session(other.name)
        assert (await fresh.state()).faults == {}

    run(test)


def test_a_further_attempt_goes_before_calls_that_came_later() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        order: list[str] = []

        queued = asyncio.Event()

        async def take(call: OpenCall, name: str) -> None:
            async with call.slot(0):
                order.append(name)
                if name == "second":
                    await queued.wait()

        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        async with opened(session, "1") as first:
            await take(first, "first")
            async with opened(session, "2") as second, opened(session, "3") as third:
                later = [
                    asyncio.create_task(take(call, name))
                    for call, name in ((second, "second"), (third, "third"))
                ]
                await settle()
                later.append(asyncio.create_task(take(first, "first again")))
                await settle()
                queued.set()
                await asyncio.gather(*later)
        assert order == ["first", "second", "first again", "third"]

    run(test)


def test_a_session_that_expired_is_opened_again() -> None:
    """A paused Ingress comes back, and the images that it waits for are granted after all."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        waiting = asyncio.create_task(hold(session))
        await settle()
        dispatcher.end_session(session.name)
        await settle()
        assert dispatcher.grants.queue_depth == 1
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        assert await waiting == "p"

    run(test)


def test_a_paused_dispatcher_reads_waiting_messages_before_sessions_expire() -> None:
    async def test(dispatcher: Dispatcher, _: DispatchSession, __: Handle) -> None:
        await settle()
        dispatcher.grants.open("silent", time.monotonic())
        time.sleep(0.4)  # noqa: ASYNC251 (the pause)
        await asyncio.sleep(0.02)
        assert dispatcher.grants.heard_from("silent", 0.0)
        await asyncio.sleep(0.1)
        assert not dispatcher.grants.heard_from("silent", 0.0)

    run(test, timing=replace(PROMPT, heartbeat_s=0.05, session_lease_s=0.2))


def test_a_dispatcher_that_is_always_late_still_does_its_periodic_work() -> None:
    async def test(dispatcher: Dispatcher, _: DispatchSession, __: Handle) -> None:
        decided: list[float] = []

        def decide(now: float, unix_s: float | None = None) -> Mapping[str, str]:
            decided.append(now)
            return {}

        async def busy() -> None:
            while dispatcher.grants.heard_from("silent", 0.0) or not decided:
                time.sleep(0.15)  # noqa: ASYNC251 (the event loop is busy)
                await asyncio.sleep(0)

        dispatcher.scaling.decide = decide  # type: ignore[method-assign]  # to count
        dispatcher.grants.open("silent", time.monotonic())
        await busy()

    run(test, timing=replace(PROMPT, heartbeat_s=0.05, session_lease_s=0.2, replica_lease_s=0.0))


def test_a_policy_that_fails_changes_nothing_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[float] = []

    def fails(now: float, unix_s: float | None = None) -> Mapping[str, str]:
        calls.append(now)
        raise ZeroDivisionError

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        dispatcher.grants.replica_lease_s = 60
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        await asyncio.sleep(0.1)
        before = await dispatcher.record_autoscaling_stats()
        dispatcher.scaling.decide = fails  # type: ignore[method-assign]  # the fault
        await asyncio.sleep(0.2)
        assert len(calls) > 1
        assert "autoscaling: no decision" in caplog.text
        assert await dispatcher.record_autoscaling_stats() == before
        await dispatcher.check_health()
        async with slot(session):
            pass

    run(test, timing=replace(PROMPT, heartbeat_s=0.05, replica_lease_s=0.0))


def test_a_restarted_dispatcher_grants_nothing_at_first() -> None:
    """Nothing is granted until every session had time to declare its running images."""

    async def main() -> None:
        dispatcher = a_dispatcher("p", timing=replace(PROMPT, recovery_s=0.2))
        session = DispatchSession(Handle(dispatcher), PROMPT)
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(5), slot(session):
            assert asyncio.get_running_loop().time() - began > 0.15

    asyncio.run(main())


def test_a_session_whose_tasks_have_ended_is_unhealthy() -> None:
    async def test(_: Dispatcher, __: DispatchSession, handle: Handle) -> None:
        before = asyncio.all_tasks()
        session = DispatchSession(handle, PROMPT)
        session.check()
        for task in asyncio.all_tasks() - before:
            task.cancel()
        await settle()
        with pytest.raises(RuntimeError):
            session.check()

    run(test)


def test_an_id_is_in_use_until_its_call_is_closed_whichever_ingress_has_it() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        other = DispatchSession(handle, PROMPT)
        await dispatcher.report_replica(Heartbeat("p", "r", 3))
        async with slot(session, "id"):
            for one in (session, other):
                with pytest.raises(RequestIdInUse):
                    async with slot(one, "id"):
                        pass
            async with slot(other, "id", tenant="other"):
                pass
        await settle()
        async with slot(other, "id"):
            pass

    run(test)


def test_an_image_that_no_node_can_run_is_refused_and_not_queued() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await settle()  # the nodes have been read
        elsewhere = (queued_image(pools=("elsewhere",)),)
        with pytest.raises(NoCapacity):
            async with slot(session, images=elsewhere):
                pass
        await dispatcher.report_replica(Heartbeat("elsewhere", "r", 1))
        async with slot(session, images=elsewhere):
            pass

    run(test)


def test_waiting_ends_when_the_last_node_goes() -> None:
    nodes = [Node("n", num_cpus=1)]

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        waiting = asyncio.create_task(hold(session))
        await settle()
        assert dispatcher.grants.queue_depth == 1
        nodes.clear()
        with pytest.raises(NoCapacity):
            await waiting
        state = await dispatcher.state()
        found = state.pools["p"]
        assert (found.replicas, found.placeable) == (0, False)

    run(test, nodes=nodes, timing=replace(PROMPT, nodes_s=0.02))


def test_resubmitted_calls_are_admitted_beyond_the_queue_limit() -> None:
    """A restarted Dispatcher with a full queue refuses new calls, but not those that waited."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        waiting = [asyncio.create_task(hold(session)) for _ in range(3)]
        await settle()
        fresh = a_dispatcher("p", max_queued=1)
        handle.break_off(fresh)
        await settle()
        assert fresh.grants.queue_depth == 3
        with pytest.raises(QueueFull):
            await hold(session)
        await fresh.report_replica(Heartbeat("p", "r", 3))
        assert await asyncio.gather(*waiting) == ["p"] * 3

    run(test)


def test_a_drained_dispatcher_refuses_calls_but_not_further_attempts() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        async with opened(session) as call:
            async with call.slot(0):
                await settle()
                assert await dispatcher.drain() == 2  # a call and its image
                with pytest.raises(Unavailable, match="shutting down"):
                    await hold(session)
            async with asyncio.timeout(1), call.slot(0, ("p",)) as again:
                assert again.lease.pool == "p"
            await settle()
            assert await dispatcher.drain() == 1  # generated, not yet sent
        await settle()
        assert await dispatcher.drain() == 0

    run(test)


def test_a_grant_without_a_waiting_call_is_given_back() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        await settle()
        handle.answering.clear()
        call = session.open("t", "id", ONE, 60, Client())
        await settle()
        assert dispatcher.grants.free_slots("p") == 0
        call.close()
        handle.answering.set()
        await settle()
        assert dispatcher.grants.free_slots("p") == 1

    run(test)


def test_a_grant_of_an_expired_session_does_not_count() -> None:
    """The answer with the grant is late: the slot has another image by then."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        other = DispatchSession(Handle(dispatcher), PROMPT)
        await settle()
        handle.answering.clear()
        call = session.open("t", "late", ONE, 60, Client())
        await settle()
        dispatcher.end_session(session.name)
        async with slot(other):
            await settle()  # the first session is open again
            handle.answering.set()
            await settle()
            (grant,) = call.grants.values()
            assert not grant.granted.done()
        await grant.granted
        call.close()

    run(test)


def test_the_more_generators_there_are_the_less_often_each_one_reports() -> None:
    timing = replace(PROMPT, heartbeat_s=1.0, heartbeats_per_s=2.0)

    async def test(dispatcher: Dispatcher, _: DispatchSession, __: Handle) -> None:
        replies = [await dispatcher.report_replica(Heartbeat("p", f"r{i}", 1)) for i in range(7)]
        assert replies[0] == HeartbeatReply(next_s=1.0)
        again = [await dispatcher.report_replica(Heartbeat("p", f"r{i}", 1)) for i in range(7)]
        assert {reply.next_s for reply in again} == {3.5}  # so 2 heartbeats are due each second
        ghost = Lease("gone", "i", "p", "r0")
        reply = await dispatcher.report_replica(Heartbeat("p", "r0", 1), [ghost])
        assert (reply.orphans, reply.next_s) == ((ghost,), 1.0)  # it is to be stopped soon

    run(test, timing=timing)


def test_a_call_that_outlasts_the_dispatcher_is_never_answered() -> None:
    async def test(dispatcher: Dispatcher, _: DispatchSession, __: Handle) -> None:
        call = asyncio.create_task(dispatcher.outlast())
        await settle()
        assert not call.done()
        call.cancel()

    run(test)


def test_a_generator_learns_which_leases_no_session_holds() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        beat = Heartbeat("p", "r", 1)
        await dispatcher.report_replica(beat)
        async with slot(session) as held:
            ghost = held.lease._replace(session="gone")
            reply = await dispatcher.report_replica(beat, [held.lease, ghost])
            assert reply.orphans == (ghost,)
        await settle()
        assert (await dispatcher.report_replica(beat, [held.lease])).orphans == (held.lease,)

    run(test)


def test_a_dispatcher_in_recovery_does_not_count_as_drained() -> None:
    async def main() -> None:
        dispatcher = a_dispatcher("p", timing=replace(PROMPT, recovery_s=0.1))
        assert await dispatcher.drain() == 1
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        assert await dispatcher.drain() == 1
        await asyncio.sleep(0.15)
        assert await dispatcher.drain() == 0

    asyncio.run(main())


def test_heartbeats_report_the_load_of_a_pool() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "a", 4, running_work_s=1.5, speed=1.25))
        await dispatcher.report_replica(Heartbeat("p", "b", 2, running_work_s=0.5, speed=0.5))
        assert (await dispatcher.state()).pools["p"]._asdict() == {
            "replicas": 2,
            "slots": 6,
            "running": 0,
            "running_work_s": 2.0,
            "speed": 1.75,
            "placeable": True,
            "least": 0,
            "wanted": 0,
            "reason": "",
        }

    run(test)


def test_a_watching_client_gets_its_positions() -> None:
    timing = replace(PROMPT, heartbeat_s=0.2)

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        positions: dict[str, list[int]] = {"b": [], "c": []}

        async def wait_for_slot(name: str) -> None:
            record = positions[name].append if name in positions else None
            images = (queued_image(report_position=record is not None),)
            async with opened(session, images=images) as call, call.slot(0, on_position=record):
                pass

        tasks = [asyncio.create_task(wait_for_slot("a"))]
        for name in "bc":
            await settle()
            tasks.append(asyncio.create_task(wait_for_slot(name)))
            await asyncio.sleep(2 * timing.positions_s)
        assert positions == {"b": [2], "c": [3]}
        tasks[0].cancel()
        await asyncio.sleep(2 * timing.heartbeat_s)
        assert positions == {"b": [2, 1], "c": [3, 2]}
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        await asyncio.gather(*tasks[1:])
        assert dispatcher.grants.positions() == []

    run(test, timing=timing)


def test_a_call_is_cancelled_at_its_own_ingress_and_by_its_own_tenant() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        other = DispatchSession(handle, PROMPT)
        runs, waits = Client(), Client()

        async def stay(at: DispatchSession, id: str, client: Client) -> None:
            async with slot(at, id, client=client):
                await asyncio.sleep(60)

        tasks = [asyncio.create_task(stay(session, "runs", runs))]
        await settle()
        tasks.append(asyncio.create_task(stay(other, "waits", waits)))
        await settle()
        assert not await state_of(session, "unknown", cancel=True)
        assert not await state_of(session, "runs", tenant="other", cancel=True)
        await settle()
        assert not runs.cancelled
        for id, client in (("waits", waits), ("runs", runs)):
            assert await state_of(session, id, cancel=True)
            await settle()
            assert client.cancelled
        for task in tasks:
            task.cancel()
        await settle()
        assert not await state_of(session, "runs", cancel=True)

    run(test)


def test_queries_for_one_id_share_one_message() -> None:
    async def test(_: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await settle()
        asked = [state_of(session, "unknown", cancel=True) for _ in range(200)]
        assert await asyncio.gather(*asked) == [None] * 200
        updates = [arguments[1] for method, arguments in handle.calls if method == "tell"]
        assert [len(update.queries) for update in updates if update.queries] == [1]
        assert await state_of(session, "unknown", cancel=True) is None  # asked anew

    run(test)


def test_a_message_of_the_dispatcher_alone_causes_no_update() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await settle()
        before = len(handle.calls)
        await dispatcher.drain()  # which is sent to every Ingress
        await settle()
        assert len(handle.calls) == before

    run(test)


def test_the_state_of_a_call_is_known_at_every_ingress() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        other = DispatchSession(handle, PROMPT)
        async with opened(session, "first", images=ONE * 2), opened(session, "second"):
            state = await state_of(other, "second")
            assert state
            assert state[:3] == (1, 0, 3)
            await dispatcher.report_replica(Heartbeat("p", "r", 1))
            state = await state_of(other, "first")
            assert state
            assert state[:3] == (1, 1, 1)
            assert state.age_s > 0
        await settle()
        assert await state_of(other, "first") is None

    run(test)


def test_a_cancellation_outlives_the_dispatcher() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await settle()
        client = Client()
        async with opened(session, "mine", client=client):
            handle.drop_messages()
            cancelling = asyncio.create_task(state_of(session, "mine", cancel=True))
            await settle()
            assert not cancelling.done()
            handle.break_off(a_dispatcher("p"))
            assert await cancelling
            assert client.cancelled

    run(test)


def test_an_ingress_knows_the_status_without_asking() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        assert session.status()[0] is None
        await settle()
        await dispatcher.report_replica(Heartbeat("p", "r", 3))
        await settle()
        before = len(handle.calls)
        status, age_s = session.status()
        assert status
        assert (status.pools["p"].slots, status.draining) == (3, False)
        assert 0 <= age_s < 5
        await dispatcher.drain()
        await settle()
        status, _ = session.status()
        assert status
        assert status.draining
        assert len(handle.calls) == before

    run(test)


def test_a_status_that_is_too_old_counts_as_unknown() -> None:
    async def test(_: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await settle()
        assert session.status()[0]
        handle.drop_messages()
        await settle()
        assert session.status()[0] is None

    run(test, timing=replace(PROMPT, session_lease_s=0.03, heartbeat_s=0.01))


# -- usage ----------------------------------------------------------------------------------------


def test_recorded_usage_is_on_disk(tmp_path: Path) -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        async with opened(session, images=ONE * 2) as call:
            assert dispatcher.admission.account("t").reserved == 2.0
            await call.record([usage(call, 0), usage(call, 1)])
            assert [r["image"] for r in usage_in(tmp_path)] == [0, 1]
            account = dispatcher.admission.account("t")
            assert (account.spent, account.reserved) == (2.0, 0.0)

    run(test, database=store_in(tmp_path))


@pytest.mark.parametrize("leader_returns", [True, False])
def test_a_call_that_follows_another_outlives_the_dispatcher(*, leader_returns: bool) -> None:
    """The second of two equal calls waits for the first one, also at the next Dispatcher."""
    timing = replace(PROMPT, recovery_s=0.1)

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        other_handle = Handle(dispatcher)
        other = DispatchSession(other_handle, timing)
        leader = session.open("t", "leader", ONE, 60, Client(), result_key="k")
        await leader.admitted()
        follower = other.open("t", "follower", ONE, 60, Client(), result_key="k")
        await follower.admitted()
        assert dispatcher.grants.queue_depth == 1
        fresh = a_dispatcher("p", timing=timing)
        waiting = asyncio.create_task(follower.leader_finished())
        other_handle.break_off(fresh)
        if leader_returns:
            handle.break_off(fresh)
            await asyncio.sleep(2 * timing.recovery_s)
            assert not waiting.done()
            session.finish("k")
        assert await waiting
        assert fresh.grants.queue_depth == leader_returns
        leader.close()
        follower.close()

    run(test, timing=timing)


def test_records_of_a_call_without_work_are_sent_with_it(tmp_path: Path) -> None:
    """A call whose images are there already costs one message to the Dispatcher."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await settle()
        handle.calls.clear()
        hit = usage_record("")._replace(work_s=0.0, outcome="hit")
        call = session.open("t", "id", (), 60, Client(), usages=[hit])
        await call.admitted()
        await call.recorded()
        assert [method for method, _ in handle.calls] == ["tell"]
        (record,) = usage_in(tmp_path)
        assert (record["call"], record["outcome"]) == (call.request.call_id, "hit")
        call.close()
        dispatcher.admission.draining = True
        refused = session.open("t", "other", (), 60, Client(), usages=[hit])
        with pytest.raises(Unavailable):
            await refused.admitted()
        refused.close()
        await settle()
        assert len(usage_in(tmp_path)) == 1

    run(test, database=store_in(tmp_path))


def test_records_sent_with_a_call_outlive_the_dispatcher(tmp_path: Path) -> None:
    """The Dispatcher dies after the write, and before the Ingress has heard of the admission."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await settle()
        handle.drop_messages()
        hit = usage_record("")._replace(work_s=0.0, outcome="hit")
        call = session.open("t", "id", (), 60, Client(), usages=[hit])
        await settle()
        assert len(usage_in(tmp_path)) == 1
        assert not call.decision.done()
        assert dispatcher.store
        dispatcher.store.close()  # like at the end of its process
        fresh = await store_opened(a_dispatcher("p", database=store_in(tmp_path)))
        handle.break_off(fresh)
        await call.admitted()
        await call.recorded()
        assert len(usage_in(tmp_path)) == 1
        assert fresh.store
        fresh.store.close()

    run(test, database=store_in(tmp_path))


def test_an_unconfirmed_record_is_sent_again_and_written_once(tmp_path: Path) -> None:
    """The Dispatcher dies between the write and its confirmation."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        async with opened(session) as call:
            handle.drop_messages()
            recording = asyncio.create_task(call.record([usage(call)]))
            await settle()
            assert len(usage_in(tmp_path)) == 1
            assert not recording.done()
            assert dispatcher.store
            dispatcher.store.close()  # like at the end of its process
            fresh = await store_opened(a_dispatcher("p", database=store_in(tmp_path)))
            assert fresh.admission.account("t").spent == 1.0
            handle.break_off(fresh)
            await recording
            assert len(usage_in(tmp_path)) == 1
            assert fresh.admission.account("t").spent == 1.0
            assert fresh.store
            fresh.store.close()

    run(test, database=store_in(tmp_path))


def test_usage_charged_by_another_dispatcher_counts(tmp_path: Path) -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        with closing(Database(**store_in(tmp_path))) as other:
            ledger = UsageLedger(other, time.time())
            ledger.append([usage_record("c", work_s=5.0)], time.time())
        async with opened(session, tenant="u") as call:
            await call.record([usage(call)._replace(tenant="u")])
        assert dispatcher.admission.account("t").spent == 5.0

    run(test, database=store_in(tmp_path))


def test_usage_that_cannot_be_written_is_written_later_and_new_calls_are_refused(
    tmp_path: Path,
) -> None:
    timing = replace(PROMPT, charge_retry_s=0.01)

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        async with opened(session) as call:
            with full_disk():
                recording = asyncio.create_task(call.record([usage(call)]))
                await asyncio.to_thread(wait_for, lambda: bool(dispatcher.metering.fault))
                assert "database" in (await dispatcher.state()).faults
                refused = session.open("t", "other", ONE, 60, Client())
                with pytest.raises(Unavailable, match="usage cannot be recorded"):
                    await refused.admitted()
                refused.close()
                assert not recording.done()
            await recording
        assert dispatcher.admission.account("t").spent == 1.0
        assert [record["work_s"] for record in usage_in(tmp_path)] == [1.0]
        assert (await dispatcher.state()).faults == {}
        async with opened(session) as call:
            await call.record([usage(call)])

    run(test, database=store_in(tmp_path), timing=timing)


def test_a_dispatcher_opens_a_database_that_comes_later(tmp_path: Path) -> None:
    """Until then calls are refused; afterwards they are admitted without a restart."""
    timing = replace(PROMPT, tenants_s=0.01)
    file = tmp_path / "later"
    file.write_text("not a folder")

    async def main() -> None:
        dispatcher = a_dispatcher("p", database=store_in(file), timing=timing)
        session = DispatchSession(Handle(dispatcher), timing)
        async with asyncio.timeout(5):
            await asyncio.to_thread(wait_for, lambda: bool(dispatcher.admission.database_fault))
            refused = session.open("t", "one", ONE, 60, Client())
            with pytest.raises(Unavailable, match="usage cannot be recorded"):
                await refused.admitted()
            refused.close()
            file.unlink()
            await store_opened(dispatcher)
            await settle()
            async with opened(session) as call:
                await call.record([usage(call)])
        assert dispatcher.store
        dispatcher.store.close()
        assert len(usage_in(file)) == 1

    asyncio.run(main())


def test_who_is_told_that_nothing_is_charged_is_not_charged_later(tmp_path: Path) -> None:
    """The disk is so slow that the answer is given before the record is written."""
    timing = replace(PROMPT, record_s=0.05)

    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        ledger = dispatcher.metering.ledger
        assert ledger
        async with opened(session) as call:
            with locked(tmp_path), pytest.raises(UsageUnrecorded):
                await call.record([usage(call)])
        await asyncio.to_thread(wait_for, lambda: len(usage_in(tmp_path)) == 2)
        records = usage_in(tmp_path)
        assert [record["outcome"] for record in records] == ["delivered", "reversed"]
        assert sum(record["work_s"] for record in records) == 0
        await settle()
        account = dispatcher.admission.account("t")
        assert (account.spent, account.reserved) == (0, 0)

    run(test, database=store_in(tmp_path), timing=timing)


def test_a_withdrawn_record_of_an_earlier_dispatcher_is_taken_back(tmp_path: Path) -> None:
    """The Dispatcher dies after it has written the record, and the next one comes too late."""
    timing = replace(PROMPT, record_s=0.2)

    async def test(_: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        async with opened(session) as call:
            handle.drop_messages()
            recording = asyncio.create_task(call.record([usage(call)]))
            await asyncio.to_thread(wait_for, lambda: len(usage_in(tmp_path)) == 1)
            handle.break_off(None)
            with pytest.raises(UsageUnrecorded):
                await recording
        handle.target = fresh = await store_opened(a_dispatcher("p", database=store_in(tmp_path)))
        await asyncio.to_thread(wait_for, lambda: len(usage_in(tmp_path)) == 2)
        assert sum(record["work_s"] for record in usage_in(tmp_path)) == 0
        assert fresh.store
        fresh.store.close()

    run(test, database=store_in(tmp_path), timing=timing)


def test_usage_written_before_the_turn_of_the_month_does_not_count_in_the_next(
    tmp_path: Path,
) -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        async with opened(session) as call:
            await call.record([usage(call)])
        assert dispatcher.admission.account("t").spent == 1.0
        dispatcher.metering.turn_month("9999-12")
        assert dispatcher.admission.account("t").spent == 0.0
        async with opened(session) as call:
            await call.record([usage(call)])
        assert dispatcher.admission.account("t").spent == 0.0

    run(test, database=store_in(tmp_path))


def test_a_cancelled_image_is_charged_the_steps_that_were_done(tmp_path: Path) -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        async with opened(session) as call:
            async with call.slot(0) as held:
                held.cancelled = usage(call)
            await settle()
            stopped = StoppedImage(held.lease, 3, 0.3)
            await dispatcher.report_replica(Heartbeat("p", "r", 1), [], [stopped])
            await settle()
        (record,) = usage_in(tmp_path)
        assert (record["outcome"], record["steps"]) == ("cancelled", 3)
        assert record["work_s"] == pytest.approx(0.3)
        await settle()
        account = dispatcher.admission.account("t")
        assert account.spent == pytest.approx(0.3)
        assert account.reserved == pytest.approx(0)

    run(test, database=store_in(tmp_path))


def test_an_image_that_was_stopped_before_its_first_step_costs_nothing(tmp_path: Path) -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        async with opened(session) as call, call.slot(0) as held:
            held.cancelled = usage(call)
        await settle()
        stopped = [StoppedImage(held.lease, 0, 0.0)]
        await dispatcher.report_replica(Heartbeat("p", "r", 1), [], stopped)
        await settle()
        assert usage_in(tmp_path) == []
        assert dispatcher.admission.account("t").reserved == 0

    run(test, database=store_in(tmp_path))


def test_images_generated_for_a_client_that_left_are_charged(tmp_path: Path) -> None:
    """One image of two is done, the other at its third step, when the client leaves."""

    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 2))
        client = Client()
        async with opened(session, images=ONE * 2, client=client) as call:
            async with call.slot(0) as done:
                done.took_s = 1.0
            call.generated.append(usage(call, 0))
            async with call.slot(1) as stopped:
                client.cancel()
                call.close()  # the call ends before its image does
                stopped.cancelled = usage(call, 1)
        await settle()
        assert dispatcher.admission.open_calls == 0
        report = StoppedImage(stopped.lease, 3, 0.3)
        await dispatcher.report_replica(Heartbeat("p", "r", 2), [], [report])
        await settle()
        records = {r["image"]: r for r in usage_in(tmp_path)}
        assert {r["outcome"] for r in records.values()} == {"cancelled"}
        assert (records[0]["steps"], records[1]["steps"]) == (10, 3)
        account = dispatcher.admission.account("t")
        assert account.spent == pytest.approx(1.3)
        assert account.reserved == pytest.approx(0)
        assert dispatcher.grants.free_slots("p") == 2

    run(test, database=store_in(tmp_path))


def test_a_slot_that_never_began_holds_no_budget() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        async with opened(session) as call, call.slot(0) as held:
            held.took_s, held.cancelled = 0.0, usage(call)
        await settle()
        assert dispatcher.admission.account("t").reserved == 0

    run(test)


def test_a_client_that_leaves_during_admission_leaves_nothing() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, _: Handle) -> None:
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        call = session.open("t", "id", ONE, 60, Client())
        await asyncio.wait([call.decision])
        call.close()  # the decision has arrived and was not read
        await settle()
        assert dispatcher.grants.free_slots("p") == 1
        assert dispatcher.admission.open_calls == 0

    run(test)


def test_a_decision_without_a_waiting_call_ends_the_call() -> None:
    async def test(dispatcher: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        await settle()
        handle.answering.clear()
        call = session.open("t", "id", (), 60, Client())
        await settle()
        assert dispatcher.admission.open_calls == 1
        call.close()
        handle.answering.set()
        await settle()
        assert dispatcher.admission.open_calls == 0

    run(test)


def test_a_restarted_dispatcher_admits_no_call_before_it_knows_the_reservations() -> None:
    async def main() -> None:
        dispatcher = a_dispatcher("p", timing=replace(PROMPT, recovery_s=0.2))
        session = DispatchSession(Handle(dispatcher), PROMPT)
        call = session.open("t", "id", ONE, 60, Client())
        await asyncio.sleep(0.1)
        assert not call.decision.done()
        gone = session.open("t", "gone", ONE, 60, Client())
        await settle()
        gone.close()
        async with asyncio.timeout(5):
            await call.admitted()
        await settle()
        assert dispatcher.admission.open_calls == 1

    asyncio.run(main())


def test_the_recovery_begins_when_the_dispatcher_can_be_reached() -> None:
    """Reading its files may take a new Dispatcher longer than the recovery."""

    async def main() -> None:
        dispatcher = a_dispatcher("p", timing=replace(PROMPT, recovery_s=0.6))
        time.sleep(0.7)  # noqa: ASYNC251 (the files)
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        session = DispatchSession(Handle(dispatcher), PROMPT)
        call = session.open("t", "id", ONE, 60, Client())
        await settle()
        assert not call.decision.done()  # another Ingress may use the only slot
        stream = dispatcher.session("other", [], [RunningImage("i", "c", "t", "p", replica="r")])
        await anext(stream)
        async with asyncio.timeout(5):
            await call.admitted()
        await settle()
        assert dispatcher.grants.free_slots("p") == 0
        assert dispatcher.grants.queue_depth == 1

    asyncio.run(main())


def test_time_in_recovery_counts_for_the_deadline() -> None:
    async def main() -> None:
        dispatcher = a_dispatcher("p", timing=replace(PROMPT, recovery_s=0.3))
        await dispatcher.report_replica(Heartbeat("p", "r", 1))
        session = DispatchSession(Handle(dispatcher), PROMPT)
        images = (queued_image(work_s=10.0),)
        call = session.open("t", "id", images, 10.2, Client())
        async with asyncio.timeout(5):
            assert (await call.decision).refusal == "deadline_unreachable"
        waited = session.open("t", "waited", images, 10.2, Client(), waited_s=1.0)
        async with asyncio.timeout(5):
            assert (await waited.decision).refusal == "deadline_unreachable"
        async with opened(session, images=images):
            pass

    asyncio.run(main())


def test_a_refused_call_sends_no_release() -> None:
    async def test(_: Dispatcher, session: DispatchSession, handle: Handle) -> None:
        async with opened(session):
            with pytest.raises(QueueFull):
                async with opened(session):
                    pass
            assert session.pending_images == 1
            await settle()
            updates = [args[1] for method, args in handle.calls if method == "tell"]
            assert [u for u in updates if u.releases or u.ended_calls] == []

    run(test, max_queued=1)


def test_recovery_ends_once_every_running_ingress_has_opened_its_session() -> None:
    async def main() -> None:
        timing = replace(PROMPT, recovery_s=60.0)
        dispatcher = a_dispatcher("p", ingresses=2, timing=timing)
        first = DispatchSession(Handle(dispatcher), timing)
        await dispatcher.report_replica(Heartbeat("p", "r", 2))
        waits = asyncio.create_task(hold(first))
        await settle()
        assert not dispatcher.recovery.over
        DispatchSession(Handle(dispatcher), timing)
        assert await waits == "p"
        assert dispatcher.recovery.over

    asyncio.run(main())
