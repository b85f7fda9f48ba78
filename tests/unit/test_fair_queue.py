"""The fair queue between tenants: examples, a simulation, and any sequence of events."""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.dispatch.fair_queue import FairQueue

P, Q = "p", "q"


@dataclass(eq=False)
class Item:
    tenant: str
    work_s: float
    pools: tuple[str, ...]
    label: str = ""
    since: float = 0.0
    number: int = 0
    late_at: float = math.inf
    late: bool = False
    last: bool = False


@dataclass(frozen=True)
class Weights:
    """The weights of these tenants, and 1 for all others."""

    by_name: Mapping[str, float]

    def __call__(self, tenant: str) -> float:
        return self.by_name.get(tenant, 1.0)


def item(tenant: str, work_s: float = 1.0, pools: tuple[str, ...] = (P,), label: str = "") -> Item:
    return Item(tenant, work_s, pools, label)


def filled(*items: Item, **weights: float) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue()
    queue.weight = Weights(weights)
    for one in items:
        queue.add(one)
    return queue


def served(queue: FairQueue[Item], times: int, pool: str = P) -> str:
    """Serve `times` items and return their tenants, one letter each."""
    found = ""
    for _ in range(times):
        first = queue.first(pool, 0.0)
        assert first
        queue.take(first, pool)
        found += first.tenant
    return found


def test_tenants_take_turns_and_each_is_served_in_order() -> None:
    queue = filled(*(item("a", label=str(i)) for i in range(4)), item("b"), item("b"))
    labels = []
    for _ in range(6):
        first = queue.first(P, 0.0)
        assert first
        queue.take(first, P)
        labels.append(first.tenant + first.label)
    assert labels == ["a0", "b", "a1", "b", "a2", "a3"]
    assert queue.first(P, 0.0) is None
    assert len(queue) == 0


def test_weights_and_work_count() -> None:
    queue = filled(*(item("a") for _ in range(9)), *(item("b") for _ in range(9)), b=2.0)
    assert sorted(served(queue, 9)) == sorted("aaabbbbbb")
    queue = filled(*(item("a", 3.0) for _ in range(9)), *(item("b") for _ in range(9)))
    assert sorted(served(queue, 8)) == sorted("aabbbbbb")


def test_a_returning_tenant_is_next_but_has_no_credit() -> None:
    queue = filled(*(item("a") for _ in range(99)))
    served(queue, 50)
    for _ in range(9):
        queue.add(item("b"))
    assert served(queue, 1) == "b"
    assert served(queue, 8).count("b") == 4


def test_past_work_is_forgotten_when_the_queue_empties() -> None:
    queue = filled(item("a", 100.0))
    served(queue, 1)
    queue.settle("a", P, 0.0)
    queue.add(item("a"))
    queue.add(item("b"))
    assert served(queue, 2) == "ba"  # a was just served, b was not
    queue.add(item("c"))
    queue.add(item("a"))
    assert served(queue, 2) == "ca"


def test_the_true_work_corrects_the_clock() -> None:
    """Tenant a predicts 1 s and takes 3 s; the shares follow the time taken."""
    queue = filled(*(item(tenant) for tenant in "ab" for _ in range(40)))
    took = {"a": 0.0, "b": 0.0}
    for _ in range(40):
        first = queue.first(P, 0.0)
        assert first
        queue.take(first, P)
        truth = 3.0 if first.tenant == "a" else 1.0
        queue.settle(first.tenant, P, truth - 1.0)
        took[first.tenant] += truth
    assert abs(took["a"] - took["b"]) <= 3.0


def test_work_that_never_ran_is_credited_back() -> None:
    queue = filled(*(item(tenant) for tenant in "ab" for _ in range(4)))
    assert served(queue, 1) == "a"
    queue.settle("a", P, -1.0)
    assert served(queue, 1) == "a"


def test_each_pool_is_shared_by_itself() -> None:
    """Tenant b was served in p, which gives c no advantage in q, where both wait."""
    queue = filled(*(item("b", pools=(P, Q)) for _ in range(20)))
    served(queue, 10)
    for _ in range(6):
        queue.add(item("c", pools=(Q,)))
    assert served(queue, 8, Q).count("c") == 4


def test_an_item_of_several_pools_is_served_once() -> None:
    queue = filled(item("a", pools=(P, Q)), item("b", pools=(Q,)))
    assert served(queue, 1) == "a"
    assert served(queue, 1, Q) == "b"
    assert queue.first(P, 0.0) is None
    assert queue.first(Q, 0.0) is None


def test_order_is_the_order_in_which_items_would_be_served() -> None:
    queue = filled(*(item(tenant) for tenant in "aaabbc"), b=2.0)
    expected = "".join(i.tenant for i in queue.order(P))
    assert served(queue, 6) == expected


def test_backlogs_are_summed_by_tenant_and_pools() -> None:
    queue = filled(item("a", 2.0, (P, Q)), item("a", 1.0, (Q,)), item("b", 4.0))
    assert queue.backlogs((P, Q)) == {"a": 3.0, "b": 4.0}
    assert queue.backlogs((P,)) == {"a": 2.0, "b": 4.0}
    assert queue.waiting("a") == (2, 3.0)
    assert queue.waiting("c") == (0, 0.0)


@given(
    weights=st.lists(st.floats(0.25, 8), min_size=2, max_size=5),
    works=st.lists(st.floats(0.1, 10), min_size=5, max_size=50),
)
def test_backlogged_tenants_never_drift_apart(weights: list[float], works: list[float]) -> None:
    """The served work per weight of two tenants differs by at most the largest item per weight."""
    names = "abcde"[: len(weights)]
    queue = filled(**dict(zip(names, weights, strict=True)))
    for tenant in names:
        for i, work in enumerate(works):
            queue.add(item(tenant, work * (1 + (i + ord(tenant)) % 3)))
    got = dict.fromkeys(names, 0.0)
    largest = {t: max(i.work_s for i in queue if i.tenant == t) / queue.weight(t) for t in names}
    while all(queue.waiting(tenant)[0] for tenant in names):
        first = queue.first(P, 0.0)
        assert first
        queue.take(first, P)
        got[first.tenant] += first.work_s / queue.weight(first.tenant)
        for one, other in combinations(names, 2):
            assert abs(got[one] - got[other]) <= max(largest[one], largest[other]) + 1e-6


def test_a_flood_delays_only_its_own_tenant() -> None:
    """With 8 slots, one tenant asks for ten times the capacity and nine for half of their share."""

    def latencies(flood: bool) -> dict[str, list[float]]:
        rng = random.Random(4)
        queue: FairQueue[Item] = FairQueue()
        rates = {f"light{i}": 0.4 for i in range(9)} | ({"flood": 80.0} if flood else {})
        arrivals = sorted(
            (t, tenant) for tenant, rate in rates.items() for t in poisson(rng, rate, until=200.0)
        )
        found: dict[str, list[float]] = {tenant: [] for tenant in rates}
        free_at = [0.0] * 8
        now = 0.0
        while arrivals or len(queue):
            now = max(now, min(free_at))
            if not len(queue):
                now = max(now, arrivals[0][0])
            while arrivals and arrivals[0][0] <= now:
                came, tenant = arrivals.pop(0)
                queue.add(Item(tenant, 1.0, (P,), since=came))
            slot = free_at.index(min(free_at))
            if (first := queue.first(P, 0.0)) is None:
                continue
            queue.take(first, P)
            queue.settle(first.tenant, P, 0.0)
            took = rng.uniform(0.5, 1.5)
            found[first.tenant].append(now - first.since + took)
            free_at[slot] = now + took
            if now > 200.0:
                break
        return found

    def poisson(rng: random.Random, rate: float, until: float) -> list[float]:
        times, now = [], rng.expovariate(rate)
        while now < until:
            times.append(now)
            now += rng.expovariate(rate)
        return times

    calm, flooded = latencies(False), latencies(True)

    def p99(found: dict[str, list[float]]) -> float:
        light = sorted(took for tenant in found if tenant != "flood" for took in found[tenant])
        return light[int(0.99 * len(light))]

    assert p99(flooded) < 2 * p99(calm)
    # The flood gets the capacity that the others leave.
    assert len(flooded["flood"]) > 0.4 * 8 * 200


def test_an_item_that_arrived_earlier_goes_before_its_tenants_later_ones() -> None:
    queue = filled(*(Item("a", 1.0, (P,), label, since) for label, since in [("x", 2), ("z", 4)]))
    queue.add(Item("a", 1.0, (P,), "y", since=3))
    queue.add(Item("a", 1.0, (P,), "w", since=1))
    order = []
    while first := queue.first(P, 0.0):
        order.append(first.label)
        queue.take(first, P)
    assert order == ["w", "x", "y", "z"]


def test_items_that_come_in_any_order_are_served_by_arrival_at_little_cost() -> None:
    """After a restart of the Dispatcher, one Ingress after the other reports what waits."""

    def seconds(arrivals: list[float]) -> float:
        began = time.thread_time()  # other processes do not count
        queue = filled(*(Item("a", 1.0, (P,), since=since) for since in arrivals))
        found = []
        while first := queue.first(P, 0.0):
            found.append(first.since)
            queue.take(first, P)
        assert found == sorted(arrivals)
        return time.thread_time() - began

    shuffled = [float(i) for i in range(2000)]
    in_order = min(seconds(shuffled) for _ in range(3))
    random.Random(1).shuffle(shuffled)
    in_any_order = min(seconds(shuffled) for _ in range(3))
    assert in_any_order < 20 * in_order  # sorting for each item would be over 100 times


def test_an_item_that_cannot_be_in_time_waits_for_those_that_can() -> None:
    items = [item("a", label=str(i), pools=(P, Q)) for i in range(4)]
    items[0].late_at = items[1].late_at = 5.0
    queue = filled(*items, item("b"))
    assert queue.first(P, 5.0) is items[0]
    assert queue.first(Q, 5.1) is items[2]  # late in one pool is late in all
    order = []
    while first := queue.first(P, 6.0):
        order.append(first.tenant + first.label)
        queue.take(first, P)
    assert order == ["a2", "b", "a3", "a0", "a1"]  # the tenants still take turns


def test_a_tenant_whose_only_item_becomes_late_keeps_its_clock() -> None:
    """Tenants a and c were charged 10 s and have used less, while b was served up to 6 s."""
    late = item("a")
    queue = filled(item("a", 10.0), item("c", 10.0), *(item("b") for _ in range(20)))
    queue.add(late)
    queue.add(item("c"))
    assert served(queue, 8) == "acbbbbbb"
    queue.settle("a", P, -8.0)
    queue.settle("c", P, -7.0)
    late.late_at = 1.0
    assert queue.first(P, 2.0) is late
    assert served(queue, 3) == "acb"


def test_late_items_get_every_tenth_slot_of_their_tenant() -> None:
    late = [item("a", label=f"late{i}") for i in range(2)]
    for one in late:
        one.late_at = 1.0
    queue = filled(*late, *(item("a", label=str(i)) for i in range(30)))
    labels = []
    for _ in range(25):
        first = queue.first(P, 2.0)
        assert first
        labels.append(first.label)
        queue.take(first, P)
    assert [i for i, label in enumerate(labels) if "late" in label] == [9, 19]


def test_items_that_may_wait_stand_behind_late_ones() -> None:
    items = [item("a", label=label) for label in ("job", "late", "in time")]
    items[0].last, items[1].late_at = True, 1.0
    queue = filled(*items)
    order = []
    while first := queue.first(P, 2.0):
        order.append(first.label)
        queue.take(first, P)
    assert order == ["in time", "late", "job"]


def test_deferrable_tenants_can_be_left_out() -> None:
    queue: FairQueue[Item] = FairQueue(deferrable=lambda tenant: tenant.startswith("batch"))
    for tenant in ("batch-a", "batch-b", "a"):
        queue.add(item(tenant))
    found = []
    while first := queue.first(P, 0.0, deferrable=False):
        found.append(first.tenant)
        queue.take(first, P)
    assert found == ["a"]
    first = queue.first(P, 0.0)
    assert first
    assert first.tenant == "batch-a"


def test_running_items_of_an_earlier_queue_count_for_a_tenant_that_waits_already() -> None:
    queue = filled(item("a"), item("b"))
    queue.taken_before("a", P, 10.0)
    assert served(queue, 2) == "ba"


def test_the_cost_of_an_item_hardly_grows_with_items_and_tenants() -> None:
    """30,000 items of 3,000 tenants cost little more each than 1,000 items of 100 tenants.

    A cost that is linear in the number of tenants would be 30 times as high.
    """

    def seconds_each(entries: int, tenants: int) -> float:
        rng = random.Random(1)
        queue: FairQueue[Item] = FairQueue()
        began = time.thread_time()
        items = [item(str(i % tenants), rng.random(), (P, Q)) for i in range(entries)]
        for one in items:
            queue.add(one)
        for one in rng.sample(items, entries // 2):
            queue.remove(one)
        while first := queue.first(P, 0.0):
            queue.take(first, P)
            queue.settle(first.tenant, P, 0.0)
        assert not len(queue)
        return (time.thread_time() - began) / entries

    few = min(seconds_each(1000, 100) for _ in range(3))
    assert seconds_each(30_000, 3_000) < 8 * few


TENANTS = "tenant-a", "tenant-b", "tenant-c", "tenant-d"


class FairQueueMachine(RuleBasedStateMachine):
    """Any order of events, compared with a plain model of one clock per tenant and pool."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Item] = FairQueue()
        self.queue.weight = Weights({"tenant-b": 2.0})
        self.items: list[Item] = []
        self.taken: list[tuple[str, str]] = []
        self.clocks: dict[tuple[str, str], float] = {}
        self.granted_at = {P: 0.0, Q: 0.0}

    def waits(self, tenant: str, pool: str) -> list[Item]:
        return [i for i in self.items if i.tenant == tenant and pool in i.pools]

    @rule(
        tenant=st.sampled_from(TENANTS),
        work_s=st.integers(1, 8),
        pools=st.sampled_from([(P,), (Q,), (P, Q), (Q, P)]),
    )
    def add(self, tenant: str, work_s: int, pools: tuple[str, ...]) -> None:
        for pool in pools:
            if not self.waits(tenant, pool):
                clock = self.clocks.get((tenant, pool), 0.0)
                self.clocks[tenant, pool] = max(clock, self.granted_at[pool])
        one = item(tenant, float(work_s), pools)
        self.queue.add(one)
        self.items.append(one)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.items))
        self.queue.remove(one)
        self.items.remove(one)

    @rule(pool=st.sampled_from([P, Q]))
    def take(self, pool: str) -> None:
        first = self.queue.first(pool, 0.0)
        there = [i for i in self.items if pool in i.pools]
        if first is None:
            assert not there  # a free slot stays free only if no item waits
            return
        heads = {i.tenant: i for i in reversed(there)}.values()
        assert first is min(heads, key=lambda i: (self.clocks[i.tenant, pool], i.number))
        self.granted_at[pool] = max(self.granted_at[pool], self.clocks[first.tenant, pool])
        self.clocks[first.tenant, pool] += first.work_s / self.queue.weight(first.tenant)
        self.queue.take(first, pool)
        self.items.remove(first)
        self.taken.append((first.tenant, pool))

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), correction_s=st.integers(-8, 8))
    def settle(self, data: st.DataObject, correction_s: int) -> None:
        tenant, pool = data.draw(st.sampled_from(self.taken))
        self.taken.remove((tenant, pool))
        self.queue.settle(tenant, pool, correction_s)
        self.clocks[tenant, pool] += correction_s / self.queue.weight(tenant)

    @invariant()
    def counts_agree(self) -> None:
        assert list(self.queue) == self.items
        for tenant in TENANTS:
            own = [i for i in self.items if i.tenant == tenant]
            assert self.queue.waiting(tenant) == (len(own), sum(i.work_s for i in own))

    def teardown(self) -> None:
        """Check that a tenant without items and without a lead leaves nothing in the queue."""
        for one in self.items:
            self.queue.remove(one)
        for tenant, pool in self.taken:
            self.queue.settle(tenant, pool, 0.0)
        for pool in (P, Q):
            for work_s in (1000.0, 1.0):
                self.queue.add(item("last", work_s, (pool,)))
                served(self.queue, 1, pool)
                self.queue.settle("last", pool, 0.0)
        self.queue.weight = Weights({})
        kept = pickle.dumps(self.queue)
        assert [tenant for tenant in TENANTS if tenant.encode() in kept] == []


TestFairQueueMachine = FairQueueMachine.TestCase
TestFairQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("pools", [(P,), (P, Q)])
def test_coming_and_going_does_not_fill_the_memory(pools: tuple[str, ...]) -> None:
    queue = filled(item("a", pools=pools), item("b", pools=pools))

    def come_and_go(times: int) -> int:
        """Add and remove items; return the size of the pickled queue in bytes."""
        for _ in range(times):
            for tenant in "ac":
                one = item(tenant, pools=pools)
                queue.add(one)
                queue.remove(one)
        return len(pickle.dumps(queue))

    few = come_and_go(300)
    assert come_and_go(3000) < 1.5 * few
