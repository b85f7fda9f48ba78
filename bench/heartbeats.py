"""Measure what the heartbeats of many Generators cost the Dispatcher, through Ray Serve.

    python -m bench.heartbeats [--seconds 20]

Runs the demo, and beside it processes that send the heartbeats of Generators which do not exist, as
often as the Dispatcher asks for them, or each one every second as a comparison. The numbers are CPU
times of the Dispatcher's process, without what it takes when nothing is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from contextlib import suppress
from itertools import count
from typing import Any

import psutil

from serve.cli.serve import DEMO_SETTINGS
from serve.deployments import APPLICATION, DISPATCHER
from serve.dispatch.protocol import Heartbeat
from serve.launch import run_application
from serve.settings.file import load_settings

from .fairness_server import free_port
from .machine import machine

POOL = "landscapes-fp8"
PACED, EVERY_SECOND = (100, 300, 1000, 3000), (100, 300)  # numbers of replicas
SENDERS = 2


class Sender:
    """Sends the heartbeats of some replicas."""

    def __init__(self) -> None:
        from ray import serve

        self._dispatcher = serve.get_deployment_handle(DISPATCHER, APPLICATION)
        self._sent = 0

    async def send(self, names: list[str], every_s: float | None, seconds: float) -> int:
        """Send for some time; return how many heartbeats were answered in its second half.

        `every_s`: the time between two heartbeats of a replica; None: what the Dispatcher asks for.
        """
        began, answered = time.monotonic(), 0

        async def beat(name: str) -> None:
            nonlocal answered
            heartbeat = Heartbeat(POOL, name, 1, node="a node", start_s=30.0)
            while True:
                reply = await self._dispatcher.report_replica.remote(heartbeat)
                answered += time.monotonic() - began > seconds / 2
                await asyncio.sleep(every_s or reply.next_s)

        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*map(beat, names))
        return answered


def dispatcher() -> psutil.Process:
    """The process of the Dispatcher that this process has started."""
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if f"ServeReplica:{APPLICATION}:{DISPATCHER}" in " ".join(process.cmdline())
    ]
    return found


def used_s(process: psutil.Process) -> float:
    """The seconds of CPU that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    half_s = parser.parse_args().seconds / 2
    environ = {"OCTET_HTTP__PORT": str(free_port()), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.update(environ)
    settings = load_settings(DEMO_SETTINGS, os.environ)
    print(f"{machine()}\n")
    with run_application(settings):
        import ray

        process, names = dispatcher(), count()
        senders: list[Any] = [ray.remote(num_cpus=0)(Sender).remote() for _ in range(SENDERS)]
        before = used_s(process)
        time.sleep(half_s)
        idle = (used_s(process) - before) / half_s
        print("| Generators | they report | heartbeats/s | CPU of the Dispatcher | ms each |")
        print("|---|---|---|---|---|")
        for replicas, every_s in [*((n, 1.0) for n in EVERY_SECOND), *((n, None) for n in PACED)]:
            each = replicas // SENDERS
            sent = [
                sender.send.remote([f"r{next(names)}" for _ in range(each)], every_s, 2 * half_s)
                for sender in senders
            ]
            time.sleep(half_s)
            before = used_s(process)
            answered = sum(ray.get(sent))
            used = (used_s(process) - before) / half_s - idle
            rate = answered / half_s
            often = "every second" if every_s else "when asked to"
            print(
                f"| {replicas} | {often} | {rate:.0f} | {used:.0%} | {1000 * used / rate:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
