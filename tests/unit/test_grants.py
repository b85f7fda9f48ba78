"""The queue's promises, as examples and for any sequence of events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.dispatch.grants import Grants
from serve.dispatch.messages import Heartbeat, Outcome, Running, Submission

FP8, FP16 = "m-fp8", "m-fp16"
AUTO = (FP8, FP16)


def grants(**pools: int) -> Grants:
    """One session "s" at time 0, and one replica per pool with so many slots."""
    book = Grants(max_queued=100, session_lease_s=10, replica_lease_s=5)
    book.open("s", 0)
    for pool, slots in pools.items():
        book.report_replica(Heartbeat(pool.replace("_", "-"), "r", slots), 0)
    return book


def ids(outcomes: list[Outcome]) -> list[tuple[str, str | None]]:
    return [(o.entry, o.pool) for o in outcomes]


def test_the_preferred_pool_goes_first_and_the_other_is_not_left_idle() -> None:
    book = grants(m_fp8=1, m_fp16=1)
    for entry in "abc":
        book.submit("s", Submission(entry, AUTO))
    assert ids(book.grant()) == [("a", FP8), ("b", FP16)]
    book.release("s", "b")
    assert ids(book.grant()) == [("c", FP16)]


def test_order_of_arrival_holds_across_lines() -> None:
    book = grants(m_fp8=0, m_fp16=0)
    book.submit("s", Submission("a", AUTO))
    book.submit("s", Submission("b", (FP16,)))
    book.submit("s", Submission("c", AUTO))
    assert book.grant() == []
    book.report_replica(Heartbeat(FP16, "r", 3), 0)
    assert [o.entry for o in book.grant()] == ["a", "b", "c"]


def test_an_entry_that_cannot_run_holds_up_nobody() -> None:
    book = grants(m_fp16=1)
    book.submit("s", Submission("a", (FP8,)))
    book.submit("s", Submission("b", (FP16,)))
    assert ids(book.grant()) == [("b", FP16)]
    assert book.queue_depth == 1


def test_no_grant_without_a_living_replica() -> None:
    book = grants(m_fp8=1)
    book.submit("s", Submission("a", AUTO))
    book.open("s", 6)
    book.submit("s", Submission("b", AUTO))
    book.expire(6)
    assert book.grant() == []
    assert book.replicas(FP8) == []


def test_a_silent_session_gives_everything_back() -> None:
    book = grants(m_fp8=1)
    book.submit("s", Submission("a", AUTO))
    book.submit("s", Submission("b", AUTO))
    assert ids(book.grant()) == [("a", FP8)]
    book.open("t", 11)
    book.submit("t", Submission("c", AUTO))
    book.report_replica(Heartbeat(FP8, "r", 1), 11)
    assert book.expire(11) == ["s"]
    assert ids(book.grant()) == [("c", FP8)]
    assert not book.heard_from("s", 11)


def test_running_work_declared_anew_keeps_its_slot() -> None:
    book = grants(m_fp8=1)
    book.open("t", 0, running=[Running("a", FP8)])
    book.submit("t", Submission("b", (FP8,)))
    assert book.grant() == []
    book.release("t", "a")
    assert ids(book.grant()) == [("b", FP8)]


def test_a_full_queue_refuses() -> None:
    book = Grants(max_queued=1, session_lease_s=10, replica_lease_s=5)
    book.open("s", 0)
    assert book.submit("s", Submission("a", AUTO)) is None
    assert book.submit("s", Submission("b", AUTO)) == Outcome("s", "b", None, "queue_full")
    book.release("s", "a")
    assert book.submit("s", Submission("c", AUTO)) is None


def test_a_request_id_belongs_to_one_session_while_it_is_used() -> None:
    book = grants(m_fp8=1)
    book.open("t", 0)
    assert book.submit("s", Submission("a", AUTO, "id")) is None
    assert book.submit("s", Submission("b", AUTO, "id")) is None
    refused = Outcome("t", "c", None, "request_id_in_use")
    assert book.submit("t", Submission("c", AUTO, "id")) == refused
    book.grant()
    book.release("s", "a")
    assert book.submit("t", Submission("c", AUTO, "id")) == refused
    book.close("s")
    assert book.submit("t", Submission("c", AUTO, "id")) is None


def test_declared_running_work_keeps_its_request_id() -> None:
    book = grants()
    book.open("t", 0, running=[Running("a", FP8, "id")])
    assert book.submit("s", Submission("b", AUTO, "id"))
    book.release("t", "a")
    assert book.submit("s", Submission("b", AUTO, "id")) is None


def test_what_was_accepted_before_is_not_refused_for_what_came_meanwhile() -> None:
    """Another attempt, or what a restarted Dispatcher is told again."""
    book = Grants(max_queued=1, session_lease_s=10, replica_lease_s=5)
    book.open("s", 0)
    book.open("t", 0)
    book.submit("s", Submission("a", AUTO, "id"))
    book.draining = True
    assert book.submit("t", Submission("b", AUTO, "id", accepted=True)) is None
    assert book.queue_depth == 2


def test_draining_refuses_what_is_new() -> None:
    book = grants(m_fp8=1)
    book.submit("s", Submission("a", AUTO))
    book.draining = True
    assert book.submit("s", Submission("b", AUTO)) == Outcome("s", "b", None, "draining")
    assert ids(book.grant()) == [("a", FP8)]


def test_nobody_waits_for_what_cannot_come() -> None:
    book = grants()
    assert book.submit("s", Submission("a", (FP8,))) is None  # nothing is known yet
    book.submit("s", Submission("b", AUTO))
    book.set_placeable({FP16})
    assert book.refuse() == [Outcome("s", "a", None, "no_capacity")]
    assert book.submit("s", Submission("c", (FP8,))) == Outcome("s", "c", None, "no_capacity")
    assert book.queue_depth == 1
    book.report_replica(Heartbeat(FP8, "r", 1), 0)  # a replica lives, whatever the nodes say
    assert book.submit("s", Submission("d", (FP8,))) is None


def test_positions_count_who_came_before_and_wants_the_same() -> None:
    book = grants()
    for entry, pools in (("a", (FP8,)), ("b", (FP16,)), ("c", AUTO), ("d", (FP8,))):
        book.submit("s", Submission(entry, pools, watched=entry != "b"))
    moved = {o.entry: o.position for o in book.positions()}
    assert moved == {"a": 1, "c": 3, "d": 3}  # b does not want what a and d want
    assert book.positions() == []  # nothing has changed
    book.release("s", "a")
    assert {o.entry: o.position for o in book.positions()} == {"c": 2, "d": 2}
    book.report_replica(Heartbeat(FP8, "r", 1), 0)
    assert ids(book.grant()) == [("c", FP8)]
    assert {o.entry: o.position for o in book.positions()} == {"d": 1}


def test_a_request_id_has_one_owner_until_its_last_entry_ends() -> None:
    book = grants(m_fp8=1)
    for entry in "ab":
        book.submit("s", Submission(entry, (FP8,), "id"))
    book.grant()
    for entry in "ab":
        assert book.owner("id") == "s"
        book.release("s", entry)
    assert book.owner("id") is None


class GrantsMachine(RuleBasedStateMachine):
    """Any order of submits, releases, deaths and restarts, against a plain model."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Grants(max_queued=50, session_lease_s=10, replica_lease_s=5)
        self.now = 0.0
        self.count = 0
        self.waiting: dict[str, tuple[str, tuple[str, ...]]] = {}  # in order of arrival
        self.running: dict[str, tuple[str, str]] = {}
        self.slots: dict[str, int] = {FP8: 0, FP16: 0}
        self.placeable = set(AUTO)
        self.request_ids: dict[str, str] = {}  # of every entry that was taken
        for session in "st":
            self.book.open(session, 0)

    @rule(
        session=st.sampled_from("st"),
        pools=st.sampled_from([AUTO, (FP8,), (FP16,), (FP16, FP8)]),
        request_id=st.sampled_from(["", "x", "y"]),
    )
    def submit(self, session: str, pools: tuple[str, ...], request_id: str) -> None:
        self.count += 1
        entry = str(self.count)
        refused = self.book.submit(session, Submission(entry, pools, request_id))
        live = {**self.waiting, **self.running}
        owners = {owner for e, (owner, _) in live.items() if self.request_ids[e] == request_id}
        if not self.possible(pools):
            assert refused == Outcome(session, entry, None, "no_capacity")
        elif request_id and owners - {session}:
            assert refused == Outcome(session, entry, None, "request_id_in_use")
        elif refused is None:
            self.waiting[entry] = session, pools
            self.request_ids[entry] = request_id
        else:
            assert len(self.waiting) == self.book.max_queued

    @rule(pools=st.sets(st.sampled_from(AUTO)))
    def nodes_change(self, pools: set[str]) -> None:
        self.placeable = pools
        self.book.set_placeable(pools)
        refused = {outcome.entry for outcome in self.book.refuse()}
        hopeless = {e for e, (_, pools) in self.waiting.items() if not self.possible(pools)}
        assert refused == hopeless
        for entry in hopeless:
            del self.waiting[entry]

    def possible(self, pools: tuple[str, ...]) -> bool:
        return any(pool in self.placeable or self.book.replicas(pool) for pool in pools)

    @rule(pool=st.sampled_from(AUTO), slots=st.integers(0, 3))
    def report(self, pool: str, slots: int) -> None:
        self.book.report_replica(Heartbeat(pool, "r", slots), self.now)
        self.slots[pool] = slots

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from([*self.waiting, *self.running]))
        session = (self.waiting.pop(entry, None) or self.running.pop(entry, None) or "")[0]
        self.book.release(session, entry)

    @rule(session=st.sampled_from("st"))
    def restart(self, session: str) -> None:
        self.book.close(session)
        self.book.open(session, self.now)
        self.waiting = {e: v for e, v in self.waiting.items() if v[0] != session}
        self.running = {e: v for e, v in self.running.items() if v[0] != session}

    @rule()
    def grant(self) -> None:
        for outcome in self.book.grant():
            assert outcome.pool is not None
            session, pools = self.waiting.pop(outcome.entry)
            assert session == outcome.session
            assert outcome.pool in pools
            # Whoever came earlier and still waits could not have used this slot.
            earlier = [p for e, (_, p) in self.waiting.items() if int(e) < int(outcome.entry)]
            assert all(outcome.pool not in pools for pools in earlier)
            self.running[outcome.entry] = session, outcome.pool
        for _, pools in self.waiting.values():  # nobody waits while an allowed pool has room
            assert all(self.free(pool) <= 0 for pool in pools)

    def free(self, pool: str) -> int:
        return self.slots[pool] - sum(p == pool for _, p in self.running.values())

    @invariant()
    def books_agree(self) -> None:
        assert self.book.queue_depth == len(self.waiting)
        for pool in AUTO:
            assert self.book.free_slots(pool) == self.free(pool)


TestGrantsMachine = GrantsMachine.TestCase
TestGrantsMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
