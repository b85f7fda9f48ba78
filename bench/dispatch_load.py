"""Load on one Dispatcher in this process, without Ray: what a request and a heartbeat cost.

`bench.dispatch` runs this file with the code of two versions, so it is a script that uses only what
both have. It prints one line of JSON.

The load: every replica has `SLOTS` slots and an image in each; for every tenant `QUEUED` more
images wait. Images end one after the other, in random order, and a random tenant asks for a new one
in place of each. Meanwhile every replica sends a heartbeat per second, as do the Ingresses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

from autoscaling.load import PoolBounds, ScalingLimits
from cluster.placement import NodeRequirement
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.protocol import (
    AdmissionRequest,
    Granted,
    Heartbeat,
    Lease,
    QueuedImage,
    Release,
    SessionUpdate,
    Timing,
)

POOLS = "m-fp8", "m-fp16"  # of ten replicas, one is in 16 bit
SESSIONS, SLOTS, QUEUED = 4, 4, 2
BATCH = 32  # images that end between two updates of an Ingress
WATCHING = 0.1  # of the images report their position
SIZES = 1.0, 2.0, 6.0  # seconds of work
PER_NODE = 8  # replicas on a node


class Load:
    """A Dispatcher, and everything that sends it messages."""

    def __init__(self, replicas: int, tenants: int) -> None:
        self.chance = random.Random(1)
        self.tenants = [f"tenant-{i}" for i in range(tenants)]
        self.dispatcher = Dispatcher(
            read_nodes=lambda: (), read_states=dict, timing=Timing(recovery_s=0.0)
        )
        needs = {pool: NodeRequirement("fp16", 1, 0.1) for pool in POOLS}
        bounds = {pool: PoolBounds("m", 0, replicas, SLOTS) for pool in POOLS}
        self.dispatcher.apply(needs, ScalingLimits(bounds), max_queued=10 * tenants + 1000)
        self.replicas = [
            Heartbeat(POOLS[i % 10 == 9], f"r{i}", SLOTS, 5.0, 1.0, f"n{i // PER_NODE}", 30.0)
            for i in range(replicas)
        ]
        self.leases: dict[str, dict[str, Lease]] = {r.replica: {} for r in self.replicas}
        self.free = {r.replica: SLOTS for r in self.replicas}
        self.by_pool = {p: [r.replica for r in self.replicas if r.pool == p] for p in POOLS}
        self.running: dict[str, list[tuple[Lease, str]]] = {f"s{i}": [] for i in range(SESSIONS)}
        self.numbers = 0
        self.ended = 0

    async def run(self, seconds: float) -> dict[str, float]:
        """Send messages for so many seconds of CPU; return what was counted."""
        streams = [asyncio.create_task(self._listen(session)) for session in self.running]
        await asyncio.sleep(0)
        for i in range(len(self.replicas)):
            await self._beat(i)
        waiting = SLOTS * len(self.replicas) + QUEUED * len(self.tenants)
        while self.numbers < waiting:
            for session in self.running:
                await self._update(session, 0, BATCH)
        began, cpu, before = time.monotonic(), time.process_time(), self.ended
        beats, beats_cpu = 0, 0.0
        while (used := time.process_time() - cpu) < seconds:
            for session in self.running:
                await self._update(session, BATCH, BATCH)
                await asyncio.sleep(0)
            due = int((time.monotonic() - began) * len(self.replicas)) - beats
            at = time.process_time()
            for i in range(beats, beats + due):
                await self._beat(i % len(self.replicas))
            beats, beats_cpu = beats + due, beats_cpu + time.process_time() - at
        for stream in streams:
            stream.cancel()
        return {
            "requests_per_s": (self.ended - before) / used,
            "requests": self.ended - before,
            "heartbeat_us": 1e6 * beats_cpu / max(beats, 1),
        }

    async def _listen(self, session: str) -> None:
        async for message in self.dispatcher.session(session, [], []):
            self._hear(session, message.events)

    def _hear(self, session: str, events: Any) -> None:
        for event in events:
            if isinstance(event, Granted):
                replica = getattr(event, "replica", "") or self._any_free(event.pool)
                fields = session, event.image_id, event.pool, replica
                lease = Lease(*fields[: len(Lease._fields)])
                self.free[replica] -= 1
                self.leases[replica][event.image_id] = lease
                self.running[session].append((lease, replica))

    def _any_free(self, pool: str) -> str:
        """A replica with a free slot, for a Dispatcher that names none."""
        names = self.by_pool[pool]
        return next(r for r in iter(lambda: self.chance.choice(names), None) if self.free[r] > 0)

    async def _update(self, session: str, ending: int, coming: int) -> None:
        running, releases, calls = self.running[session], [], []
        for _ in range(min(ending, len(running))):
            place = self.chance.randrange(len(running))
            running[place], running[-1] = running[-1], running[place]
            lease, replica = running.pop()
            self.free[replica] += 1
            del self.leases[replica][lease.image_id]
            releases.append(Release(lease.image_id, self.chance.choice(SIZES)))
            calls.append(lease.image_id.partition("/")[0])
        self.ended += len(releases)
        admissions = []
        for _ in range(coming if not ending else len(releases)):
            self.numbers += 1
            call, work_s = f"{session}.{self.numbers}", self.chance.choice(SIZES)
            watched = self.chance.random() < WATCHING
            image = QueuedImage(POOLS, work_s, watched, f"{call}/0", call)
            tenant = self.chance.choice(self.tenants)
            admissions.append(
                AdmissionRequest(call, tenant, call, (image,), timeout_s=1e6, work_s=work_s)
            )
        update = SessionUpdate(
            releases=tuple(releases), ended_calls=tuple(calls), admissions=tuple(admissions)
        )
        self._hear(session, await self.dispatcher.tell(session, update) or ())

    async def _beat(self, i: int) -> None:
        heartbeat = self.replicas[i]
        left_s = 5.0 * self.chance.random()
        leases = list(self.leases[heartbeat.replica].values())
        await self.dispatcher.report_replica(heartbeat._replace(running_work_s=left_s), leases)


async def measure(replicas: int, tenants: int, seconds: float) -> dict[str, float]:
    return await Load(replicas, tenants).run(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("replicas", type=int)
    parser.add_argument("tenants", type=int)
    parser.add_argument("seconds", type=float)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.replicas, given.tenants, given.seconds))))


if __name__ == "__main__":
    main()
