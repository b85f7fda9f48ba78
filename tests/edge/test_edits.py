"""Edits over real HTTP with the real Dispatcher: uploads, answers, reuse and limits.

The Generator lays a plain colour over what may change, so what a mask keeps can be compared.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from serve.api.timing import IngressTiming
from serve.settings.application import Settings
from serve.settings.file import load_settings

from ..builders import LAPTOP
from .edge import Edge, started

EDIT, GENERATE = "/v1/images/edits", "/v1/images/generations"
FOLDER = Path(__file__).parents[1] / "edits"
CASES: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())["cases"]
NIGHT = {"prompt": "night"}


def file(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


PLAIN, MASK = file("plain.png"), file("mask_alpha.png")
IMAGE = {"image": ("plain.png", PLAIN)}
MASKED = {**IMAGE, "mask": ("mask.png", MASK)}


@pytest.fixture(scope="module")
def edge(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = str(tmp_path_factory.mktemp("data"))
    with started(laptop.model_copy(update={"data_folder": folder})) as edge:
        yield edge


@pytest.fixture
def client(edge: Edge) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=edge.url, timeout=20) as client:
        yield client


@pytest.fixture
def tune(edge: Edge) -> Iterator[Any]:
    def tune(**changes: int) -> None:
        edits = edge.settings.edits.model_copy(update=changes)
        edge.tune(edge.settings.model_copy(update={"edits": edits}))

    yield tune
    edge.tune(edge.settings)


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def generated(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def fault(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize("name", CASES)
def test_every_file_is_answered_as_its_case_says(client: httpx.Client, name: str) -> None:
    case = CASES[name]
    files = {"image": (name, file(name))}
    if case["sent_as"] == "mask":
        files = {"image": ("image", file(case["with"])), "mask": (name, file(name))}
    answer = client.post(EDIT, data=NIGHT, files=files)
    if case["status"] == 400:
        assert fault(answer) == (400, "invalid_value", case["sent_as"])
        return
    found = generated(answer)
    width, height = case["size"]
    assert answer.json()["size"] == f"{width}x{height}"
    assert pixels(found).shape == (height, width, 3)
    assert b"<script>" not in found
    assert b"trailing" not in found


def test_what_a_mask_keeps_is_the_same_to_the_last_bit(client: httpx.Client) -> None:
    for mask in ("mask_alpha.png", "mask_palette.png"):
        files = {**IMAGE, "mask": ("m", file(mask))}
        found = pixels(generated(client.post(EDIT, data=NIGHT, files=files)))
        assert np.array_equal(found[:, :48], pixels(PLAIN)[:, :48])
        assert (found[:, 48:] != pixels(PLAIN)[:, 48:]).any(axis=2).mean() > 0.9


def test_the_openai_client_edits_an_image_with_a_mask(edge: Edge) -> None:
    with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="none") as client:
        answer = client.images.edit(
            image=io.BytesIO(PLAIN),
            mask=("mask.png", MASK, "text/plain"),  # the content decides
            prompt="night",
            n=2,
            size="auto",
            background="auto",
            input_fidelity="low",
            quality="high",
            extra_body={"seed": 7, "strength": 0.5, "num_inference_steps": 8},
        )
    assert answer.data
    assert [item.seed for item in answer.data] == [7, 8]  # type: ignore[attr-defined]  # ours
    assert answer.usage
    assert answer.usage.input_tokens_details.image_tokens == 2 * 96 * 64 / 256
    image = pixels(base64.b64decode(answer.data[0].b64_json or ""))
    assert np.array_equal(image[:, :48], pixels(PLAIN)[:, :48])


def test_the_openai_client_iterates_the_events_of_an_edit(edge: Edge) -> None:
    with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="none") as client:
        stream = client.images.edit(
            image=[PLAIN], prompt="night", stream=True, extra_body={"progress": True, "seed": 3}
        )
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.progress", "image_edit.completed"]
    alone = httpx.post(
        edge.url + EDIT,
        data={**NIGHT, "seed": "3"},
        files=IMAGE,
        headers={"cache-control": "no-cache"},
    )
    last: Any = events[-1]
    assert base64.b64decode(last.b64_json) == generated(alone)


def test_json_and_a_form_get_the_same_image_and_share_the_result_cache(
    client: httpx.Client,
) -> None:
    url = f"data:image/png;base64,{base64.b64encode(PLAIN).decode()}"
    body = {**NIGHT, "seed": 11, "images": [{"image_url": url}]}
    first = client.post(EDIT, json=body)
    again = client.post(EDIT, data={**NIGHT, "seed": "11"}, files=IMAGE)
    assert [a.headers["x-octet-cache"] for a in (first, again)] == ["miss", "hit"]
    assert generated(first) == generated(again)
    for files in (MASKED, {"image": ("a", file("rgba_half.png"))}):
        other = client.post(EDIT, data={**NIGHT, "seed": "11"}, files=files)
        assert other.headers["x-octet-cache"] == "miss"
    stronger = client.post(EDIT, data={**NIGHT, "seed": "11", "strength": "0.9"}, files=IMAGE)
    assert stronger.headers["x-octet-cache"] == "miss"
    assert client.post(GENERATE, json={**NIGHT, "seed": 11}).headers["x-octet-cache"] == "miss"


def test_equal_edits_that_are_open_are_generated_once(client: httpx.Client, edge: Edge) -> None:
    before = edge.painter.begun

    def post(id: str) -> httpx.Response:
        data = {"prompt": "held", "seed": "5"}
        return client.post(EDIT, data=data, files=IMAGE, headers={"x-request-id": id})

    with ThreadPoolExecutor(2) as pool, edge.painter.holding():
        answers = [pool.submit(post, id) for id in ("one", "two")]
        edge.wait_until_open("one", "two")
    assert generated(answers[0].result()) == generated(answers[1].result())
    assert edge.painter.begun == before + 1
    assert edge.ingress._uploads.held == 0


def test_the_tokens_of_the_picture_are_input_tokens(client: httpx.Client) -> None:
    usage = client.post(EDIT, data={**NIGHT, "strength": "0.5"}, files=IMAGE).json()["usage"]
    assert usage["input_tokens"] == 77 + 24
    assert usage["output_tokens"] == 24


def test_an_image_may_be_answered_as_a_url(client: httpx.Client) -> None:
    answer = client.post(EDIT, data={**NIGHT, "response_format": "url"}, files=MASKED)
    image = client.get(answer.json()["data"][0]["url"]).content
    assert np.array_equal(pixels(image)[:, :48], pixels(PLAIN)[:, :48])


def test_variations_are_named_as_retired(client: httpx.Client) -> None:
    answer = client.post("/v1/images/variations", files=IMAGE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "use /v1/images/edits" in answer.text


@pytest.mark.parametrize("cut", [1, 3, 60, 400])
def test_a_form_that_was_cut_off_is_400(client: httpx.Client, cut: int) -> None:
    request = client.build_request("POST", EDIT, data=NIGHT, files=IMAGE)
    kind = request.headers["content-type"]
    answer = client.post(EDIT, content=request.read()[:-cut], headers={"content-type": kind})
    assert answer.status_code == (200 if cut == 1 else 400)  # the very last byte is a new line


def test_uploads_that_are_too_large_are_413(client: httpx.Client, tune: Any) -> None:
    tune(max_image_bytes=1000, max_mask_bytes=2000)
    picture = PLAIN + bytes(1001 - len(PLAIN))
    answer = client.post(EDIT, data=NIGHT, files={"image": ("a", picture)})
    assert fault(answer) == (413, "body_too_large", "image")
    assert client.post(EDIT, data=NIGHT, files={"image": ("a", picture[:-1])}).status_code == 200
    whole = {"image": ("a", bytes(1_010_000))}  # more than all parts together may have
    assert client.post(EDIT, data=NIGHT, files=whole).status_code == 413


def test_an_ingress_holds_a_limited_number_of_bytes(
    client: httpx.Client, edge: Edge, tune: Any
) -> None:
    """The pictures of open requests count too. When they have ended, others are accepted."""
    tune(max_held_bytes=96 * 64 * 3 * 4 + 2000, max_image_bytes=1000, max_mask_bytes=1000)
    with ThreadPoolExecutor(3) as pool, edge.painter.holding():
        held = [
            pool.submit(
                client.post,
                EDIT,
                data={"prompt": "held"},
                files=IMAGE,
                headers={"x-request-id": f"held-{i}"},
            )
            for i in range(2)
        ]
        edge.wait_until_open("held-0", "held-1")
        refused = client.post(EDIT, data=NIGHT, files=IMAGE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["x-should-retry"] == "true"
        assert client.post(GENERATE, json=NIGHT).status_code == 200
    assert {answer.result().status_code for answer in held} == {200}
    assert edge.ingress._uploads.held == 0
    assert client.post(EDIT, data=NIGHT, files=IMAGE).status_code == 200


def test_a_slow_upload_is_not_cut_off_while_it_goes_on(tmp_path: Path) -> None:
    """A fifth of a second is too little for a body of this size, but it keeps coming."""
    chosen = load_settings(LAPTOP, {}).model_copy(update={"data_folder": str(tmp_path)})
    with started(chosen, IngressTiming(body_s=0.2)) as edge:
        request = httpx.Request(
            "POST", edge.url + EDIT, data=NIGHT, files={"image": ("a", PLAIN + bytes(100_000))}
        )
        body, kind = request.read(), request.headers["content-type"]

        def slowly(pause_s: float) -> Iterator[bytes]:
            for start in range(0, len(body), 10_000):
                yield body[start : start + 10_000]
                time.sleep(pause_s)

        def post(pause_s: float) -> int:
            headers = {"content-type": kind}
            return httpx.post(
                edge.url + EDIT, content=slowly(pause_s), headers=headers, timeout=30
            ).status_code

        assert post(0.04) == 200
        assert post(0.3) == 408


def damaged_forms() -> st.SearchStrategy[tuple[bytes, str]]:
    """Bodies of forms that were damaged in some places, cut off, or are named wrongly."""
    good = [
        httpx.Request("POST", "http://x", data=NIGHT, files=files)
        for files in (IMAGE, MASKED, *({"image": (name, file(name))} for name in CASES))
    ]
    whole = [(request.read(), request.headers["content-type"]) for request in good]

    @st.composite
    def damaged(draw: st.DrawFn) -> tuple[bytes, str]:
        body, kind = draw(st.sampled_from(whole))
        data = bytearray(body)
        for _ in range(draw(st.integers(0, 5))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        if draw(st.booleans()):
            del data[draw(st.integers(0, len(data))) :]
        kinds = [kind, kind, kind, "application/json", "multipart/form-data", "image/png"]
        return bytes(data), draw(st.sampled_from(kinds))

    return damaged()


def test_any_upload_gets_an_image_or_an_explanation(edge: Edge) -> None:
    """tests/unit/test_wire_edit.py tries many more on the decoder alone."""
    seen: dict[int, int] = {}
    with httpx.Client(base_url=edge.url, timeout=20) as client:

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(damaged_forms())
        def post(given: tuple[bytes, str]) -> None:
            body, kind = given
            answer = client.post(EDIT, content=body, headers={"content-type": kind})
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400), answer.text
            assert answer.status_code == 200 or answer.json()["error"]["message"]

        post()
    assert sum(seen.values()) >= 100
    assert min(seen[200], seen[400]) >= 5, seen
    assert edge.ingress._uploads.held == 0
