"""Measure how long grants pause when the node of the Dispatcher dies, and that nothing is lost.

    python -m bench.dispatcher_node [--rounds 10]

Runs a Ray cluster of several nodes on this machine, whose Generators only wait (`bench/timed.py`).
In each round 200 requests are opened at an Ingress on another node, then the Dispatcher's node
dies: in every other round its processes are killed, in the others they are stopped, like when the
node is cut off from the network. The exit code is 1 if a request failed, or was not charged once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from serve.cli.load_client import LoadAnswer, LoadClient, TimedRequest
from serve.cli.main import DEMO_SETTINGS
from serve.deployments import DISPATCHER, INGRESS
from serve.launch import ENVIRONMENT, check_port
from serve.settings.application import Settings
from serve.settings.file import load_settings
from serve.settings.serve_config import serve_config
from serve.usage.ledger import read_usage

from .machine import machine
from .step_time import STEP_S

OPEN, SLOTS, STEPS = 200, 8, 20
PORT = 8037
URL = f"http://127.0.0.1:{PORT}/v1/images/generations"
ROLE = "octet/role"
LEAD_S = 2.0  # from the first request to the death
PATIENCE_S = 120.0


class Round(NamedTuple):
    """What one round showed; times in seconds from the death of the node.

    `up_s`: until the new Dispatcher's process was ready. `resumed_s`: until an image was finished
    that had been granted by it. `failed`: answers that were no image, by their code. `charged`: how
    often each number of charges for a request occurred.
    """

    how: str
    up_s: float
    resumed_s: float
    failed: Counter[str]
    charged: Counter[int]


class Cluster:
    """A cluster: a head, nodes for the Ingress and for Generators, and two for the Dispatcher."""

    def __init__(self, folder: Path) -> None:
        import ray
        from ray._private import utils
        from ray.cluster_utils import Cluster as RayCluster

        # Ray would note this cluster's address, and other programs of this machine would join it.
        utils.write_ray_address = lambda *_: None
        head = {"num_cpus": 0, "num_gpus": 0, "temp_dir": str(folder), "include_log_monitor": False}
        self._ray = RayCluster(initialize_head=True, head_node_args=head)
        ray.init(address=self._ray.address, log_to_driver=False, logging_level="error")
        self._add("ingress", 4)
        self._add("card", 8)
        self.dispatchers = [self._add("front", 1), self._add("front", 1)]

    def _add(self, role: str, cpus: int) -> Any:
        return self._ray.add_node(
            num_cpus=cpus, num_gpus=0, labels={ROLE: role}, object_store_memory=80 * 2**20
        )

    def kill_dispatcher(self, how: signal.Signals) -> list[psutil.Process]:
        """Send a signal to all processes of the Dispatcher's node; return them."""
        _, node_id, pid = dispatcher()
        (node,) = (one for one in self.dispatchers if one.node_id == node_id)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        processes = {*raylet.children(recursive=True), raylet, psutil.Process(pid)}
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        return list(processes)

    def replace_node(self, dead: list[psutil.Process]) -> None:
        """End a dead node's processes and add another node in its place."""
        for process in dead:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        pids = {process.pid for process in dead}
        for node in list(self.dispatchers):
            if node.all_processes["raylet"][0].process.pid in pids:
                self.dispatchers.remove(node)
                self._ray.remove_node(node, allow_graceful=False)
        self.dispatchers.append(self._add("front", 1))

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._ray.shutdown()


def dispatcher() -> tuple[str, str, int]:
    """The actor id, the node id and the process id of the living Dispatcher, newest first.

    Raises `LookupError` if there is none.
    """
    import ray

    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE" and f"#{DISPATCHER}#" in (actor["Name"] or ""):
            return actor["ActorID"], actor["Address"]["NodeID"], actor["Pid"]
    raise LookupError(DISPATCHER)


def config(settings: Settings) -> dict[str, Any]:
    """The applications with each deployment on its own kind of node."""
    found = serve_config(settings, "bench.timed:build", pools_start_empty=False)
    for application in found["applications"]:
        for deployment in application["deployments"]:
            name = deployment["name"]
            role = {INGRESS: "ingress", DISPATCHER: "front"}.get(name, "card")
            options = {"num_cpus": 0.5, "label_selector": {ROLE: role}}
            deployment["ray_actor_options"] = options
    return found


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[Cluster, Settings]]:
    """Octet on such a cluster."""
    check_port("127.0.0.1", PORT)
    environ = {
        "OCTET_HTTP__PORT": str(PORT),
        "OCTET_DATA_FOLDER": str(folder / "data"),
        "OCTET_CACHE": "null",
        "OCTET_MODELS__0__POOLS__0__REPLICAS": "2",
        "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": "2",
        "OCTET_MODELS__0__POOLS__0__SLOTS": str(SLOTS // 2),
    }
    settings = load_settings(DEMO_SETTINGS, environ)
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    cluster = Cluster(folder / "ray")
    try:
        http = {"host": "127.0.0.1", "port": PORT}
        serve.start(proxy_location="HeadOnly", http_options=http)
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config(settings)))
        asyncio.run(one_image())
        yield cluster, settings
    finally:
        cluster.close()


async def one_image() -> None:
    """Wait until an image is answered."""
    client = LoadClient(URL, {})
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        (answer,) = await client.open_loop([TimedRequest(0, "t", body(1))])
        if answer.status == 200:
            return
        await asyncio.sleep(0.5)
    raise TimeoutError(f"no image: {answer.code}")


def body(steps: int) -> dict[str, Any]:
    return {"prompt": "the sea", "num_inference_steps": steps, "size": "64x64", "precision": "fp8"}


async def measure(cluster: Cluster, usage: Path, how: signal.Signals) -> Round:
    """One round: open the requests, let the Dispatcher's node die, and wait for all answers."""
    before = sum(1 for _ in read_usage(usage))
    old, *_ = dispatcher()
    client = LoadClient(URL, {})
    requests = [TimedRequest(i / OPEN, "t", body(STEPS)) for i in range(OPEN)]
    began = time.monotonic()
    answering = asyncio.create_task(client.open_loop(requests))
    await asyncio.sleep(LEAD_S)
    died = time.monotonic()
    dead = cluster.kill_dispatcher(how)
    up_s = 0.0
    while not up_s and time.monotonic() - died < PATIENCE_S:
        await asyncio.sleep(0.05)
        with contextlib.suppress(LookupError):
            up_s = time.monotonic() - died if dispatcher()[0] != old else 0.0
    answers: list[LoadAnswer] = await answering
    cluster.replace_node(dead)
    # Images that were running at the death end within their own time; later ones have new grants.
    ran = died - began + STEPS * STEP_S * 1.5
    resumed = min(a.done_at for a in answers if a.done_at > ran) - (died - began)
    failed = Counter(answer.code for answer in answers if answer.status != 200)
    charges = Counter(r["request_id"] for r in list(read_usage(usage))[before:])
    return Round(how.name, up_s, resumed, failed, Counter(charges.values()))


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--rounds", type=int, default=10)
    rounds = arguments.parse_args().rounds
    os.environ.update(ENVIRONMENT)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"`python -m bench.dispatcher_node --rounds {rounds}` on {machine()}:\n")
    print(
        "| the node's processes are | new Dispatcher up, s | first image of a new grant, s | ok |"
    )
    print("|---|---|---|---|")
    found: list[Round] = []
    with (
        tempfile.TemporaryDirectory(prefix="octet-", dir="/tmp") as name,
        served(Path(name)) as (
            cluster,
            settings,
        ),
    ):
        for number in range(rounds):
            how = signal.SIGSTOP if number % 2 else signal.SIGKILL
            one = asyncio.run(measure(cluster, Path(str(settings.usage_path)), how))
            found.append(one)
            ok = not one.failed and one.charged == {1: OPEN}
            said = "yes" if ok else f"failed {dict(one.failed)}, charged {dict(one.charged)}"
            what = "killed" if how == signal.SIGKILL else "stopped"
            print(f"| {what} | {one.up_s:.1f} | {one.resumed_s:.1f} | {said} |", flush=True)
            asyncio.run(one_image())
    worst = max(one.resumed_s for one in found)
    after = max(one.resumed_s - one.up_s for one in found)
    median = statistics.median(one.resumed_s for one in found)
    print(f"\nresumed_s: median {median:.1f}, worst {worst:.1f}; after up_s: worst {after:.1f}")
    return int(any(one.failed or one.charged != {1: OPEN} for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
