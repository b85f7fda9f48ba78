"""Edits with the demo model on real Ray, and hostile uploads."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from serve.launch import RunningApplication

from .test_faults import replicas

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
SKY = 48  # rows of 128 in which the mask is transparent


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    headers = {"cache-control": "no-cache"}
    with httpx.Client(base_url=url, timeout=120, headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def noon(url: str) -> bytes:
    """A picture of mountains by day."""
    body = {"prompt": "mountains at noon", "seed": 3, "num_inference_steps": 14}
    return image_of(httpx.post(url + GENERATE, json=body, timeout=120))


def image_of(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def pixels(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def sky_mask() -> bytes:
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 128, SKY))
    return saved(mask)


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
def test_repainting_the_sky_makes_it_night_and_keeps_the_ground(
    client: httpx.Client, noon: bytes, precision: str
) -> None:
    answer = client.post(
        EDIT,
        data={"prompt": "mountains at night, stars", "seed": "5", "precision": precision},
        files={"image": ("noon", noon), "mask": ("sky", sky_mask())},
    )
    before, after = pixels(noon), pixels(image_of(answer))
    assert np.array_equal(before[SKY:], after[SKY:])
    assert after[:SKY].mean() < 0.6 * before[:SKY].mean()
    timings = answer.json()["data"][0]["timings"]
    assert timings["latents_s"] > 0


def test_the_strength_says_how_much_of_the_picture_is_left(
    client: httpx.Client, noon: bytes
) -> None:
    def apart(strength: str) -> float:
        data = {"prompt": "mountains at noon", "seed": "5", "strength": strength}
        edited = image_of(client.post(EDIT, data=data, files={"image": ("noon", noon)}))
        return float(np.abs(pixels(edited).astype(int) - pixels(noon)).mean())

    slight, strong = apart("0.1"), apart("0.95")
    assert 0 < slight < 0.5 * strong


def test_a_seed_gives_the_same_image_through_form_json_and_stream(
    url: str, client: httpx.Client, noon: bytes
) -> None:
    odd = saved(Image.open(io.BytesIO(noon)).crop((0, 0, 100, 75)))
    fields = {"prompt": "a city at night", "precision": "fp8", "num_inference_steps": 6, "seed": 9}
    by_form = client.post(
        EDIT, data={k: str(v) for k, v in fields.items()}, files={"image": ("odd", odd)}
    )
    address = f"data:image/png;base64,{base64.b64encode(odd).decode()}"
    by_json = client.post(EDIT, json={**fields, "images": [{"image_url": address}]})
    assert by_form.json()["size"] == "100x75"
    assert image_of(by_form) == image_of(by_json)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as openai_client:
        events = list(
            openai_client.images.edit(
                image=odd,
                prompt="a city at night",
                stream=True,
                partial_images=2,
                extra_body={"precision": "fp8", "num_inference_steps": 6, "seed": 9},
                extra_headers={"cache-control": "no-store"},
            )
        )
    kinds = [event.type for event in events]
    assert kinds == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    files = [base64.b64decode(event.b64_json) for event in events]
    assert {pixels(file).shape for file in files} == {(75, 100, 3)}
    assert files[-1] == image_of(by_form)
    image = Image.open(io.BytesIO(files[-1]))
    assert isinstance(image, PngImageFile)
    assert json.loads(image.text["edit_parameters"])["strength"] == 0.6


def hostile_uploads() -> list[tuple[bytes, str]]:
    """A hundred bodies: huge, mislabelled and damaged pictures; the same ones in each run."""
    rng = random.Random(0)
    big = Image.new("RGB", (5000, 5000), "teal")
    huge = [saved(big), saved(big, "jpeg"), saved(big.resize((4000, 4000)), "webp")]
    noise = saved(Image.effect_noise((500, 500), 90).convert("RGB"))
    small = [
        noise,
        saved(Image.effect_noise((300, 300), 90).convert("RGB"), "webp"),
        b"",
        b"GIF89a",
    ]
    bodies = []
    for i in range(100):
        data = bytearray(huge[i % 3] if i % 20 == 0 else small[i % 4])
        for _ in range(rng.randrange(3) if i % 20 else 0):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        texts = {"prompt": "x", "num_inference_steps": "1", "size": "64x64", "guidance_scale": "1"}
        kind = rng.choice(["image/png", "text/html", "application/octet-stream"])
        request = httpx.Request(
            "POST", "http://x", data=texts, files={"image": ("../x", bytes(data), kind)}
        )
        body = request.read()
        if i % 7 == 3:
            body = body[: rng.randrange(len(body))]
        bodies.append((body, request.headers["content-type"]))
    return bodies


def test_hostile_uploads_take_bounded_memory_and_hold_up_nobody(
    url: str, octet: RunningApplication
) -> None:
    """Eight clients send all bodies, while others ask for the server's health without a pause."""
    (pid,) = [pid for pid, name in replicas().items() if name == "Ingress"]
    ingress, done = psutil.Process(pid), threading.Event()
    before, peak = ingress.memory_full_info().uss, [0]

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], ingress.memory_full_info().uss)

    async def main() -> tuple[Counter[int], int]:
        looks, statuses, bodies = 0, Counter[int](), hostile_uploads()
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:

            async def send() -> None:
                while bodies:
                    body, kind = bodies.pop()
                    answer = await client.post(EDIT, content=body, headers={"content-type": kind})
                    statuses[answer.status_code] += 1

            async def look() -> None:
                nonlocal looks
                while not sending.done():
                    assert (await client.get("/health")).status_code == 200
                    looks += 1

            sending = asyncio.gather(*(send() for _ in range(8)))
            await asyncio.gather(sending, look())
        return statuses, looks

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        statuses, looks = asyncio.run(main())
    finally:
        done.set()
        watcher.join()
    assert set(statuses) == {200, 400}, statuses
    assert min(statuses.values()) > 10
    limits = octet.settings.edits
    bound = limits.max_held_bytes + 20 * limits.max_pixels
    assert peak[0] - before <= 1.1 * bound
    # If each look waited for the pictures of eight clients, only a dozen looks would fit in.
    assert looks > sum(statuses.values())
