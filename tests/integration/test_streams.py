"""Tests of streams, progress and cancelled calls, over HTTP on real Ray."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import re
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from serve.launch import RunningApplication

from ..stored import usage_in
from ..wait import wait_for
from .conftest import DAY_S, replica_logs, running
from .faulty import IDLE

GENERATE = "/v1/images/generations"
LONG: dict[str, Any] = {
    "prompt": "dunes",
    "num_inference_steps": 100,
    "size": "256x256",
    "guidance_scale": IDLE,
}


def picture(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def colours(image: Image.Image) -> list[int]:
    return list(image.convert("RGB").resize((8, 8), Image.Resampling.BOX).tobytes())


def apart(one: Image.Image, other: Image.Image) -> float:
    pairs = list(zip(colours(one), colours(other), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def idle(octet: RunningApplication) -> bool:
    """No call is open, nothing waits, no slot is held and no image is generated."""
    found = octet.status()
    busy = [pool.running or pool.running_work_s for pool in found.pools.values()]
    return not (found.calls or found.queued or any(busy))


async def lines(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", GENERATE, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_the_openai_client_iterates_a_stream(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = client.images.generate(
            model="landscapes",
            prompt="the sea at dawn, red sun",
            stream=True,
            partial_images=3,
            size="128x96",
            output_format="jpeg",
            extra_body={"seed": 3, "num_inference_steps": 12, "precision": "fp16"},
        )
        events: list[Any] = list(stream)
    kinds = [ImageGenPartialImageEvent] * 3 + [ImageGenCompletedEvent]
    assert [type(event) for event in events] == kinds
    for kind, event in zip(kinds, events, strict=True):
        kind.model_validate(event.to_dict(), strict=True)  # nothing that OpenAI has is missing
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    previews = [picture(event.b64_json) for event in events[:3]]
    final = picture(events[3].b64_json)
    assert {image.size for image in (*previews, final)} == {(128, 96)}
    assert {image.format for image in (*previews, final)} == {"JPEG"}
    assert events[3].size == "128x96"
    assert events[3].usage.output_tokens == 8 * 6
    asked = {"prompt": "night over dunes", "seed": 4, "size": "128x96", "num_inference_steps": 12}
    other = httpx.post(url + GENERATE, json=asked, timeout=120).json()["data"][0]["b64_json"]
    assert apart(previews[2], final) < 25
    assert apart(previews[2], final) < apart(previews[2], picture(other)) / 2


def test_a_stream_ends_with_the_image_that_is_answered_without_one(url: str) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            body = {"prompt": "dunes", "seed": 5, "num_inference_steps": 8, "precision": "fp8"}
            events = [event async for event in lines(client, {**body, "progress": True})]
            again = await client.post(GENERATE, json=body, headers={"cache-control": "no-cache"})
            plain = again.json()["data"][0]
            progress, completed = events[:-1], events[-1]
            assert completed["type"] == "image_generation.completed"
            for key in ("b64_json", "seed", "precision", "emulated"):
                assert completed[key] == plain[key]
            assert {event["type"] for event in progress} == {"image_generation.progress"}
            steps = [event["step"] for event in progress if event["queue_position"] is None]
            assert steps == sorted(set(steps))
            assert (steps[0], steps[-1]) == (0, 8)
            etas = [event["eta_s"] for event in progress if event["step"]]
            assert etas[-1] < etas[0]

    asyncio.run(main())


def test_a_waiting_client_sees_its_place_in_the_queue(url: str, octet: RunningApplication) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            fill = {**LONG, "num_inference_steps": 15}
            # After a test that has killed a replica, the others may run one image at a time.
            status = await asyncio.to_thread(octet.status)
            slots = sum(pool.slots for pool in status.pools.values())
            posts = [client.post(GENERATE, json=fill) for _ in range(slots + 1)]
            work = [asyncio.create_task(post) for post in posts]
            # Before the slots are held, too, there may be a moment in which one image waits.
            await asyncio.to_thread(
                wait_for, lambda: running(octet) == slots and octet.status().queued == 1
            )
            quick = {"prompt": "dunes", "num_inference_steps": 1, "progress": True}
            events = [event async for event in lines(client, quick)]
            places = [e["queue_position"] for e in events if e["type"].endswith("progress")]
            waited = [place for place in places if place is not None]
            assert waited[0] == 2
            assert waited == sorted(waited, reverse=True)
            assert events[-1]["type"] == "image_generation.completed"
            assert [(await task).status_code for task in work] == [200] * (slots + 1)

    asyncio.run(main())


def test_an_error_before_the_first_event_has_an_http_status(url: str) -> None:
    answer = httpx.post(url + GENERATE, json={"prompt": "x", "stream": True, "n": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    tiny = {**LONG, "stream": True, "timeout_s": 0.2}
    answer = httpx.post(url + GENERATE, json=tiny, timeout=120)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "timeout_too_short")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_cancelled_by_its_id(url: str, octet: RunningApplication, stream: bool) -> None:
    name, streaming = f"mine-{stream}", threading.Event()

    def post() -> httpx.Response:
        body = {**LONG, "n": 1 if stream else 3, "stream": stream, "progress": stream}
        headers = {"x-request-id": name}
        with httpx.stream(
            "POST", url + GENERATE, json=body, headers=headers, timeout=120
        ) as answer:
            streaming.set()  # the answer to a stream begins with its first event
            answer.read()
            return answer

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post)
        wait_for(lambda: running(octet) > 0 and streaming.is_set() == stream)
        deleted = httpx.delete(f"{url}/v1/requests/{name}")
        assert (deleted.status_code, deleted.json()["cancelled"]) == (200, True)
        error = answer.result()
    if stream:
        assert error.text.rpartition("event: ")[2].startswith("error")
        assert '"code":"request_cancelled"' in error.text
    else:
        assert (error.status_code, error.json()["error"]["code"]) == (499, "request_cancelled")
        assert error.headers["x-should-retry"] == "false"
    wait_for(lambda: idle(octet))
    assert f"generated {name}" not in replica_logs()
    again = httpx.delete(f"{url}/v1/requests/{name}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
    assert httpx.delete(f"{url}/v1/requests/a%20b").status_code == 400


def charges(octet: RunningApplication, prefix: str) -> list[dict[str, Any]]:
    """The usage records of the requests whose ids begin with `prefix`."""
    found = usage_in(Path(octet.settings.data_folder or ""))
    return [record for record in found if record["request_id"].startswith(prefix)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_pays_for_the_steps_that_were_done(
    url: str, octet: RunningApplication, stream: bool
) -> None:
    """The client leaves before the answer begins, also if it asked for a stream.

    Without previews and progress, the image is the first event of a stream.
    """
    name = f"gone-{stream}"

    async def main() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            posting = client.post(
                url + GENERATE, json={**LONG, "stream": stream}, headers={"x-request-id": name}
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(posting, 1.5)

    asyncio.run(main())
    wait_for(lambda: bool(charges(octet, name)))
    (record,) = charges(octet, name)
    assert record["outcome"] == "cancelled"
    assert 0 < record["steps"] < LONG["num_inference_steps"]


@pytest.mark.usefixtures("patient")
def test_no_image_is_finished_for_a_hundred_clients_that_hang_up(
    url: str, octet: RunningApplication
) -> None:
    """Half of the clients stream. All leave at random moments.

    The images of some clients run at that moment, those of others wait.
    """
    rng = random.Random(4)
    statuses: list[int] = []

    async def stay(client: httpx.AsyncClient, number: int, leaves_after_s: float) -> None:
        stream = number % 2 == 0
        body = {**LONG, "stream": stream, "progress": stream, "timeout_s": DAY_S}
        headers = {"x-request-id": f"hang-up-{number}"}
        try:
            async with asyncio.timeout(leaves_after_s):
                async with client.stream("POST", GENERATE, json=body, headers=headers) as answer:
                    statuses.append(answer.status_code)
                    async for _ in answer.aiter_bytes():
                        pass
        except TimeoutError:
            pass

    async def main() -> None:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            stays = [stay(client, i, leaves_after_s=rng.uniform(0.3, 4)) for i in range(100)]
            await asyncio.gather(*stays)

    asyncio.run(main())
    # 200: a stream had begun. 429: a slow server refused. The other clients had no answer yet.
    assert set(statuses) <= {200, 429}
    assert 0 < statuses.count(200) <= 50
    wait_for(lambda: idle(octet))
    assert "generated hang-up" not in replica_logs()
    charged = charges(octet, "hang-up")
    assert charged
    assert {record["outcome"] for record in charged} == {"cancelled"}
    quick = {"prompt": "dunes", "num_inference_steps": 1, "size": "64x64"}
    for precision in ("fp8", "fp16"):
        answer = httpx.post(url + GENERATE, json={**quick, "precision": precision}, timeout=60)
        assert answer.status_code == 200


TAGS = "tenant", "pool", "state", "phase", "outcome", "reason", "code"


def exported() -> dict[str, dict[str, float]]:
    """Octet's metrics on this node: by name, then by the tags' values joined with `/`."""
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}", timeout=60).text
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if match := re.match(r"ray_(octet_\w+){(.*)} (\S+)$", line):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            own = "/".join(tags[t] for t in TAGS if t in tags)
            values = found.setdefault(match[1], {})
            values[own] = values.get(own, 0) + float(match[3])
    return found


def test_metrics_count_images_charges_replicas_and_phases(url: str) -> None:
    """The metrics also count the clients that hung up in the earlier tests of this file."""
    asked = {"prompt": "dunes", "num_inference_steps": 4, "size": "64x64", "precision": "fp16"}
    assert httpx.post(url + GENERATE, json=asked, timeout=120).status_code == 200
    deadline = time.monotonic() + 60
    pool = "landscapes-fp16"
    wanted = {f"{pool}/drawn", f"{pool}/cancelled"}
    charged = {"anonymous/delivered", "anonymous/cancelled"}
    while not (
        wanted <= (found := exported()).get("octet_engine_images_total", {}).keys()
        and charged <= found.get("octet_tenant_images_total", {}).keys()
        and found["octet_tenant_queued"]["anonymous"] == 0
    ):
        assert time.monotonic() < deadline, found
        time.sleep(1)
    assert found["octet_tenant_work_total"]["anonymous/delivered"] > 0
    assert found["octet_tenant_refused_total"]["anonymous/timeout_too_short"] > 0
    replicas = found["octet_pool_replicas"]
    assert replicas[f"{pool}/wanted"] == replicas[f"{pool}/ready"] == 1
    assert replicas[f"{pool}/starting"] == 0
    assert found["octet_eta_ratio_count"][""] > 0
    steps, rows = found["octet_engine_steps_total"][pool], found["octet_engine_rows_total"][pool]
    assert steps >= 4
    assert rows > 2 * steps  # the images of the hundred clients shared steps
    assert found["octet_engine_step_seconds_total"][pool] > 0
    for phase in ("text", "denoise", "decode", "encode"):
        assert found["octet_engine_phase_seconds_count"][f"{pool}/{phase}"] > 0
    assert found["octet_queue_seconds_count"][pool] > 0
    assert found["octet_engine_speed"][pool] > 0
    for phase in ("import", "pull", "verify", "load", "warm-up"):
        assert found["octet_engine_start_seconds"][f"{pool}/{phase}"] > 0
