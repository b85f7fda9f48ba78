"""Repeated requests on the demo model over HTTP: `make bench-repeats`, about 3 minutes.

How long an answer takes that is drawn, and one that was drawn before: remembered by the Ingress, or
through Redis. Then Redis is stopped (SIGSTOP), and images are drawn in turn with the cache asked in
vain and without it. One request at a time; an image of one step, so that what the cache adds shows.
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
from serve.cli.main import DEMO_SETTINGS
from serve.launch import run_application
from serve.settings.application import CacheSettings, Settings
from serve.settings.file import load_settings

from .fairness_server import free_port

DRAWN, HITS, STOPPED = 30, 500, 200
BODY = {"prompt": "dunes", "size": "128x128"}
QUICK_BODY = {**BODY, "num_inference_steps": 1}


class Client:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, body: dict[str, Any], expected: str, **headers: str) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        answer = self._http.post("/v1/images/generations", json=body, headers=headers)
        took_s = time.perf_counter() - began
        assert answer.status_code == 200, answer.text
        use = answer.headers["x-octet-cache"]
        assert use == expected, f"{use} in the place of {expected}"
        return took_s


def line(what: str, took: list[float]) -> None:
    p50, p99 = 1000 * median(took), 1000 * percentile(took, 0.99)
    print(f"| {what} | {len(took)} | {p50:.1f} | {p99:.1f} |", flush=True)


def measure(client: Client, where: str) -> None:
    line(
        f"{where}: drawn (28 steps)",
        [client.ask({**BODY, "seed": s}, "miss") for s in range(DRAWN)],
    )
    time.sleep(0.5)
    line(f"{where}: hit", [client.ask({**BODY, "seed": i % DRAWN}, "hit") for i in range(HITS)])


def stopped(client: Client) -> None:
    """Images that are drawn either way, in turn."""
    asked, not_asked = [], []
    for i in range(STOPPED):
        body = {**QUICK_BODY, "seed": 1000 + i}
        asked.append(client.ask(body, "miss"))
        not_asked.append(client.ask({**body, "seed": i}, "off", **{"cache-control": "no-cache"}))
    line("Redis stopped: drawn (1 step), the cache asked in vain", asked)
    line("Redis stopped: drawn (1 step), the cache not asked", not_asked)
    added_ms = 1000 * (percentile(asked, 0.99) - percentile(not_asked, 0.99))
    print(f"\nadded to the p99: {added_ms:.0f} ms; longest {1000 * max(asked):.0f} ms")


def settings(folder: str, cache: CacheSettings) -> Settings:
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
