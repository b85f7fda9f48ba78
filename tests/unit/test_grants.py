"""The queue's promises, as examples and for any sequence of events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.dispatch.grants import UNSETTLED_S, Grants
from serve.dispatch.protocol import (
    Granted,
    Heartbeat,
    Lease,
    QueuedImage,
    Refused,
    Release,
    RunningImage,
    StoppedImage,
)

from ..builders import queued_image, usage_record

FP8, FP16 = "m-fp8", "m-fp16"
AUTO = (FP8, FP16)
USAGE = usage_record()


def grants(**pools: int) -> Grants:
    """One session "s" at time 0, and one replica per pool with so many slots."""
    book = Grants(AUTO, session_lease_s=10, replica_lease_s=5)
    book.open("s", 0)
    for pool, slots in pools.items():
        book.report_replica(Heartbeat(pool.replace("_", "-"), "r", slots), 0)
    return book


def asked(
    image: str, pools: tuple[str, ...] = AUTO, work_s: float = 1.0, watched: bool = False
) -> QueuedImage:
    return queued_image(image, pools, work_s, report_position=watched)


def submit(book: Grants, *images: QueuedImage, tenant: str = "t", session: str = "s") -> None:
    for image in images:
        assert book.submit(session, image, tenant, 0.0) is None


def release(book: Grants, image: str, session: str = "s") -> None:
    book.release(session, Release(image, 1.0), 0)


def ids(granted: list[Granted]) -> list[tuple[str, str]]:
    return [(g.image_id, g.pool) for g in granted]


def test_the_preferred_pool_goes_first_and_the_other_is_not_left_idle() -> None:
    book = grants(m_fp8=1, m_fp16=1)
    submit(book, *(asked(entry) for entry in "abc"))
    assert ids(book.grant()) == [("a", FP8), ("b", FP16)]
    release(book, "b")
    assert ids(book.grant()) == [("c", FP16)]


def test_a_further_attempt_may_prefer_the_other_pool() -> None:
    book = grants(m_fp8=1, m_fp16=1)
    submit(book, asked("a", (FP16, FP8)))
    assert ids(book.grant()) == [("a", FP16)]


def test_but_not_at_the_expense_of_one_that_has_no_other() -> None:
    book = grants(m_fp8=1, m_fp16=1)
    submit(book, asked("a", (FP16,)), asked("b", (FP16, FP8)))
    assert sorted(ids(book.grant())) == [("a", FP16), ("b", FP8)]


def test_order_of_arrival_holds_within_a_tenant_whatever_the_pools() -> None:
    book = grants(m_fp8=0, m_fp16=0)
    submit(book, asked("a"), asked("b", (FP16,)), asked("c"))
    assert book.grant() == []
    book.report_replica(Heartbeat(FP16, "r", 3), 0)
    assert [g.image_id for g in book.grant()] == ["a", "b", "c"]


def test_tenants_take_turns() -> None:
    book = grants(m_fp8=0)
    submit(book, *(asked(entry) for entry in "abc"), tenant="flood")
    submit(book, asked("x"), tenant="light")
    book.report_replica(Heartbeat(FP8, "r", 2), 0)
    assert [g.image_id for g in book.grant()] == ["a", "x"]


def test_what_an_image_took_in_truth_counts() -> None:
    """a and b are charged 1 each; a took 3, so b has two more turns."""
    book = grants(m_fp8=2)
    submit(book, *(asked(f"a{i}", (FP8,)) for i in range(3)), tenant="a")
    submit(book, *(asked(f"b{i}", (FP8,)) for i in range(4)), tenant="b")
    assert [g.image_id for g in book.grant()] == ["a0", "b0"]
    book.release("s", Release("a0", 3.0), 0)
    book.release("s", Release("b0", 1.0), 0)
    assert [g.image_id for g in book.grant()] == ["b1", "b2"]


def test_an_image_that_was_stopped_is_settled_when_its_generator_has_said_so() -> None:
    book = grants(m_fp8=1)
    submit(book, *(asked(f"a{i}", (FP8,), 10.0) for i in range(2)), tenant="a")
    submit(book, *(asked(f"b{i}", (FP8,), 2.0) for i in range(2)), tenant="b")
    assert [g.image_id for g in book.grant()] == ["a0"]
    assert book.release("s", Release("a0", None, USAGE), 0) == "awaited"
    said = StoppedImage(Lease("s", "a0", FP8), 1, 1.0)
    assert book.stopped(said, 1) == USAGE
    assert book.stopped(said, 1) is None
    assert [g.image_id for g in book.grant()] == ["b0"]
    release(book, "b0")
    assert [g.image_id for g in book.grant()] == ["a1"]  # it was charged 1, b 2


def test_a_generator_may_say_so_before_its_session_does() -> None:
    book = grants(m_fp8=1)
    submit(book, asked("a", (FP8,)))
    book.grant()
    said = StoppedImage(Lease("s", "a", FP8), 1, 1.0)
    assert book.stopped(said, 0) is None
    assert book.release("s", Release("a", None, USAGE), 0) == said


def test_what_no_generator_has_settled_stays_as_charged_after_a_while() -> None:
    book = grants(m_fp8=1)
    submit(book, asked("a", (FP8,)))
    book.grant()
    book.release("s", Release("a", None, USAGE), 0)
    assert book.give_up(UNSETTLED_S) == []
    assert book.give_up(UNSETTLED_S + 1) == [USAGE]
    assert book.stopped(StoppedImage(Lease("s", "a", FP8), 1, 1.0), 40) is None


def test_an_entry_that_cannot_run_holds_up_nobody() -> None:
    book = grants(m_fp16=1)
    submit(book, asked("a", (FP8,)), asked("b", (FP16,)))
    assert ids(book.grant()) == [("b", FP16)]
    assert book.queue_depth == 1


def test_no_grant_without_a_living_replica() -> None:
    book = grants(m_fp8=1)
    submit(book, asked("a"))
    book.open("s", 6)
    submit(book, asked("b"))
    book.expire(6)
    assert book.grant() == []
    assert book.replicas(FP8) == []


def test_a_silent_session_gives_everything_back() -> None:
    book = grants(m_fp8=1)
    submit(book, asked("a"), asked("b"))
    assert ids(book.grant()) == [("a", FP8)]
    book.open("t", 11)
    submit(book, asked("c"), session="t")
    book.report_replica(Heartbeat(FP8, "r", 1), 11)
    assert book.expire(11) == ["s"]
    assert ids(book.grant()) == [("c", FP8)]
    assert not book.heard_from("s", 11)


def test_running_work_declared_anew_keeps_its_slot() -> None:
    book = grants(m_fp8=1)
    book.open("t", 0)
    book.declare("t", RunningImage("a", "call", "t", FP8, 1.0))
    submit(book, asked("b", (FP8,)), session="t")
    assert book.grant() == []
    release(book, "a", "t")
    assert ids(book.grant()) == [("b", FP8)]


def test_nobody_waits_for_what_cannot_come() -> None:
    book = grants()
    submit(book, asked("a", (FP8,)), asked("b"))  # nothing is known yet
    book.set_placeable({FP16})
    assert book.refuse() == [Refused("s", "a")]
    refused = book.submit("s", asked("c", (FP8,)), "t", 0.0)
    assert refused == Refused("s", "c")
    assert book.queue_depth == 1
    book.report_replica(Heartbeat(FP8, "r", 1), 0)  # a replica lives, whatever the nodes say
    submit(book, asked("d", (FP8,)))


def test_positions_are_where_one_comes_first() -> None:
    book = grants()
    for entry, pools in (("a", (FP8,)), ("b", (FP16,)), ("c", AUTO), ("d", (FP8,))):
        submit(book, asked(entry, pools, watched=entry != "b"))
    moved = {o.image_id: o.position for o in book.positions()}
    assert moved == {"a": 1, "c": 2, "d": 3}
    assert book.positions() == []  # nothing has changed
    release(book, "a")
    assert {o.image_id: o.position for o in book.positions()} == {"c": 1, "d": 2}
    book.report_replica(Heartbeat(FP8, "r", 1), 0)
    assert ids(book.grant()) == [("c", FP8)]
    assert {o.image_id: o.position for o in book.positions()} == {"d": 1}


def test_positions_are_by_fairness() -> None:
    book = grants()
    submit(book, *(asked(str(i)) for i in range(9)), tenant="flood")
    submit(book, asked("x", watched=True), tenant="light")
    assert [o.position for o in book.positions()] == [2]


class GrantsMachine(RuleBasedStateMachine):
    """Any order of submits, releases, deaths, restarts, drains and shrinking pools, against a plain
    model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.book = Grants(AUTO, session_lease_s=10, replica_lease_s=5)
        self.now = 0.0
        self.count = 0
        self.waiting: dict[str, tuple[str, tuple[str, ...], str]] = {}  # in order of arrival
        self.running: dict[str, tuple[str, str]] = {}
        # Of each pool's replicas: when first heard, and what they said and draw.
        self.there: dict[str, dict[str, tuple[float, Heartbeat, set[str]]]] = {FP8: {}, FP16: {}}
        self.kept: dict[str, tuple[float, int]] = {}
        self.draining: set[str] = set()
        self.placeable = set(AUTO)
        for session in "st":
            self.book.open(session, 0)

    @initialize()
    def begin(self) -> None:
        for pool in AUTO:
            for name in "pq":
                self.report(pool, name, 2)

    @rule(
        session=st.sampled_from("st"),
        pools=st.sampled_from([AUTO, (FP8,), (FP16,), (FP16, FP8)]),
        tenant=st.sampled_from("xyz"),
        work_s=st.floats(0.1, 10),
    )
    def submit(self, session: str, pools: tuple[str, ...], tenant: str, work_s: float) -> None:
        self.count += 1
        image = str(self.count)
        refused = self.book.submit(session, asked(image, pools, work_s), tenant, 0.0)
        if not self.possible(pools):
            assert refused == Refused(session, image)
        else:
            assert refused is None
            self.waiting[image] = session, pools, tenant

    @rule(pools=st.sets(st.sampled_from(AUTO)))
    def nodes_change(self, pools: set[str]) -> None:
        self.placeable = pools
        self.book.set_placeable(pools)
        refused = {event.image_id for event in self.book.refuse()}
        hopeless = {e for e, (_, pools, _) in self.waiting.items() if not self.possible(pools)}
        assert refused == hopeless
        for entry in hopeless:
            del self.waiting[entry]

    def possible(self, pools: tuple[str, ...]) -> bool:
        return any(pool in self.placeable or self.book.replicas(pool) for pool in pools)

    @rule(
        pool=st.sampled_from(AUTO),
        name=st.sampled_from(["p", "q", "r"]),
        slots=st.integers(0, 3),
    )
    def report(self, pool: str, name: str, slots: int) -> None:
        others = {e for r, (_, _, drawn) in self.there[pool].items() if r != name for e in drawn}
        mine = [e for e, (_, p) in self.running.items() if p == pool and e not in others]
        drawn = set(mine[:slots])
        said = Heartbeat(pool, name, slots, node=f"node-{name}")
        leases = [Lease(self.running[entry][0], entry, pool) for entry in sorted(drawn)]
        self.book.report_replica(said, self.now, leases)
        first_heard = self.there[pool].get(name, (self.now,))[0]
        self.there[pool][name] = first_heard, said, drawn

    @rule(pool=st.sampled_from(AUTO), replicas=st.integers(0, 3))
    def keep(self, pool: str, replicas: int) -> None:
        if replicas < len(self.book.staying(pool)):
            self.kept[pool] = self.now, replicas
        self.book.keep(pool, replicas, self.now)
        self.now += 1

    @rule(names=st.sets(st.sampled_from(["p", "q", "r"])))
    def drain(self, names: set[str]) -> None:
        self.draining = {f"node-{name}" for name in names}
        self.book.draining = frozenset(self.draining)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data(), took_s=st.none() | st.floats(0, 20))
    def release(self, data: st.DataObject, took_s: float | None) -> None:
        entry = data.draw(st.sampled_from([*self.waiting, *self.running]))
        session = (self.waiting.pop(entry, None) or self.running.pop(entry, None) or "")[0]
        self.book.release(session, Release(entry, took_s), self.now)

    @rule(session=st.sampled_from("st"))
    def restart(self, session: str) -> None:
        self.book.close(session)
        self.book.open(session, self.now)
        self.waiting = {e: v for e, v in self.waiting.items() if v[0] != session}
        self.running = {e: v for e, v in self.running.items() if v[0] != session}

    @rule()
    def grant(self) -> None:
        for granted in self.book.grant():
            session, pools, tenant = self.waiting.pop(granted.image_id)
            assert session == granted.session
            assert granted.pool in pools
            # An earlier image of the tenant that still waits could not have used this slot.
            earlier = [
                pools
                for image, (_, pools, other) in self.waiting.items()
                if other == tenant and int(image) < int(granted.image_id)
            ]
            assert all(granted.pool not in pools for pools in earlier)
            self.running[granted.image_id] = session, granted.pool
        for _, pools, _ in self.waiting.values():  # nothing waits while an allowed pool has room
            assert all(self.free(pool) <= 0 for pool in pools)

    def free(self, pool: str) -> int:
        staying = {said.replica for said in self.book.staying(pool)}
        free = -sum(p == pool for _, p in self.running.values())
        for name, (_, said, drawn) in self.there[pool].items():
            free += said.slots if name in staying else len(drawn & self.running.keys())
        return free

    @invariant()
    def who_leaves_is_told_apart(self) -> None:
        for pool in AUTO:
            staying = {said.replica for said in self.book.staying(pool)}
            left = {
                name: first_heard
                for name, (first_heard, said, _) in self.there[pool].items()
                if said.node not in self.draining
            }
            since, most = self.kept.get(pool, (-1.0, 0))
            old = {name for name, first_heard in left.items() if first_heard <= since}
            assert staying <= left.keys()
            assert left.keys() - old <= staying  # who came later was wanted
            assert len(staying & old) == min(most, len(old))

    @invariant()
    def books_agree(self) -> None:
        assert self.book.queue_depth == len(self.waiting)
        for pool in AUTO:
            assert self.book.free_slots(pool) == self.free(pool)


TestGrantsMachine = GrantsMachine.TestCase
TestGrantsMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
