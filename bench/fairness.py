"""What one tenant feels of the others, who is admitted, and what the Dispatcher can do.

    python -m bench.fairness [--quick]

Real Ray, real HTTP, an own server on loopback. Most of it runs on Generators that only wait
(`bench/timed.py`), 8 slots, so that two cores measure dispatch; one part runs on the demo model.
Plain Ray Serve, first come first served, is measured beside it. Writes build/bench/fairness.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve.cli.load_client import LoadAnswer, LoadClient, TimedRequest, percentile, poisson
from serve.cli.main import DEMO_SETTINGS
from serve.settings.file import load_settings

from .fairness_report import table
from .fairness_server import BUDGETS, LIGHT, WEIGHTS, Bench, served
from .load import STEP_S, jain

RESULT = Path(__file__).parents[1] / "build" / "bench" / "fairness.json"
SLOTS = 8
POOL = "landscapes-fp16"


def body(steps: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "the sea", "size": "64x64", "num_inference_steps": steps, **more}


# -- parts ----------------------------------------------------------------------------------------


def light_tenants(steps: int, seconds: float) -> list[TimedRequest]:
    """Nine tenants at half of their share each."""
    share = SLOTS / (steps * STEP_S) / (len(LIGHT) + 1)
    return [ask for t in LIGHT for ask in poisson("1", t, share / 2, seconds, body(steps))]


def flood(bench: Bench, steps: int, seconds: float) -> tuple[dict[str, Any], list[TimedRequest]]:
    """The light tenants without and with one that asks for ten times all there is.

    The flood sets in when they have begun; they are compared from then on. Also what was drawn
    of it, when it was asked for.
    """
    service_s = steps * STEP_S
    capacity, begins = SLOTS / service_s, 2 * service_s
    light, asked = light_tenants(steps, seconds), body(steps, timeout_s=10 * service_s)
    heavy = [
        ask._replace(at=begins + ask.at)
        for ask in poisson("1", "flood", 10 * capacity, seconds - begins, asked)
    ]
    calm = asyncio.run(bench.load.open_loop(light))
    flooded = asyncio.run(bench.load.open_loop([*light, *heavy]))
    done = [a for a in flooded if a.status == 200 and begins + service_s < a.done_at < seconds]
    drawn = [a.ask for a in _of(flooded, ["flood"]) if a.status == 200]
    return {
        **_tails(calm, flooded, begins),
        "flood_requests": len(heavy),
        "flood_drawn": len(drawn),
        "used": len(done) / capacity / (seconds - begins - service_s),
    }, drawn


def shares(bench: Bench, steps: int, seconds: float) -> dict[str, Any]:
    """Four tenants who always wait: what each is served, per weight."""
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
    """Of 200 parallel requests of a tenant with budget for ten, how many are drawn."""
    asks = [TimedRequest(0, tenant, body(4)) for _ in range(200)]
    found = asyncio.run(bench.load.open_loop(asks))
    assert {a.code for a in found if a.status != 200} == {"insufficient_quota"}
    return sum(a.status == 200 for a in found)


def overload(bench: Bench, steps: int, seconds: float) -> dict[str, Any]:
    """Three tenants who together ask for three times what there is, with deadlines."""
    capacity = SLOTS / (steps * STEP_S)
    deadline_s = 5 * steps * STEP_S
    tenants = LIGHT[:3]
    peak = asyncio.run(
        bench.load.closed_loop(dict.fromkeys(tenants, SLOTS), body(steps), seconds / 2)
    )
    peak_per_s = _rate(peak, seconds / 2)
    asked = body(steps, timeout_s=deadline_s)
    asks = [a for t in tenants for a in poisson("2", t, capacity, seconds, asked)]
    found = asyncio.run(bench.load.open_loop(asks))
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
    """Plain Ray Serve with the same slots, the same light tenants, and of the flood `heavy`."""
    from ray import serve

    from .timed import fifo as application

    serve.run(application(SLOTS), name="fifo", route_prefix="/fifo")
    load, light = LoadClient(f"{bench.octet.url}/fifo", {}), light_tenants(steps, seconds)
    calm = asyncio.run(load.open_loop(light))
    flooded = asyncio.run(load.open_loop([*light, *heavy]))
    serve.delete("fifo")
    return _tails(calm, flooded, 2 * steps * STEP_S)


def dispatcher(bench: Bench, seconds: float) -> dict[str, Any]:
    """Grants a second without HTTP and without drawing, with limits and metering.

    As many slots as calls: nobody waits for another.
    """
    from ray import serve

    from .timed import Driver

    handle = bench.octet._dispatcher()
    driver = serve.deployment(Driver).options(
        max_ongoing_requests=10, ray_actor_options={"num_cpus": 0.1}
    )
    drive = serve.run(driver.bind(handle), name="driver", route_prefix=None).drive
    found = {}
    for opened in (32, 256):
        drive.remote(opened, 1.0, POOL, LIGHT).result()  # warm
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
    return found


def demo(bench: Bench, seconds: float) -> dict[str, Any]:
    """One tenant asks for an image at a time, alone and beside one with 32 requests open."""
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
    """Of the light tenants' requests since a time."""

    def p99(found: Sequence[LoadAnswer]) -> float:
        return percentile([a.latency_s for a in found if a.status == 200], 0.99)

    before, after = ([a for a in _of(f, LIGHT) if a.ask.at >= begins] for f in (calm, flooded))
    return {
        "light_requests": len(after),
        "light_failed": sum(a.status != 200 for a in [*before, *after]),
        "light_p99_calm_s": p99(before),
        "light_p99_flooded_s": p99(after),
        "light_p99_ratio": p99(after) / p99(before),
    }


def _of(found: Sequence[LoadAnswer], tenants: Sequence[str]) -> list[LoadAnswer]:
    return [a for a in found if a.ask.tenant in tenants]


def _rate(found: Sequence[LoadAnswer], seconds: float) -> float:
    """Images a second after the first fifth, in which slots fill."""
    begin = 0.2 * seconds
    done = [a for a in found if a.status == 200 and begin < a.done_at < seconds]
    return len(done) / (seconds - begin)


def _dispatcher_cpu_s() -> float:
    import psutil

    for process in psutil.Process().children(recursive=True):
        if any("ServeReplica:octet:Dispatcher" in part for part in process.cmdline()):
            used = process.cpu_times()
            return float(used.user + used.system)
    raise RuntimeError("no Dispatcher")


def measure(quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {"slots": SLOTS, "step_s": STEP_S}
    model = load_settings(DEMO_SETTINGS, {}).models[0]
    pools = tuple(
        pool.model_copy(update={"slots": SLOTS}) for pool in model.pools if pool.precision == "fp16"
    )
    timed = model.model_copy(update={"pools": pools})
    seconds, steps = (12.0 if quick else 45.0), 20
    found["seconds"] = seconds
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"models": (timed,)}
        with served("bench.timed:build", Path(folder), **changes) as bench:
            for part in ("flood", "shares", "budget_admitted"):
                found[part] = {}
            drawn: list[TimedRequest] = []
            for number, replicas in enumerate((1, 4) if quick else (1, 2, 4)):
                tell(f"{replicas} Ingresses")
                bench.ingresses(replicas)
                found["flood"][replicas], drawn = flood(bench, steps, seconds)
                found["shares"][replicas] = shares(bench, *((5, 10.0) if quick else (8, 20.0)))
                found["budget_admitted"][replicas] = budget(bench, BUDGETS[number])
            bench.ingresses(1)
            tell("overload")
            found["overload"] = overload(bench, 10, 12.0 if quick else 45.0)
            tell("plain Ray Serve")
            found["fifo"] = fifo(bench, steps, seconds, drawn)
            tell("the Dispatcher")
            found["dispatcher"] = dispatcher(bench, 3.0 if quick else 5.0)
    with tempfile.TemporaryDirectory() as folder:
        tell("the demo model")
        with served("serve.app:build", Path(folder)) as bench:
            found["demo"] = demo(bench, 6.0 if quick else 30.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than 5 minutes")
    quick = parser.parse_args().quick
    logging.disable(logging.WARNING)
    began = time.monotonic()
    found = measure(quick, lambda news: print(f"{time.monotonic() - began:5.0f} s  {news}"))
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
