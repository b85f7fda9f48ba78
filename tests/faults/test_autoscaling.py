"""A pool from nothing to several replicas and back on real Ray, through a drain and updates, under
load over HTTP: no request fails.

Replicas only wait in the place of drawing (`bench.timed`), so that two cores are enough.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve import launch
from serve.launch import Running
from serve.settings import Settings
from serve.settings_file import load_settings

from ..integration.conftest import ROOT, free_port
from .conftest import STORE_BYTES, landed, wait_for

POOL = "landscapes-fp8"
SETTINGS = {
    "OCTET_MODELS__0__POOLS__0__REPLICAS": "2",
    "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": "0",
    "OCTET_MODELS__0__POOLS__0__NUM_GPUS": "0.5",
    "OCTET_MODELS__0__POOLS__0__SLOTS": "2",
    "OCTET_MODELS__0__POOLS__1__MIN_REPLICAS": "0",
    "OCTET_AUTOSCALING__TARGET_WAIT_S": "2",
    "OCTET_AUTOSCALING__HOLD_S": "3",
    "OCTET_AUTOSCALING__IDLE_S": "3",
}


class Load:
    """So many clients, each with one request after the other; and what they were answered."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self._threads: list[threading.Thread] = []
        self.answers: Counter[int | str] = Counter()

    def start(self, clients: int) -> None:
        self._stop.clear()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        body = {"prompt": "dunes", "num_inference_steps": 20}
        with httpx.Client(timeout=60) as client:
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
def octet(cluster: Any, deploy: Callable[[Settings], Running]) -> Iterator[Running]:
    for _ in range(2):
        cluster.add_node(
            num_cpus=2,
            num_gpus=2,
            labels={"ray.io/accelerator-type": "H100"},
            object_store_memory=STORE_BYTES,
        )
    patch = pytest.MonkeyPatch()
    config = launch.serve_config

    def timed(settings: Settings) -> Any:
        found = config(settings)
        found["applications"][0]["import_path"] = "bench.timed:build"
        return found

    patch.setattr(launch, "serve_config", timed)
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
    yield running
    patch.undo()


PORT = free_port()


def laptop(**changes: str) -> Settings:
    environ = {**SETTINGS, **changes, "OCTET_HTTP__PORT": str(PORT)}
    return load_settings(ROOT / "examples" / "laptop.yaml", environ)


def drain(node_id: str) -> None:
    """As KubeRay or a spot notice does: the node will go in a minute."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 60) * 1000)
    accepted, why = client.drain_node(node_id, reason, "spot notice", deadline_ms)
    assert accepted, why


def generators() -> dict[str, str]:
    """Living replicas, and the nodes that they are on."""
    import ray

    return {
        actor["Name"]: actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if actor["State"] == "ALIVE" and f"#Generator-{POOL}#" in (actor["Name"] or "")
    }


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_from_zero_and_back_through_a_drain_and_updates(octet: Running, folder: Path) -> None:
    url = octet.url

    def pool() -> dict[str, Any]:
        """Nothing while the Dispatcher restarts."""
        ready: dict[str, Any] = httpx.get(f"{url}/ready", timeout=10).json()
        return ready["models"]["landscapes"][POOL] or dict.fromkeys(("replicas", "wanted"))

    # Asleep: nothing runs, and the server is ready all the same.
    assert httpx.get(f"{url}/ready", timeout=10).status_code == 200
    assert pool()["replicas"] == pool()["wanted"] == 0
    assert landed() == {}

    # Four clients at a time need two replicas of two slots.
    load = Load(url)
    load.start(4)
    wait_for(lambda: pool()["replicas"] == 2)
    assert pool()["reason"].startswith(("0 → 2 replicas: ", "1 → 2 replicas: "))
    logs = "\n".join(log.read_text() for log in folder.glob("session_*/logs/serve/*Dispatcher*"))
    assert f"{POOL}: 0 → " in logs

    # Ray Serve fills one node before the next; that one is drained.
    (full,) = set(generators().values())
    drain(full)
    wait_for(lambda: full not in generators().values())
    wait_for(lambda: pool()["replicas"] == 2)
    assert full not in generators().values()

    # Settings that restart nothing, then settings that restart every replica.
    before = generators()
    octet.apply(laptop(OCTET_MAX_QUEUED="500"))
    time.sleep(1)
    assert generators() == before
    octet.apply(laptop(OCTET_MODELS__0__MAX_SEQUENCE_LENGTH="31"))
    wait_for(lambda: generators() and not generators().keys() & before.keys())
    time.sleep(2)
    load.end()
    assert load.answers.keys() == {200}, load.answers
    assert load.answers[200] > 25

    # Nothing to do.
    wait_for(lambda: pool()["wanted"] == 0 and not generators())
    assert httpx.get(f"{url}/ready", timeout=10).status_code == 200
