"""Shadows run only in idle capacity, and make room for anything else."""

from __future__ import annotations

import pytest

from serve.dispatch.grants import Grants
from serve.dispatch.protocol import Heartbeat, Lease, QueuedImage, Release, RunningImage
from serve.dispatch.shadows import Shadows

FP8, FP16 = "m-fp8", "m-fp16"


class Cluster:
    """Grants of two pools and the shadows of one session, "s"; each pool has its own node."""

    def __init__(self, fp16_node: str = "b") -> None:
        self.grants = Grants(session_lease_s=10, replica_lease_s=10)
        self.grants.set_pools([FP8, FP16])
        self.grants.open("s", 0.0)
        self.shadows = Shadows(self.grants)
        self.beat(FP8, "a")
        self.beat(FP16, fp16_node)

    def beat(self, pool: str, node: str, card: str = "") -> None:
        heartbeat = Heartbeat(pool, f"{pool}-{node}", slots=2, node=node, card=card)
        self.grants.report_replica(heartbeat, 0.0)

    def ask(self, id: str = "shadow-1", pools: tuple[str, ...] = (FP16,)) -> None:
        self.shadows.ask("s", QueuedImage(pools, id=id))

    def run(self, pool: str, id: str = "1") -> None:
        """Grant an image of a client a slot of the pool."""
        self.grants.submit("s", QueuedImage((pool,), 1.0, id=id, call_id="c"), "t", 0.0)
        assert [granted.image_id for granted in self.grants.grant(0.0)] == [id]

    def begun(self) -> list[str]:
        return [granted.image_id for granted in self.shadows.begin(0.0)]

    def stopped(self) -> list[str]:
        return [stopped.image_id for stopped in self.shadows.stop()]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_a_shadow_runs_in_an_idle_pool_and_takes_no_slot(cluster: Cluster) -> None:
    cluster.ask()
    assert cluster.begun() == ["shadow-1"]
    assert cluster.grants.free_slots(FP16) == 2
    assert cluster.shadows.holds(Lease("s", "shadow-1", FP16, f"{FP16}-b"))
    assert not cluster.shadows.holds(Lease("s", "shadow-1", FP8, f"{FP8}-a"))
    assert cluster.stopped() == []


def test_a_shadow_waits_while_anything_runs_in_its_pool(cluster: Cluster) -> None:
    cluster.run(FP16)
    cluster.ask()
    assert cluster.begun() == []
    cluster.grants.release("s", Release("1", 1.0), 1.0)
    assert cluster.begun() == ["shadow-1"]


def test_an_image_of_a_client_stops_the_shadow(cluster: Cluster) -> None:
    cluster.ask()
    cluster.begun()
    cluster.run(FP16)
    assert cluster.stopped() == ["shadow-1"]
    assert not cluster.shadows.holds(Lease("s", "shadow-1", FP16, f"{FP16}-b"))
    assert cluster.stopped() == []


def test_work_on_another_node_stops_no_shadow(cluster: Cluster) -> None:
    cluster.ask()
    cluster.begun()
    cluster.run(FP8)
    assert cluster.stopped() == []


def test_work_beside_it_on_its_node_stops_a_shadow() -> None:
    cluster = Cluster(fp16_node="a")
    cluster.ask()
    assert cluster.begun() == ["shadow-1"]
    cluster.run(FP8)
    assert cluster.stopped() == ["shadow-1"]


def test_other_cards_of_its_node_do_not_count() -> None:
    cluster = Cluster(fp16_node="a")
    cluster.beat(FP8, "a", card="GPU-1")
    cluster.beat(FP16, "a", card="GPU-2")
    cluster.run(FP8)
    cluster.ask()
    assert cluster.begun() == ["shadow-1"]


def test_one_shadow_runs_in_a_pool_at_a_time(cluster: Cluster) -> None:
    cluster.ask("shadow-1")
    cluster.ask("shadow-2")
    assert cluster.begun() == ["shadow-1"]
    assert cluster.begun() == []
    cluster.shadows.release("s", "shadow-1")
    assert cluster.begun() == ["shadow-2"]


def test_without_a_replica_no_shadow_begins_and_none_is_wanted() -> None:
    cluster = Cluster()
    cluster.grants.expire_replicas(100.0)
    cluster.ask()
    assert cluster.begun() == []


def test_a_shadow_ends_with_its_session(cluster: Cluster) -> None:
    cluster.ask()
    cluster.begun()
    cluster.shadows.end_session("s")
    assert not cluster.shadows.holds(Lease("s", "shadow-1", FP16, f"{FP16}-b"))
    assert cluster.begun() == []


def test_an_image_that_ran_before_the_dispatchers_restart_counts(cluster: Cluster) -> None:
    cluster.grants.declare("s", RunningImage("9", "c", "t", FP16, 1.0), 0.0)
    cluster.ask()
    assert cluster.begun() == []
