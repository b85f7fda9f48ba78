"""The load that every contestant meets, and what it makes of it.

All meet the same requests at the same times. A request is *in time* if it is answered within
`IN_TIME` × the seconds that its picture takes alone in diffusers' pipeline, without any server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import aiohttp
import psutil

from serve.cli.load_client import LoadAnswer, LoadClient, TimedRequest, percentile

from .contestants import Server

SIZES = "64x64", "128x128", "192x192"
STEPS = 4, 8, 20, 28, 50
GUIDANCE = 1.0, 3.0
KINDS = list(product(SIZES, STEPS, GUIDANCE))
PLACES = "the sea", "a forest", "a desert", "hills", "a city", "mountains"
TIMES = "at dawn", "at noon", "at dusk", "at night"
IN_TIME = 5.0
OPEN = 16  # requests that are open at a time to find the largest throughput
FLOOD = 3.0  # the flood's requests ÷ Octet's largest throughput
LIGHT = 0.2  # the light tenant's requests ÷ Octet's largest throughput
GIVEN_UP = 8  # requests whose clients hang up
GIVEN_UP_AFTER_S = 1.0
LONG = "128x128", 50, 3.0

Kind = tuple[str, int, float]  # size, steps, guidance
OwnTimes = Mapping[Kind, float]


def request(kind: Kind, number: int) -> dict[str, Any]:
    """A request of a kind. Its prompt holds the number, so that no cache can answer another's."""
    size, steps, guidance = kind
    place, hour = PLACES[number % len(PLACES)], TIMES[number // len(PLACES) % len(TIMES)]
    return {
        "prompt": f"{place} {hour}, number {number}",
        "size": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": number,
    }


def kind_of(body: Mapping[str, Any]) -> Kind:
    """The kind of a request's body."""
    if "requests" in body:
        (body,) = body["requests"]
    return body["size"], body["num_inference_steps"], body["guidance_scale"]


def arrivals(
    tenant: str, per_s: float, seconds: float, seed: int, begins: float = 0
) -> list[TimedRequest]:
    """Requests of random kinds that arrive as a Poisson process, the same for every contestant."""
    rng = random.Random(f"{tenant} {seed}")
    at, found = begins, []
    while (at := at + rng.expovariate(per_s)) < seconds:
        number = rng.randrange(10**9)
        found.append(TimedRequest(at, tenant, request(rng.choice(KINDS), number)))
    return found


def in_time(answers: Sequence[LoadAnswer], own_s: OwnTimes) -> float:
    """The part of the requests that were answered in time."""
    good = [
        a
        for a in answers
        if a.status == 200 and a.latency_s <= IN_TIME * own_s[kind_of(a.request.body)]
    ]
    return len(good) / len(answers)


def tail_s(answers: Sequence[LoadAnswer], share: float) -> float:
    """The latency at `share` of all requests; one without an answer counts as infinitely late."""
    return percentile([a.latency_s if a.status == 200 else float("inf") for a in answers], share)


def mixed(server: Server, per_s: float, seconds: float, own_s: OwnTimes) -> dict[str, float]:
    """Requests of all kinds at a rate."""
    sent = server.requests(arrivals("light", per_s, seconds, seed=1))
    answers = asyncio.run(server.client().open_loop(sent))
    slowdowns = [
        a.latency_s / own_s[kind_of(a.request.body)] if a.status == 200 else float("inf")
        for a in answers
    ]
    return {
        "requests": len(answers),
        "failed": sum(a.status != 200 for a in answers),
        "goodput": in_time(answers, own_s),
        "p50_s": tail_s(answers, 0.5),
        "p99_s": tail_s(answers, 0.99),
        "p99_slowdown": percentile(slowdowns, 0.99),
    }


def throughput(server: Server, seconds: float, kind: Kind | None = None) -> float:
    """Pictures per second with `OPEN` requests open: of one kind, or of all."""
    rng = random.Random(4)

    def next_body() -> Mapping[str, Any]:
        body = request(kind or rng.choice(KINDS), rng.randrange(10**9))
        return server.contestant.body(body)

    answers = asyncio.run(server.client().closed_loop({"light": OPEN}, next_body, seconds))
    began = 0.2 * seconds  # until then the first requests wait together
    done = [a.done_at for a in answers if a.status == 200 and a.done_at > began]
    return (len(done) - 1) / (max(done) - min(done)) if len(done) > 1 else 0.0


def wasted(server: Server) -> float:
    """The work done for clients that have hung up, in pictures.

    `GIVEN_UP` clients ask for long pictures and hang up after `GIVEN_UP_AFTER_S`. From then on the
    server's CPU seconds count, less what it uses when idle, until it is idle again.
    """
    bodies = [server.contestant.body(request(LONG, 100 + i)) for i in range(GIVEN_UP + 1)]
    idle = _cpu_s_per_s(server, 2.0)
    before, began = _total(server.cpu_s()), time.monotonic()
    asyncio.run(server.client().open_loop([TimedRequest(0, "light", bodies[0])]))
    took_s = time.monotonic() - began
    one = _total(server.cpu_s()) - before - idle * took_s
    hang_up = [TimedRequest(0, "light", body) for body in bodies[1:]]
    asyncio.run(server.client(patience_s=GIVEN_UP_AFTER_S).open_loop(hang_up))
    before, began = _total(server.cpu_s()), time.monotonic()
    while _cpu_s_per_s(server, 1.0) > idle + 0.3 and time.monotonic() - began < 60:
        pass
    used = _total(server.cpu_s()) - before - idle * (time.monotonic() - began)
    return max(used, 0.0) / one


def killed(server: Server, per_s: float, seconds: float, own_s: OwnTimes) -> dict[str, float]:
    """Kill the process that computes, a third into a load; count the requests that fail."""
    sent = server.requests(arrivals("light", per_s, seconds, seed=2))

    async def load() -> list[LoadAnswer]:
        answered = asyncio.create_task(server.client().open_loop(sent))
        await asyncio.sleep(seconds / 3)
        before = server.cpu_s()
        await asyncio.sleep(seconds / 10)
        after = server.cpu_s()
        busiest = max(after, key=lambda pid: after[pid] - before.get(pid, 0.0))
        psutil.Process(busiest).kill()
        return await answered

    answers = asyncio.run(load())
    return {
        "requests": len(answers),
        "failed": sum(a.status != 200 for a in answers),
        "goodput": in_time(answers, own_s),
    }


def light_tenant(
    server: Server, per_s: float, seconds: float, own_s: OwnTimes, *, flooded: bool
) -> dict[str, float]:
    """A tenant that sends `LIGHT` × what Octet can serve, alone or beside one that sends `FLOOD` ×.

    `per_s`: Octet's largest throughput of mixed requests.
    """
    light = server.requests(arrivals("light", LIGHT * per_s, seconds, seed=3))
    flood = server.requests(arrivals("flood", FLOOD * per_s, seconds, seed=3))

    async def both() -> list[LoadAnswer]:
        # Its clients give up with the end of the load, so that the servers need not work it off.
        heavy = asyncio.create_task(_until(server.client(), flood if flooded else [], seconds))
        answers = await server.client(patience_s=2 * seconds).open_loop(light)
        await heavy
        return answers

    answers = asyncio.run(both())
    return {
        "requests": len(answers),
        "failed": sum(a.status != 200 for a in answers),
        "goodput": in_time(answers, own_s),
        "p50_s": tail_s(answers, 0.5),
        "p99_s": tail_s(answers, 0.99),
    }


async def _until(client: LoadClient, requests: Sequence[TimedRequest], seconds: float) -> None:
    """Send requests; hang up all that are open after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await client.open_loop(requests)
    except (TimeoutError, aiohttp.ClientError):
        pass


def _cpu_s_per_s(server: Server, seconds: float) -> float:
    before, began = server.cpu_s(), time.monotonic()
    time.sleep(seconds)
    return (_total(server.cpu_s()) - _total(before)) / (time.monotonic() - began)


def _total(used: Mapping[int, float]) -> float:
    return sum(used.values())
