"""The guarantees of the queue: examples, and any sequence of events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.dispatch.grants import Grants
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
from serve.dispatch.settlement import UNSETTLED_S

from ..builders import queued_image, usage_record

FP8, FP16 = "m-fp8", "m-fp16"
AUTO = (FP8, FP16)
USAGE = usage_record()


def grants(**pools: int) -> Grants:
    """Grants with one session "s" at time 0 and one replica per pool with the given slots."""
    book = Grants(session_lease_s=10, replica_lease_s=5)
    book.set_pools(AUTO)
    book.open("s", 0)
    for pool, slots in pools.items():
        book.report_replica(Heartbeat(pool.replace("_", "-"), "r", slots), 0)
    return book


def waiting_image(
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
    submit(book, *(waiting_image(entry) for entry in "abc"))
    assert ids(book.grant(0.0)) == [("a", FP8), ("b", FP16)]
    release(book, "b")
    assert ids(book.grant(0.0)) == [("c", FP16)]


def test_a_further_attempt_may_prefer_the_other_pool() -> None:
    book = grants(m_fp8=1, m_fp16=1)
    submit(book, waiting_image("a", (FP16, FP8)))
    assert ids(book.grant(0.0)) == [("a", FP16)]


def test_a_preference_yields_to_an_image_that_has_no_other_pool() -> None:
    book = grants(m_fp8=1, m_fp16=1)
    submit(book, waiting_image("a", (FP16,)), waiting_image("b", (FP16, FP8)))
    assert sorted(ids(book.grant(0.0))) == [("a", FP16), ("b", FP8)]


def test_order_of_arrival_holds_within_a_tenant_whatever_the_pools() -> None:
    book = grants(m_fp8=0, m_fp16=0)
    submit(book, waiting_image("a"), waiting_image("b", (FP16,)), waiting_image("c"))
    assert book.grant(0.0) == []
    book.report_replica(Heartbeat(FP16, "r", 3), 0)
    assert [g.image_id for g in book.grant(0.0)] == ["a", "b", "c"]


def test_tenants_take_turns() -> None:
    book = grants(m_fp8=0)
    submit(book, *(waiting_image(entry) for entry in "abc"), tenant="flood")
    submit(book, waiting_image("x"), tenant="light")
    book.report_replica(Heartbeat(FP8, "r", 2), 0)
    assert [g.image_id for g in book.grant(0.0)] == ["a", "x"]


def test_the_measured_work_of_an_image_counts() -> None:
    """Tenants a and b are charged 1 s each; a took 3 s, so b gets the next two slots."""
    book = grants(m_fp8=2)
    submit(book, *(waiting_image(f"a{i}", (FP8,)) for i in range(3)), tenant="a")
    submit(book, *(waiting_image(f"b{i}", (FP8,)) for i in range(4)), tenant="b")
    assert [g.image_id for g in book.grant(0.0)] == ["a0", "b0"]
    book.release("s", Release("a0", 3.0), 0)
    book.release("s", Release("b0", 1.0), 0)
    assert [g.image_id for g in book.grant(0.0)] == ["b1", "b2"]


def test_a_stopped_image_is_settled_when_its_generator_reports_it() -> None:
    book = grants(m_fp8=1)
    submit(book, *(waiting_image(f"a{i}", (FP8,), 10.0) for i in range(2)), tenant="a")
    assert [g.image_id for g in book.grant(0.0)] == ["a0"]
    submit(book, *(waiting_image(f"b{i}", (FP8,), 2.0) for i in range(2)), tenant="b")
    assert book.release("s", Release("a0", None, USAGE), 0) == "awaited"
    stopped = StoppedImage(Lease("s", "a0", FP8, "r"), 1, 1.0)
    assert book.stopped(stopped, 1) == USAGE
    assert book.stopped(stopped, 1) is None
    assert [g.image_id for g in book.grant(0.0)] == ["b0"]
    release(book, "b0")
    assert [g.image_id for g in book.grant(0.0)] == ["a1"]  # a was charged 1 s, b 2 s


def test_a_generator_may_report_a_stopped_image_before_its_session_does() -> None:
    book = grants(m_fp8=1)
    submit(book, waiting_image("a", (FP8,)))
    book.grant(0.0)
    stopped = StoppedImage(Lease("s", "a", FP8, "r"), 1, 1.0)
    assert book.stopped(stopped, 0) is None
    assert book.release("s", Release("a", None, USAGE), 0) == stopped


def test_an_image_that_no_generator_settles_stays_as_charged() -> None:
    book = grants(m_fp8=1)
    submit(book, waiting_image("a", (FP8,)))
    book.grant(0.0)
    book.release("s", Release("a", None, USAGE), 0)
    assert book.give_up(UNSETTLED_S) == []
    assert book.give_up(UNSETTLED_S + 1) == [USAGE]
    assert book.stopped(StoppedImage(Lease("s", "a", FP8, "r"), 1, 1.0), 40) is None


def test_an_image_that_cannot_run_blocks_no_other() -> None:
    book = grants(m_fp16=1)
    submit(book, waiting_image("a", (FP8,)), waiting_image("b", (FP16,)))
    assert ids(book.grant(0.0)) == [("b", FP16)]
    assert book.queue_depth == 1


def test_no_grant_without_a_living_replica() -> None:
    book = grants(m_fp8=1)
    submit(book, waiting_image("a"))
    book.open("s", 6)
    submit(book, waiting_image("b"))
    book.expire_replicas(6)
    assert book.grant(0.0) == []
    assert book.replicas(FP8) == []


def test_a_silent_session_gives_everything_back() -> None:
    book = grants(m_fp8=1)
    submit(book, waiting_image("a"), waiting_image("b"))
    assert ids(book.grant(0.0)) == [("a", FP8)]
    book.open("t", 11)
    submit(book, waiting_image("c"), session="t")
    book.report_replica(Heartbeat(FP8, "r", 1), 11)
    assert book.expire(11) == ["s"]
    assert ids(book.grant(0.0)) == [("c", FP8)]
    assert not book.heard_from("s", 11)


def test_running_work_declared_anew_keeps_its_slot() -> None:
    book = grants(m_fp8=1)
    book.open("t", 0)
    book.declare("t", RunningImage("a", "call", "t", FP8, 1.0, "r"), 0)
    submit(book, waiting_image("b", (FP8,)), session="t")
    assert book.grant(0.0) == []
    release(book, "a", "t")
    assert ids(book.grant(0.0)) == [("b", FP8)]


def test_running_work_counts_once_however_often_its_session_is_opened() -> None:
    book = grants(m_fp8=2)
    for now in range(4):
        book.open("t", now)
        book.declare("t", RunningImage("a", "call", "a", FP8, 10.0, "r"), now)
    submit(book, waiting_image("a1", (FP8,)), tenant="a")
    submit(book, *(waiting_image(f"b{i}", (FP8,), 4.0) for i in range(4)), tenant="b")
    order = []
    while granted := ids(book.grant(0.0)):
        order += [image for image, _ in granted]
        book.release("s", Release(order[-1], 4.0 if order[-1][0] == "b" else 1.0), 5)
    assert order == ["b0", "b1", "b2", "a1", "b3"]


def test_a_further_attempt_keeps_the_arrival_of_the_first() -> None:
    book = grants(m_fp8=1)
    submit(book, waiting_image("a", (FP8,)))
    assert ids(book.grant(0.0)) == [("a", FP8)]
    for i in range(9):
        assert book.submit("s", waiting_image(f"b{i}", (FP8,)), "t", 1.0 + i) is None
    again = waiting_image("a again", (FP8,))._replace(waited_s=10.0)
    assert book.submit("s", again, "t", 10.0) is None
    release(book, "a")
    assert ids(book.grant(0.0)) == [("a again", FP8)]


def test_images_without_a_placeable_pool_are_refused() -> None:
    book = grants()
    submit(book, waiting_image("a", (FP8,)), waiting_image("b"))  # the nodes are not known yet
    book.set_placeable({FP16})
    assert book.refuse() == [Refused("s", "a")]
    refused = book.submit("s", waiting_image("c", (FP8,)), "t", 0.0)
    assert refused == Refused("s", "c")
    assert book.queue_depth == 1
    # A living replica counts even without such a node.
    book.report_replica(Heartbeat(FP8, "r", 1), 0)
    submit(book, waiting_image("d", (FP8,)))


def test_a_position_is_the_best_among_the_pools_of_an_image() -> None:
    book = grants()
    for entry, pools in (("a", (FP8,)), ("b", (FP16,)), ("c", AUTO), ("d", (FP8,))):
        submit(book, waiting_image(entry, pools, watched=entry != "b"))
    moved = {o.image_id: o.position for o in book.positions()}
    assert moved == {"a": 1, "c": 2, "d": 3}
    assert book.positions() == []  # nothing has changed
    release(book, "a")
    assert {o.image_id: o.position for o in book.positions()} == {"c": 1, "d": 2}
    book.report_replica(Heartbeat(FP8, "r", 1), 0)
    assert ids(book.grant(0.0)) == [("c", FP8)]
    assert {o.image_id: o.position for o in book.positions()} == {"d": 1}


def test_positions_follow_the_fair_order() -> None:
    book = grants()
    submit(book, *(waiting_image(str(i)) for i in range(9)), tenant="flood")
    submit(book, waiting_image("x", watched=True), tenant="light")
    assert [o.position for o in book.positions()] == [2]


def test_pools_come_and_go_while_images_wait_and_run() -> None:
    book = grants(m_fp8=1)
    submit(book, waiting_image("runs", (FP8,)), waiting_image("waits", (FP8,)))
    (running,) = book.grant(0.0)
    book.set_placeable(AUTO)
    # An Ingress may have heard of a new pool earlier.
    submit(book, waiting_image("new", ("new",)), waiting_image("both", (FP8, "new")))
    assert not book.grant(0.0)
    assert not book.refuse()
    book.set_pools(["new", FP16])
    assert [one.image_id for one in book.refuse()] == ["waits"]
    assert book.report_replica(Heartbeat("new", "r", 2), 1) == (True, True)
    assert book.report_replica(Heartbeat(FP8, "r", 2), 1) == (False, False)
    assert {one.image_id: one.pool for one in book.grant(0.0)} == {"new": "new", "both": "new"}
    assert book.release("s", Release(running.image_id, took_s=1.0), 2) is None
    assert book.submit("s", waiting_image("late", (FP8,)), "t", 2) == Refused("s", "late")
    submit(book, waiting_image("lost", ("unheard",)))
    book.heard_from("s", 11)
    book.expire(11)
    assert [one.image_id for one in book.refuse()] == ["lost"]
    book.set_pools([FP8])
    assert book.free_slots(FP8) == 0
    assert book.report_replica(Heartbeat(FP8, "r", 2), 3) == (True, True)
    assert book.free_slots(FP8) == 2


NAMES = "p", "q", "r"


class GrantsMachine(RuleBasedStateMachine):
    """Any order of submits, releases, deaths, refusals, restarts, drains and shrinking pools.

    The grants are compared with a plain model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.book = Grants(session_lease_s=1000, replica_lease_s=5)
        self.book.set_pools(AUTO)
        self.now = 0.0
        self.count = 0
        self.waiting: dict[str, tuple[str, tuple[str, ...], str]] = {}  # in order of arrival
        self.running: dict[str, tuple[str, str, str]] = {}  # session, pool and replica
        # For each replica: the time of its first heartbeat, and its last one.
        self.there: dict[str, dict[str, tuple[float, Heartbeat]]] = {FP8: {}, FP16: {}}
        self.avoided: dict[tuple[str, str], float] = {}  # until when, by pool and replica
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
        alone=st.booleans(),
    )
    def submit(
        self, session: str, pools: tuple[str, ...], tenant: str, work_s: float, alone: bool
    ) -> None:
        self.count += 1
        image = str(self.count)
        asked = waiting_image(image, pools, work_s)._replace(alone=alone)
        refused = self.book.submit(session, asked, tenant, self.now)
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
        unplaceable = {e for e, (_, pools, _) in self.waiting.items() if not self.possible(pools)}
        assert refused == unplaceable
        for entry in unplaceable:
            del self.waiting[entry]

    def possible(self, pools: tuple[str, ...]) -> bool:
        return any(pool in self.placeable or self.there[pool] for pool in pools)

    @rule(pool=st.sampled_from(AUTO), name=st.sampled_from(NAMES), slots=st.integers(0, 3))
    def report(self, pool: str, name: str, slots: int) -> None:
        heartbeat = Heartbeat(pool, name, slots, node=f"node-{name}")
        mine = (e for e, (_, p, r) in self.running.items() if (p, r) == (pool, name))
        leases = [Lease(self.running[entry][0], entry, pool, name) for entry in mine]
        first, _ = self.book.report_replica(heartbeat, self.now, leases)
        assert first == (name not in self.there[pool])
        if first:
            self.avoided.pop((pool, name), None)
        first_heard = self.there[pool].get(name, (self.now,))[0]
        self.there[pool][name] = first_heard, heartbeat

    @rule(pool=st.sampled_from(AUTO), replicas=st.integers(0, 3))
    def keep(self, pool: str, replicas: int) -> None:
        if replicas < self.book.staying(pool).replicas:
            self.kept[pool] = self.now, replicas
        self.book.keep(pool, replicas, self.now)
        self.now += 1

    @rule(names=st.sets(st.sampled_from(NAMES)))
    def drain(self, names: set[str]) -> None:
        self.draining = {f"node-{name}" for name in names}
        self.book.set_draining(frozenset(self.draining), self.now)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data(), took_s=st.none() | st.floats(0, 20))
    def release(self, data: st.DataObject, took_s: float | None) -> None:
        entry = data.draw(st.sampled_from([*self.waiting, *self.running]))
        session = (self.waiting.pop(entry, None) or self.running.pop(entry, None) or "")[0]
        self.book.release(session, Release(entry, took_s), self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), lost=st.booleans())
    def fail(self, data: st.DataObject, lost: bool) -> None:
        """A replica dies while it runs an image, or refuses the image."""
        entry = data.draw(st.sampled_from([*self.running]))
        session, pool, name = self.running.pop(entry)
        self.book.release(session, Release(entry, 0.0, lost=lost, refused=not lost), self.now)
        dead = {(d.heartbeat.pool, d.heartbeat.replica) for d in self.book.dead()}
        if lost:
            assert dead == ({(pool, name)} if name in self.there[pool] else set())
            self.there[pool].pop(name, None)
        else:
            assert not dead
            if name in self.there[pool]:
                self.avoided[pool, name] = self.now + 5

    @rule(session=st.sampled_from("st"))
    def restart(self, session: str) -> None:
        self.book.close(session, self.now)
        self.book.open(session, self.now)
        self.waiting = {e: v for e, v in self.waiting.items() if v[0] != session}
        self.running = {e: v for e, v in self.running.items() if v[0] != session}

    @rule()
    def grant(self) -> None:
        for granted in self.book.grant(self.now):
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
            self.running[granted.image_id] = session, granted.pool, granted.replica
            assert granted.replica in self.staying(granted.pool)
        for pool, there in self.there.items():  # no replica has more than its slots, apart from
            for name, (_, heartbeat) in there.items():  # those that have reported fewer since
                held = sum(one[1:] == (pool, name) for one in self.running.values())
                assert held <= max(heartbeat.slots, 3)
        for _, pools, _ in self.waiting.values():  # nothing waits while an allowed pool has room
            assert all(self.free(pool) <= 0 for pool in pools)

    def staying(self, pool: str) -> set[str]:
        """The replicas that may get images, as the book says; the next method checks them."""
        return {r.heartbeat.replica for r in self.book._pools[pool] if not r.leaving}

    @invariant()
    def leaving_replicas_are_known(self) -> None:
        for pool in AUTO:
            staying = self.staying(pool)
            left = {
                name: first_heard
                for name, (first_heard, heartbeat) in self.there[pool].items()
                if heartbeat.node not in self.draining
            }
            since, most = self.kept.get(pool, (-1.0, 99))
            old = {name for name, first_heard in left.items() if first_heard <= since}
            assert staying <= left.keys()
            assert left.keys() - old <= staying  # replicas that came later were wanted
            assert len(staying & old) == min(most, len(old))

    def free(self, pool: str) -> int:
        free = 0
        for name in self.staying(pool):
            held = sum(one[1:] == (pool, name) for one in self.running.values())
            if self.now >= self.avoided.get((pool, name), 0.0):
                free += max(self.there[pool][name][1].slots - held, 0)
        return free

    @invariant()
    def counts_agree(self) -> None:
        assert self.book.queue_depth == len(self.waiting)
        for pool in AUTO:
            assert self.book.staying(pool).replicas == len(self.staying(pool))
            assert self.book.running_in(pool) == sum(p == pool for _, p, _ in self.running.values())
            # A replica that was avoided is looked at again with its next heartbeat.
            assert self.book.free_slots(pool) <= self.free(pool)
            if not any(p == pool for p, _ in self.avoided):
                assert self.book.free_slots(pool) == self.free(pool)


TestGrantsMachine = GrantsMachine.TestCase
TestGrantsMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_a_tenants_requests_come_before_its_jobs_and_other_tenants_take_turns() -> None:
    book = grants(m_fp8=1)
    submit(book, waiting_image("running"))
    book.grant(0.0)
    for image in ("job-1", "job-2"):
        assert book.submit("s", waiting_image(image, (FP8,)), "t", 0.0, of_job=True) is None
    submit(book, waiting_image("late", (FP8,)))
    submit(book, waiting_image("other", (FP8,)), tenant="u")
    assert book.waiting_jobs("t") == (2, 2.0)
    assert book.waiting_requests("t") == (1, 1.0)
    order = []
    last = "running"
    for _ in range(4):
        release(book, last)
        ((last, _),) = ids(book.grant(0.0))
        order.append(last)
    assert order.index("late") < order.index("job-1") < order.index("job-2")
    assert order.index("other") < order.index("job-1")
    assert book.waiting_jobs("t") == (0, 0.0)


def test_batches_leave_free_slots_to_others() -> None:
    book = grants(m_fp8=3)
    book.kept_from_batches = 2
    for image in ("a", "b"):
        submit(book, waiting_image(image, (FP8,)), tenant="t/batch")
    assert ids(book.grant(0.0)) == [("a", FP8)]
    submit(book, waiting_image("request", (FP8,)))
    assert ids(book.grant(0.0)) == [("request", FP8)]
    assert book.evict(1, newcomer="u")[0][0] == "t"  # the tenant, not the name of its queue
