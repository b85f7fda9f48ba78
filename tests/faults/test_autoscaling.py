"""Test that a pool scales from 0 to 2 replicas and back on real Ray, and that no request fails.

Clients put load on the pool over HTTP. Meanwhile nodes come late, the Dispatcher dies, a node is
drained and settings change. Replicas only wait instead of generating (`bench.timed`), so that two
cores are enough.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.launch import RunningApplication
from serve.settings.application import Settings
from serve.settings.file import load_settings

from ..builders import ROOT
from ..ports import free_port
from ..wait import wait_for
from .conftest import add_node, dispatchers_log, landed

POOL = "landscapes-fp8"
SETTINGS = {
    "OCTET_MODELS__0__POOLS__0__REPLICAS": "2",
    "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": "0",
    "OCTET_MODELS__0__POOLS__0__NUM_GPUS": "1",
    "OCTET_MODELS__0__POOLS__0__SLOTS": "2",
    "OCTET_MODELS__0__POOLS__1__MIN_REPLICAS": "0",
    "OCTET_AUTOSCALING__NODE_WAIT_S": "60",
    "OCTET_AUTOSCALING__UTILISATION": "1",
    "OCTET_AUTOSCALING__SPARE": "0",
    "OCTET_AUTOSCALING__TARGET_WAIT_S": "2",
    "OCTET_AUTOSCALING__HOLD_S": "3",
    "OCTET_AUTOSCALING__IDLE_S": "1",
    "OCTET_AUTOSCALING__LATE_PART": "1",  # else a second replica stays wanted, without a card
}


class Load:
    """Clients that each send one request after the other, until `end`.

    `answers`: how often the clients got each HTTP status or each connection error.
    """

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self._threads: list[threading.Thread] = []
        self.answers: Counter[int | str] = Counter()

    def start(self, clients: int) -> None:
        self._stop.clear()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        body = {"prompt": "dunes", "num_inference_steps": 20}
        with httpx.Client(timeout=120) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{self._url}/v1/images/generations", json=body)
                    self.answers[answer.status_code] += 1
                except httpx.HTTPError as error:
                    self.answers[type(error).__name__] += 1

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def octet(cluster: Any, deploy: Callable[[Settings], RunningApplication]) -> RunningApplication:
    """The application on a cluster without a node that could hold a Generator replica."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray import serve

        settings = laptop()
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.http.host, "port": settings.http.port},
        )
        running = deploy(settings)
        running.wait()
    return running


PORT = free_port()


def laptop(**changes: str) -> Settings:
    environ = {**SETTINGS, **changes, "OCTET_HTTP__PORT": str(PORT)}
    return load_settings(ROOT / "examples" / "laptop.yaml", environ)


def gcs() -> Any:
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it has no types

    return GcsClient(address=ray.get_runtime_context().gcs_address)


def demanded() -> list[tuple[dict[str, float], dict[str, list[str]]]]:
    """The resources and labels of replicas that wait for a node, as Ray's autoscaler sees them."""
    from ray.core.generated import autoscaler_pb2

    state = autoscaler_pb2.GetClusterResourceStateReply()
    state.ParseFromString(gcs().get_cluster_resource_state())
    return [
        (
            dict(one.request.resources_bundle),
            {
                constraint.label_key: list(constraint.label_values)
                for selector in one.request.label_selectors
                for constraint in selector.label_constraints
            },
        )
        for one in state.cluster_resource_state.pending_resource_requests
    ]


def add_card(cluster: Any) -> None:
    """Add a node with room for one replica."""
    add_node(cluster, num_cpus=2, num_gpus=1, labels={"ray.io/accelerator-type": "H100"})


def drain(node_id: str) -> None:
    """Announce that a node ends in a minute, as KubeRay or a spot notice does."""
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 60) * 1000)
    accepted, why = gcs().drain_node(node_id, reason, "spot notice", deadline_ms)
    assert accepted, why


def living(deployment: str) -> dict[str, Any]:
    """Ray's descriptions of the living replicas of a deployment, by name."""
    import ray

    return {
        actor["Name"]: actor
        for actor in ray._private.state.actors().values()
        if actor["State"] == "ALIVE" and f"#{deployment}#" in (actor["Name"] or "")
    }


def generators() -> dict[str, str]:
    """The node of each living replica of the pool, by the replica's name."""
    replicas = living(f"Generator-{POOL}")
    return {name: actor["Address"]["NodeID"] for name, actor in replicas.items()}


@pytest.mark.filterwarnings("ignore")  # Ray's own warnings
def test_no_request_fails_while_a_pool_scales_from_zero_and_back(
    cluster: Any, octet: RunningApplication, folder: Path
) -> None:
    url = octet.url

    def pool() -> dict[str, Any]:
        """The pool in the answer of `/ready`; all values are None while the Dispatcher restarts."""
        ready: dict[str, Any] = httpx.get(f"{url}/ready", timeout=60).json()
        return ready["models"]["landscapes"][POOL] or dict.fromkeys(("replicas", "wanted"))

    # The pool sleeps: no replica runs, and the server is ready nevertheless.
    wait_for(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200)
    assert pool()["replicas"] == pool()["wanted"] == 0
    assert landed() == {}

    # The clients need two replicas of two slots. Ray asks for nodes to hold these replicas.
    busy, steady = Load(url), Load(url)
    busy.start(6)
    steady.start(2)
    wait_for(lambda: pool()["wanted"] == 2 and len(demanded()) > 0)  # Ray may not list all
    for resources, labels in demanded():
        assert resources["GPU"] == 1
        assert "H100" in labels["ray.io/accelerator-type"]
        assert "A100" not in labels["ray.io/accelerator-type"]
    assert pool()["reason"].startswith("0 → 2 replicas")
    logs = dispatchers_log(folder)
    assert f"{POOL}: 0 → " in logs

    # The nodes come, and the Dispatcher dies while replicas start.
    add_card(cluster)
    add_card(cluster)
    wait_for(lambda: bool(generators()))
    (dispatcher,) = living("Dispatcher").values()
    os.kill(dispatcher["Pid"], signal.SIGKILL)
    wait_for(lambda: pool()["replicas"] == 2)
    assert len(set(generators().values())) == 2

    # The load falls: one node becomes free and the other one goes on. Then the latter is drained.
    busy.end()
    wait_for(lambda: pool()["wanted"] == len(generators()) == 1)
    (full,) = set(generators().values())
    drain(full)
    wait_for(lambda: full not in generators().values())
    wait_for(lambda: pool()["wanted"] == pool()["replicas"] == len(generators()) == 1)
    assert full not in generators().values()

    # Settings change: first one that restarts nothing, then one that restarts every replica.
    before = generators()
    octet.apply(laptop(OCTET_MAX_QUEUED="500"))
    time.sleep(1)
    assert before.keys() <= generators().keys()
    octet.apply(laptop(OCTET_MODELS__0__MAX_SEQUENCE_LENGTH="31"))
    wait_for(lambda: bool(generators()) and not generators().keys() & before.keys())
    steady.end()
    answers = busy.answers + steady.answers
    assert answers.keys() == {200}, answers
    assert answers[200] > 20

    # The load ends, and the pool scales back to no replica.
    wait_for(lambda: pool()["wanted"] == 0 and not generators())
    wait_for(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200)
