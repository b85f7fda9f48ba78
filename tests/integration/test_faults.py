"""Tests of requests that are served while processes are killed or settings change."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest

from serve.launch import RunningApplication

from ..wait import wait_for
from .conftest import DAY_S, replica_logs, running
from .faulty import HUNGRY, IDLE

GENERATE = "/v1/images/generations"
QUICK = {"prompt": "dunes", "num_inference_steps": 1, "size": "64x64"}
LONG = {
    "prompt": "dunes",
    "num_inference_steps": 100,
    "size": "256x256",
    "guidance_scale": IDLE,
    "timeout_s": DAY_S,
}


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def replicas() -> dict[int, str]:
    """The deployment of each replica of Octet that this test run started, by process id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            title = " ".join(process.cmdline())
            if match := re.search(r"ServeReplica:[\w.-]+:([\w-]+)", title):
                found[process.pid] = match[1]
    return found


def kill(deployment: str) -> None:
    (pid,) = [pid for pid, name in replicas().items() if name == deployment]
    os.kill(pid, signal.SIGKILL)


def generated(request_ids: list[str]) -> Counter[str]:
    """How often the Generators' logs say that each image of these requests was generated."""
    found = re.findall(r'generated ([^\s"]+)', replica_logs())
    return Counter(f for f in found if f.partition("/")[0] in request_ids)


def all_back(url: str) -> bool:
    pools = httpx.get(url + "/ready").json()["models"]["landscapes"]
    return all(pool["replicas"] == 1 for pool in pools.values())


def test_running_out_of_memory_repeats_the_step_and_loses_no_image(url: str) -> None:
    async def main() -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            body = {
                "prompt": "dunes",
                "size": "64x64",
                "num_inference_steps": 6,
                "guidance_scale": HUNGRY,
                "precision": "fp16",
            }
            return [
                answer.status_code
                for answer in await asyncio.gather(
                    *(client.post(GENERATE, json=body) for _ in range(4))
                )
            ]

    assert asyncio.run(main()) == [200] * 4
    assert re.search(r"out of memory with \d rows: smaller batches for a while", replica_logs())


def test_requests_wait_for_the_restart_of_a_text_encoder_and_a_generator(
    client: httpx.Client,
) -> None:
    kill("TextEncoder-landscapes")
    kill("Generator-landscapes-fp16")
    for precision in ("fp8", "fp16"):
        assert client.post(GENERATE, json={**QUICK, "precision": precision}).status_code == 200
    wait_for(lambda: all_back(str(client.base_url)))


@pytest.mark.usefixtures("patient")
def test_when_the_dispatcher_dies_each_image_is_generated_exactly_once(
    url: str, octet: RunningApplication
) -> None:
    ids = [f"kill-{i}" for i in range(20)]  # 8 run, 12 wait

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            body = {**LONG, "num_inference_steps": 8}
            work = [
                asyncio.create_task(client.post(GENERATE, json=body, headers={"x-request-id": id}))
                for id in ids
            ]
            await asyncio.to_thread(wait_for, lambda: running(octet) == 8)
            kill("Dispatcher")
            assert not all(task.done() for task in work)
            return list(await asyncio.gather(*work))

    assert [answer.status_code for answer in asyncio.run(main())] == [200] * len(ids)
    assert generated(ids) == {f"{id}/0": 1 for id in ids}


@pytest.mark.usefixtures("patient")
def test_when_an_ingress_dies_its_slots_are_freed_and_its_images_stopped(
    url: str, octet: RunningApplication, client: httpx.Client
) -> None:
    """The clients of the Ingress lose their connections.

    Later clients wait for the Ingress's slots until its lease has expired.
    """
    ids = [f"orphan-{i}" for i in range(10)]  # two more than there are slots

    def status_of(id: str) -> int:
        headers = {"x-request-id": id}
        return httpx.post(url + GENERATE, json=LONG, headers=headers, timeout=120).status_code

    def served(precision: str) -> bool:
        body = {**QUICK, "precision": precision}
        return client.post(GENERATE, json=body).status_code == 200

    with ThreadPoolExecutor(len(ids)) as pool:
        statuses = [pool.submit(status_of, id) for id in ids]
        wait_for(lambda: running(octet) == 8)
        ended_before = replica_logs().count("nobody waits for image")
        kill("Ingress")
        assert all(status.result() >= 500 for status in statuses)
    wait_for(lambda: served("fp8"))
    assert served("fp16")
    # After its lease, a session has the same time again to come back. Then its images are stopped.
    wait_for(lambda: replica_logs().count("nobody waits for image") > ended_before)
    assert not generated(ids)


def test_live_settings_reach_running_replicas(
    octet: RunningApplication, client: httpx.Client
) -> None:
    before, settings = replicas(), octet.settings
    model = settings.models[0]
    defaults = model.defaults.model_copy(update={"width": 64, "height": 96})
    tuned = settings.model_copy(
        update={
            "max_body_bytes": 500,
            "models": (model.model_copy(update={"defaults": defaults}),),
        }
    )
    asked = {"prompt": "dunes", "num_inference_steps": 1}
    try:
        octet.apply(tuned)
        wait_for(lambda: client.post(GENERATE, json=asked).json()["size"] == "64x96")
        assert client.post(GENERATE, json={"prompt": "x" * 600}).status_code == 413
    finally:
        octet.apply(settings)
    wait_for(lambda: client.post(GENERATE, json=asked).json()["size"] == "128x128")
    assert replicas() == before
