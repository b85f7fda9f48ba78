"""Measure jobs and batches: `make bench-jobs`, about 20 minutes; `QUICK=1`: 3 minutes.

    python -m bench.jobs [--quick] [--url postgresql://…]

Runs on real Ray with real HTTP and a real database: SQLite, and PostgreSQL if `--url` names an
empty one, where the tables stay. Generators only wait (`bench/timed.py`).

    accept       seconds from a request to its 202: one client, then 16
    jobs         jobs a second from the first 202 to the last end, each of one image of 50 ms
    batch        a batch from its creation to its end, its lines a second, and the memory of the
                 process that runs it
    beside       seconds of requests of one image, without and beside a full batch whose images
                 take `SERVICE_S`, and with slots that batches leave free
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil

from serve.cli.load_client import percentile
from serve.settings.application import JobSettings, StoreSettings

from .fairness_server import Bench, served
from .machine import machine
from .step_time import STEP_S

CLIENTS = 16
SLOTS = 16  # of each of the two pools, so that they are not what is measured
FEW = 4  # slots of each pool, for the requests beside a batch
BODY = {"prompt": "the sea", "size": "64x64", "num_inference_steps": 1}
SERVICE_STEPS = 20
SERVICE_S = SERVICE_STEPS * STEP_S
GENERATE, JOBS = "/v1/images/generations", "/v1/jobs"


class Client:
    """Sends requests to the server with the key of one tenant."""

    def __init__(self, http: aiohttp.ClientSession, bench: Bench, tenant: str = "single") -> None:
        self._http, self._url = http, bench.octet.url
        self._key = {"authorization": f"Bearer {bench.keys[tenant]}"}

    async def call(self, method: str, path: str, **more: Any) -> Any:
        headers = {**self._key, **more.pop("headers", {})}
        async with self._http.request(method, self._url + path, headers=headers, **more) as answer:
            text = await answer.text()
            assert answer.status < 300, text
            return json.loads(text) if answer.content_type == "application/json" else text

    async def accept(self) -> float:
        """Send a job; return the seconds until its 202."""
        began = time.perf_counter()
        await self.call("POST", GENERATE, json=BODY, headers={"prefer": "respond-async"})
        return time.perf_counter() - began

    async def generate(self) -> float:
        """Send a request of an image that takes `SERVICE_S`; return the seconds of its answer."""
        body = {**BODY, "num_inference_steps": SERVICE_STEPS}
        began = time.perf_counter()
        await self.call("POST", GENERATE, json=body)
        return time.perf_counter() - began

    async def all_ended(self) -> None:
        """Wait until no job waits or runs."""
        while True:
            found = [
                await self.call("GET", f"{JOBS}?limit=1&status={state}")
                for state in ("queued", "running")
            ]
            if not any(page["data"] for page in found):
                return
            await asyncio.sleep(0.2)

    async def batch(self, lines: int, steps: int) -> dict[str, Any]:
        """Begin a batch of so many lines."""
        body = {**BODY, "num_inference_steps": steps}
        one = {"method": "POST", "url": GENERATE, "body": body}
        content = "".join(json.dumps({"custom_id": str(i), **one}) + "\n" for i in range(lines))
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", content.encode(), filename="lines.jsonl")
        file = await self.call("POST", "/v1/files", data=form)
        asked = {"input_file_id": file["id"], "endpoint": GENERATE, "completion_window": "24h"}
        found: dict[str, Any] = await self.call("POST", "/v1/batches", json=asked)
        return found


def memory_mib(deployment: str) -> float:
    """The resident memory of a deployment's replica, in MiB."""
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:{deployment}:" in " ".join(process.cmdline()):
                return float(process.memory_info().rss) / 2**20
        except psutil.Error:  # it has just ended
            continue
    return 0.0


async def measure_jobs(bench: Bench, jobs: int) -> dict[str, str]:
    """The seconds to accept a job, and jobs a second."""
    async with aiohttp.ClientSession() as http:
        client = Client(http, bench)
        await asyncio.gather(*(client.accept() for _ in range(50)))  # warm-up
        await client.all_ended()
        alone = [await client.accept() for _ in range(jobs // 4)]
        await client.all_ended()
        began, left = time.perf_counter(), jobs

        async def keep_sending() -> list[float]:
            nonlocal left
            took = []
            while left > 0:
                left -= 1
                took.append(await client.accept())
            return took

        parts = await asyncio.gather(*(keep_sending() for _ in range(CLIENTS)))
        accepted_s = time.perf_counter() - began
        await client.all_ended()
        took_s = time.perf_counter() - began
        crowd = [seconds for part in parts for seconds in part]
        return {
            "accept, one client, p50 / p99 ms": _ms(alone),
            f"accept, {CLIENTS} clients, p50 / p99 ms": _ms(crowd),
            f"accepted per second, {CLIENTS} clients": f"{len(crowd) / accepted_s:.0f}",
            "jobs per second, from the first 202 to the last end": f"{len(crowd) / took_s:.0f}",
        }


async def measure_batch(bench: Bench, lines: int) -> dict[str, str]:
    """A batch from its creation to its end, and the memory of `Jobs`."""
    before = memory_mib("Jobs")
    most = before
    async with aiohttp.ClientSession() as http:
        client = Client(http, bench)
        began = time.perf_counter()
        batch = await client.batch(lines, 1)
        uploaded_s = time.perf_counter() - began
        while batch["status"] in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(1)
            most = max(most, memory_mib("Jobs"))
            batch = await client.call("GET", f"/v1/batches/{batch['id']}")
        took_s = time.perf_counter() - began
        assert batch["request_counts"]["completed"] == lines, batch
        began = time.perf_counter()
        text = await client.call("GET", f"/v1/files/{batch['output_file_id']}/content")
        read_s = time.perf_counter() - began
        assert text.count("\n") == lines
    return {
        f"upload of {lines} lines, s": f"{uploaded_s:.1f}",
        "from the upload to the end, s": f"{took_s:.0f}",
        "lines per second": f"{lines / took_s:.0f}",
        "memory of `Jobs` before and at most, MiB": f"{before:.0f}, {most:.0f}",
        "reading the output file, s": f"{read_s:.1f}",
    }


async def measure_beside(bench: Bench, seconds: float) -> list[dict[str, str]]:
    """Requests without and beside a full batch, and with free slots."""
    rows: list[dict[str, str]] = []
    async with aiohttp.ClientSession() as http:
        light, heavy = Client(http, bench), Client(http, bench, "another")
        batch: dict[str, Any] | None = None
        for name, free in (("no batch", 0), ("a full batch", 0), ("a full batch, 2 free slots", 2)):
            settings = bench.octet.settings
            jobs = settings.jobs.model_copy(update={"batch_free_slots": free})
            bench.octet.apply(settings.model_copy(update={"jobs": jobs}))
            if name != "no batch" and batch is None:
                batch = await heavy.batch(5000, SERVICE_STEPS)
            await asyncio.sleep(10)  # until the batch fills all slots, or leaves some free
            took = []
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                took.append(await light.generate())
            rows.append(
                {
                    "beside": name,
                    "requests": str(len(took)),
                    "p50 s": f"{median(took):.2f}",
                    "p99 s": f"{percentile(took, 0.99):.2f}",
                    "p99 more than alone, in images of the batch": f"{_more(took, rows):.2f}",
                }
            )
            rows[-1]["_p99"] = str(percentile(took, 0.99))
        if batch:
            await heavy.call("POST", f"/v1/batches/{batch['id']}/cancel")
    return rows


def _more(took: list[float], rows: list[dict[str, str]]) -> float:
    """How much longer the p99 is than without a batch, in service times."""
    return (percentile(took, 0.99) - float(rows[0]["_p99"])) / SERVICE_S if rows else 0.0


def _ms(seconds: list[float]) -> str:
    return f"{1000 * median(seconds):.1f} / {1000 * percentile(seconds, 0.99):.1f}"


def with_slots(slots: int) -> Any:
    """The demo's models with so many slots in each replica."""
    from serve.cli.serve import DEMO_SETTINGS
    from serve.settings.file import load_settings

    settings = load_settings(DEMO_SETTINGS, {})
    return tuple(
        model.model_copy(
            update={
                "pools": tuple(
                    pool.model_copy(update={"slots": slots, "min_replicas": 1, "replicas": 1})
                    for pool in model.pools
                )
            }
        )
        for model in settings.models
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer jobs and lines")
    parser.add_argument("--url", help="an empty PostgreSQL database to measure too")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    jobs, lines, seconds = (400, 2000, 20.0) if options.quick else (2000, 50_000, 60.0)
    print(f"{machine()}\n")
    found: dict[str, dict[str, str]] = {}
    for name, url in (("SQLite", None), ("PostgreSQL", options.url)):
        if name == "PostgreSQL" and not url:
            continue
        with tempfile.TemporaryDirectory() as folder:
            changes = {
                "models": with_slots(SLOTS),
                "store": StoreSettings(url=url),
                "max_queued": 2000,
                "jobs": JobSettings(),
            }
            with served("bench.timed:build", Path(folder), **changes) as bench:
                found[name] = asyncio.run(measure_jobs(bench, jobs))
                found[name] |= asyncio.run(measure_batch(bench, lines))
    names = list(found)
    print(f"| | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for row in found[names[0]]:
        print(f"| {row} | {' | '.join(found[name][row] for name in names)} |")
    with (
        tempfile.TemporaryDirectory() as folder,
        served(
            "bench.timed:build", Path(folder), models=with_slots(FEW), jobs=JobSettings()
        ) as bench,
    ):
        rows = asyncio.run(measure_beside(bench, seconds))
    shown = [name for name in rows[0] if not name.startswith("_")]
    print(f"\n| {' | '.join(shown)} |\n{'|---' * len(shown)}|")
    for one in rows:
        print(f"| {' | '.join(one[name] for name in shown)} |")


if __name__ == "__main__":
    main()
