"""Measure fairness between tenants, admission under overload, and the Dispatcher's throughput.

    python -m bench.fairness [--quick] [--only-floods]

Runs on real Ray with real HTTP, against a server of its own on loopback. Most parts use Generators
that only wait (`bench/timed.py`), with 8 slots, so that two cores are enough to measure dispatch.
One part uses the demo model. Plain Ray Serve, first come first served, is measured for comparison.
Writes build/bench/fairness.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from serve.cli.load_client import LoadAnswer, LoadClient, TimedRequest, percentile, poisson
from serve.cli.serve import DEMO_SETTINGS
from serve.deployments import APPLICATION, DISPATCHER
from serve.settings.file import load_settings

from .fairness_report import floods, table
from .fairness_server import BUDGETS, LIGHT, WEIGHTS, Bench, served
from .machine import machine
from .step_time import STEP_S

RESULT = Path(__file__).parents[1] / "build" / "bench" / "fairness.json"
SLOTS = 8
TIMES = 10, 50  # the flood's requests ÷ what the slots can serve
PROBES_PER_S = 500
POOL = "landscapes-fp16"


def body(steps: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "the sea", "size": "64x64", "num_inference_steps": steps, **more}


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all values are equal, 1/n if one of n has everything."""
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))


# -- parts ----------------------------------------------------------------------------------------


def light_tenants(steps: int, seconds: float) -> list[TimedRequest]:
    """Requests of nine tenants that each use half of their share."""
    share = SLOTS / (steps * STEP_S) / (len(LIGHT) + 1)
    return [r for t in LIGHT for r in poisson("1", t, share / 2, seconds, body(steps))]


def flood(
    bench: Bench, steps: int, seconds: float, times: int, calm: Sequence[LoadAnswer]
) -> tuple[dict[str, Any], list[TimedRequest]]:
    """Measure the light tenants with a tenant that requests `times` times the capacity.

    `calm`: the answers to the light tenants without it. The tenant `flood` begins after the light
    tenants, and only requests after that moment count for their latencies. The second value is the
    flood's requests whose images were generated; each has the time at which it was sent.
    """
    service_s = steps * STEP_S
    capacity, begins = SLOTS / service_s, 2 * service_s
    light, asked = light_tenants(steps, seconds), body(steps, timeout_s=10 * service_s)
    heavy = [
        request._replace(at=begins + request.at)
        for request in poisson("1", "flood", times * capacity, seconds - begins, asked)
    ]
    flooded = asyncio.run(bench.load.open_loop([*light, *heavy]))
    done = [a for a in flooded if a.status == 200 and begins + service_s < a.done_at < seconds]
    generated = [a.request for a in _of(flooded, ["flood"]) if a.status == 200]
    refused = [a.latency_s for a in _of(flooded, ["flood"]) if a.status in (429, 503)]
    return {
        **_tails(calm, flooded, begins),
        "flood_requests": len(heavy),
        "flood_generated": len(generated),
        "flood_failed": len(heavy) - len(generated) - len(refused),
        "refused_p99_ms": 1000 * percentile(refused, 0.99),
        "used": len(done) / capacity / (seconds - begins - service_s),
    }, generated


def probes(bench: Bench, steps: int, seconds: float) -> dict[str, float]:
    """Measure the light tenants without and with `PROBES_PER_S` requests of /ready a second."""
    light = light_tenants(steps, seconds)

    async def probed() -> tuple[list[LoadAnswer], int]:
        probing = asyncio.create_task(_probe(f"{bench.octet.url}/ready"))
        answers = await bench.load.open_loop(light)
        probing.cancel()
        (answered,) = await asyncio.gather(probing)
        return answers, answered

    calm = asyncio.run(bench.load.open_loop(light))
    answers, answered = asyncio.run(probed())
    return {
        "probes_per_s": answered / max(a.done_at for a in answers),
        **{
            f"p{percent}_{name}_s": percentile(
                [a.latency_s for a in found if a.status == 200], percent / 100
            )
            for name, found in (("calm", calm), ("probed", answers))
            for percent in (50, 99)
        },
    }


async def _probe(url: str) -> int:
    """Send `PROBES_PER_S` GET requests a second until cancelled; return the number of 200s."""
    answered = 0
    async with aiohttp.ClientSession() as http:

        async def probe() -> None:
            nonlocal answered
            async with http.get(url) as answer:
                answered += answer.status == 200

        began, sent = time.monotonic(), 0
        pending: set[asyncio.Task[None]] = set()
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                while sent < (time.monotonic() - began) * PROBES_PER_S:
                    pending.add(task := asyncio.create_task(probe()))
                    task.add_done_callback(pending.discard)
                    sent += 1
                await asyncio.sleep(0.002)
        await asyncio.gather(*pending)
    return answered


def shares(bench: Bench, steps: int, seconds: float) -> dict[str, Any]:
    """Images per weight of four tenants that always have requests waiting."""
    asking = dict.fromkeys(WEIGHTS, 2 * SLOTS)
    found = asyncio.run(bench.load.closed_loop(asking, body(steps), seconds))
    settled = [a for a in found if 0.1 * seconds < a.done_at < seconds and a.status == 200]
    served = {t: len(_of(settled, [t])) / weight for t, weight in WEIGHTS.items()}
    return {
        "images": len(settled),
        "per_weight": served,
        "jain": jain(list(served.values())),
        "max_min_service_ratio": max(served.values()) / min(served.values()),
    }


def budget(bench: Bench, tenant: str) -> int:
    """The number of images from 200 parallel requests of a tenant whose budget is ten images."""
    requests = [TimedRequest(0, tenant, body(4)) for _ in range(200)]
    found = asyncio.run(bench.load.open_loop(requests))
    assert {a.code for a in found if a.status != 200} == {"insufficient_quota"}
    return sum(a.status == 200 for a in found)


def overload(bench: Bench, steps: int, seconds: float) -> dict[str, Any]:
    """Measure three tenants that together request three times the capacity, with deadlines."""
    capacity = SLOTS / (steps * STEP_S)
    deadline_s = 5 * steps * STEP_S
    tenants = LIGHT[:3]
    peak = asyncio.run(
        bench.load.closed_loop(dict.fromkeys(tenants, SLOTS), body(steps), seconds / 2)
    )
    peak_per_s = _rate(peak, seconds / 2)
    asked = body(steps, timeout_s=deadline_s)
    requests = [r for t in tenants for r in poisson("2", t, capacity, seconds, asked)]
    found = asyncio.run(bench.load.open_loop(requests))
    accepted = [a for a in found if a.status in (200, 504)]
    met = [a for a in accepted if a.status == 200 and a.latency_s <= deadline_s + 0.1]
    refused = [a for a in found if a.status in (429, 503)]
    assert len(accepted) + len(refused) == len(found)
    return {
        "requests": len(found),
        "accepted": len(accepted),
        "deadline_met": len(met) / len(accepted),
        "refusal_handler_p99_ms": percentile(
            [a.handler_ms for a in refused if a.handler_ms is not None], 0.99
        ),
        "peak_per_s": peak_per_s,
        "goodput_per_s": _rate(met, seconds),
        "goodput_of_peak": _rate(met, seconds) / peak_per_s,
    }


def fifo(bench: Bench, steps: int, seconds: float, heavy: Sequence[TimedRequest]) -> dict[str, Any]:
    """Measure plain Ray Serve with the same slots, the same light tenants and the load `heavy`."""
    from ray import serve

    from .timed import fifo as application

    serve.run(application(SLOTS), name="fifo", route_prefix="/fifo")
    load, light = LoadClient(f"{bench.octet.url}/fifo", {}), light_tenants(steps, seconds)
    calm = asyncio.run(load.open_loop(light))
    flooded = asyncio.run(load.open_loop([*light, *heavy]))
    serve.delete("fifo")
    return _tails(calm, flooded, 2 * steps * STEP_S)


def dispatcher(bench: Bench, seconds: float) -> dict[int, dict[str, float]]:
    """Measure grants per second, with limits and metering but without HTTP and images.

    There are as many slots as calls, so no call waits for another.
    """
    from ray import serve

    from .timed import Driver

    handle = serve.get_deployment_handle(DISPATCHER, APPLICATION)
    driver = serve.deployment(Driver).options(
        max_ongoing_requests=10, ray_actor_options={"num_cpus": 0.1}
    )
    drive = serve.run(driver.bind(handle), name="driver", route_prefix=None).drive
    found = {}
    for opened in (32, 256):
        drive.remote(opened, 1.0, POOL, LIGHT).result()  # warm-up
        before = _dispatcher_cpu_s()
        driven = drive.remote(opened, seconds, POOL, LIGHT).result()
        cpu_s, waits = _dispatcher_cpu_s() - before, driven["waits"]
        found[opened] = {
            "grants_per_s": len(waits) / driven["took_s"],
            "dispatch_ms_p50": 1000 * percentile(waits, 0.5),
            "dispatch_ms_p99": 1000 * percentile(waits, 0.99),
            "dispatcher_cpu_ms": 1000 * cpu_s / len(waits),
            "ingress_cpu_ms": 1000 * driven["cpu_s"] / len(waits),
        }
    serve.delete("driver")
    handle.shutdown()  # otherwise it reports to Ray for ever
    return found


def demo(bench: Bench, seconds: float) -> dict[str, Any]:
    """Measure a tenant with one open request, alone and next to a tenant with 32 open requests."""
    asked = body(28)
    calm = asyncio.run(bench.load.closed_loop({"light0": 1}, asked, seconds))

    found = asyncio.run(bench.load.closed_loop({"light0": 1, "flood": 32}, asked, seconds))
    light = [a.latency_s for a in _of(found, LIGHT)]
    heavy = [a.latency_s for a in _of(found, ["flood"]) if a.status == 200]
    alone = [a.latency_s for a in calm]
    return {
        "light_calm_s": percentile(alone, 0.5),
        "light_flooded_s": percentile(light, 0.5),
        "flood_s": percentile(heavy, 0.5),
        "light_images": len(light),
        "flood_images": len(heavy),
    }


# -- helpers --------------------------------------------------------------------------------------


def _tails(
    calm: Sequence[LoadAnswer], flooded: Sequence[LoadAnswer], begins: float
) -> dict[str, Any]:
    """The p99 latencies of the light tenants' requests since `begins`, calm and flooded."""

    def p99(found: Sequence[LoadAnswer]) -> float:
        return percentile([a.latency_s for a in found if a.status == 200], 0.99)

    before, after = ([a for a in _of(f, LIGHT) if a.request.at >= begins] for f in (calm, flooded))
    return {
        "light_requests": len(after),
        "light_failed": sum(a.status != 200 for a in [*before, *after]),
        "light_p99_calm_s": p99(before),
        "light_p99_flooded_s": p99(after),
        "light_p99_ratio": p99(after) / p99(before),
    }


def _of(found: Sequence[LoadAnswer], tenants: Sequence[str]) -> list[LoadAnswer]:
    return [a for a in found if a.request.tenant in tenants]


def _rate(found: Sequence[LoadAnswer], seconds: float) -> float:
    """Images per second without the first fifth of the time, in which the slots fill."""
    begin = 0.2 * seconds
    done = [a for a in found if a.status == 200 and begin < a.done_at < seconds]
    return len(done) / (seconds - begin)


def _dispatcher_cpu_s() -> float:
    """CPU seconds that the Dispatcher's process has used so far."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        if any("ServeReplica:octet:Dispatcher" in part for part in process.cmdline()):
            used = process.cpu_times()
            return float(used.user + used.system)
    raise RuntimeError("no Dispatcher")


def measure(quick: bool, only_floods: bool, on_part: Callable[[str], None]) -> dict[str, Any]:
    """Run all parts, or those with floods; `on_part` is called with the name of each."""
    found: dict[str, Any] = {"slots": SLOTS, "step_s": STEP_S}
    model = load_settings(DEMO_SETTINGS, {}).models[0]
    pools = tuple(
        pool.model_copy(update={"slots": SLOTS, "min_replicas": 1})
        for pool in model.pools
        if pool.precision == "fp16"
    )
    timed = model.model_copy(update={"pools": pools})
    seconds, steps = (20.0 if quick else 60.0), 20
    found["seconds"] = seconds
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"models": (timed,)}
        with served("bench.timed:build", Path(folder), **changes) as bench:
            # Early: after `hold_s` the Dispatcher would take the driver for a replica in excess.
            if not only_floods:
                on_part("the Dispatcher")
                found["dispatcher"] = dispatcher(bench, 3.0 if quick else 5.0)
            for part in ("flood", "shares", "budget_admitted"):
                found[part] = {}
            generated: list[TimedRequest] = []
            for number, replicas in enumerate((1, 4) if quick else (1, 2, 4)):
                on_part(f"{replicas} Ingresses")
                bench.ingresses(replicas)
                calm = asyncio.run(bench.load.open_loop(light_tenants(steps, seconds)))
                found["flood"][replicas] = {}
                for times in TIMES:
                    cell, made = flood(bench, steps, seconds, times, calm)
                    found["flood"][replicas][times] = cell
                    generated = generated or made
                if only_floods:
                    continue
                found["shares"][replicas] = shares(bench, *((5, 10.0) if quick else (8, 20.0)))
                found["budget_admitted"][replicas] = budget(bench, BUDGETS[number])
            bench.ingresses(1)
            if only_floods:
                return found
            on_part("probes")
            found["probes"] = probes(bench, steps, seconds)
            on_part("overload")
            found["overload"] = overload(bench, 10, 12.0 if quick else 45.0)
            on_part("plain Ray Serve")
            found["fifo"] = fifo(bench, steps, seconds, generated)
    with tempfile.TemporaryDirectory() as folder:
        on_part("the demo model")
        with served("serve.app:build", Path(folder)) as bench:
            found["demo"] = demo(bench, 6.0 if quick else 30.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than 8 minutes")
    parser.add_argument("--only-floods", action="store_true", help="only the parts with floods")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.monotonic()

    def on_part(part: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {part}")

    found = measure(options.quick, options.only_floods, on_part)
    found["machine"] = machine()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(floods(found)) if options.only_floods else table(found))


if __name__ == "__main__":
    main()
