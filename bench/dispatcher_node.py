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
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from serve.cli.load_client import LoadAnswer, LoadClient, TimedRequest
from serve.cli.serve import DEMO_SETTINGS
from serve.deployments import DISPATCHER, INGRESS
from serve.settings.application import Settings
from serve.settings.file import load_settings
from serve.store.database import Database
from serve.usage.ledger import records

from .local_cluster import PATIENCE_S, LocalCluster, body, front_or_card, one_image, replicas_of
from .local_cluster import url_of as url
from .machine import machine
from .step_time import STEP_S

OPEN, SLOTS, STEPS = 200, 8, 20
LEAD_S = 2.0  # from the first request to the death
ENVIRON = {
    "OCTET_HTTP__PORT": "8037",
    "OCTET_CACHE": "null",
    "OCTET_MODELS__0__POOLS__0__REPLICAS": "2",
    "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": "2",
    "OCTET_MODELS__0__POOLS__0__SLOTS": str(SLOTS // 2),
}


class Round(NamedTuple):
    """What one round showed; times in seconds from the death of the node.

    `up_s`: until the new Dispatcher's process was ready. `resumed_s`: until an image was finished
    that had been granted by it. `failed`: answers that were no image, by their code. `charged`: how
    often each number of charges for a request occurred.
    """

    up_s: float
    resumed_s: float
    failed: Counter[str]
    charged: Counter[int]


def role_of(deployment: str) -> str:
    """The role of a deployment's nodes; the Ingress has one of its own, which stays."""
    return "ingress" if deployment == INGRESS else front_or_card(deployment)


def kill_node(nodes: list[Any], how: signal.Signals) -> list[psutil.Process]:
    """Send a signal to all processes of the Dispatcher's node; return them."""
    ((node_id, pid),) = replicas_of(DISPATCHER).values()
    (node,) = (one for one in nodes if one.node_id == node_id)
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    processes = {*raylet.children(recursive=True), raylet, psutil.Process(pid)}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(how)
    return list(processes)


async def measure(
    cluster: LocalCluster, nodes: list[Any], settings: Settings, how: signal.Signals
) -> Round:
    """One round: open the requests, let the Dispatcher's node die, and wait for all answers."""
    before, old = len(usage_of(settings)), replicas_of(DISPATCHER)
    requests = [TimedRequest(i / OPEN, "t", body(STEPS)) for i in range(OPEN)]
    began = time.monotonic()
    answering = asyncio.create_task(LoadClient(url(settings), {}).open_loop(requests))
    await asyncio.sleep(LEAD_S)
    died = time.monotonic()
    dead = kill_node(nodes, how)
    while not replicas_of(DISPATCHER).keys() - old.keys():
        await asyncio.sleep(0.05)
        if time.monotonic() - died > PATIENCE_S:
            raise TimeoutError("no new Dispatcher")
    up_s = time.monotonic() - died
    answers: list[LoadAnswer] = await answering
    replace_node(cluster, nodes, dead)
    # Images that were running at the death end within their own time; later ones have new grants.
    ran = died - began + STEPS * STEP_S * 1.5
    resumed = min(a.done_at for a in answers if a.done_at > ran) - (died - began)
    failed = Counter(answer.code for answer in answers if answer.status != 200)
    charges = Counter(r["request_id"] for r in usage_of(settings)[before:])
    return Round(up_s, resumed, failed, Counter(charges.values()))


def usage_of(settings: Settings) -> list[dict[str, Any]]:
    """All usage records."""
    with contextlib.closing(Database(**(settings.database or {}))) as database:
        return list(records(database))


def replace_node(cluster: LocalCluster, nodes: list[Any], dead: list[psutil.Process]) -> None:
    """End a dead node's processes and add another node in its place."""
    for process in dead:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    pids = {process.pid for process in dead}
    for node in list(nodes):
        if node.all_processes["raylet"][0].process.pid in pids:
            nodes.remove(node)
            cluster.remove(node)
    nodes.append(cluster.add("front", 1))


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--rounds", type=int, default=10)
    rounds = arguments.parse_args().rounds
    print(f"`python -m bench.dispatcher_node --rounds {rounds}` on {machine()}:\n")
    print(
        "| the node's processes are | new Dispatcher up, s | first image of a new grant, s | ok |"
    )
    print("|---|---|---|---|")
    found: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="octet-", dir="/tmp") as folder:
        environ = {**ENVIRON, "OCTET_DATA_FOLDER": f"{folder}/data"}
        settings = load_settings(DEMO_SETTINGS, environ)
        with LocalCluster(Path(folder) / "ray") as cluster:
            cluster.add("ingress", 4)
            cluster.add("card", 8)
            nodes = [cluster.add("front", 1), cluster.add("front", 1)]
            cluster.deploy(settings, role_of, "HeadOnly", {})
            for number in range(rounds):
                how = signal.SIGSTOP if number % 2 else signal.SIGKILL
                one = asyncio.run(measure(cluster, nodes, settings, how))
                found.append(one)
                ok = not one.failed and one.charged == {1: OPEN}
                said = "yes" if ok else f"failed {dict(one.failed)}, charged {dict(one.charged)}"
                what = "killed" if how == signal.SIGKILL else "stopped"
                print(f"| {what} | {one.up_s:.1f} | {one.resumed_s:.1f} | {said} |", flush=True)
                asyncio.run(one_image(url(settings)))
    worst = max(one.resumed_s for one in found)
    after = max(one.resumed_s - one.up_s for one in found)
    median = statistics.median(one.resumed_s for one in found)
    print(f"\nresumed_s: median {median:.1f}, worst {worst:.1f}; after up_s: worst {after:.1f}")
    return int(any(one.failed or one.charged != {1: OPEN} for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
