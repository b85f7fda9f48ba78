"""The config that `octet k8s render` writes runs on several nodes, deployed as KubeRay does.

The nodes have the overlay's labels and fake cards, and replicas only wait (`bench.timed`), so that
two cores are enough. The S3 protocol, Redis, keys and Ray's REST API with its token are real. While
clients send requests, a node leaves, models and pools come and go, a changed serveConfigV2 replaces
every replica, and a pool wakes. No request may fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from bench.tenants import add_tenants
from bench.timed import FILE
from k8s.render import NodeKind, read_nodes
from serve.settings.application import Settings

from ..overlay import OVERLAY, Clients, Operator, config_of, on_this_machine
from ..redis_server import RedisServer
from ..s3 import a_bucket, s3_server
from ..wait import wait_for
from .conftest import DASHBOARD_PORT, add_node, landed

pytestmark = pytest.mark.long  # test_placement.py has nodes that leave, tests/unit what is rendered
NODES = "front", "front", "h100", "a100"


def changed_catalogue(settings: Settings) -> Settings:
    """Another number of slots for Large's first pool, a new model on the A100, and no Medium."""
    large, medium = settings.models
    first, *others = large.pools
    pools = (first.model_copy(update={"slots": first.slots + 1}), *others)
    (pool,) = (p for p in medium.pools if p.card == "a100-80")
    new = {"id": "new", "pools": (pool.model_copy(update={"min_replicas": 1}),)}
    models = large.model_copy(update={"pools": pools}), medium.model_copy(update=new)
    return settings.model_copy(update={"models": models})


@pytest.fixture
def servers(folder: Path) -> Iterator[Settings]:
    redis = RedisServer()
    with s3_server() as endpoint:
        bucket = a_bucket(endpoint).model_dump(exclude_unset=True)
        yield on_this_machine(folder, bucket, redis.url)
    redis.close()


def add_node_of(cluster: Any, kind: NodeKind) -> str:
    """Add a node of this kind to the cluster; return the id that Ray gives it."""
    return str(add_node(cluster, num_cpus=2, num_gpus=kind.gpus, labels=kind.labels).node_id)


def nodes_of(deployment: str) -> dict[str, str]:
    """The node of each living replica, by the replica's name.

    `deployment`: how the names of the deployments begin; an empty string stands for all.
    """
    import ray

    return {
        actor["Name"]: actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if actor["State"] == "ALIVE" and f"#{deployment}" in (actor["Name"] or "")
    }


@pytest.mark.filterwarnings("ignore")  # Ray warns while it starts
def test_no_request_fails_while_nodes_leave_and_the_config_changes(
    cluster: Any, folder: Path, servers: Settings, request: pytest.FixtureRequest
) -> None:
    kinds = {kind.name: kind for kind in read_nodes(OVERLAY / "nodes.yaml")}
    ids = [add_node_of(cluster, kinds[name]) for name in NODES]
    key = add_tenants(servers.database or {}, {"acme": {}})["acme"]
    operator = Operator(DASHBOARD_PORT)
    url = f"http://127.0.0.1:{servers.http.port}"

    # KubeRay sends traffic to a cluster when its applications run. The pools are ready by then.
    config = config_of(servers)
    operator.deploy(config)
    wait_for(lambda: operator.running(config))
    large, medium = "Generator-sd3.5-large", "Generator-sd3.5-medium"
    h100 = Counter({"h100": 1})
    assert landed().items() >= {f"{large}-fp8-h100": h100, f"{medium}-fp8-h100": h100}.items()
    front = {*nodes_of("Ingress").values(), *nodes_of("Dispatcher").values()}
    assert front <= set(ids[:2])
    # A front pod is ready, and counts for the disruption budget, only if it has an HTTP proxy. Ray
    # Serve starts proxies only on nodes with replicas.
    assert set(nodes_of("Ingress").values()) == set(ids[:2])
    client = httpx.Client(base_url=url, timeout=120)
    assert client.post("/v1/images/generations", json={"prompt": "dunes"}).status_code == 401
    client.headers["authorization"] = f"Bearer {key}"

    # The first image goes through the bucket. Redis finds it there for the repeated request.
    # Images in FP8 wake no 16-bit pool, which would take up the A100.
    body = {"prompt": "dunes", "seed": 7, "response_format": "url", "precision": "fp8"}
    body["model"] = "sd3.5-medium"
    answers = [client.post("/v1/images/generations", json=body) for _ in range(2)]
    assert [answer.headers["x-octet-cache"] for answer in answers] == ["miss", "hit"]
    images = []
    for answer in answers:
        link = answer.json()["data"][0]["url"]
        found = httpx.get(f"{url}{link}" if link.startswith("/") else link, follow_redirects=True)
        images.append(found.content)
    assert images == [FILE, FILE]
    assert servers.s3
    bucket = boto3.resource(
        "s3", endpoint_url=servers.s3.endpoint_url, region_name=servers.s3.region
    ).Bucket(servers.s3.bucket)
    assert {one.key.split("/")[1] for one in bucket.objects.all()} == {"acme"}

    clients = Clients(url, key, 2, precision="fp8")
    request.addfinalizer(clients.end)
    # The node of the Dispatcher leaves with the command that a pod runs before it ends.
    (dispatcher,) = nodes_of("Dispatcher").values()
    leaving = subprocess.Popen(  # noqa: S603 - our own
        [
            *(str(Path(sys.executable).parent / "octet"), "k8s", "leave"),
            *(str(int(servers.drain_timeout_s) + 60), "--node", dispatcher),
        ],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stderr=subprocess.PIPE,
        text=True,
    )
    request.addfinalizer(leaving.kill)
    wait_for(lambda: dispatcher not in nodes_of("Dispatcher").values())
    # KubeRay makes a new front pod in its place. An Ingress finds a place only there: one a pod.
    new = add_node_of(cluster, kinds["front"])

    # Models and pools come, change and go; every other replica stays.
    def on_staying_nodes(deployment: str) -> set[str]:
        """The replicas that are not on the node that leaves."""
        return {name for name, node in nodes_of(deployment).items() if node != dispatcher}

    wait_for(lambda: len(on_staying_nodes("Ingress")) == 2)
    before = on_staying_nodes("")
    config = config_of(changed_catalogue(servers))
    operator.deploy(config)
    wait_for(lambda: operator.running(config) and not nodes_of(medium))
    body = {"prompt": "dunes", "model": "new"}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    gone = {name.split("#")[1] for name in before - {*nodes_of("")}}
    assert gone == {f"{large}-fp8-h100", f"{medium}-fp8-h100"}

    # Settings that every replica is started with replace them all.
    before = {*nodes_of("")}
    folders = {"models_folder": str(folder / "m"), "data_folder": str(folder / "d")}
    operator.deploy(config_of(servers.model_copy(update=folders)))
    wait_for(lambda: not before & {*nodes_of("")} and len(nodes_of("Ingress")) == 2)

    # A sleeping pool wakes for a request that needs it, on the node that is meant for the pool.
    body = {"prompt": "dunes", "precision": "fp16", "model": "sd3.5-large"}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    assert landed()[f"{large}-fp16-a100-80"] == Counter({"a100-80": 1})
    front = {*nodes_of("Ingress").values(), *nodes_of("Dispatcher").values()}
    assert front == {*ids[:2], new} - {dispatcher}
    assert len({*nodes_of("Ingress").values()}) == 2

    answered = clients.end()
    assert clients.resets <= 6  # one proxy ended and two started, and there are two clients
    assert set(answered) == {"ok"}, answered
    assert answered["ok"] > 20
    assert clients.closed
    _, said = leaving.communicate(timeout=120)
    assert "nothing is served there any more" in said
    client.close()
    operator.close()
