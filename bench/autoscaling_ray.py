"""Measure autoscaling on real Ray with the demo model, under load: `make bench-autoscaling-ray`.

Octet's policy scales from 0 and from 1 replica to as many as the load needs, and back. Then the
same load runs under Ray Serve's own policy with its default settings. The times for which replicas
are held are shortened to seconds. All replicas share this machine's cores, so more of them generate
no faster here. The measurement is when replicas come and go, and that no request fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from autoscaling.simulation.plot import plot_timelines
from autoscaling.simulation.simulator import TimelinePoint
from serve.cli.load_client import LoadClient, percentile
from serve.cli.serve import DEMO_SETTINGS
from serve.launch import run_application
from serve.settings.file import load_settings

from .fairness_server import free_port

OUT = Path("build/bench")
MOST, CLIENTS = 3, 16
CALM_S, LOAD_S, AFTER_S = 10.0, 60.0, 100.0
BODY = {"prompt": "dunes", "size": "64x64", "num_inference_steps": 12}
POOL = "landscapes-fp8"


def settings(policy: str, least: int) -> Any:
    """The demo's settings with one pool of `least` to `MOST` replicas."""
    environ = {
        "OCTET_HTTP__PORT": str(free_port()),
        "OCTET_AUTOSCALING_POLICY": policy,
        "OCTET_MODELS__0__POOLS__0__REPLICAS": str(MOST),
        "OCTET_MODELS__0__POOLS__0__MIN_REPLICAS": str(least),
        "OCTET_AUTOSCALING__HOLD_S": "10",
        "OCTET_AUTOSCALING__IDLE_S": "20",
        "OCTET_AUTOSCALING__KEEP_S": "20",
        "OCTET_AUTOSCALING__TARGET_WAIT_S": "3",
    }
    found = load_settings(DEMO_SETTINGS, environ)
    model = found.models[0]
    return found.model_copy(
        update={"models": (model.model_copy(update={"pools": model.pools[:1]}),)}
    )


class Watch(threading.Thread):
    """A thread that records the pool's replicas and queue twice per second in `points`."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self.began = url, time.monotonic()
        self.points: list[TimelinePoint] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            try:
                state = httpx.get(f"{self._url}/ready", timeout=5).json()
                pool = state["models"]["landscapes"][POOL]
            except (httpx.HTTPError, ValueError):
                continue
            if pool:
                at = time.monotonic() - self.began
                queued = state["queued"]
                load = queued + pool["running"]
                self.points.append(
                    TimelinePoint(at, load, queued, pool["wanted"], pool["replicas"])
                )


def run_load(policy: str, least: int) -> tuple[dict[str, Any], list[TimelinePoint]]:
    """Put the load on a server under the policy; return the results and the timeline.

    `least`: the fewest replicas of the pool.
    """
    with run_application(settings(policy, least)) as octet:
        watch = Watch(octet.url)
        watch.start()
        time.sleep(CALM_S)
        begins = time.monotonic() - watch.began
        load = LoadClient(f"{octet.url}/v1/images/generations", {})
        answers = asyncio.run(load.closed_loop({"anyone": CLIENTS}, BODY, LOAD_S))
        ended = time.monotonic() - watch.began
        time.sleep(AFTER_S if policy == "queued-work" else 10)
        watch.done.set()
        watch.join()
    points = watch.points
    up = next((p.at - begins for p in points if p.at > begins and p.ready == MOST), None)
    down = next((p.at - ended for p in points if p.at > ended and p.ready == least), None)
    took = sorted(answer.latency_s for answer in answers)
    return {
        "requests": len(answers),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "failed": sum(answer.status != 200 for answer in answers),
        "burst_to_all_ready_s": round(up, 1) if up else None,
        "end_to_least_s": round(down, 1) if down else None,
        "latency_p50_s": round(percentile(took, 0.5), 2),
        "latency_p99_s": round(percentile(took, 0.99), 2),
    }, points


def main() -> None:
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"cores": os.cpu_count(), "clients": CLIENTS, "replicas": MOST}
    timelines: dict[str, list[TimelinePoint]] = {}
    for policy, least in (("queued-work", 0), ("queued-work", 1), ("ray-default", 1)):
        name = f"{policy}, from {least}"
        results[name], timelines[name] = run_load(policy, least)
        print(name, json.dumps(results[name]), flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "autoscaling-ray.json").write_text(json.dumps(results, indent=1))
    title, file = "the demo model on real Ray", OUT / "autoscaling-ray.png"
    plot_timelines(timelines, title, file, arriving="images that wait or run")


if __name__ == "__main__":
    main()
