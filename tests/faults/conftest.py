"""A Ray cluster of several nodes on this machine, with cards that only Ray believes in."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.launch import ENVIRONMENT, RunningApplication
from serve.settings.application import Settings

# Ray reads these when it is imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.update(ENVIRONMENT)

STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, because Ray puts sockets into it."""
    path = Path(tempfile.mkdtemp(prefix="octet-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Only a head without GPU so far; its driver is this process.

    A module with a DASHBOARD_PORT gets Ray's dashboard there.
    """
    dashboard_port = getattr(request.module, "DASHBOARD_PORT", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray._private import utils
        from ray.cluster_utils import Cluster

        # It would tell every other Ray user of this machine to join our cluster.
        utils.write_ray_address = lambda *_: None
        head = {
            "num_cpus": 4,
            "num_gpus": 0,
            "include_dashboard": dashboard_port is not None,
            "dashboard_port": dashboard_port,
            "temp_dir": str(folder),
            "object_store_memory": STORE_BYTES,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    yield cluster
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def deploy(cluster: Any) -> Iterator[Callable[[Settings], RunningApplication]]:
    """Deploys settings on the cluster, with Generators that only wait (`bench.timed`)."""

    def deploy(settings: Settings) -> RunningApplication:
        application = RunningApplication(settings, import_path="bench.timed:build")
        return running.enter_context(contextlib.closing(application))

    with contextlib.ExitStack() as running:
        yield deploy


def landed() -> dict[str, Counter[str]]:
    """Living Generators: deployment → card of the node → how many."""
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


def dispatchers_log(folder: Path) -> str:
    """Its messages, of all its lives."""
    files = folder.glob("session_*/logs/serve/*Dispatcher*")
    lines = [line for file in files for line in file.read_text().splitlines()]
    return "\n".join(json.loads(line)["message"] for line in lines)


def wait_for(truth: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.3)
