"""Measure what the heartbeats of many Generators cost the Dispatcher, through Ray Serve.

    python -m bench.heartbeats [--seconds 30]

Runs the demo, and beside it processes that send the heartbeats of Generators which do not exist, as
often as the Dispatcher asks for them, or each one every second as a comparison. The numbers are CPU
times of the Dispatcher's process, without what it takes when nothing is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from itertools import count
from typing import Any

import psutil

from serve.cli.serve import DEMO_SETTINGS
from serve.deployments import APPLICATION, DISPATCHER
from serve.dispatch.protocol import TIMING, Heartbeat
from serve.engine.reporting import pause_s
from serve.launch import run_application
from serve.settings.file import load_settings

from .fairness_server import free_port
from .machine import machine

POOL = "landscapes-fp8"
EVERY_SECOND, PACED = (100, 300), (300, 1000, 3000)  # numbers of replicas
SENDERS = 2


class Sender:
    """Sends the heartbeats of some replicas."""

    def __init__(self) -> None:
        from ray import serve

        self._dispatcher = serve.get_deployment_handle(DISPATCHER, APPLICATION)
        self._answered = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, names: list[str], every_s: float | None) -> None:
        """Send the heartbeats of these replicas until `end`; return once each was answered.

        `every_s`: the time between two heartbeats of a replica; None: what the Dispatcher asks for.
        """
        known = set()
        all_known = asyncio.Event()

        async def beat(name: str) -> None:
            heartbeat = Heartbeat(POOL, name, 1, node="a node", start_s=30.0)
            while True:
                reply = await self._dispatcher.report_replica.remote(heartbeat)
                self._answered += 1
                known.add(name)
                if len(known) == len(names):
                    all_known.set()
                await asyncio.sleep(every_s or pause_s(reply.next_s))

        self._tasks = [asyncio.create_task(beat(name)) for name in names]
        await all_known.wait()

    async def answered(self) -> int:
        """How many heartbeats were answered so far."""
        return self._answered

    async def end(self) -> None:
        """Send no more."""
        for task in self._tasks:
            task.cancel()


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
    parser.add_argument("--seconds", type=float, default=30.0, help="for each row")
    seconds = parser.parse_args().seconds
    settings = load_settings(DEMO_SETTINGS, {"OCTET_HTTP__PORT": str(free_port())})
    print(f"{machine()}\n")
    with run_application(settings):
        import ray

        process, names = dispatcher(), count()
        senders: list[Any] = [ray.remote(num_cpus=0)(Sender).remote() for _ in range(SENDERS)]

        def measured() -> tuple[float, float]:
            """The heartbeats per second, and the part of a core that the Dispatcher uses."""
            before, cpu_s = sum(ray.get([s.answered.remote() for s in senders])), used_s(process)
            time.sleep(seconds)
            now = sum(ray.get([s.answered.remote() for s in senders]))
            return (now - before) / seconds, (used_s(process) - cpu_s) / seconds

        _, idle = measured()
        print("| Generators | they report | heartbeats/s | CPU of the Dispatcher | ms each |")
        print("|---|---|---|---|---|")
        for replicas, every_s in [*((n, 1.0) for n in EVERY_SECOND), *((n, None) for n in PACED)]:
            each = replicas // SENDERS
            own = [[f"r{next(names)}" for _ in range(each)] for _ in senders]
            ray.get([s.begin.remote(n, every_s) for s, n in zip(senders, own, strict=True)])
            time.sleep(replicas / TIMING.heartbeats_per_s)  # all learn how many they are
            rate, used = measured()
            ray.get([sender.end.remote() for sender in senders])
            time.sleep(
                replicas / TIMING.heartbeats_per_s + 2 * TIMING.replica_lease_s
            )  # all are forgotten
            often = "every second" if every_s else "when asked to"
            took = used - idle
            print(
                f"| {replicas} | {often} | {rate:.0f} | {took:.0%} | {1000 * took / rate:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
