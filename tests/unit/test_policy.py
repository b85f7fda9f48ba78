"""The policy on a fluid model: work flows in, and replicas drain the queue once a second."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaling.floor import Floor, JumpMemory
from autoscaling.load import Demand, Follower, Load, PolicyTuning, PoolBounds, ScalingLimits, Supply
from autoscaling.policy import PolicyState, ScalingDecision, decide, preferred

POOL = PoolBounds("m", min_replicas=0, max_replicas=100, slots=4, start_s=30.0)
# Replicas that stay ready for jumps have a test of their own.
TUNING = PolicyTuning(late_part=1.0, utilisation=0.9, spare=2.0, hold_s=120.0)
START_S = 30
IMAGE_S = 0.5  # work of a request


class Plant:
    """One pool whose work arrives evenly.

    `comes`: whether wanted replicas ever start. `reports`: whether replicas send heartbeats.
    """

    def __init__(
        self, pool: PoolBounds = POOL, tuning: PolicyTuning | None = None, replicas: int = 0
    ) -> None:
        self.limits = ScalingLimits({"p": pool}, tuning=tuning or TUNING)
        self.state, self.now = PolicyState(), 1000.0
        self.arrived = self.queue = 0.0
        self.starts: list[float] = []  # when each starting replica is ready
        self.ready, self.comes, self.reports = replicas, True, True
        self.wanted: list[int] = []
        self.reasons: list[str] = []

    def run(self, seconds: float, rate: float | Callable[[float], float]) -> list[int]:
        """Run with `rate` seconds of work per second; return the wanted replicas of each second."""
        for second in range(int(seconds)):
            arriving = rate(second) if callable(rate) else rate
            self.arrived += arriving
            self.queue = max(self.queue + arriving - self.ready, 0.0)
            self.tick()
        return self.wanted[-int(seconds) :]

    def tick(self) -> ScalingDecision:
        self.now += 1
        self.ready += sum(at <= self.now for at in self.starts)
        self.starts = [at for at in self.starts if at > self.now]
        demand = Demand(("p",), self.arrived, self.arrived * IMAGE_S, self.queue)
        supplies = {"p": Supply(self.ready)} if self.reports else {}
        decision = decide(Load([demand], supplies), self.limits, self.state, self.now)
        self.state = decision.state
        self.wanted.append(decision.replicas["p"])
        self.reasons += decision.reasons.values()
        there = self.ready + len(self.starts)
        if self.wanted[-1] > there and self.comes:
            self.starts += [self.now + START_S] * (self.wanted[-1] - there)
        while self.wanted[-1] < self.ready + len(self.starts):
            if self.starts:
                self.starts.pop()
            else:
                self.ready -= 1
        return decision


def turns(wanted: list[int]) -> int:
    """The number of changes of direction."""
    moves = [b > a for a, b in itertools.pairwise(wanted) if a != b]
    return sum(a != b for a, b in itertools.pairwise(moves))


def test_steady_work_gets_a_steady_number_with_room() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    wanted = plant.run(600, 10.0)
    assert len(set(wanted)) == 1
    assert wanted[0] == math.ceil(10 + TUNING.spare * math.sqrt(10 / 4))
    assert plant.queue == 0


def test_big_fleets_are_kept_no_fuller_than_the_utilisation_says() -> None:
    plant = Plant(replace(POOL, max_replicas=2000), replicas=1000)
    assert plant.run(600, 1000.0)[-1] == math.ceil(1000 / TUNING.utilisation)


def test_a_step_is_followed_at_once_and_its_end_slowly() -> None:
    plant = Plant()
    plant.run(600, 4.0)
    before = plant.wanted[-1]
    up = plant.run(600, 20.0)
    assert next(i for i, n in enumerate(up) if n >= 20) <= 15
    assert up[-1] >= 20
    assert max(up) <= 60  # draining the queue of the start takes more replicas than the step
    assert turns([before, *up]) <= 2
    down = plant.run(900, 4.0)
    assert turns(down) == 0
    assert down[60] == up[-1]  # held
    assert before <= down[-1] <= before + 1  # room for the next such step


def test_a_ramp_is_followed_without_turning_back() -> None:
    plant = Plant()
    plant.run(300, 2.0)
    wanted = plant.run(1800, lambda second: 2.0 + second / 60)
    assert turns(wanted) <= 1
    assert wanted[-1] >= 32
    assert plant.queue < 1


def test_a_spike_is_answered_once_and_a_burst_of_a_second_hardly() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    before = plant.wanted[-1]
    spike = plant.run(900, lambda second: 40.0 if second < 60 else 10.0)
    assert max(spike) >= 40
    assert turns([before, *spike]) <= 2
    assert spike[-1] == before
    burst = plant.run(300, lambda second: 40.0 if second < 1 else 10.0)
    assert max(burst) <= before + 10
    assert turns([before, *burst]) <= 2


def test_a_queue_that_is_gone_before_a_start_orders_nothing() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    before = plant.wanted[-1]
    plant.queue += 3.0 * START_S  # 14 replicas do 4 a second more than arrives
    assert max(plant.run(120, 10.0)) == before
    assert plant.queue == 0
    plant.queue += 20.0 * START_S
    assert max(plant.run(120, 10.0)) > before


def test_replicas_added_for_a_queue_stay_until_the_queue_is_gone() -> None:
    plant = Plant()
    plant.run(600, 2.0)
    plant.queue += 1000.0
    while plant.queue:
        most = max(plant.wanted)
        plant.run(1, 2.0)
        assert plant.wanted[-1] >= most - 1 or plant.queue < plant.ready
    plant.run(15, 2.0)
    assert plant.wanted[-1] == 2 + 2


def test_a_sawtooth_and_flapping_work_do_not_thrash() -> None:
    plant = Plant()
    plant.run(600, 5.0)
    wanted = plant.run(1200, lambda second: 5.0 + 10.0 * (second % 60) / 60)
    assert turns(wanted[300:]) == 0
    flapping = plant.run(1200, lambda second: 15.0 if second // 10 % 2 else 3.0)
    assert turns(flapping[300:]) == 0


def test_an_idle_pool_goes_to_zero_and_back_with_the_first_request() -> None:
    plant = Plant()
    plant.run(300, 1.0)
    wanted = plant.run(1200, 0.0)
    assert wanted[int(TUNING.idle_s) - 30] == 1
    assert wanted[-1] == 0
    assert plant.ready == 0
    plant.arrived += IMAGE_S
    plant.queue += IMAGE_S
    plant.tick()
    assert plant.wanted[-1] == 1
    assert turns(plant.run(60, 0.0)) == 0
    assert plant.ready == 1


def test_from_zero_a_pool_starts_as_many_replicas_as_the_queue_needs() -> None:
    plant = Plant()
    plant.arrived = plant.queue = 300.0
    plant.tick()
    assert plant.wanted[-1] >= 300 / 15


def test_replica_bounds_and_the_warm_reserve_are_kept() -> None:
    plant = Plant(replace(POOL, min_replicas=2, max_replicas=6))
    assert plant.run(60, 0.0)[-1] == 2
    assert plant.run(300, 50.0)[-1] == 6
    assert any("6 is its limit" in reason for reason in plant.reasons)
    spare = Plant(tuning=replace(TUNING, warm_reserve=3))
    plain = Plant()
    assert spare.run(600, 5.0)[-1] == plain.run(600, 5.0)[-1] + 3
    assert spare.run(1500, 0.0)[-1] == 0


def test_missing_metrics_keep_the_wanted_replicas_and_late_ones_count() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    before = plant.wanted[-1]
    plant.reports = False
    assert set(plant.run(300, 10.0)) == {before}
    plant.reports = True
    assert set(plant.run(60, 10.0)) == {before}
    plant.now += 600  # no decision for ten minutes, while work arrived
    plant.arrived += 600 * 10.0
    assert set(plant.run(60, 10.0)) == {before}


def test_a_clock_that_jumps_and_counters_that_begin_anew_release_nothing_at_once() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    before = plant.wanted[-1]
    plant.now -= 5000
    assert set(plant.run(120, 10.0)) == {before}
    plant.arrived = 0.0
    assert set(plant.run(120, 10.0)) == {before}
    assert set(plant.run(600, 10.0)) == {before}


def test_after_a_pause_without_metrics_no_replica_is_released() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    before = plant.wanted[-1]
    plant.now += 3600  # the Dispatcher was paused
    assert set(plant.run(110, 10.0)) == {before}
    assert set(plant.run(600, 10.0)) == {before}


def test_an_unusual_start_hardly_changes_the_learnt_start_time() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    ready, plant.ready = plant.ready, 0  # no heartbeat arrived for a second
    plant.tick()
    plant.ready = ready
    plant.tick()
    assert plant.state.pools["p"].start_s > START_S / 4
    late = Plant(replace(POOL, max_replicas=16))
    late.comes = False
    late.run(2000, 10.0)  # then one replica comes after all
    late.ready = 1
    late.tick()
    assert late.state.pools["p"].start_s <= 3 * START_S


def test_a_new_dispatcher_keeps_the_replicas_that_it_finds() -> None:
    plant = Plant(replicas=12)
    assert set(plant.run(110, 10.0)) <= {12, 13, 14}


def test_the_time_of_a_start_is_learnt() -> None:
    plant = Plant(replace(POOL, start_s=5.0))
    for _ in range(4):
        plant.run(300, 10.0)
        plant.run(1500, 0.0)
    assert plant.state.pools["p"].start_s == pytest.approx(START_S, rel=0.1)


def test_a_new_dispatcher_learns_start_times_from_heartbeats() -> None:
    limits = ScalingLimits({"p": POOL})
    there = {"p": Supply(2, start_s=4.0)}
    assert decide(Load([], there), limits, PolicyState(), 0.0).state.pools["p"].start_s == 4.0
    without_replicas = decide(Load([], {"p": Supply()}), limits, PolicyState(), 0.0)
    assert without_replicas.state.pools["p"].start_s == POOL.start_s


def test_wanted_starting_and_ready_replicas_are_counted_apart() -> None:
    plant = Plant()
    plant.run(10, 10.0)
    pool = plant.state.pools["p"]
    assert (pool.ready, pool.wanted - pool.starting) == (0, 0)
    assert pool.starting == len(plant.starts) == plant.wanted[-1]
    plant.run(60, 10.0)
    pool = plant.state.pools["p"]
    assert pool.ready + pool.starting == pool.wanted
    assert pool.ready > 0


def test_a_dead_replica_counts_as_starting() -> None:
    plant = Plant()
    plant.run(600, 10.0)
    plant.ready -= 1
    plant.starts.append(plant.now + START_S)
    plant.tick()
    assert plant.state.pools["p"].starting == 1


def test_a_wait_that_no_prediction_explains_orders_one_more() -> None:
    limits = ScalingLimits({"p": POOL})
    state = PolicyState()
    for second in range(100):
        load = Load([Demand(("p",), 0.0, 0.0, 0.5, 40.0)], {"p": Supply(3)})
        decision = decide(load, limits, state, second)
        state = decision.state
    assert decision.replicas["p"] == 4


def test_the_very_first_requests_have_a_rate() -> None:
    limits = ScalingLimits({"p": replace(POOL, min_replicas=1)})
    quiet = decide(Load([], {"p": Supply(1)}), limits, PolicyState(), 0.0)
    many = [Demand(("p",), 100.0, 50.0, 10.0)]
    assert decide(Load(many, {"p": Supply(1)}), limits, quiet.state, 1.0).replicas["p"] > 10
    # The first value of a counter that was not seen at zero says nothing about the rate.
    unknown = decide(Load(many, {"p": Supply(1)}), limits, PolicyState(), 1.0)
    assert unknown.replicas["p"] == 1


def test_every_change_has_its_reason() -> None:
    plant = Plant()
    plant.run(1, 0.0)
    plant.run(300, 5.0)
    plant.run(1500, 0.0)
    changes = sum(a != b for a, b in zip([0, *plant.wanted], plant.wanted, strict=False))
    assert len(plant.reasons) == changes
    assert "replicas (to drain what waits): " in plant.reasons[0]
    assert any("replicas (the most that was needed of late): " in r for r in plant.reasons)
    assert "s of work arrive a second" in plant.reasons[0]
    assert "a start takes 30 s" in plant.reasons[0]
    assert plant.reasons[-1].startswith("1 → 0 replicas (idle): nothing arrives")


# -- several pools --------------------------------------------------------------------------------

BOTH, ONLY_16 = ("fp8", "fp16"), ("fp16",)
PAIR = {
    "fp8": PoolBounds("m", 0, 4, 4, speed=1.0),
    "fp16": PoolBounds("m", 0, 10, 4, speed=0.5),
}


def settle(
    limits: ScalingLimits,
    arriving: dict[tuple[str, ...], float],
    supplies: Callable[[dict[str, int]], dict[str, Supply]],
    seconds: int = 600,
) -> ScalingDecision:
    """The decision after `seconds`; `supplies` maps wanted replicas to the pools' supplies."""
    state, wanted = PolicyState(), dict.fromkeys(limits.pools, 0)
    for second in range(seconds):
        demands = [
            Demand(pools, rate * second, rate * second * IMAGE_S, rate, 1.0)
            for pools, rate in arriving.items()
        ]
        decision = decide(Load(demands, supplies(wanted)), limits, state, second)
        state, wanted = decision.state, dict(decision.replicas)
    return decision


def all_come(wanted: dict[str, int]) -> dict[str, Supply]:
    return {name: Supply(n) for name, n in wanted.items()}


def test_the_preferred_pool_is_used_alone_while_it_suffices() -> None:
    decision = settle(ScalingLimits(PAIR, tuning=TUNING), {BOTH: 2.0}, all_come)
    assert decision.replicas["fp16"] == 0
    assert 3 <= decision.replicas["fp8"] <= 4


def test_work_beyond_the_preferred_pool_goes_to_the_next() -> None:
    decision = settle(ScalingLimits(PAIR, tuning=TUNING), {BOTH: 5.0}, all_come)
    assert decision.replicas["fp8"] == 4
    assert decision.replicas["fp16"] >= math.ceil((5.0 - 4) / 0.5)


def test_requests_that_may_use_only_one_pool_get_it() -> None:
    decision = settle(ScalingLimits(PAIR, tuning=TUNING), {ONLY_16: 1.0}, all_come)
    assert decision.replicas["fp8"] == 0
    assert decision.replicas["fp16"] >= 2


def test_replicas_that_do_not_come_are_not_waited_for() -> None:
    def no_fp8(wanted: dict[str, int]) -> dict[str, Supply]:
        return {"fp8": Supply(0), "fp16": Supply(wanted["fp16"], 0.5)}

    early = settle(ScalingLimits(PAIR, tuning=TUNING), {BOTH: 1.0}, no_fp8, seconds=80)
    assert early.replicas["fp16"] == 0
    late = settle(ScalingLimits(PAIR, tuning=TUNING), {BOTH: 1.0}, no_fp8, seconds=200)
    assert late.replicas["fp16"] >= 3
    assert late.replicas["fp8"] >= 3  # so that a node may still be added
    assert late.state.pools["fp8"].given_up


def test_a_pool_that_was_given_up_is_remembered_while_idle() -> None:
    limits = ScalingLimits(
        PAIR, tuning=PolicyTuning(late_part=1.0, idle_s=30, hold_s=30, node_wait_s=30)
    )
    state, arrived, waits = PolicyState(), 0.0, []
    for second in range(500):
        wake = second < 200 or second == 400
        arrived += 3.0 * wake
        supplies = {"fp8": Supply(0), "fp16": Supply(state.pools["fp16"].wanted if second else 0)}
        queued = 3.0 if wake else 0.0
        load = Load([Demand(BOTH, arrived, arrived, queued)], supplies)
        decision = decide(load, limits, state, second)
        if decision.replicas["fp16"] > (state.pools["fp16"].wanted if second else 0):
            waits.append(second)
        state = decision.state
    assert 400 in waits  # at once, because the pool was given up before
    assert state.pools["fp8"].wanted == 0


def jumps_of(rate: float) -> Floor:
    """A floor that has learnt of jumps to this rate, which bring all of the work."""
    memory = JumpMemory()
    for second in range(1000):
        memory = memory.counted(rate * (second % 2), 0.0, 1.0, 0.0, None)
    return Floor(memory, worked=600.0)


def test_replicas_for_jumps_stay_ready_in_the_preferred_pool_first() -> None:
    limits = ScalingLimits(PAIR, tuning=replace(TUNING, late_part=0.01))
    supplies = {"fp8": Supply(0), "fp16": Supply(0)}

    def wanted(rate: float) -> ScalingDecision:
        state = PolicyState(at=599.5, floors={BOTH: jumps_of(rate)})
        return decide(Load([Demand(BOTH, 0.0, 0.0)], supplies), limits, state, 600.0)

    assert wanted(0.0).replicas == {"fp8": 0, "fp16": 0}
    some = wanted(3.0)
    assert some.replicas == {"fp8": 4, "fp16": 0}  # the next level above 3
    assert "(for jumps like those before)" in some.reasons["fp8"]
    most = PAIR["fp8"].max_replicas
    many = wanted(most + 2.0).replicas
    assert many["fp8"] == most
    assert many["fp16"] >= 2


def test_a_pool_of_slower_replicas_has_more_of_them() -> None:
    def half(wanted: dict[str, int]) -> dict[str, Supply]:
        return {"p": Supply(wanted["p"], 0.5)}

    limits = ScalingLimits({"p": POOL}, tuning=TUNING)
    fast = settle(limits, {("p",): 20.0}, all_come).replicas["p"]
    assert settle(limits, {("p",): 20.0}, half).replicas["p"] == pytest.approx(2 * fast, abs=4)


def test_needed_replicas_are_kept_for_two_start_times() -> None:
    plant = Plant(replace(POOL, start_s=200.0), replicas=14)
    plant.run(500, 10.0)
    wanted = plant.run(500, 1.0)
    assert wanted[390] == wanted[0]
    assert wanted[-1] < wanted[0]


def test_slow_starts_add_few_replicas_to_drain_a_queue() -> None:
    """A queue is drained over at least an eighth of the start time of a replica."""
    plant = Plant(replace(POOL, max_replicas=1000, start_s=600.0))
    assert 10 < max(plant.run(60, 10.0)) <= 10 + 8 * 10 + 4


def test_pools_that_do_not_come_are_tried_again_after_a_while() -> None:
    def no_fp8(wanted: dict[str, int]) -> dict[str, Supply]:
        return {"fp8": Supply(0), "fp16": Supply(wanted["fp16"], 0.5)}

    gave_up = [
        settle(ScalingLimits(PAIR, tuning=TUNING), {BOTH: 1.0}, no_fp8, seconds)
        .state.pools["fp8"]
        .given_up
        for seconds in (80, 200, 3000)
    ]
    assert gave_up == [False, True, True]


def test_a_queue_of_a_full_pool_adds_replicas_of_the_next_only_while_it_lasts() -> None:
    def drained(wanted: dict[str, int]) -> dict[str, Supply]:
        return {"fp8": Supply(4), "fp16": Supply(wanted["fp16"], 0.5)}

    state, wanted, sizes = PolicyState(), {"fp8": 4, "fp16": 0}, []
    for second in range(300):
        queued = 300.0 if 150 <= second < 160 else 0.0
        load = Load([Demand(BOTH, 1.5 * second, second, queued)], drained(wanted))
        decision = decide(load, ScalingLimits(PAIR, tuning=PolicyTuning(idle_s=1)), state, second)
        state, wanted = decision.state, dict(decision.replicas)
        sizes.append(wanted["fp16"])
    assert max(sizes) > 0  # the next pool helps to drain the queue
    assert sizes[-100] == 0  # and its replicas go when the queue is gone


def test_a_long_wait_at_a_full_pool_adds_a_replica_of_the_next() -> None:
    state = PolicyState()
    for second in range(30):
        load = Load(
            [Demand(BOTH, 1.0 * second, second, 0.5, 60.0)], {"fp8": Supply(4), "fp16": Supply(0)}
        )
        decision = decide(load, ScalingLimits(PAIR, tuning=TUNING), state, second)
        state = decision.state
    assert decision.replicas["fp16"] >= 1


def test_without_a_node_that_could_hold_it_the_next_pool_is_taken_at_once() -> None:
    def none_fits(wanted: dict[str, int]) -> dict[str, Supply]:
        return {"fp8": Supply(0, placeable=False), "fp16": Supply(wanted["fp16"], 0.5)}

    limits = ScalingLimits(PAIR, tuning=TUNING)
    assert settle(limits, {BOTH: 2.0}, none_fits, seconds=10).replicas["fp16"] >= 1
    elastic = ScalingLimits(PAIR, tuning=PolicyTuning(node_wait_s=120))
    assert settle(elastic, {BOTH: 1.0}, none_fits, seconds=100).replicas["fp16"] == 0
    assert settle(elastic, {BOTH: 1.0}, none_fits, seconds=140).replicas["fp16"] >= 1


def test_when_its_nodes_come_after_all_the_preferred_pool_takes_over() -> None:
    calls = 0

    def late(wanted: dict[str, int]) -> dict[str, Supply]:
        nonlocal calls
        calls += 1
        there = wanted["fp8"] if calls > 300 else 0
        return {"fp8": Supply(there), "fp16": Supply(wanted["fp16"], 0.5)}

    decision = settle(ScalingLimits(PAIR, tuning=TUNING), {BOTH: 2.0}, late, seconds=1500)
    assert decision.replicas["fp16"] == 0
    assert not decision.state.pools["fp8"].given_up


def test_pools_are_preferred_by_the_price_of_their_work() -> None:
    dear = {
        name: replace(pool, usd_h=usd)
        for (name, pool), usd in zip(PAIR.items(), (9, 2), strict=True)
    }
    assert preferred("m", ScalingLimits(PAIR, tuning=TUNING)) == ["fp8", "fp16"]
    assert preferred("m", ScalingLimits(dear)) == ["fp16", "fp8"]
    half = dear | {"fp16": PAIR["fp16"]}
    assert preferred("m", ScalingLimits(half)) == ["fp8", "fp16"]


def test_text_encoders_and_ingresses_follow() -> None:
    followers = {
        "TextEncoder": Follower(1, 3, pools=("fp8", "fp16")),
        "Ingress": Follower(1, 4, each=100),
    }
    limits = ScalingLimits(PAIR, followers, TUNING)
    assert settle(limits, {}, all_come).replicas == {
        "fp8": 0,
        "fp16": 0,
        "TextEncoder": 1,
        "Ingress": 1,
    }
    busy = settle(limits, {BOTH: 5.0}, all_come)
    # By the speed of their replicas.
    share = (busy.replicas["fp8"] + 0.5 * busy.replicas["fp16"]) / 9
    assert busy.replicas["TextEncoder"] == math.ceil(3 * share)
    full = decide(Load([], {}, open_requests=250), limits, PolicyState(), 0.0)
    assert full.replicas["Ingress"] == 3
    sizes = []
    for second in range(1, 140):
        full = decide(Load([], {}), limits, full.state, second)
        sizes.append(full.replicas["Ingress"])
    assert sizes[110] == 3
    assert sizes[-1] == 1


# -- any load -------------------------------------------------------------------------------------

amounts = st.floats(0, 1e4)
step = st.tuples(
    amounts, amounts, amounts, st.integers(0, 30), st.integers(0, 30), st.floats(0, 90)
)


def play(steps: list[tuple[float, float, float, int, int, float]], more: float) -> ScalingDecision:
    """Decide on a history with `more` times as many requests in its last step.

    All requests have the same size, because one large request makes the rate less certain.
    """
    limits = ScalingLimits(
        {
            "fp8": replace(PAIR["fp8"], min_replicas=1),
            "fp16": PAIR["fp16"],
            "other": PoolBounds("n", 1, 3, 2),
        }
    )
    state, now, arrived = PolicyState(), 0.0, 0.0
    for i, (work, queued, wait_s, ready8, ready16, passed_s) in enumerate(steps):
        factor = more if i == len(steps) - 1 else 1.0
        now, arrived = now + passed_s, arrived + work * factor
        demands = [
            Demand(BOTH, arrived, arrived * IMAGE_S, queued * factor, wait_s * factor),
            Demand(ONLY_16, arrived / 2, arrived * IMAGE_S / 2, queued * factor / 3),
        ]
        supplies = {"fp8": Supply(ready8), "fp16": Supply(ready16, 0.5, i % 3 > 0)}
        decision = decide(Load(demands, supplies), limits, state, now)
        state = decision.state
        assert decision.replicas["other"] == 1  # a pool without heartbeats keeps its minimum
        for name in PAIR:
            pool = limits.pools[name]
            assert pool.min_replicas <= decision.replicas[name] <= pool.max_replicas
    return decision


@settings(deadline=None)
@given(st.lists(step, min_size=1, max_size=12), st.floats(1, 10))
def test_bounds_are_kept_and_more_load_never_asks_for_fewer(
    steps: list[tuple[float, float, float, int, int, float]], more: float
) -> None:
    less_load, more_load = play(steps, 1.0), play(steps, more)
    for name, replicas in less_load.replicas.items():
        assert more_load.replicas[name] >= replicas
