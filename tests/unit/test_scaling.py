"""The load that the Dispatcher gives the policy, and how it applies the decision."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig

from autoscaling import ray_default
from autoscaling.load import Follower, Load, PolicyTuning, PoolBounds, ScalingLimits
from autoscaling.policy import PolicyState, ScalingDecision
from autoscaling.ray_policy import replicas
from autoscaling.report import ScalingReport, publish
from cluster.placement import PRECISION_LABEL, Node, NodeRequirement
from cluster.room import Room
from serve.dispatch.admission import Admission
from serve.dispatch.grants import Grants
from serve.dispatch.protocol import (
    AdmissionRequest,
    Granted,
    Heartbeat,
    Lease,
    Release,
)
from serve.dispatch.ray_default_scaling import RayDefaultScaling
from serve.dispatch.scaling import Scaling
from serve.settings.serve_config import ADAPTERS

from ..builders import queued_image

BOTH = ("fp8", "fp16")
POOLS = {"fp8": PoolBounds("m", 0, 4, 2), "fp16": PoolBounds("m", 0, 2, 2)}


@pytest.fixture(autouse=True)
def _nothing_published() -> None:
    """Begin like a new process of Ray Serve's controller."""
    publish(ScalingReport())


class ScalingHarness:
    """An Admission, its Grants and a Scaling, with replicas that send heartbeats."""

    def __init__(
        self, limits: ScalingLimits | None = None, scaling: type[Scaling] = Scaling
    ) -> None:
        self.grants = Grants(session_lease_s=1e9, replica_lease_s=1e9)
        self.grants.set_pools(POOLS)
        self.admission = Admission(self.grants, max_queued=1000)
        limits = limits or ScalingLimits(POOLS, tuning=PolicyTuning(hold_s=2))
        self.scaling = scaling(self.grants, self.admission, 0.0)
        self.scaling.set_limits(limits)
        self.grants.open("s", 0)
        self.calls = 0

    def open_call(self, now: float, work_s: float = 1.0, pools: tuple[str, ...] = BOTH) -> None:
        self.calls += 1
        call_id = f"c{self.calls}"
        image = queued_image(f"e{self.calls}", pools, work_s, call_id=call_id)
        request = AdmissionRequest(call_id, "t", f"id{self.calls}", (image,), 60.0, work_s)
        assert not self.admission.open("s", request, now).refusal
        self.grants.submit("s", image, "t", now)

    def replica(
        self,
        pool: str,
        name: str,
        node: str = "n",
        speed: float = 1.0,
        now: float = 0.0,
        running: Sequence[Granted] = (),
    ) -> None:
        leases = [Lease(*one) for one in running]
        heartbeat = Heartbeat(pool, name, 2, speed=speed, node=node)
        self.grants.report_replica(heartbeat, now, leases)


def test_work_that_arrives_and_waits_makes_replicas_wanted() -> None:
    harness = ScalingHarness()
    assert harness.scaling.decide(0.0) == {}
    for _ in range(30):
        harness.open_call(1.0)
    harness.open_call(1.0, pools=("fp16",))
    load = harness.scaling.load(3.0)
    both, only = sorted(load.demands, key=lambda demand: -len(demand.pools))
    assert (both.pools, both.arrived_s, both.squares) == (BOTH, 30.0, 30.0)
    assert (both.queued_s, both.oldest_wait_s) == (30.0, 2.0)
    assert (only.pools, only.queued_s) == (("fp16",), 1.0)
    assert load.open_requests == 31
    reasons = harness.scaling.decide(3.0)
    assert harness.scaling.replicas["fp8"] == 4
    assert reasons["fp8"].startswith("0 → 4 replicas")
    assert harness.scaling.reasons == reasons
    wanted = {
        "Generator-fp8": 4.0,
        "Generator-fp16": float(harness.scaling.replicas["fp16"]),
    }
    assert harness.scaling.report() == ScalingReport(wanted=wanted)


def test_work_that_arrives_before_the_first_decision_has_a_rate() -> None:
    harness = ScalingHarness()
    for _ in range(30):
        harness.open_call(3.0)
    harness.scaling.decide(7.0)
    reason = harness.scaling.reasons["fp8"]
    assert reason.startswith("0 → 4 replicas (for what arrives): 4.29 s of work arrive a second")


def test_before_the_first_decision_only_minimum_replicas_are_reported() -> None:
    harness = ScalingHarness(
        ScalingLimits({"fp8": PoolBounds("m", 2, 4, 2), "fp16": POOLS["fp16"]})
    )
    least = {"Generator-fp8": 2.0, "Generator-fp16": 0.0}
    assert harness.scaling.report() == ScalingReport(at_least=least)


def test_granted_work_no_longer_waits_but_has_arrived() -> None:
    harness = ScalingHarness()
    harness.replica("fp8", "r", speed=0.5)
    harness.scaling.decide(0.0)
    for _ in range(2):
        harness.open_call(1.0)
    harness.grants.grant(0.0)
    load = harness.scaling.load(2.0)
    assert load.demands[0].arrived_s == 2.0
    assert load.demands[0].queued_s == load.demands[0].oldest_wait_s == 0.0
    assert load.supplies["fp8"].ready == 1
    assert load.supplies["fp8"].speed == 0.5


def test_replicas_in_excess_are_granted_nothing_until_they_are_gone() -> None:
    harness = ScalingHarness()
    for name in "abc":
        harness.replica("fp8", name)
    assert harness.grants.staying("fp8").slots == 6
    harness.grants.keep("fp8", 1, 1.0)
    assert harness.grants.staying("fp8").slots == 2
    for _ in range(9):
        harness.open_call(0.0)
    assert len(harness.grants.grant(0.0)) == 2
    harness.grants.keep("fp8", 3, 2.0)  # Serve stops the others nevertheless
    assert harness.grants.grant(0.0) == []
    harness.replica("fp8", "d", now=3.0)
    assert len(harness.grants.grant(0.0)) == 2


def three_replicas(decisions: Sequence[int]) -> ScalingHarness:
    """A pool of three replicas, of which the policy wants these numbers, one after the other."""
    wanted = iter(decisions)

    class Scripted(Scaling):
        @staticmethod
        def policy(_: Load, __: ScalingLimits, state: PolicyState, ___: float) -> ScalingDecision:
            return ScalingDecision({"fp8": next(wanted), "fp16": 0}, state, {})

    harness = ScalingHarness(scaling=Scripted)
    for name in "abc":
        harness.replica("fp8", name)
    return harness


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [
        ([3, 3, 3, 1, 3, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3, 3, 3, 1]),
        ([1, 1, 1, 1, 3, 3, 3, 3, 3], [3] * 9),  # right after a start
    ],
)
def test_a_momentary_decision_takes_no_grants_from_replicas(
    decisions: list[int], expected: list[int]
) -> None:
    """Ray Serve may never have read the momentary decision, and then stops nothing."""
    harness = three_replicas(decisions)
    staying = []
    for second in range(9):
        harness.scaling.decide(float(second))
        staying.append(harness.grants.staying("fp8").replicas)
    assert staying == expected


@pytest.mark.parametrize(
    ("stopping", "wanted_later", "slots"),
    [(0, 3, 6), (1, 3, 2), (0, 2, 2)],  # forgotten; carried out; still wanted
)
def test_a_decision_that_ray_serve_never_carried_out_is_undone(
    stopping: int, wanted_later: int, slots: int
) -> None:
    harness = three_replicas([1] * 8 + [wanted_later] * 5)
    found = []
    for second in range(13):
        harness.scaling.decide(float(second))
        harness.scaling.restore({"Generator-fp8": stopping}, float(second))
        found.append(harness.grants.staying("fp8").slots)
    assert (found[6:12], found[12]) == ([2] * 6, slots)


def test_images_on_leaving_replicas_take_no_slots_of_the_others() -> None:
    harness = ScalingHarness()
    harness.replica("fp8", "a", node="stays")
    harness.replica("fp8", "b", node="goes")
    for _ in range(9):
        harness.open_call(0.0)
    granted = sorted(harness.grants.grant(0.0), key=lambda one: one.replica)
    assert [one.replica for one in granted] == ["a", "a", "b", "b"]
    harness.grants.set_draining(frozenset({"goes"}), 0.0)
    assert harness.grants.grant(0.0) == []
    harness.grants.release("s", Release(granted[0].image_id, 1.0), 1.0)
    assert len(harness.grants.grant(0.0)) == 1
    harness.grants.release("s", Release(granted[2].image_id, 1.0), 1.0)  # on the draining node
    assert harness.grants.grant(0.0) == []


def test_the_replicas_that_ray_serve_stops_first_count_as_leaving() -> None:
    """Serve stops those on the nodes with the fewest replicas, and there the newest."""
    harness = ScalingHarness()
    for second, (name, node) in enumerate([("a", "m"), ("b", "n"), ("c", "n"), ("d", "n")]):
        harness.replica("fp8", name, node=node, now=float(second))
    harness.grants.keep("fp8", 2, 4.0)
    for _ in range(9):
        harness.open_call(4.0)
    granted = harness.grants.grant(4.0)
    assert {one.replica for one in granted} == {"b", "c"}
    assert len(granted) == 4


def test_heartbeats_of_pools_that_no_longer_exist_are_ignored() -> None:
    harness = ScalingHarness()
    harness.replica("renamed", "old")
    assert harness.grants.replicas("renamed") == []


def test_a_new_dispatcher_removes_no_replica_within_the_hold_time() -> None:
    harness = ScalingHarness(ScalingLimits(POOLS, tuning=PolicyTuning(hold_s=60)))
    for name in "abc":
        harness.replica("fp8", name)
    for second in range(50):
        harness.scaling.decide(second)
        assert set(harness.scaling.report().at_least) == {"Generator-fp8", "Generator-fp16"}
        assert harness.scaling.report().wanted == {}
    assert harness.grants.staying("fp8").slots == 6


def test_a_draining_node_is_granted_nothing_and_its_replicas_are_no_supply() -> None:
    harness = ScalingHarness()
    harness.replica("fp8", "a", node="stays")
    harness.replica("fp8", "b", node="goes")
    harness.grants.set_draining(frozenset({"goes"}), 0.0)
    assert harness.grants.staying("fp8").slots == 2
    assert harness.scaling.load(0.0).supplies["fp8"].ready == 1


def test_pools_wait_for_nodes_that_may_be_added_until_they_are_given_up() -> None:
    fixed = ScalingHarness()
    fixed.scaling.placeable = frozenset({"fp16"})
    assert not fixed.scaling.may_come("fp8")
    elastic = ScalingHarness(ScalingLimits(POOLS, tuning=PolicyTuning(node_wait_s=60)))
    elastic.scaling.placeable = frozenset({"fp16"})
    elastic.scaling.decide(0.0)
    elastic.open_call(1.0, pools=("fp8",))
    for second in range(1, 60):
        elastic.scaling.decide(second)
        assert elastic.scaling.may_come("fp8")
    for second in range(60, 70):
        elastic.scaling.decide(second)
    assert not elastic.scaling.may_come("fp8")
    assert elastic.scaling.replicas["fp8"] > 0  # so that a node may still be added


def test_tuning_changes_what_is_decided_from_then_on() -> None:
    harness = ScalingHarness()
    harness.scaling.decide(0.0)
    harness.open_call(0.5, work_s=0.01)
    harness.scaling.decide(1.0)
    assert harness.scaling.replicas["fp8"] == 1
    harness.scaling.set_limits(ScalingLimits(POOLS, tuning=PolicyTuning(warm_reserve=2)))
    harness.scaling.decide(2.0)
    assert harness.scaling.replicas["fp8"] == 3


def test_followers_are_reported_by_their_own_names() -> None:
    harness = ScalingHarness(
        ScalingLimits(POOLS, {"Ingress": Follower(1, 3, each=10)}, PolicyTuning(hold_s=1))
    )
    harness.scaling.decide(0.0)
    for _ in range(25):
        harness.open_call(0.0)
    assert harness.scaling.decide(1.0)["Ingress"].startswith("1 → 3 replicas")
    assert harness.scaling.report().wanted["Ingress"] == 3.0


def test_ray_serves_own_policy_gets_the_number_of_requests() -> None:
    harness = ScalingHarness(scaling=RayDefaultScaling)
    assert harness.scaling.decide(0.0) == {}
    harness.replica("fp8", "r")
    for _ in range(5):
        harness.open_call(0.0)
    harness.grants.grant(0.0)
    harness.open_call(0.0, pools=("fp16",))
    assert harness.scaling.report() == ScalingReport(
        at_least={"Generator-fp8": 0.0, "Generator-fp16": 0.0},
        requests={"Generator-fp8": 5.0, "Generator-fp16": 1.0},
    )
    harness.scaling.placeable = frozenset({"fp16"})
    # Queued requests count for the placeable pool.
    assert harness.scaling.report().requests["Generator-fp16"] == 4.0


# -- Ray Serve's side -----------------------------------------------------------------------------


class Deployment(NamedTuple):
    name: str


class Sample(NamedTuple):
    timestamp: float
    value: float


class Context:
    """The parts of Ray Serve's context that Octet's policy reads."""

    def __init__(self, current: int = 0, target: int = 0, **reported: list[tuple[float, float]]):
        self.current_num_replicas, self.target_num_replicas = current, target
        self.total_num_requests = 0.0
        self.policy_state: dict[str, Any] = {}
        self.config = AutoscalingConfig(min_replicas=0, max_replicas=9, target_ongoing_requests=2)
        self.capacity_adjusted_min_replicas, self.capacity_adjusted_max_replicas = 0, 9
        # The names of `as_stats`.
        series = {name.replace("__", "/"): pairs for name, pairs in reported.items()}
        self.raw_metrics: Any = {
            name: {"replica": [Sample(*pair) for pair in pairs]} for name, pairs in series.items()
        }
        self.aggregated_metrics = {
            name: {"replica": sum(value for _, value in pairs) / len(pairs)}
            for name, pairs in series.items()
            if pairs
        }


def contexts(target: int = 2, current: int = 2, **reported: list[tuple[float, float]]) -> Any:
    return {
        Deployment("Dispatcher"): Context(1, 1, **reported),
        Deployment("pool"): Context(current, target),
    }


def test_the_newest_number_counts_and_not_the_mean() -> None:
    found = contexts(replicas__pool=[(1.0, 9.0), (3.0, 4.0), (2.0, 7.0)])
    assert replicas(found) == ({Deployment("pool"): 4.0}, {})


def test_deployments_that_stay_at_zero_are_left_out_and_those_that_go_to_zero_are_not() -> None:
    assert replicas(contexts(target=0, current=0, replicas__pool=[(1.0, 0.0)]))[0] == {}
    going = contexts(target=1, replicas__pool=[(1.0, 0.0)])
    assert replicas(going)[0] == {Deployment("pool"): 0.0}


def test_minimum_replicas_never_reduce_a_deployment() -> None:
    assert replicas(contexts(target=0, least__pool=[(1.0, 2.0)]))[0] == {Deployment("pool"): 2.0}
    assert replicas(contexts(target=5, least__pool=[(1.0, 2.0)]))[0] == {Deployment("pool"): 5}
    assert replicas(contexts(target=0, current=0, least__pool=[(1.0, 0.0)]))[0] == {}
    decided = contexts(target=5, least__pool=[(1.0, 2.0)], replicas__pool=[(2.0, 3.0)])
    assert replicas(decided)[0] == {Deployment("pool"): 3.0}


def test_the_policies_of_other_applications_take_what_the_dispatchers_has_published() -> None:
    pool = {Deployment("pool"): contexts()[Deployment("pool")]}
    assert replicas(pool) == ({}, {})
    replicas(contexts(replicas__pool=[(1.0, 4.0)]))
    assert replicas(pool) == ({Deployment("pool"): 4.0}, {})
    # Without a Dispatcher the numbers stay: it may have moved to another node.
    replicas({Deployment("Dispatcher"): Context(0, 1)})
    assert replicas(pool) == ({Deployment("pool"): 4.0}, {})
    ray_default.replicas(contexts(requests__pool=[(1.0, 6.0)]))
    assert ray_default.replicas(pool)[0] == {Deployment("pool"): 3.0}


def test_without_numbers_every_deployment_keeps_its_replicas() -> None:
    assert replicas(contexts()) == ({}, {})
    assert replicas(contexts(replicas__pool=[])) == ({}, {})
    assert replicas({}) == ({}, {})


def test_the_policies_never_raise(caplog: pytest.LogCaptureFixture) -> None:
    broken = contexts()
    broken[Deployment("Dispatcher")].raw_metrics = None
    for policy in (replicas, ray_default.replicas):
        assert policy(broken) == ({}, {})
        assert policy({None: None}) == ({}, {})


def test_ray_serves_own_policy_decides_on_the_requests_of_the_dispatcher() -> None:
    found = contexts(requests__pool=[(1.0, 4.0), (2.0, 16.0)])
    # A mean of 10 requests, 2 per replica.
    assert ray_default.replicas(found)[0] == {Deployment("pool"): 5.0}
    asleep = contexts(target=0, current=0, requests__pool=[(1.0, 3.0)])
    assert ray_default.replicas(asleep)[0] == {Deployment("pool"): 1}


def test_ray_serve_applies_octets_policy_at_once_and_its_own_after_a_delay() -> None:
    as_applied = _apply_app_level_autoscaling_config(replicas)
    at_once = AutoscalingConfig(min_replicas=0, max_replicas=9, **ADAPTERS["queued-work"].delays)
    for target, wanted in ((2, 5.0), (5, 1.0), (1, 0.0)):
        found = contexts(target=target, replicas__pool=[(1.0, wanted)])
        found[Deployment("pool")].config = at_once
        assert as_applied(found)[0] == {Deployment("pool"): wanted}
    # Ray Serve never goes from several replicas to none at once, but to one first.
    found = contexts(target=5, replicas__pool=[(1.0, 0.0)])
    found[Deployment("pool")].config = at_once
    assert as_applied(found)[0] == {Deployment("pool"): 1}

    as_applied = _apply_app_level_autoscaling_config(ray_default.replicas)
    found = contexts(target=2, requests__pool=[(1.0, 10.0)])
    now, states = as_applied(found)
    assert now == {Deployment("pool"): 2}
    remembered = states[Deployment("pool")]
    (since,) = (value for key, value in remembered.items() if "timestamp" in key)
    later = contexts(target=2, requests__pool=[(1.0, 10.0)])
    later[Deployment("pool")].policy_state = {
        key: since - 31 if "timestamp" in key else value for key, value in remembered.items()
    }
    assert as_applied(later)[0] == {Deployment("pool"): 5}


@given(
    st.dictionaries(st.text(min_size=1), st.floats(0, 99)),
    st.dictionaries(st.text(min_size=1), st.floats(0, 99)),
    st.dictionaries(st.text(min_size=1), st.floats(0, 99)),
)
def test_a_report_survives_ray_serves_dictionary(
    wanted: dict[str, float], at_least: dict[str, float], requests: dict[str, float]
) -> None:
    report = ScalingReport(wanted, at_least, requests)
    assert ScalingReport.from_stats({"other/name": 1.0, **report.as_stats()}) == report


def test_deployments_that_report_no_requests_follow_ray_serves_own_count() -> None:
    found = contexts(requests__pool=[(1.0, 4.0)])
    ingress = found[Deployment("Ingress")] = Context(1, 1)
    ingress.total_num_requests = 8.0
    assert ray_default.replicas(found)[0] == {Deployment("pool"): 2, Deployment("Ingress"): 4}


# -- pools that do not fit together ---------------------------------------------------------------

TWO_MODELS = {"a-fp8": PoolBounds("a", 0, 4, 2), "b-fp8": PoolBounds("b", 0, 4, 2)}


def room_of(cards: int, pools: Sequence[str]) -> Room:
    node = Node("n", {PRECISION_LABEL: "fp8"}, 64, cards)
    return Room([node], {pool: NodeRequirement("fp8", 1, 1) for pool in pools})


def crowded(
    pools: dict[str, PoolBounds], cards: int, demands: Sequence[tuple[str, ...]], **tuning: Any
) -> tuple[Scaling, dict[str, str]]:
    """The decision for demands of a lot of work each, on this many cards; and its reasons."""
    harness = ScalingHarness(ScalingLimits(pools, tuning=PolicyTuning(hold_s=2, **tuning)))
    harness.grants.set_pools(pools)
    harness.scaling.room = room_of(cards, list(pools))
    harness.scaling.decide(1)
    for wanted in demands:
        for _ in range(40):
            harness.open_call(1.5, pools=wanted)
    return harness.scaling, dict(harness.scaling.decide(2))


def test_pools_that_fit_alone_but_not_together_share_what_there_is() -> None:
    scaling, reasons = crowded(TWO_MODELS, 3, [("a-fp8",), ("b-fp8",)])
    assert dict(scaling.replicas) == {"a-fp8": 2, "b-fp8": 1}
    assert reasons == {
        "a-fp8": "2 of 4 wanted replicas: the nodes hold no more beside 1 b-fp8",
        "b-fp8": "1 of 4 wanted replicas: the nodes hold no more beside 2 a-fp8",
    }
    scaling, reasons = crowded(TWO_MODELS, 8, [("a-fp8",), ("b-fp8",)])
    assert dict(scaling.replicas) == {"a-fp8": 4, "b-fp8": 4}
    assert not any("hold no more" in reason for reason in reasons.values())


def test_a_model_that_has_all_cards_gives_one_up_for_a_model_that_has_none() -> None:
    harness = ScalingHarness(ScalingLimits(TWO_MODELS, tuning=PolicyTuning(hold_s=2)))
    harness.grants.set_pools(TWO_MODELS)
    harness.scaling.room = room_of(3, list(TWO_MODELS))
    harness.scaling.decide(1)
    for _ in range(40):
        harness.open_call(1.5, pools=("a-fp8",))
    harness.scaling.decide(2)
    assert dict(harness.scaling.replicas) == {"a-fp8": 3, "b-fp8": 0}
    harness.open_call(2.5, pools=("b-fp8",))
    harness.scaling.decide(3)
    assert dict(harness.scaling.replicas) == {"a-fp8": 2, "b-fp8": 1}


@pytest.mark.parametrize("first", [0, 1])
def test_small_changes_of_what_is_needed_move_no_card(first: int) -> None:
    harness = ScalingHarness(ScalingLimits(TWO_MODELS, tuning=PolicyTuning(hold_s=2)))
    harness.grants.set_pools(TWO_MODELS)
    harness.scaling.room = room_of(3, list(TWO_MODELS))
    harness.scaling.decide(1)
    splits = set()
    for i in range(40):
        pool = ("a-fp8", "b-fp8")[(i // 3 + first) % 2]
        for _ in range(20):
            harness.open_call(1.1 + i, pools=(pool,))
        harness.scaling.decide(2 + i)
        if i > 6:
            splits.add(tuple(harness.scaling.replicas.values()))
    assert len(splits) == 1
    assert sum(splits.pop()) == 3


def test_replicas_that_are_only_kept_give_way_to_work_that_waits() -> None:
    harness = ScalingHarness(ScalingLimits(TWO_MODELS, tuning=PolicyTuning(hold_s=2, idle_s=1e6)))
    harness.grants.set_pools(TWO_MODELS)
    harness.scaling.room = room_of(1, list(TWO_MODELS))
    harness.replica("a-fp8", "r1")
    for now in (1, 2, 6):
        harness.scaling.decide(now)
    assert dict(harness.scaling.replicas) == {"a-fp8": 1, "b-fp8": 0}, "a replica is kept, idle"
    harness.open_call(6.5, pools=("b-fp8",))
    harness.scaling.decide(7)
    assert dict(harness.scaling.replicas) == {"a-fp8": 0, "b-fp8": 1}


def test_what_is_given_up_is_said_once_and_so_is_its_end() -> None:
    scaling, _ = crowded(TWO_MODELS, 3, [("a-fp8",), ("b-fp8",)])
    assert not scaling.decide(3)
    scaling.room = room_of(5, list(TWO_MODELS))
    assert scaling.decide(4)["b-fp8"].startswith("2 of 4 wanted replicas")
    scaling.room = room_of(8, list(TWO_MODELS))
    assert "hold no more" not in "".join(scaling.decide(5).values())
    assert not any("hold no more" in reason for reason in scaling.reasons.values())


def test_other_deployments_have_their_place_first() -> None:
    harness = ScalingHarness(ScalingLimits(TWO_MODELS, tuning=PolicyTuning(hold_s=2)))
    harness.grants.set_pools(TWO_MODELS)
    harness.scaling.room = room_of(4, [*TWO_MODELS, "encoders"])
    harness.scaling.others = {"encoders": 2}
    harness.scaling.decide(1)
    for _ in range(40):
        harness.open_call(1.5, pools=("a-fp8",))
    harness.scaling.decide(2)
    assert harness.scaling.replicas["a-fp8"] == 2


@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=12),
)
def test_never_more_is_ordered_than_the_cards_hold(
    cards: list[int], work: list[tuple[int, int]]
) -> None:
    pools = {n: PoolBounds(n[0], 0, 4, 2) for n in ("a-1", "a-2", "b-1", "b-2")}
    demands = [("a-1", "a-2"), ("a-2",), ("b-1", "b-2"), ("b-2", "b-1")]
    harness = ScalingHarness(ScalingLimits(pools, tuning=PolicyTuning(hold_s=2)))
    harness.grants.set_pools(pools)
    for turn, number in enumerate(cards):
        harness.scaling.room = room_of(number, list(pools))
        for demand, images in work:
            for _ in range(images):
                harness.open_call(turn + 0.5, pools=demands[demand])
        harness.scaling.decide(turn + 1)
        assert sum(harness.scaling.replicas.values()) <= number


def test_demand_that_finds_no_room_goes_on_to_the_next_pool() -> None:
    pools = {"a-fp8": PoolBounds("a", 0, 4, 2), "a-cpu": PoolBounds("a", 0, 4, 2)}
    scaling, _ = crowded(pools, 2, [("a-fp8", "a-cpu")])
    assert dict(scaling.replicas) == {"a-fp8": 2, "a-cpu": 0}, "the preferred pool has all cards"
    harness_room = Room(
        [Node("n", {PRECISION_LABEL: "fp8"}, 64, 2)],
        {"a-fp8": NodeRequirement("fp8", 1, 1), "a-cpu": NodeRequirement("fp16", 1, 0)},
    )
    scaling.room = harness_room
    scaling.decide(3)
    assert scaling.replicas["a-fp8"] == 2
    assert scaling.replicas["a-cpu"] >= 2


def test_orders_are_what_nodes_are_added_for() -> None:
    scaling, _ = crowded(TWO_MODELS, 3, [("a-fp8",), ("b-fp8",)], node_wait_s=60)
    assert dict(scaling.replicas) == {"a-fp8": 4, "b-fp8": 4}


def test_a_shortage_takes_nothing_from_what_follows() -> None:
    followers = {"encoders": Follower(1, 4, pools=tuple(TWO_MODELS))}
    harness = ScalingHarness(
        ScalingLimits(TWO_MODELS, followers, PolicyTuning(hold_s=2)),
    )
    harness.grants.set_pools(TWO_MODELS)
    harness.scaling.room = room_of(0, list(TWO_MODELS))
    harness.scaling.decide(1)
    harness.open_call(1.5, pools=("a-fp8",))
    harness.scaling.decide(2)
    assert dict(harness.scaling.replicas) == {"a-fp8": 0, "b-fp8": 0, "encoders": 1}
