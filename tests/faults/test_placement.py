"""Test of a cluster that mixes cards with and without FP8, while its nodes come and go.

The cards are fake and replicas only wait (`bench.timed`). The nodes on which replicas start and the
answers that clients get over HTTP are real.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve

from serve.dispatch.client.attempts import ATTEMPTS
from serve.launch import RunningApplication
from serve.settings.application import Settings
from serve.settings.file import load_settings

from ..builders import ROOT
from ..ports import free_port
from ..wait import wait_for
from .conftest import add_node, dispatchers_log, landed
from .deadly import DEADLY

FP8_CARD, ODD_CARD = "H100", "Odd-Card"
SETTINGS = {
    "OCTET_MODELS__0__POOLS__0__REPLICAS": "2",
    "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": "2",
    "OCTET_MODELS__0__POOLS__0__NUM_GPUS": "0.5",
    "OCTET_MODELS__0__POOLS__1__NUM_GPUS": "0.5",
    "OCTET_MODELS__0__POOLS__1__MIN_REPLICAS": "1",
}
FP8, FP16 = "Generator-landscapes-fp8", "Generator-landscapes-fp16"


def add_card(cluster: Any, card: str) -> Any:
    """Add a node with two of these cards."""
    return add_node(cluster, num_cpus=1, num_gpus=2, labels={"ray.io/accelerator-type": card})


def die(cluster: Any, node: Any, *deployments: str) -> None:
    """Kill a node as if it were unplugged: its raylet and the replicas of `deployments` at once."""
    pids = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any(f"ServeReplica:{name}:" in " ".join(process.cmdline()) for name in deployments)
    ]
    cluster.remove_node(node, allow_graceful=False)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def dead_generators() -> int:
    """The number of Generators that have died so far."""
    actors = ray._private.state.actors().values()
    return sum(a["State"] == "DEAD" and "#Generator-" in (a["Name"] or "") for a in actors)


def nodes_of(deployment: str) -> set[str]:
    """The nodes of a deployment's living replicas."""
    return {
        actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if actor["State"] == "ALIVE" and f"#{deployment}#" in (actor["Name"] or "")
    }


class Client:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(
        self, precision: str = "auto", steps: int = 1, guidance_scale: float = 3.0
    ) -> tuple[int, str]:
        """The HTTP status, and the precision of the image or the code of the error."""
        body = {
            "prompt": "dunes",
            "num_inference_steps": steps,
            "precision": precision,
            "guidance_scale": guidance_scale,
        }
        answer = httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=120)
        if answer.status_code == 200:
            return 200, answer.json()["data"][0]["precision"]
        return answer.status_code, answer.json()["error"]["code"]

    def ready(self) -> httpx.Response:
        return httpx.get(f"{self.url}/ready", timeout=60)

    def pool(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ready().json()["models"]["landscapes"][name]
        return found


@pytest.mark.filterwarnings("ignore")  # Ray warns while it starts
def test_requests_reach_the_right_pools_while_nodes_come_and_go(
    cluster: Any, folder: Path, deploy: Callable[[Settings], RunningApplication]
) -> None:
    environ = {**SETTINGS, "OCTET_HTTP__PORT": str(free_port())}
    settings = load_settings(ROOT / "examples" / "laptop.yaml", environ)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": settings.http.host, "port": settings.http.port},
    )
    octet = deploy(settings)
    news: list[str] = []

    # No node can hold any pool: the start ends nevertheless, and requests get an error.
    octet.wait(news.append)
    assert "Dispatcher: 1 of 1 replicas ready" in news
    assert news[-1] == f"going on without {FP8}, {FP16}: no room on any node"
    client = Client(octet.url)
    assert client.ask() == (503, "no_capacity")
    assert client.ready().status_code == 503

    # A node comes whose card is in no table. The card counts as having no FP8, and the log says
    # how to label the node.
    odd = add_card(cluster, ODD_CARD)
    wait_for(lambda: client.pool("landscapes-fp16")["replicas"] == 1)
    fp8 = client.pool("landscapes-fp8")
    assert (fp8["replicas"], fp8["placeable"]) == (0, False)
    assert client.ready().status_code == 200
    assert landed() == {FP16: Counter({ODD_CARD: 1})}
    assert client.ask() == (200, "fp16")
    assert client.ask("fp8") == (503, "no_capacity")
    logs = dispatchers_log(folder)
    assert f"unknown card {ODD_CARD}; it counts as having no FP8" in logs
    assert "octet/precision=fp8" in logs

    # A node with FP8 comes.
    fp8_node = add_card(cluster, FP8_CARD)
    wait_for(lambda: client.pool("landscapes-fp8")["replicas"] == 2)
    assert landed() == {FP8: Counter({FP8_CARD: 2}), FP16: Counter({ODD_CARD: 1})}
    assert client.ask() == (200, "fp8")
    assert client.ask("fp16") == (200, "fp16")

    # A request kills the replica in each of its attempts, and then no other replica. The images
    # that ran beside it are generated again. Its last attempt runs alone.
    dead_before = dead_generators()
    with ThreadPoolExecutor(13) as pool:
        neighbours = [pool.submit(client.ask, steps=30) for _ in range(12)]
        wait_for(lambda: client.pool("landscapes-fp16")["running"] > 0)
        deadly = pool.submit(client.ask, guidance_scale=DEADLY)
    assert deadly.result() == (503, "replica_failed")
    assert [neighbour.result()[0] for neighbour in neighbours] == [200] * 12
    assert dead_generators() - dead_before == ATTEMPTS
    wait_for(lambda: client.pool("landscapes-fp8")["replicas"] == 2)
    wait_for(lambda: client.pool("landscapes-fp16")["replicas"] == 1)

    # The FP8 node dies during a request. This request and new ones are served in 16 bit.
    answers: list[tuple[int, str]] = []
    under_way = threading.Thread(target=lambda: answers.append(client.ask(steps=100)))
    under_way.start()
    wait_for(lambda: client.pool("landscapes-fp8")["running"] == 1)
    die(cluster, fp8_node, FP8)
    assert client.ask() == (200, "fp16")
    under_way.join()
    assert answers == [(200, "fp16")]
    wait_for(lambda: not client.pool("landscapes-fp8")["placeable"])
    assert client.ask("fp8") == (503, "no_capacity")

    # A node with FP8 comes back.
    add_card(cluster, FP8_CARD)
    wait_for(lambda: client.pool("landscapes-fp8")["replicas"] == 2)
    assert client.ask() == (200, "fp8")

    # Only nodes with FP8 are left. The 16-bit pool moves to them, because its settings allow it.
    die(cluster, odd, FP16)
    wait_for(lambda: landed().get(FP16) == Counter({FP8_CARD: 1}))
    wait_for(lambda: client.ask("fp16") == (200, "fp16"))
    assert client.ask("fp8") == (200, "fp8")

    # The settings forbid it now: 16 bit is refused with an error code, and FP8 is served.
    strict = {"OCTET_MODELS__0__POOLS__1__ALLOW_FP8_NODES": "false"}
    octet.apply(load_settings(ROOT / "examples" / "laptop.yaml", {**environ, **strict}))
    wait_for(lambda: client.ask("fp16") == (503, "no_capacity"))
    wait_for(lambda: landed() == {FP8: Counter({FP8_CARD: 2})})
    assert client.ask() == (200, "fp8")

    # An operator cordons the node. Its replicas move to another, and nothing fails meanwhile.
    (node,) = nodes_of(FP8)
    add_card(cluster, FP8_CARD)
    cordon = f"{octet.url}/v1/nodes/{node[:16]}/cordon"
    assert httpx.put(cordon, json={"reason": "noise"}, timeout=60).json()["node"] == node
    wait_for(lambda: client.ask() == (200, "fp8") and node not in nodes_of(FP8))
    wait_for(lambda: client.pool("landscapes-fp8")["replicas"] == 2)
    assert client.ask() == (200, "fp8")
