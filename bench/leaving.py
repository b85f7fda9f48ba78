"""Measure whether requests fail while nodes with HTTP proxies leave a busy machine.

    python -m bench.leaving [--runs 20] [--busy 2]

Runs a Ray cluster of several nodes on this machine, whose Generators only wait (`bench/timed.py`).
In each run a node with an Ingress and a proxy is drained, as a pod's preStop hook does it, until
nothing is served there any more; another takes its place. Meanwhile clients send requests: two over
connections that they keep, two over a new connection for each request. `--busy` processes compute.
All proxies of this machine share one port, and the kernel gives each connection to any of them.

`reached`: of the requests without an answer, how many had reached an Ingress, by its log. A request
that had not may be sent again without a risk. The exit code is 1 if a request failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from serve.cli.serve import DEMO_SETTINGS
from serve.deployments import DISPATCHER, INGRESS
from serve.settings.file import load_settings

from .local_cluster import PATIENCE_S, LocalCluster, body, front_or_card, replicas_of, url_of
from .machine import machine

ENVIRON = {
    "OCTET_HTTP__PORT": "8038",
    "OCTET_CACHE": "null",
    "OCTET_INGRESS__REPLICAS": "2",
    "OCTET_MODELS__0__POOLS__0__REPLICAS": "1",
    "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": "1",
}
DRAIN_S = 360.0
STARTING = "this proxy is starting"  # a 503 after which clients try again


class Clients:
    """Clients that each send one request after the other until the `with` block ends.

    `answers`: how often they got `ok`, `starting`, or an error. `unanswered`: the ids of requests
    whose connection ended without an answer.
    """

    def __init__(self, url: str) -> None:
        self.answers: Counter[str] = Counter()
        self.unanswered: list[str] = []
        self._url, self._ended = url, threading.Event()

    def __enter__(self) -> Clients:
        self._threads = [
            threading.Thread(target=self._ask, args=[keep], daemon=True)
            for keep in (True, True, False, False)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, keep: bool) -> None:
        with contextlib.ExitStack() as open_clients:
            client = open_clients.enter_context(httpx.Client(timeout=120))
            while not self._ended.wait(0.1):
                if not keep:
                    client = open_clients.enter_context(httpx.Client(timeout=120))
                request_id = uuid.uuid4().hex
                headers = {"x-request-id": request_id}
                try:
                    answer = client.post(self._url, json=body(2), headers=headers)
                except httpx.HTTPError as error:
                    self.answers[type(error).__name__] += 1
                    self.unanswered.append(request_id)
                else:
                    starting = "starting" if STARTING in answer.text else f"{answer.status_code}"
                    self.answers["ok" if answer.status_code == 200 else starting] += 1
                if not keep:
                    open_clients.close()


def leave(cluster: LocalCluster, nodes: list[Any]) -> None:
    """Let a node with an Ingress, but without the Dispatcher, leave; another takes its place."""
    from cluster.ray_nodes import actors_on, drain

    until = time.monotonic() + PATIENCE_S
    leaving = None
    while leaving is None:
        dispatchers = {node for node, _ in replicas_of(DISPATCHER).values()}
        with_ingress = {node for node, _ in replicas_of(INGRESS).values()}
        if len(with_ingress) == 2 or time.monotonic() > until:
            usable = with_ingress - dispatchers
            leaving = next(node for node in nodes if node.node_id in usable)
        time.sleep(0.5)
    nodes.append(cluster.add("front", 1))
    drain(leaving.node_id, DRAIN_S)
    while actors_on(leaving.node_id) and time.monotonic() < until:
        time.sleep(0.5)
    nodes.remove(leaving)
    with contextlib.suppress(AssertionError):  # a drained raylet may have ended by itself
        cluster.remove(leaving)


def compute() -> None:
    for _ in itertools.count():
        pass


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Let this many processes compute."""
    working = [multiprocessing.Process(target=compute, daemon=True) for _ in range(processes)]
    for process in working:
        process.start()
    try:
        yield
    finally:
        for process in working:
            process.kill()


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--runs", type=int, default=20)
    arguments.add_argument("--busy", type=int, default=2)
    asked = arguments.parse_args()
    print(f"`python -m bench.leaving --runs {asked.runs} --busy {asked.busy}` on {machine()}:\n")
    settings = load_settings(DEMO_SETTINGS, ENVIRON)
    with (
        tempfile.TemporaryDirectory(prefix="octet-", dir="/tmp") as folder,
        LocalCluster(Path(folder)) as cluster,
    ):
        cluster.add("card", 4)
        nodes = [cluster.add("front", 1) for _ in range(3)]
        each = {INGRESS: {"max_replicas_per_node": 1}}
        cluster.deploy(settings, front_or_card, "EveryNode", each)
        with busy(asked.busy), Clients(url_of(settings)) as clients:
            for number in range(asked.runs):
                leave(cluster, nodes)
                print(f"run {number + 1}: {dict(clients.answers)}", flush=True)
        logs = "".join(
            file.read_text() for file in Path(folder).glob("session_*/logs/serve/*Ingress*")
        )
        reached = sum(request_id in logs for request_id in clients.unanswered)
    failed = sum(n for what, n in clients.answers.items() if what not in ("ok", "starting"))
    print(f"\n{asked.runs} nodes left; answers {dict(clients.answers)}; reached {reached}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
