"""Send the same load to every server, and measure how it is served.

All get the same requests at the same times. A *kind* is a size, a number of steps and a guidance
scale; *mixed* requests are of random kinds. A request is *in time* if it is answered within
`IN_TIME` × the seconds that its image takes alone in diffusers' pipeline, without any server.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import psutil

from serve.cli.load_client import LoadAnswer, LoadClient, TimedRequest, percentile

from .contestants import PATIENCE_S, Server

SIZES = "64x64", "128x128", "192x192"
STEPS = 4, 8, 20, 28, 50
GUIDANCE = 1.0, 3.0
KINDS = list(product(SIZES, STEPS, GUIDANCE))
PLACES = "the sea", "a forest", "a desert", "hills", "a city", "mountains"
TIMES = "at dawn", "at noon", "at dusk", "at night"
IN_TIME = 5.0  # also the default of Octet's `late_slowdown`, by which its queue is ordered
MULTIPLES = 3.0, IN_TIME, 10.0  # reported beside each other, because 5 suits Octet
WATCHED_S = 1.0
AFTER_KILL_S = 30.0  # a request that is open for longer has failed
OPEN = 16  # requests that are open at a time to find the largest throughput
FLOOD = 3.0  # the flood's requests ÷ Octet's largest throughput
LIGHT = 0.3  # the light tenant's requests ÷ Octet's largest throughput
GIVEN_UP = 8  # requests whose clients hang up
GIVEN_UP_AFTER_S = 1.0
LONG = "128x128", 50, 3.0

Kind = tuple[str, int, float]  # size, steps, guidance
OwnTimes = Mapping[Kind, float]
Numbers = dict[str, Any]


def request(kind: Kind, number: int, part: str) -> dict[str, Any]:
    """A request of a kind. Its prompt holds number and part, so no cache can answer for another."""
    size, steps, guidance = kind
    place, hour = PLACES[number % len(PLACES)], TIMES[number // len(PLACES) % len(TIMES)]
    return {
        "prompt": f"{place} {hour}, {part} {number}",
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


def arrivals(part: str, tenant: str, per_s: float, seconds: float) -> list[TimedRequest]:
    """Requests of random kinds that arrive as a Poisson process, the same for every contestant."""
    rng = random.Random(f"{part} {tenant}")
    at, found = 0.0, []
    while (at := at + rng.expovariate(per_s)) < seconds:
        body = request(rng.choice(KINDS), rng.randrange(10**9), part)
        found.append(TimedRequest(at, tenant, body))
    return found


def slowdowns(answers: Sequence[LoadAnswer], own_s: OwnTimes) -> list[float]:
    """Latency ÷ the image's own time, of each request."""
    return [_latency_s(a) / own_s[kind_of(a.request.body)] for a in answers]


def in_time(answers: Sequence[LoadAnswer], own_s: OwnTimes, times: float = IN_TIME) -> float:
    """The part of the requests that were answered in time."""
    return sum(s <= times for s in slowdowns(answers, own_s)) / len(answers)


def tail_s(answers: Sequence[LoadAnswer], share: float) -> float:
    """The percentile of the latencies at `share`: 0.99 gives the p99."""
    return percentile([_latency_s(a) for a in answers], share)


def _latency_s(answer: LoadAnswer) -> float:
    """Seconds until the answer. A request that failed counts as at least `PATIENCE_S`."""
    return answer.latency_s if answer.status == 200 else max(answer.latency_s, PATIENCE_S)


def mixed(server: Server, part: str, per_s: float, seconds: float, own_s: OwnTimes) -> Numbers:
    """Requests of all kinds at a rate."""
    sent = server.requests(arrivals(part, "light", per_s, seconds))
    return _summary(asyncio.run(server.client().open_loop(sent)), own_s)


def _summary(answers: Sequence[LoadAnswer], own_s: OwnTimes) -> Numbers:
    return {
        "requests": len(answers),
        "failed": sum(a.status != 200 for a in answers),
        "goodput": in_time(answers, own_s),
        "goodput_each": {f"{n:g}": in_time(answers, own_s, n) for n in MULTIPLES},
        "p50_s": tail_s(answers, 0.5),
        "p99_s": tail_s(answers, 0.99),
        "p99_slowdown": percentile(slowdowns(answers, own_s), 0.99),
    }


def throughput(server: Server, part: str, seconds: float, kind: Kind | None = None) -> float:
    """Images per second with `OPEN` requests open: of one kind, or of all.

    The first fifth of the time does not count, because all begin at once then. See `images_within`.
    """
    rng = random.Random(part)

    def next_body() -> Mapping[str, Any]:
        body = request(kind or rng.choice(KINDS), rng.randrange(10**9), part)
        return server.contestant.body(body)

    answers = asyncio.run(server.client().closed_loop({"light": OPEN}, next_body, seconds))
    began = 0.2 * seconds
    return images_within(answers, began, seconds) / (seconds - began)


def images_within(answers: Sequence[LoadAnswer], began: float, ended: float) -> float:
    """The images that were generated within a time.

    Of an image that began earlier or ended later, that part counts which its time from request to
    answer has in this time. If only answers within the time were counted, large batches would seem
    slow: nothing is answered before the first one is done.
    """
    parts = (
        (min(a.done_at, ended) - max(a.done_at - a.latency_s, began)) / a.latency_s
        for a in answers
        if a.status == 200
    )
    return sum(max(part, 0.0) for part in parts)


def wasted(server: Server) -> float:
    """The work done for clients that have hung up, in images.

    `GIVEN_UP` clients ask for long images and hang up after `GIVEN_UP_AFTER_S`. From then on the
    server's CPU seconds count, less what it uses when idle, until it is idle again.
    """
    bodies = [server.contestant.body(request(LONG, i, "wasted")) for i in range(GIVEN_UP + 1)]

    def worked_s(do: Callable[[], object]) -> float:
        before, began = sum(server.cpu_s().values()), time.monotonic()
        do()
        took_s = time.monotonic() - began
        return sum(server.cpu_s().values()) - before - server.idle * took_s

    one = TimedRequest(0, "light", bodies[0])
    one_s = worked_s(lambda: asyncio.run(server.client().open_loop([one])))
    hang_up = [TimedRequest(0, "light", body) for body in bodies[1:]]
    asyncio.run(server.client(patience_s=GIVEN_UP_AFTER_S).open_loop(hang_up))
    return max(worked_s(server.rest), 0.0) / one_s


def killed(server: Server, per_s: float, seconds: float, own_s: OwnTimes, kills: int) -> Numbers:
    """Kill the process that computes most, several times in a load; count what fails.

    `open`: the requests that were open at these moments, of which the killed process had some.
    """
    sent = server.requests(arrivals("killed", "light", per_s, seconds))
    client, still_open = server.client(AFTER_KILL_S), 0

    async def load() -> list[LoadAnswer]:
        nonlocal still_open
        answered = asyncio.create_task(client.open_loop(sent))
        began = time.monotonic()
        for i in range(kills):
            at = (i + 0.5) * seconds / kills
            await asyncio.sleep(began + at - WATCHED_S - time.monotonic())
            before = server.cpu_s()
            await asyncio.sleep(WATCHED_S)
            after = server.cpu_s()
            used = {pid: after[pid] - before[pid] for pid in after.keys() & before.keys()}
            still_open += sum(r.at < at for r in sent) - len(client.answers)
            if used:
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(max(used, key=lambda pid: used[pid])).kill()
        return await answered

    answers = asyncio.run(load())
    return {**_summary(answers, own_s), "kills": kills, "open": still_open}


def light_tenant(
    server: Server, per_s: float, seconds: float, own_s: OwnTimes, *, flooded: bool
) -> Numbers:
    """A tenant that sends `LIGHT` × what Octet can serve, alone or beside one that sends `FLOOD` ×.

    `per_s`: Octet's largest throughput of mixed requests.
    """
    part = "flooded" if flooded else "calm"
    light = server.requests(arrivals(part, "light", LIGHT * per_s, seconds))
    flood = server.requests(arrivals(part, "flood", FLOOD * per_s, seconds)) if flooded else []

    async def both() -> list[LoadAnswer]:
        # The flood's clients hang up at the end, so that a server may stop working for them.
        heavy = asyncio.create_task(_until(server.client(), flood, seconds))
        answers = await server.client().open_loop(light)
        await heavy
        return answers

    return _summary(asyncio.run(both()), own_s)


async def _until(client: LoadClient, requests: Sequence[TimedRequest], seconds: float) -> None:
    """Send requests; hang up all that are open after `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await client.open_loop(requests)
