"""Measure the result cache on the demo model over HTTP: `make bench-repeats`, about 4 minutes.

Compares the time of a generated image with that of a repeated request. The cache answers repeated
requests, from the Ingress's memory or through Redis. Then Redis is stopped (SIGSTOP), so that it
does not answer. Requests that ask the stopped Redis and requests that bypass the cache take turns.
The images of both have one step, so that the time that the cache adds can be seen. One request runs
at a time.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from statistics import median
from typing import Any

import httpx

from serve.cli.load_client import percentile
from serve.cli.serve import DEMO_SETTINGS
from serve.launch import run_application
from serve.settings.application import CacheSettings, Settings
from serve.settings.file import load_settings

from .fairness_server import free_port

GENERATED, HITS, STOPPED = 30, 500, 200  # requests of each kind
BODY = {"prompt": "dunes", "size": "128x128"}
QUICK_BODY = {**BODY, "num_inference_steps": 1}


class Client:
    """Sends a request at a time and checks what the result cache did."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def request(self, body: dict[str, Any], expected: str, **headers: str) -> float:
        """Send a request; return the seconds until its answer.

        `expected`: the value that the header `x-octet-cache` must have, such as `hit`. Raises
        `AssertionError` if the header has another value, or if the status is not 200.
        """
        began = time.perf_counter()
        answer = self._http.post("/v1/images/generations", json=body, headers=headers)
        took_s = time.perf_counter() - began
        assert answer.status_code == 200, answer.text
        use = answer.headers["x-octet-cache"]
        assert use == expected, f"{use} instead of {expected}"
        return took_s


def line(name: str, took: list[float]) -> None:
    """Print a row of the table; `took`: seconds of each request."""
    p50, p99 = 1000 * median(took), 1000 * percentile(took, 0.99)
    print(f"| {name} | {len(took)} | {p50:.1f} | {p99:.1f} |", flush=True)


def measure(client: Client, where: str) -> None:
    """Measure generated images and hits of the cache; `where`: the cache's name in the table."""
    line(
        f"{where}: generated (28 steps)",
        [client.request({**BODY, "seed": s}, "miss") for s in range(GENERATED)],
    )
    time.sleep(0.5)
    hits = [client.request({**BODY, "seed": i % GENERATED}, "hit") for i in range(HITS)]
    line(f"{where}: hit", hits)


def stopped(client: Client) -> None:
    """Measure images that look up a stopped Redis, and images that bypass the cache, in turn."""
    looked_up, bypassed = [], []
    for i in range(STOPPED):
        body = {**QUICK_BODY, "seed": 1000 + i}
        looked_up.append(client.request(body, "miss"))
        bypassed.append(client.request({**body, "seed": i}, "off", **{"cache-control": "no-cache"}))
    line("Redis stopped: generated (1 step), cache without an answer", looked_up)
    line("Redis stopped: generated (1 step), cache bypassed", bypassed)
    added_ms = 1000 * (percentile(looked_up, 0.99) - percentile(bypassed, 0.99))
    print(f"\nadded to the p99: {added_ms:.0f} ms; longest {1000 * max(looked_up):.0f} ms")


def settings(folder: str, cache: CacheSettings) -> Settings:
    """The demo's settings on a free port, with a data folder and a cache."""
    found = load_settings(DEMO_SETTINGS, {"OCTET_HTTP__PORT": str(free_port())})
    return found.model_copy(update={"cache": cache, "data_folder": folder})


def main() -> None:
    print("| | requests | p50 ms | p99 ms |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        with (
            run_application(settings(f"{folder}/a", CacheSettings())) as octet,
            httpx.Client(base_url=octet.url, timeout=60) as http,
        ):
            measure(Client(http), "memory")
        port = free_port()
        options = f"--port {port} --bind 127.0.0.1 --logfile log --dir {folder} --save".split()
        redis = subprocess.Popen([str(shutil.which("redis-server")), *options, ""])  # noqa: S603 - found on the path
        cache = CacheSettings(redis_url=f"redis://127.0.0.1:{port}/0")
        try:
            with (
                run_application(settings(f"{folder}/b", cache)) as octet,
                httpx.Client(base_url=octet.url, timeout=60) as http,
            ):
                measure(Client(http), "Redis")
                redis.send_signal(signal.SIGSTOP)
                stopped(Client(http))
        finally:
            redis.kill()
            redis.wait()


if __name__ == "__main__":
    main()
