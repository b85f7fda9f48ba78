"""Tests that send requests over real HTTP to the application on real Ray."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cluster.capability import capability, probe
from demo.check import shows
from demo.landscapes import Scene
from serve.launch import RunningApplication

from ..wait import wait_for
from .conftest import DAY_S, log_folder, replica_logs, running
from .faulty import IDLE

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
SIXTEEN_BIT = capability(probe("cpu")).sixteen_bit


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """A client that bypasses the result cache, so that each of its requests is generated anew."""
    headers = {"cache-control": "no-cache"}
    with httpx.Client(base_url=url, timeout=120, headers=headers) as client:
        yield client


def picture(item: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def png_text(item: dict[str, Any]) -> str:
    """The parameters that Octet wrote into a PNG of an answer, as JSON."""
    image = picture(item)
    assert isinstance(image, PngImageFile)
    return str(image.text["parameters"])


def test_the_openai_client_gets_an_image(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.images.generate(
            model="landscapes",
            prompt="a futuristic cityscape at sunset",
            size="128x128",
            response_format="b64_json",
            extra_body={"seed": 4},
        )
        models = [model.id for model in client.models.list()]
    assert models == ["landscapes"]
    assert answer.data
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
    assert (image.format, image.size) == ("PNG", (128, 128))
    assert shows(image, Scene("city", "sunset"))


def test_the_answer_says_how_the_images_were_made(client: httpx.Client) -> None:
    asked = {"prompt": "the sea at dawn", "n": 2, "seed": 10, "size": "192x128"}
    answer = client.post(GENERATE, json={**asked, "num_inference_steps": 4}).json()
    assert answer["model"] == "landscapes"
    assert [item["seed"] for item in answer["data"]] == [10, 11]
    for item in answer["data"]:
        assert picture(item).size == (192, 128)
        assert (item["precision"], item["emulated"]) in [("fp8", True), (SIXTEEN_BIT, False)]
        assert item["timings"].keys() == {
            *("queue_s", "text_s", "latents_s", "denoise_s", "decode_s", "encode_s")
        }
        assert item["timings"]["denoise_s"] > 0


def test_a_png_posted_back_gives_the_same_png(client: httpx.Client) -> None:
    first = client.post(
        GENERATE,
        json={"prompt": "green hills, birds", "negative_prompt": "night", "precision": "fp8"},
    ).json()["data"][0]
    text = png_text(first)
    again = client.post(GENERATE, content=text).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]


def test_precision_is_honoured(client: httpx.Client) -> None:
    asked = {"prompt": "a forest at noon", "seed": 1}
    fp8, sixteen = (
        client.post(GENERATE, json={**asked, "precision": p}).json()["data"][0]
        for p in ("fp8", "fp16")
    )
    assert (fp8["precision"], fp8["emulated"]) == ("fp8", True)
    assert (sixteen["precision"], sixteen["emulated"]) == (SIXTEEN_BIT, False)
    assert fp8["b64_json"] != sixteen["b64_json"]


@pytest.mark.parametrize(("output_format", "found"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_the_output_format_is_honoured(
    client: httpx.Client, output_format: str, found: str
) -> None:
    asked = {"prompt": "dunes", "output_format": output_format, "num_inference_steps": 1}
    assert picture(client.post(GENERATE, json=asked).json()["data"][0]).format == found


@pytest.mark.parametrize(
    ("asked", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": "x", "size": "100x100"}, 400, "size"),
        ({"prompt": "x", "steps": 3}, 400, "steps"),
        ({"prompt": "x", "model": "sdxl"}, 404, "model"),
    ],
)
def test_wrong_input_is_explained_in_openais_form(
    client: httpx.Client, asked: dict[str, Any], status: int, param: str
) -> None:
    answer = client.post(GENERATE, json=asked)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"


def test_bodies_that_are_too_large_or_not_json_are_refused(client: httpx.Client) -> None:
    assert client.post(GENERATE, content=b"{" * 2_000_000).status_code == 413
    answer = client.post(GENERATE, content=b"prompt=x")
    assert (answer.status_code, "JSON" in answer.json()["error"]["message"]) == (400, True)


def test_unknown_paths_and_methods_are_refused(client: httpx.Client) -> None:
    assert client.get("/v2/images").status_code == 404
    answer = client.get(GENERATE)
    assert (answer.status_code, "error" in answer.json()) == (405, True)


def test_the_playground_is_served_and_ready_describes_the_pools(client: httpx.Client) -> None:
    assert "Octet playground" in client.get("/").text
    wait_for(lambda: client.get("/ready").status_code == 200)
    ready = client.get("/ready")
    found = ready.json()
    assert (found["status"], found["queued"]) == ("ready", 0)
    pools = found["models"]["landscapes"]
    assert pools.keys() == {"landscapes-fp8", "landscapes-fp16"}
    for pool in pools.values():
        assert pool.keys() == {
            *("replicas", "slots", "running", "running_work_s", "speed", "placeable"),
            *("least", "wanted", "reason"),
        }
        assert (pool["replicas"], pool["slots"], pool["placeable"]) == (1, 4, True)
        assert pool["speed"] > 0


@pytest.mark.parametrize(
    "prompt", ["雪山上的月亮", "🌇 🌊", "منظر جبلي عند الغروب", "e\u0301" * 500]
)
def test_prompts_in_any_language_are_generated(client: httpx.Client, prompt: str) -> None:
    item = client.post(GENERATE, json={"prompt": prompt, "num_inference_steps": 1}).json()["data"][
        0
    ]
    assert json.loads(png_text(item))["prompt"] == prompt


def test_every_answer_has_a_request_id(client: httpx.Client) -> None:
    for method, path in [("GET", "/v1/models"), ("GET", "/nope"), ("PUT", GENERATE), ("GET", "/")]:
        own, given = client.request(method, path), {"x-request-id": "mine"}
        assert len(own.headers["x-request-id"]) > 8
        assert client.request(method, path, headers=given).headers["x-request-id"] == "mine"


@pytest.mark.parametrize("given", ["é", "\xff", "a b", "", "x" * 65, "../x"])
@pytest.mark.parametrize("path", [GENERATE, "/health", "/nope"])
def test_unsafe_request_ids_are_400_on_every_path(
    client: httpx.Client, path: str, given: str
) -> None:
    headers = {b"x-request-id": given.encode("latin-1")}
    answer = client.post(path, json={"prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-id")
    assert answer.headers["x-request-id"] not in ("", given)


def test_two_request_ids_in_one_request_are_refused(client: httpx.Client) -> None:
    headers = [(b"x-request-id", b"ok"), (b"x-request-id", b"\xff")]
    assert client.get("/health", headers=headers).status_code == 400


@pytest.mark.parametrize(
    "header", ["x-request-timeout-seconds", "serve_multiplexed_model_id", "x-session-id"]
)
@pytest.mark.parametrize("value", ["0.00001", "é"])
def test_headers_that_would_steer_ray_serve_are_ignored(
    client: httpx.Client, header: str, value: str
) -> None:
    body = {"prompt": "dunes", "num_inference_steps": 1, "size": "64x64"}
    headers = {header.encode(): value.encode("latin-1")}
    assert client.post(GENERATE, json=body, headers=headers).status_code == 200


def test_an_image_at_a_url_is_the_same_as_in_the_answer(client: httpx.Client) -> None:
    asked = {"prompt": "dunes", "num_inference_steps": 2, "seed": 3, "precision": "fp8"}
    inline = client.post(GENERATE, json=asked).json()["data"][0]
    item = client.post(GENERATE, json={**asked, "response_format": "url"}).json()["data"][0]
    answer = client.get(item["url"])
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == base64.b64decode(inline["b64_json"])
    assert client.get(item["url"] + "0").status_code == 403


@pytest.mark.usefixtures("patient")
def test_health_does_not_wait_behind_200_open_requests(url: str, octet: RunningApplication) -> None:
    """Ten health checks in a row are answered while 200 requests stay open."""
    long = {
        "prompt": "dunes",
        "timeout_s": DAY_S,
        "num_inference_steps": 100,
        "size": "256x256",
        "guidance_scale": IDLE,
    }

    async def main() -> None:
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            work = [asyncio.create_task(client.post(GENERATE, json=long)) for _ in range(200)]
            await asyncio.to_thread(wait_for, lambda: octet.status().calls == 200)
            for _ in range(10):
                assert (await client.get("/health")).status_code == 200
            assert not any(task.done() for task in work)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    asyncio.run(main())
    wait_for(lambda: octet.status().calls == 0)


def test_a_repeated_request_is_answered_from_the_cache(url: str) -> None:
    asked = {"prompt": "dunes", "seed": 20}
    with httpx.Client(base_url=url, timeout=120) as client:
        first, again = (client.post(GENERATE, json=asked) for _ in range(2))
    assert [a.headers["x-octet-cache"] for a in (first, again)] == ["miss", "hit"]
    assert first.json()["data"] == again.json()["data"]


def test_a_client_that_leaves_ends_no_other_clients_image(
    url: str, octet: RunningApplication
) -> None:
    """Equal requests share one generation, which ends when the last client has left."""
    body: dict[str, Any] = {"prompt": "dunes", "size": "256x256", "guidance_scale": IDLE}
    body.update(num_inference_steps=15, seed=21)

    def post(timeout_s: float, id: str, **more: Any) -> httpx.Response:
        headers = {"x-request-id": id}
        return httpx.post(url + GENERATE, json=body | more, headers=headers, timeout=timeout_s)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, 1, "leaver")
        wait_for(lambda: running(octet) == 1)
        others = [pool.submit(post, 60, f"stays-{i}") for i in range(2)]
        with pytest.raises(httpx.ReadTimeout):
            first.result()
        assert running(octet) == 1
        uses = [other.result().headers["x-octet-cache"] for other in others]
        assert uses == ["shared", "shared"]
        assert "leaver/0: no replica" not in replica_logs()  # the generation was not stopped
        assert "generated leaver/0" in replica_logs()
        leaving = [
            pool.submit(post, 0.5, f"leaves-{i}", seed=22, num_inference_steps=100)
            for i in range(2)
        ]
        for one in leaving:
            with pytest.raises(httpx.ReadTimeout):
                one.result()
    wait_for(lambda: running(octet) == 0)
    assert "generated leaves" not in replica_logs()


def test_auto_uses_both_pools_at_once(url: str) -> None:
    """`precision: auto` never waits while an allowed pool has a free slot."""

    async def main() -> set[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            body = {"prompt": "dunes", "n": 4, "num_inference_steps": 8}
            answers = await asyncio.gather(*(client.post(GENERATE, json=body) for _ in range(2)))
            return {item["precision"] for a in answers for item in a.json()["data"]}

    assert asyncio.run(main()) == {"fp8", SIXTEEN_BIT}


CANARY = "canary-5e1b"
PICTURE = (Path(__file__).parents[1] / "edits" / "plain.png").read_bytes()
QUICK_FORM = {"num_inference_steps": "1", "size": "64x64"}


def test_logs_are_json_and_hold_neither_prompts_nor_keys(url: str) -> None:
    """Some requests are valid and some are not. One line of the log says how each request ended."""
    named = {"authorization": f"Bearer {CANARY}", "x-request-id": "watched"}
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{CANARY} hills", "negative_prompt": CANARY, "seed": 23},
        {"prompt": f"{CANARY} hills", "negative_prompt": CANARY, "seed": 23},
        {"prompt": CANARY, "stream": True, "partial_images": 1},
        {"prompt": CANARY, "timeout_s": 0.05},
        {"prompt": CANARY, "size": CANARY},
        {"prompt": [CANARY]},
        {"prompt": CANARY, CANARY: CANARY},
        {"prompt": f"{CANARY}\ud800"},
        {"prompt": CANARY, "user": CANARY, "response_format": "url"},
    ]
    quick = {"num_inference_steps": 2, "size": "64x64"}
    with httpx.Client(base_url=url, timeout=120) as client:
        for i, body in enumerate(bodies):
            headers = {**named, "x-request-id": f"watched-{i}"}
            client.post(GENERATE, content=json.dumps({**quick, **body}), headers=headers)
        client.post(GENERATE, content=f'{{"prompt": "{CANARY}', headers=named)
        client.get(f"/v1/models/{'x' * 9}", headers=named)
        for content in (PICTURE, CANARY.encode()):
            upload: dict[str, Any] = {"image": (CANARY, content, CANARY), CANARY: (CANARY, content)}
            client.post(EDIT, data={"prompt": CANARY}, files=upload, headers=named)
            del upload[CANARY]
            client.post(EDIT, data={**QUICK_FORM, "prompt": CANARY}, files=upload, headers=named)

    files = [file for file in log_folder().rglob("*") if file.is_file()]
    assert len(files) > 10
    requests = {}
    for file in files:
        text = file.read_text(errors="replace")
        assert CANARY not in text, file
        if file.parent.name == "serve" and file.name.startswith(("replica", "proxy")):
            for line in text.splitlines():
                said = json.loads(line)
                if said.get("event") == "request":
                    requests[said["request"]] = said
    first, again = requests["watched-0"], requests["watched-1"]
    assert (first["outcome"], first["status"], first["tenant"]) == ("ok", 200, "anonymous")
    assert (first["cache"], again["cache"]) == ("miss", "hit")
    assert first["took_s"] > first["denoise_s"] > 0
    assert requests["watched-2"]["outcome"] == "ok"
