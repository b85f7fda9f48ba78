"""Fixtures of the fault tests: a Ray cluster of several nodes on this machine, with fake cards."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serve.launch import ENVIRONMENT, RunningApplication
from serve.settings.application import Settings

from ..ports import free_port

# Ray reads these variables when it is imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.update(ENVIRONMENT)

STORE_BYTES = 80 * 2**20
DASHBOARD_PORT = free_port()


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Ray's folder; its path is short because Ray puts sockets into it."""
    path = Path(tempfile.mkdtemp(prefix="octet-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def head(folder: Path) -> Iterator[Any]:
    """A cluster of one node without a GPU, with Ray's dashboard; this process is its driver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray._private import utils
        from ray.cluster_utils import Cluster

        # Ray would note this cluster's address, and other programs of this machine would join it.
        utils.write_ray_address = lambda *_: None
        arguments = {
            "num_cpus": 4,
            "num_gpus": 0,
            "include_dashboard": True,
            "include_log_monitor": False,
            "dashboard_port": DASHBOARD_PORT,
            "temp_dir": str(folder),
            "object_store_memory": STORE_BYTES,
        }
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    yield cluster
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster(head: Any, folder: Path) -> Any:
    """The cluster with nothing but its head.

    The nodes, the Serve application and the Dispatcher's logs of an earlier test are removed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        end_serve()
        for node in list(head.worker_nodes):
            head.remove_node(node)
    for file in dispatcher_logs(folder):
        file.unlink(missing_ok=True)
    return head


def end_serve() -> None:
    """Shut Ray Serve down and kill its replicas.

    Waiting for the replicas could take for ever, because some may have no node.
    """
    import ray
    from ray import serve

    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(serve.shutdown)
        while not ending.done():
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if actor["name"].startswith("SERVE_REPLICA"):
                    with contextlib.suppress(ValueError):  # it has just ended
                        ray.kill(ray.get_actor(**actor))
            time.sleep(0.2)


def add_node(cluster: Any, **arguments: Any) -> Any:
    """Add a node to the cluster; `arguments` as Ray's `Cluster.add_node` has them.

    Twice in about twelve runs Ray's raylet has ended within two seconds of its start, without a
    message. Then another node takes its place.
    """
    for _ in range(3):
        node = cluster.add_node(object_store_memory=STORE_BYTES, **arguments)
        (raylet,) = node.all_processes["raylet"]
        try:
            code = raylet.process.wait(2)
        except subprocess.TimeoutExpired:
            return node
        sys.stderr.write(f"a raylet has ended with {code}\n")
        cluster.remove_node(node, allow_graceful=False)
    raise AssertionError("no raylet stays alive")


@pytest.fixture
def deploy(cluster: Any) -> Iterator[Callable[[Settings], RunningApplication]]:
    """A function that deploys settings on the cluster, with the Generators of `deadly`."""

    def deploy(settings: Settings) -> RunningApplication:
        application = RunningApplication(settings, import_path="tests.faults.deadly:build")
        return running.enter_context(contextlib.closing(application))

    with contextlib.ExitStack() as running:
        yield deploy


def landed() -> dict[str, Counter[str]]:
    """The number of living Generators, by deployment and then by the card of their node."""
    import ray

    cards = {
        node["NodeID"]: node["Labels"].get("ray.io/accelerator-type")
        or node["Labels"].get("octet/card", "none")
        for node in ray.nodes()
        if node["Alive"]
    }
    found: dict[str, Counter[str]] = {}
    for actor in ray._private.state.actors().values():
        name = actor["Name"] or ""
        if actor["State"] == "ALIVE" and "#Generator-" in name:
            card = cards.get(actor["Address"]["NodeID"], "gone")
            found.setdefault(name.split("#")[1], Counter())[card] += 1
    return found


def dispatcher_logs(folder: Path) -> list[Path]:
    """The log files of every Dispatcher replica of this test."""
    return list(folder.glob("session_*/logs/serve/*Dispatcher*"))


def dispatchers_log(folder: Path) -> str:
    """The messages of every Dispatcher replica of this test."""
    lines = [line for file in dispatcher_logs(folder) for line in file.read_text().splitlines()]
    return "\n".join(json.loads(line)["message"] for line in lines)
