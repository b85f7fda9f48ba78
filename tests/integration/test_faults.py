"""What users see when a process is killed, and when settings change under load."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest

from serve.api.attempts import ATTEMPTS
from serve.dispatch.protocol import TIMING
from serve.launch import RunningApplication

from .conftest import replica_logs
from .faulty import DEADLY, HUNGRY

GENERATE = "/v1/images/generations"
QUICK = {"prompt": "dunes", "num_inference_steps": 1, "size": "64x64"}


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def wait_for(truth: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


def replicas() -> dict[int, str]:
    """Process id and deployment of each of our replicas."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            title = " ".join(process.cmdline())
            if match := re.search(r"ServeReplica:octet:([\w-]+)", title):
                found[process.pid] = match[1]
    return found


def kill(deployment: str) -> None:
    (pid,) = [pid for pid, name in replicas().items() if name == deployment]
    os.kill(pid, signal.SIGKILL)


def generated(request_ids: list[str]) -> Counter[str]:
    """How often the Generators say that they drew each of these images."""
    found = re.findall(r'generated ([^\s"]+)', replica_logs())
    return Counter(f for f in found if f.partition("/")[0] in request_ids)


def test_a_replica_that_dies_in_the_middle_is_replaced(client: httpx.Client) -> None:
    asked = {"prompt": "dunes at dawn", "num_inference_steps": 60, "precision": "fp16", "seed": 1}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: client.post(GENERATE, json=asked))
        time.sleep(0.7)
        kill("Generator-landscapes-fp16")
        assert answer.result().status_code == 200
    anew = {"cache-control": "no-cache"}
    undisturbed = client.post(GENERATE, json=asked, headers=anew).json()["data"]
    assert answer.result().json()["data"][0]["b64_json"] == undisturbed[0]["b64_json"]

    def back() -> bool:
        pools = client.get("/ready").json()["models"]["landscapes"]
        return bool(pools["landscapes-fp16"]["replicas"] == 1)

    wait_for(back, 30)


def test_a_poison_request_costs_three_replicas_and_no_neighbour(url: str) -> None:
    """Its third attempt is alone on its replica; images beside the others are drawn again."""

    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:

            async def ask(id: str, **fields: object) -> httpx.Response:
                body = {"prompt": "dunes", "size": "64x64", "num_inference_steps": 30, **fields}
                return await client.post(GENERATE, json=body, headers={"x-request-id": id})

            neighbours = [asyncio.create_task(ask(f"beside-{i}")) for i in range(12)]
            poison = asyncio.create_task(ask("poison", guidance_scale=DEADLY))
            killed = await poison
            assert (killed.status_code, killed.json()["error"]["code"]) == (503, "replica_failed")
            assert killed.headers["x-should-retry"] == "false"
            assert [(await task).status_code for task in neighbours] == [200] * 12

    before = set(replicas())
    watching = threading.Event()
    seen: set[int] = set()

    def watch() -> None:
        while not watching.wait(0.3):
            seen.update(pid for pid, name in replicas().items() if name.startswith("Generator"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        asyncio.run(main())
    finally:
        watching.set()
        watcher.join()
    wait_for(lambda: all_back(url), 30)
    after = {pid for pid, name in replicas().items() if name.startswith("Generator")}
    assert 1 <= len((seen | after) - before) <= ATTEMPTS  # each is one restart


def all_back(url: str) -> bool:
    pools = httpx.get(url + "/ready").json()["models"]["landscapes"]
    return all(pool["replicas"] == 1 for pool in pools.values())


def test_without_memory_a_step_is_repeated_and_nothing_is_lost(url: str) -> None:
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


def test_a_text_encoder_that_dies_is_waited_for(client: httpx.Client) -> None:
    kill("TextEncoder-landscapes")
    for precision in ("fp8", "fp16"):
        assert client.post(GENERATE, json={**QUICK, "precision": precision}).status_code == 200


def test_a_dispatcher_that_dies_loses_nothing_and_repeats_nothing(
    url: str, client: httpx.Client
) -> None:
    ids = [f"kill-{i}" for i in range(30)]  # 8 run, 22 wait

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            body = {"prompt": "dunes", "num_inference_steps": 16}
            work = [
                asyncio.create_task(client.post(GENERATE, json=body, headers={"x-request-id": id}))
                for id in ids
            ]
            await asyncio.sleep(1)
            assert sum(task.done() for task in work) <= 2
            kill("Dispatcher")
            return list(await asyncio.gather(*work))

    assert [answer.status_code for answer in asyncio.run(main())] == [200] * len(ids)
    assert generated(ids) == {f"{id}/0": 1 for id in ids}


def test_an_ingress_that_dies_gives_its_slots_back(url: str, client: httpx.Client) -> None:
    """Its clients lose their connection; those who come after wait a lease's time at most."""
    long = {"prompt": "dunes", "num_inference_steps": 20, "size": "256x256"}

    def ask() -> int:
        return httpx.post(url + GENERATE, json=long, timeout=120).status_code

    with ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(ask) for _ in range(10)]  # more than there are slots
        time.sleep(1.5)
        kill("Ingress")
        died = time.monotonic()
        assert all(answer.result() >= 500 for answer in answers)

    def served() -> bool:
        return client.post(GENERATE, json={**QUICK, "precision": "fp8"}).status_code == 200

    wait_for(served, TIMING.session_lease_s + 30)
    assert client.post(GENERATE, json={**QUICK, "precision": "fp16"}).status_code == 200
    # What its slots were granted to is drawn meanwhile, on two cores that may be slow.
    assert time.monotonic() - died < TIMING.session_lease_s + 2 * TIMING.heartbeat_s + 30


def test_what_a_dead_ingress_wanted_is_not_drawn_to_the_end(url: str, client: httpx.Client) -> None:
    ids = [f"orphan-{i}" for i in range(8)]
    endless = {"prompt": "dunes", "num_inference_steps": 100, "size": "256x256"}

    def ask(id: str) -> int:
        headers = {"x-request-id": id}
        return httpx.post(url + GENERATE, json=endless, headers=headers, timeout=120).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, id) for id in ids]
        time.sleep(2)
        before = replica_logs().count("nobody waits for image")
        kill("Ingress")
        assert all(answer.result() >= 500 for answer in answers)
    pause = 2 * TIMING.session_lease_s + 15  # the session's lease, then as long for it to come back
    wait_for(lambda: replica_logs().count("nobody waits for image") > before, pause)
    began = time.perf_counter()
    assert client.post(GENERATE, json=QUICK).status_code == 200
    assert time.perf_counter() - began < 10  # 100 steps of these sizes take longer
    assert len(generated(ids)) < len(ids)


def test_tuning_reaches_running_replicas(octet: RunningApplication, client: httpx.Client) -> None:
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
        wait_for(lambda: client.post(GENERATE, json=asked).json()["size"] == "64x96", 10)
        assert client.post(GENERATE, json={"prompt": "x" * 600}).status_code == 413
    finally:
        octet.apply(settings)
    wait_for(lambda: client.post(GENERATE, json=asked).json()["size"] == "128x128", 10)
    assert replicas() == before
