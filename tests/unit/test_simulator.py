"""The simulator: its replicas, nodes and workloads, and the policies to compare with."""

import heapq
import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from autoscaling.load import Load, PoolBounds, ScalingLimits, Supply
from autoscaling.simulation.baselines import Oracle, QueueLength, RayServe, most_ahead
from autoscaling.simulation.contestants import QueuedWork, Static
from autoscaling.simulation.fleet import NodeType, SimulatedReplica
from autoscaling.simulation.shared_volume import SharedVolume
from autoscaling.simulation.simulator import (
    Policy,
    PolicyView,
    SimulatedPool,
    Simulation,
    SimulationResult,
)
from autoscaling.simulation.workloads import (
    HOUR_S,
    Arrival,
    RequestShape,
    Workload,
    diurnal,
    heavy_tailed,
    on_off,
    poisson,
    sparse,
    spikes,
    trace,
)
from cluster.cost import CostCoefficients
from serve.dispatch.fair_queue import FairQueue

COSTS = CostCoefficients(constant=0.0, step=0.0, token=1e-3 / 8, token2=0.0, pixel=0.0)
SHAPE = RequestShape(256, 256, 10, 1.0)  # 589 tokens, 10 steps
IMAGE_S = 589 * 10 * 1e-3 / 8
POOL = PoolBounds("m", 0, 50, 2)
NODES = NodeType("h100", 3.6, node_s=20, start_s=10)


def given(*at: float, tenant: str = "t") -> Workload:
    arrivals = [Arrival(time, tenant, SHAPE) for time in at]
    return Workload("given", 60.0, lambda _: arrivals)


def run(
    workload: Workload,
    policy: Policy,
    node_type: NodeType = NODES,
    costs: CostCoefficients = COSTS,
    warm_up_s: float = 0.0,
) -> SimulationResult:
    pools = {"p": SimulatedPool(POOL, node_type, costs)}
    return Simulation(pools, policy, FairQueue(), 1).run(workload, warm_up_s)


def static(replicas: int) -> Static:
    return Static({"p": POOL}, replicas)


# -- replicas -------------------------------------------------------------------------------------


def test_images_of_a_replica_take_turns_step_by_step() -> None:
    replica = SimulatedReplica(0, 0.0, step_s=1.0)
    replica.join("a", size=1, row_s=2.0, steps=10)
    assert replica.ends_at == 10 * 3.0  # a step costs 1, and 2 for its row
    replica.advance(15.0)  # after 5 steps
    replica.join("b", size=1, row_s=2.0, steps=2)
    assert replica.next.request == "b"
    assert replica.ends_at == 15.0 + 2 * 5.0  # two rows of one size share the step
    replica.advance(25.0)
    replica.leave(replica.next)
    assert replica.ends_at == 25.0 + 3 * 3.0
    replica.join("c", size=9, row_s=2.0, steps=1)
    assert replica.ends_at == 25.0 + 6.0  # an image of another size takes a step of its own


def test_a_request_waits_for_node_and_start_and_then_takes_its_time() -> None:
    outcome = run(given(0.0), static(1))
    assert outcome.requests == 1
    (wait_s,) = outcome.waits
    assert 20 + 8 <= wait_s <= 20 + 12
    assert outcome.violations == 1
    warm = run(given(40.0), static(1))
    assert list(warm.waits) == [0.0]
    assert warm.violations == 0


def first_wait_s(replicas: int, per_node: int, **cold: float) -> float:
    """How long a request at the start waits for the first of some replicas on cold nodes."""
    cold_node = NodeType("h100", 1.0, per_node, node_s=0, start_s=1, **cold)
    (wait_s,) = run(given(0.0), static(replicas), cold_node).waits
    return wait_s


def test_nodes_share_the_volume_from_which_they_copy_weights() -> None:
    alone_s = first_wait_s(1, 1, weights_gib=10, volume_gib_s=1)
    assert alone_s == pytest.approx(10 + 1, abs=0.3)
    assert first_wait_s(4, 1, weights_gib=10, volume_gib_s=1) == pytest.approx(40 + 1, abs=0.3)
    assert first_wait_s(4, 4, weights_gib=10, volume_gib_s=1) == pytest.approx(10 + 1, abs=0.3)
    assert first_wait_s(1, 1, weights_gib=10, volume_gib_s=1, compile_s=7) == pytest.approx(
        10 + 7 + 1, abs=0.3
    )


def test_a_node_that_has_the_weights_starts_its_next_replica_faster() -> None:
    def again(_: PolicyView, now: float) -> dict[str, int]:
        return {"p": int(now < 30 or now >= 50)}

    def wait_s(idle_s: float) -> float:
        node = NodeType("h100", 1.0, node_s=0, start_s=1, idle_s=idle_s, weights_gib=10)
        (waited_s,) = run(given(50.0), again, node).waits
        return waited_s

    assert wait_s(idle_s=60) == pytest.approx(1, abs=0.3)
    assert wait_s(idle_s=5) == pytest.approx(10 + 1, abs=0.3), "the node was given back meanwhile"


@hypothesis.given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 20)), min_size=1, max_size=8))
def test_a_shared_volume_reads_at_full_speed_and_treats_readers_alike(
    readers: list[tuple[float, float]],
) -> None:
    events: list[tuple[float, int, Callable[[float], object]]] = []
    numbers = itertools.count()

    def later(at: float, do: Callable[[float], object]) -> None:
        heapq.heappush(events, (at, next(numbers), do))

    volume, ended = SharedVolume(2.0, later), dict[int, float]()
    for i, (at, gib) in enumerate(readers):
        later(at, partial(volume.read, gib, partial(ended.__setitem__, i)))
    while events:
        at, _, do = heapq.heappop(events)
        do(at)
    for i, (at, gib) in enumerate(readers):
        others = sum(g for j, (a, g) in enumerate(readers) if j != i)
        assert at + gib / 2 - 1e-6 <= ended[i] <= at + (gib + others) / 2 + 1e-6
    first = min(at for at, _ in readers)
    busy_s = max(ended.values()) - first
    idle_s = max(at for at, _ in readers) - first
    assert busy_s <= sum(gib for _, gib in readers) / 2 + idle_s + 1e-6


def test_a_reader_that_gives_up_leaves_the_volume_to_the_others() -> None:
    events: list[tuple[float, int, Callable[[float], object]]] = []
    numbers = itertools.count()

    def later(at: float, do: Callable[[float], object]) -> None:
        heapq.heappush(events, (at, next(numbers), do))

    volume, ended = SharedVolume(1.0, later), dict[str, float]()
    gone = volume.read(10, partial(ended.__setitem__, "gone"), 0.0)
    volume.read(10, partial(ended.__setitem__, "stays"), 0.0)
    later(8.0, partial(volume.give_up, gone))
    while events:
        at, _, do = heapq.heappop(events)
        do(at)
    assert ended == {"stays": pytest.approx(8 + 6)}


def test_cost_is_nodes_by_the_hour() -> None:
    outcome = run(given(0.0), static(3))
    assert outcome.usd == pytest.approx(3 * 60 * 3.6 / 3600, rel=0.05)
    assert outcome.usd_by_card == {"h100": outcome.usd}
    packed = run(given(0.0), static(3), NodeType("h100", 3.6, per_node=4, node_s=20, start_s=10))
    assert packed.usd == pytest.approx(outcome.usd / 3, rel=0.05)
    assert packed.replica_h == pytest.approx(outcome.replica_h, rel=0.01)


def test_empty_nodes_are_given_back_and_the_emptiest_is_emptied_first() -> None:
    def shrinking(_: PolicyView, now: float) -> dict[str, int]:
        return {"p": 5 if now < 100 else 4}

    machine = NodeType("h100", 3600.0, per_node=4, node_s=0, start_s=1, idle_s=30)
    workload = Workload("idle", 1000.0, lambda _: [])
    outcome = run(workload, shrinking, machine)
    assert outcome.usd == pytest.approx(1000 + 100 + 30, abs=5)


def test_images_of_a_dead_replica_are_generated_again() -> None:
    machine = NodeType("h100", 1.0, node_s=0, start_s=1, replica_fails_s=40)
    workload = poisson(2.0, 600, ((SHAPE, 1.0),))
    outcome = run(workload, static(4), machine)
    assert outcome.retried > 0
    assert len(outcome.waits) == outcome.requests


def test_a_node_that_is_taken_away_with_notice_is_drained_first() -> None:
    workload = poisson(2.0, 600, ((SHAPE, 1.0),))
    notice = NodeType("h100", 1.0, node_s=0, start_s=1, node_taken_s=100, notice_s=60)
    assert run(workload, static(4), notice).retried == 0
    sudden = NodeType("h100", 1.0, node_s=0, start_s=1, node_taken_s=20, notice_s=0)
    taken = run(workload, static(4), sudden)
    assert taken.retried > 0
    assert len(taken.waits) == taken.requests


def test_tenants_share_through_the_fair_queue() -> None:
    flood = [Arrival(40.0, "flood", SHAPE) for _ in range(200)]
    light = [Arrival(40.1 + i, f"light{i}", SHAPE) for i in range(20)]
    arrivals = sorted([*flood, *light])
    outcome = run(Workload("two", 60.0, lambda _: arrivals), static(1))
    # Each light request is next in the fair queue; in order of arrival all would be too late.
    assert outcome.waits[-1] > 100 * IMAGE_S
    assert outcome.in_time >= 20


def test_the_same_seed_gives_the_same_result_and_a_warm_up_is_not_counted() -> None:
    workload = poisson(3.0, 600)
    one, two = (run(workload, QueuedWork(ScalingLimits({"p": POOL}))) for _ in range(2))
    assert one == two
    warm = run(workload, QueuedWork(ScalingLimits({"p": POOL})), warm_up_s=300)
    assert 0 < warm.requests < one.requests
    assert warm.usd < one.usd


def test_a_policy_that_follows_the_load_beats_a_fixed_fleet_of_the_same_cost() -> None:
    span_s, warm_up_s = HOUR_S / 2, 300
    workload = diurnal(60, span_s, trough=0.02, mix=((SHAPE, 1.0),))
    following = run(workload, QueuedWork(ScalingLimits({"p": POOL})), warm_up_s=warm_up_s)
    assert following.attainment > 0.97
    same_cost = static(round(following.replica_h * HOUR_S / (span_s - warm_up_s)))
    assert run(workload, same_cost, warm_up_s=warm_up_s).violations > 2 * following.violations


# -- workloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "per_s"),
    [
        (poisson(5, 2000), 5),
        (diurnal(5, 2000), 3),
        (spikes(0.5, 4 * HOUR_S), 0.84),
        (on_off(2, 5 * HOUR_S), 2),
        (heavy_tailed(6, 2000), 6),
        (sparse(2, 10 * HOUR_S), 0.67),
    ],
    ids=lambda value: value.name if isinstance(value, Workload) else "",
)
def test_workloads_are_in_order_and_repeatable_and_have_their_stated_rate(
    workload: Workload, per_s: float
) -> None:
    arrivals = list(workload.arrivals(3))
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < workload.seconds + 1
    assert arrivals == list(workload.arrivals(3))
    assert arrivals != list(workload.arrivals(4))
    assert len(times) / workload.seconds == pytest.approx(per_s, rel=0.35)


def test_spikes_are_ten_times_as_high() -> None:
    arrivals = [arrival.at for arrival in spikes(1, 6 * HOUR_S).arrivals(0)]
    minutes = [0] * 361
    for at in arrivals:
        minutes[int(at // 60)] += 1
    assert sorted(minutes)[180] < 90
    assert max(minutes) > 450


def test_a_trace_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    head = "time,tenant,width,height,steps,guidance\n"
    file.write_text(head + "5,b,512,512,4,1\n1.5,a,1024,768,28,4.5\n")
    assert list(trace(file).arrivals(0)) == [
        Arrival(0.0, "a", RequestShape(1024, 768, 28, 4.5)),
        Arrival(3.5, "b", RequestShape(512, 512, 4, 1.0)),
    ]
    file.write_text(head + "1,a,512,512,4,1\n2,a,big,512,4,1\n")
    with pytest.raises(ValueError, match=r"line 3: .*'big'"):
        trace(file)
    file.write_text("time,tenant\n1,a\n")
    with pytest.raises(ValueError, match="line 2: no column 'width'"):
        trace(file)
    for row in ("1,a,512,0,4,1", "1,,512,512,4,1", "1,a,512,512,4,nan", "inf,a,512,512,4,1"):
        file.write_text(head + row + "\n")
        with pytest.raises(ValueError, match="line 2: no request"):
            trace(file)
    file.write_text(head)
    with pytest.raises(ValueError, match="no requests"):
        trace(file)


# -- baseline policies ----------------------------------------------------------------------------


def view(ready: int, running: int, waiting: int = 0) -> PolicyView:
    return PolicyView(Load([], {"p": Supply(ready)}), {"p": running}, waiting)


def test_ray_serves_policy_waits_out_its_delays_on_the_simulated_clock() -> None:
    ray = RayServe({"p": POOL}, 2.0, upscale_delay_s=30, downscale_delay_s=600)
    assert ray(view(0, 0), 0)["p"] == 0
    assert ray(view(0, 0, 4), 1)["p"] == 1  # from zero without a delay
    wanted = [ray(view(1, 2, 18), now)["p"] for now in range(2, 100)]
    first = next(i for i, n in enumerate(wanted) if n > 1)
    assert 28 <= first <= 40
    assert wanted[-1] == 10
    wanted = [ray(view(10, 4), now)["p"] for now in range(100, 900)]
    falls = next(i for i, n in enumerate(wanted) if n < 10)
    assert 600 <= falls <= 640
    assert wanted[-1] == 2


def test_a_baselines_least_number_is_at_most_what_the_pool_may_have() -> None:
    for policy in (
        RayServe({"p": POOL}, min_replicas=1e3),
        QueueLength({"p": POOL}, 2, 300, 300, 1e3),
    ):
        assert policy(view(0, 0), 0)["p"] == POOL.max_replicas


def test_the_queue_length_rule_doubles_at_most_and_remembers_five_minutes() -> None:
    keda = QueueLength({"p": POOL}, target=2)
    assert keda(view(0, 0, 1), 1)["p"] == 0  # it decides every 30 s
    assert keda(view(0, 0, 100), 30)["p"] == 5
    assert keda(view(5, 10, 90), 45)["p"] == 10
    assert keda(view(10, 20, 80), 60)["p"] == 20
    for now in range(61, 360):
        assert keda(view(20, 4), now)["p"] == 20
    assert keda(view(20, 4), 375)["p"] == 2
    for now in range(376, 2000):
        wanted = keda(view(2, 0), now)["p"]
    assert wanted == 0


def test_the_oracle_has_replicas_ready_before_they_are_needed() -> None:
    arrivals = [(1000.0 + i / 10, 1.0) for i in range(3000)]
    oracle = Oracle({"p": POOL}, arrivals, 2000, start_s=60, spare=0.0, window_s=10)
    wanted = [oracle(view(0, 0), float(now))["p"] for now in range(2000)]
    assert wanted[925] == 0  # not earlier than a start and half a window before
    assert wanted[945] == 10
    assert wanted[1290] == 10
    assert wanted[1320] == 0


def test_most_ahead_is_the_maximum_of_the_next_values() -> None:
    assert most_ahead([1, 5, 2, 0, 0, 3], 1) == [5, 5, 2, 0, 3, 3]


def test_the_global_random_state_does_not_change_a_simulation() -> None:
    random.seed(1)
    first = run(poisson(2.0, 100), static(2))
    random.seed(2)
    assert run(poisson(2.0, 100), static(2)) == first
