"""Measure what the way of a request costs, apart from generating: `make bench-path`, 2 minutes.

    python -m bench.path [--seconds S]

Runs on real Ray with real HTTP. Generators only wait (`bench/timed.py`). In each round one client
sends one request of each kind, one after the other, so that all kinds meet the same machine:

    health       GET /health, which reaches an Ingress and no further
    hit          an image from the result cache in memory
    generated    an image of one step
    bare         the same on plain Ray Serve: an Ingress calls a Dispatcher and then a Generator

Then 16 clients send requests of one kind at a time, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from serve.cli.load_client import percentile
from serve.settings.application import CacheSettings

from .fairness_server import Bench, served
from .machine import machine
from .step_time import STEP_S

CLIENTS = 16
TURNS = 5
KEPT = 20  # cached images
BODY = {"prompt": "the sea", "size": "64x64", "num_inference_steps": 1}

Send = Callable[[], Awaitable[None]]


class Requests:
    """Requests of each kind, which check the status and the use of the cache of their answers."""

    def __init__(self, http: aiohttp.ClientSession, bench: Bench) -> None:
        self._http, self._url = http, bench.octet.url
        self._key = {"authorization": f"Bearer {bench.keys['single']}"}
        self._numbers = count()

    async def health(self) -> None:
        async with self._http.get(f"{self._url}/health") as answer:
            assert answer.status == 200
            await answer.read()

    async def hit(self) -> None:
        await self._generation({**BODY, "seed": next(self._numbers) % KEPT}, "hit")

    async def generated(self) -> None:
        await self._generation(BODY, "off")

    async def bare(self) -> None:
        async with self._http.post(f"{self._url}/bare", json=BODY) as answer:
            assert answer.status == 200
            await answer.read()

    async def fill(self) -> None:
        """Put the images that `hit` asks for into the cache."""
        for seed in range(KEPT):
            await self._generation({**BODY, "seed": seed}, "miss")

    async def _generation(self, body: Mapping[str, Any], use: str) -> None:
        url = f"{self._url}/v1/images/generations"
        async with self._http.post(url, json=body, headers=self._key) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.headers["x-octet-cache"] == use
            await answer.read()


async def in_turn(kinds: Mapping[str, Send], seconds: float) -> dict[str, list[float]]:
    """Send one request of each kind in turn, for `seconds`; return the seconds that each took."""
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for kind, send in kinds.items():
            began = time.perf_counter()
            await send()
            took[kind].append(time.perf_counter() - began)
    return took


async def per_second(send: Send, seconds: float) -> float:
    """Answers per second if `CLIENTS` clients send one request after the other."""
    began = time.perf_counter()
    until = began + seconds

    async def client() -> int:
        sent = 0
        while time.perf_counter() < until:
            await send()
            sent += 1
        return sent

    sent = sum(await asyncio.gather(*(client() for _ in range(CLIENTS))))
    return sent / (time.perf_counter() - began)


async def measure(bench: Bench, seconds: float) -> str:
    """Measure both parts; return the tables in Markdown."""
    async with aiohttp.ClientSession() as http:
        requests = Requests(http, bench)
        kinds = {kind: getattr(requests, kind) for kind in ("health", "hit", "generated", "bare")}
        await requests.fill()
        await in_turn(kinds, seconds / 10)  # warm-up
        took = in_turn(kinds, seconds / 2)
        rows = await took
        rates: dict[str, list[float]] = {"health": [], "hit": []}
        for _ in range(TURNS):
            for kind, found in rates.items():
                found.append(await per_second(kinds[kind], seconds / 4 / TURNS))
    return _tables(rows, {kind: median(found) for kind, found in rates.items()})


def _tables(took: Mapping[str, list[float]], rates: Mapping[str, float]) -> str:
    p50 = {kind: median(found) for kind, found in took.items()}
    added = {kind: p50[kind] - STEP_S for kind in ("generated", "bare")}
    return "\n".join(
        [
            f"{machine()}, {len(took['health'])} rounds",
            "",
            "| one client | p50 ms | p99 ms |",
            "|---|---|---|",
            *(
                f"| {kind} | {1000 * p50[kind]:.1f} | {1000 * percentile(found, 0.99):.1f} |"
                for kind, found in took.items()
            ),
            "",
            f"| {CLIENTS} clients | per second |",
            "|---|---|",
            *(f"| {kind} | {rate:.0f} |" for kind, rate in rates.items()),
            "",
            "| | |",
            "|---|---|",
            f"| `hit_p50_of_health` | {p50['hit'] / p50['health']:.2f} |",
            f"| `added_p50_of_bare` | {added['generated'] / added['bare']:.2f} |",
            f"| `hits_per_s_of_health` | {rates['hit'] / rates['health']:.2f} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=80.0, help="how long to measure")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"cache": CacheSettings()}
        with served("bench.timed:build", Path(folder), **settings) as bench:
            from ray import serve

            from .timed import bare

            serve.run(bare(), name="bare", route_prefix="/bare")
            print(asyncio.run(measure(bench, options.seconds)))


if __name__ == "__main__":
    main()
