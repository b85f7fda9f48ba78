"""The HTTP edge with real HTTP and the real Dispatcher; the Generators return plain colours.

Plain colours make thousands of requests affordable. For every body that a client sends, the answer
conforms to the OpenAPI document and is never a 500.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from starlette.routing import Route

from cluster.cost import CostCoefficients
from serve.api.ingress import Ingress
from serve.api.timing import IngressTiming
from serve.api.wire.edit import EditFields
from serve.api.wire.paths import VARIATIONS
from serve.api.wire.request import ImageGeneration
from serve.models import reference_work
from serve.models.checkpoints import node_folder
from serve.settings.application import (
    CatalogueSettings,
    HttpSettings,
    ResultSettings,
    Settings,
)
from serve.settings.models import Source

from ..builders import DEMO_MODEL
from ..in_process import Handle
from ..s3 import ENDPOINT, FaultProxy, a_bucket, s3_server
from ..wait import wait_for
from .conforms import CONFORMS
from .edge import Edge, front, started, units

GENERATE = "/v1/images/generations"
HASTY = IngressTiming(body_s=0.5, keep_alive_s=0.1, sweep_s=0.2)


@pytest.fixture(scope="module")
def edge(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = str(tmp_path_factory.mktemp("data"))
    with started(laptop.model_copy(update={"data_folder": folder}), HASTY) as edge:
        yield edge


@pytest.fixture
def client(edge: Edge) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=edge.url, timeout=10) as client:
        yield client


@pytest.fixture
def tune(edge: Edge) -> Iterator[Any]:
    def tune(**changes: object) -> None:
        edge.tune(edge.settings.model_copy(update=changes))

    yield tune
    edge.tune(edge.settings)


# -- any body of a client -------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8")) | st.sampled_from(["\x00", "夜 🌕", "x" * 40_000])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PLAUSIBLE = {
    "model": st.sampled_from(["landscapes", "sdxl", "", None]),
    "n": st.integers(-1, 6) | st.just(10**30),
    "size": st.sampled_from(["64x64", "auto", "65x64", "0x0", "99999x16", "x", "64X64", "６４x64"]),
    "seed": st.integers(-1, 2**64),
    "num_inference_steps": st.integers(-1, 200),
    "guidance_scale": st.floats(),
    "precision": st.sampled_from(["auto", "fp8", "fp16", "fp4"]),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
    "output_compression": st.integers(-1, 101),
    "response_format": st.sampled_from(["url", "b64_json", "x"]),
    "timeout_s": st.floats(),
    "promt": st.just("x"),
}
FIELDS = st.sampled_from([*ImageGeneration.model_fields, "extra", ""]) | TEXT
BODIES = (
    st.fixed_dictionaries({"prompt": st.just("a hill") | TEXT}, optional=PLAUSIBLE).map(json.dumps)
    | st.dictionaries(FIELDS, JSON, max_size=5).map(json.dumps)
    | JSON.map(json.dumps)
    | st.text().map(lambda text: '{"prompt": "' + text)
    | st.sampled_from(
        [
            '{"prompt": "\\ud800"}',
            '{"prompt": "x", "seed": ' + "9" * 5000 + "}",
            '{"prompt": "x", "guidance_scale": NaN}',
            '{"prompt": "x", "guidance_scale": 1e999}',
            '{"prompt": "x", "prompt": 1}',
            "[" * 100_000,
            '{"a":' * 50_000,
        ]
    )
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=50)


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_any_body_gets_an_image_or_an_explanation(edge: Edge) -> None:
    """tests/unit/test_wire_request.py tries many more bodies on the parser alone."""
    seen: dict[int, int] = {}
    with httpx.Client(base_url=edge.url, timeout=10) as client:

        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
        @given(BODIES)
        @example(b'{"prompt": "dunes"}')
        def post(body: bytes) -> None:
            answer = client.post(GENERATE, content=body)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code == 200:
                assert answer.json()["data"]
            else:
                tiny = "deadline_unreachable", "deadline_exceeded"  # where a timeout_s is
                assert answer.status_code in (400, 404) or code(answer) in tiny, answer.text
                assert answer.json()["error"]["message"]

        post()
    assert sum(seen.values()) >= 200
    assert seen[200], seen  # the well-formed ones are served
    assert seen[400] > 50, seen


# test_tenants and test_jobs have these.
ELSEWHERE = "/admin/", "/v1/jobs", "/v1/batches", "/v1/webhook_endpoints", "/v1/files/{"


# -- the OpenAPI document -------------------------------------------------------------------------


def test_answers_are_what_the_openapi_document_says(edge: Edge) -> None:
    document = schemathesis.openapi.from_url(f"{edge.url}/openapi.json")
    results = document.get_all_operations()
    operations = [found.ok() for found in results if isinstance(found, Ok)]
    operations = [one for one in operations if not one.path.startswith(ELSEWHERE)]
    operations = [one for one in operations if one.path != "/v1/files"]
    assert len(operations) == 14
    statuses = set()
    for operation in operations:
        # Only a body can be wrong; the other routes take any text.
        has_body = operation.method == "post"
        for mode in GenerationMode if has_body else [GenerationMode.POSITIVE]:

            @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=mode))
            def call(case: Any) -> None:
                answer = case.call_and_validate(checks=CONFORMS)
                assert answer.status_code != 500  # a 504 is right where a timeout_s is tiny
                statuses.add(answer.status_code)

            call()
    assert statuses >= {200, 400, 403, 404}, statuses


def test_the_document_names_every_field_and_route(client: httpx.Client, edge: Edge) -> None:
    text = client.get("/openapi.json").text
    document = json.loads(text)
    named = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert named == set(document["components"]["schemas"])
    body = document["components"]["schemas"]["ImageGeneration"]
    assert body["properties"].keys() == ImageGeneration.model_fields.keys()
    assert body["additionalProperties"] is False
    routes = {
        r.path.replace(":path", "")
        for r in edge.ingress.__serve_build_asgi_app__().routes
        if isinstance(r, Route)
    }
    for name in ("ImageEdit", "ImageEditForm"):
        edit = document["components"]["schemas"][name]
        assert edit["properties"].keys() >= EditFields.model_fields.keys()
        assert edit["additionalProperties"] is False
    assert document["paths"].keys() == routes - {"/", "/favicon.ico", "/openapi.json", VARIATIONS}


# -- limits, ids, deadlines -----------------------------------------------------------------------


def test_a_body_may_have_a_megabyte(client: httpx.Client) -> None:
    def post(size: int) -> int:
        return client.post(
            GENERATE, content=b'{"prompt":"x"' + b" " * (size - 14) + b"}"
        ).status_code

    assert post(1_000_000) == 200
    assert post(1_000_001) == 413


def test_a_body_that_does_not_arrive_is_408(client: httpx.Client) -> None:
    def slowly() -> Iterator[bytes]:
        yield b'{"prompt": '
        time.sleep(2 * HASTY.body_s)
        yield b'"x"}'

    answer = client.post(GENERATE, content=slowly())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_timeout")


def test_a_request_id_is_in_use_until_its_answer(client: httpx.Client, edge: Edge) -> None:
    def post(prompt: str) -> httpx.Response:
        headers = {"x-request-id": "mine.1"}
        return client.post(GENERATE, json={"prompt": prompt, "n": 2}, headers=headers)

    with ThreadPoolExecutor(1) as pool, edge.painter.holding():
        first = pool.submit(post, "held")
        edge.wait_until_open("mine.1")
        second = post("x")
    assert first.result().status_code == 200
    assert second.status_code == 409
    assert second.json()["error"]["code"] == "request_id_in_use"
    assert second.headers["x-should-retry"] == "false"
    assert post("x").status_code == 200


@pytest.mark.parametrize("given", ["a b", "x" * 65, ""])
def test_unsafe_request_ids_are_refused(client: httpx.Client, given: str) -> None:
    answer = client.post(GENERATE, json={"prompt": "x"}, headers={"x-request-id": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-id")


def test_a_deadline_that_passes_is_504_and_frees_the_slots(
    edge: Edge, client: httpx.Client
) -> None:
    before = edge.painter.cancelled
    for _ in range(8):  # both pools have 4 slots
        answer = client.post(GENERATE, json={"prompt": "slow", "timeout_s": 0.05})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert "0.05 s" in answer.json()["error"]["message"]
    assert client.post(GENERATE, json={"prompt": "x"}).status_code == 200
    assert edge.painter.cancelled == before + 8  # none of them ran to its end


def test_a_deadline_that_passes_later_is_an_event(edge: Edge) -> None:
    with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="any", max_retries=0) as client:
        stream = client.images.generate(
            model="landscapes",
            prompt="slow",
            stream=True,
            extra_body={"progress": True, "timeout_s": 0.1},
        )
        with pytest.raises(openai.APIError, match=r"not done in 0\.1 s") as caught:
            list(stream)
    body = cast(dict[str, Any], caught.value.body)
    assert body["code"] == "deadline_exceeded"


def test_an_unexpected_error_is_the_last_event_of_a_stream(client: httpx.Client) -> None:
    answer = client.post(GENERATE, json={"prompt": "broken", "stream": True, "progress": True})
    frames = answer.text.rstrip().split("\n\n")
    assert [frame.splitlines()[0] for frame in frames][-1] == "event: error"
    error = json.loads(frames[-1].splitlines()[1].removeprefix("data: "))["error"]
    assert (error["code"], "ZeroDivision" in answer.text) == ("internal_error", False)


def test_a_quiet_stream_sends_keep_alive_comments(client: httpx.Client) -> None:
    text = client.post(GENERATE, json={"prompt": "slow", "stream": True}).text
    assert text.startswith(": still here\n\n")
    assert "event: image_generation.completed\n" in text


def test_a_call_is_cancelled_at_any_ingress(edge: Edge) -> None:
    async def another_ingress_deletes() -> httpx.Response:
        other = Ingress.__new__(Ingress)
        await other.__init__(  # type: ignore[misc]  # like Ray Serve
            front(edge.settings), Handle(edge.dispatcher), Handle, units
        )
        await other.reconfigure(edge.settings.model_dump(mode="json"))
        transport = httpx.ASGITransport(other.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://other") as client:
            return await client.delete("/v1/requests/elsewhere")

    async def main() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(base_url=edge.url) as client:
            headers = {"x-request-id": "elsewhere"}
            body = {"prompt": "held", "n": 2}
            asked = asyncio.create_task(client.post(GENERATE, json=body, headers=headers))
            await asyncio.to_thread(edge.wait_until_open, "elsewhere")
            deleting = asyncio.run_coroutine_threadsafe(another_ingress_deletes(), edge.loop)
            return await asyncio.wrap_future(deleting), await asked

    with edge.painter.holding():
        deleted, cancelled = asyncio.run(main())
    assert deleted.json() == {"id": "elsewhere", "object": "request", "cancelled": True}
    assert (cancelled.status_code, cancelled.json()["error"]["code"]) == (499, "request_cancelled")


def test_the_answer_states_the_tokens_of_all_images(client: httpx.Client) -> None:
    body = {"prompt": "x", "n": 3, "size": "128x64"}
    usage = client.post(GENERATE, json=body).json()["usage"]
    assert usage == {
        "input_tokens": 3 * 77,
        "input_tokens_details": {"text_tokens": 3 * 77, "image_tokens": 0},
        "output_tokens": 3 * (128 // 16) * (64 // 16),
        "total_tokens": 3 * 77 + 3 * 32,
    }
    with openai.OpenAI(base_url=str(client.base_url) + "/v1", api_key="any") as official:
        answer = official.images.generate(prompt="x", extra_body={"size": "128x64"})
    assert answer.usage
    assert answer.usage.total_tokens == 77 + 32


def test_browsers_may_call_from_the_origins_that_the_settings_allow(
    client: httpx.Client, edge: Edge, tune: Any
) -> None:
    origin = {"origin": "https://app.example"}
    preflight = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,prefer,x-request-id",
    }
    allowed = "access-control-allow-origin"
    assert client.options(GENERATE, headers=preflight).status_code == 405
    assert allowed not in client.get("/v1/models", headers=origin).headers
    tune(http=HttpSettings(allowed_origins=("https://app.example",)))
    answer = client.options(GENERATE, headers=preflight)
    assert answer.status_code == 200
    assert answer.headers[allowed] == "https://app.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    answer = client.post(GENERATE, headers=origin, json={"prompt": ""})  # errors too
    assert (answer.status_code, answer.headers[allowed]) == (400, "https://app.example")
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = {**preflight, "origin": "https://evil.example"}
    assert client.options(GENERATE, headers=other).status_code == 400


def test_models_state_their_limits_and_defaults(client: httpx.Client) -> None:
    """Whole numbers stay whole, so that a client may put them into a request."""
    (listed,) = client.get("/v1/models").json()["data"]
    assert listed == client.get("/v1/models/landscapes").json()
    assert repr(listed["limits"]["max_size_px"]) == "256"
    assert listed["limits"]["max_guidance_scale"] == 30
    body = {"prompt": "x", "num_inference_steps": listed["limits"]["max_steps"]}
    assert client.post(GENERATE, json=body).status_code == 200
    assert repr(listed["defaults"]["num_inference_steps"]) == "28"
    assert "a futuristic cityscape at sunset" in listed["example_prompts"]


def test_without_a_database_there_is_nothing_to_administer(client: httpx.Client) -> None:
    for path in ("usage", "tenants", "keys", "audit"):
        answer = client.get(f"/admin/v1/{path}")
        assert answer.status_code == 404
        assert "set data_folder, or the url of store" in answer.json()["error"]["message"]


def test_the_icon_is_served(client: httpx.Client) -> None:
    answer = client.get("/favicon.ico")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")


def test_an_open_request_says_where_it_is(client: httpx.Client, edge: Edge) -> None:
    assert client.get("/v1/requests/where").status_code == 404
    with ThreadPoolExecutor(1) as pool, edge.painter.holding():
        headers, body = {"x-request-id": "where"}, {"prompt": "held", "n": 2}
        asked = pool.submit(client.post, GENERATE, json=body, headers=headers)
        edge.wait_until_open("where")
        wait_for(lambda: client.get("/v1/requests/where").json()["running"] == 2)
        state = client.get("/v1/requests/where").json()
        assert state.pop("age_s") >= 0
        assert state == {
            "id": "where",
            "object": "request",
            "status": "in_progress",
            "queued": 0,
            "running": 2,
            "queue_position": None,
        }
    assert asked.result().status_code == 200
    wait_for(lambda: client.get("/v1/requests/where").status_code == 404)


def test_without_authentication_any_authorization_header_passes(client: httpx.Client) -> None:
    for value in ("Bearer x", "Bearer", "Basic eA==", "nonsense"):
        headers = {"authorization": value}
        assert client.post(GENERATE, json={"prompt": "x"}, headers=headers).status_code == 200


# -- live settings --------------------------------------------------------------------------------


def test_unknown_fields_pass_if_the_settings_allow_them(client: httpx.Client, tune: Any) -> None:
    body = {"prompt": "x", "scheduler": "ddim"}
    assert client.post(GENERATE, json=body).status_code == 400
    tune(ignore_unknown_fields=True)
    answer = client.post(GENERATE, json=body)
    assert (answer.status_code, answer.headers["x-octet-ignored"]) == (200, "scheduler")
    answer = client.post(GENERATE, json={"prompt": "x", "a\nb": 1, "é": 2})
    assert answer.headers["x-octet-ignored"] == "a%0Ab, %C3%A9"
    assert "x-octet-ignored" not in client.post(GENERATE, json={"prompt": "x"}).headers


def test_a_draining_ingress_finishes_what_it_has(edge: Edge, client: httpx.Client) -> None:
    try:
        assert client.get("/ready").status_code == 200
        with ThreadPoolExecutor(1) as pool, edge.painter.holding():
            headers = {"x-request-id": "before"}
            asked = pool.submit(client.post, GENERATE, json={"prompt": "held"}, headers=headers)
            edge.wait_until_open("before")
            asyncio.run_coroutine_threadsafe(edge.dispatcher.drain(), edge.loop).result()
        assert asked.result().status_code == 200
        refused = client.post(GENERATE, json={"prompt": "x"})
        assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "true")
        wait_for(lambda: client.get("/ready").json()["status"] == "draining")
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
    finally:
        edge.dispatcher.admission.draining = False


# -- results as URLs ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_url_is_read_as_the_image_it_is(client: httpx.Client, kind: str) -> None:
    body = {"prompt": "x", "n": 2, "response_format": "url", "output_format": kind}
    items = client.post(GENERATE, json=body).json()["data"]
    assert len({item["url"] for item in items}) == 2
    for item in items:
        assert "b64_json" not in item
        answer = client.get(item["url"])
        assert answer.headers["content-type"] == f"image/{kind}"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert Image.open(io.BytesIO(answer.content)).format == kind.upper()
        assert client.head(item["url"]).status_code == 200


def test_links_that_were_changed_or_expired_are_403(client: httpx.Client, tune: Any) -> None:
    body = {"prompt": "x", "response_format": "url"}
    url = client.post(GENERATE, json=body).json()["data"][0]["url"]
    for bad in (url + "0", url.replace("expires=1", "expires=2"), url.partition("?")[0]):
        answer = client.get(bad)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "link_invalid")
    tune(results=ResultSettings(link_expires_s=1))
    before = time.time()
    url = client.post(GENERATE, json=body).json()["data"][0]["url"]
    assert float(httpx.URL(url).params["expires"]) >= before + 1
    wait_for(lambda: client.get(url).status_code == 403)


def test_old_images_are_deleted(edge: Edge, client: httpx.Client, tune: Any) -> None:
    def kept() -> int:
        # os.walk passes over a folder that is deleted meanwhile, where rglob raises.
        return sum(len(files) for _, _, files in os.walk(f"{edge.settings.data_folder}/images"))

    client.post(GENERATE, json={"prompt": "x", "response_format": "url"}).raise_for_status()
    assert kept() > 0
    tune(results=ResultSettings(link_expires_s=1, max_age_s=1))
    wait_for(lambda: kept() == 0)


def test_links_lead_to_the_public_address(client: httpx.Client, edge: Edge, tune: Any) -> None:
    body = {"prompt": "x", "response_format": "url"}
    tune(public_url="https://images.example/octet")
    url = client.post(GENERATE, json=body).json()["data"][0]["url"]
    assert url.startswith("https://images.example/octet/v1/files/")
    assert client.get(url.removeprefix("https://images.example/octet")).status_code == 200


def ready(client: httpx.Client) -> dict[str, Any]:
    """The answer of a server that is ready or degraded."""
    answer = client.get("/ready")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_images_in_a_bucket_are_read_through_links_to_this_server(
    laptop: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ENDPOINT:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    body = {"prompt": "x", "response_format": "url"}
    with s3_server() as server:
        proxy, bucket = FaultProxy(server), a_bucket(server, spool_bytes=1)
        changes = {
            "data_folder": str(tmp_path),
            "s3": bucket.model_copy(update={"endpoint_url": proxy.url}),
        }
        with (
            started(laptop.model_copy(update=changes)) as edge,
            httpx.Client(base_url=edge.url, timeout=20) as client,
        ):
            url = client.post(GENERATE, json=body).json()["data"][0]["url"]
            assert url.startswith(edge.url)
            leads = client.get(url)
            assert leads.status_code == 307
            image = httpx.get(leads.headers["location"]).content
            assert Image.open(io.BytesIO(image)).size == (16, 16)
            assert client.get(url + "0").status_code == 403

            # Without the bucket, one more image waits here; then no image is generated for URLs.
            proxy.fault = "refuse"
            kept = client.post(GENERATE, json=body).json()["data"][0]["url"]
            assert client.get(kept).headers["content-type"] == "image/png"
            generated = edge.painter.generated
            answer = client.post(GENERATE, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_failed")
            assert edge.painter.generated == generated
            assert client.post(GENERATE, json={"prompt": "x"}).status_code == 200
            wait_for(lambda: ready(client)["status"] == "degraded")
            (fault,) = ready(client)["faults"].values()
            assert fault.startswith(f"bucket {bucket.bucket}: ")
            assert proxy.url in fault
            assert "anonymous" not in fault  # the fault of one image is that of the next

            # The bucket comes back.
            proxy.fault = "none"
            wait_for(lambda: client.post(GENERATE, json=body).status_code == 200)
            wait_for(lambda: ready(client)["status"] == "ready")
            assert client.get(kept).status_code == 307
        proxy.close()


def test_an_image_that_cannot_be_kept_is_503(edge: Edge, client: httpx.Client) -> None:
    images = Path(str(edge.settings.data_folder)) / "images"
    images.rename(images.with_name("away"))
    try:
        answer = client.post(GENERATE, json={"prompt": "x", "response_format": "url"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_failed")
        time.sleep(3 * HASTY.sweep_s)  # the sweep fails too and is repeated
        asyncio.run(edge.ingress.check_health())
        wait_for(lambda: ready(client)["status"] == "degraded")
        (fault,) = ready(client)["faults"].values()
        assert fault == f"folder {images}: No such file or directory"
    finally:
        images.with_name("away").rename(images)
    wait_for(lambda: ready(client)["status"] == "ready")


def test_the_work_of_a_model_is_counted_anew_when_its_files_have_come(
    laptop: Settings, tmp_path: Path
) -> None:
    counted = []

    def count(settings: CatalogueSettings) -> dict[str, CostCoefficients]:
        counted.append(reference_work.units(settings))
        return counted[-1]

    (model,) = laptop.models
    unknown = model.model_copy(update={"source": Source(location="org/own", revision=40 * "0")})
    folders = {"models_folder": str(tmp_path), "data_folder": str(tmp_path / "data")}
    settings = laptop.model_copy(update={"models": (unknown,), **folders})
    with started(settings, units=count) as edge:
        asyncio.run(edge.ingress.check_health())
        assert len(counted) == 1
        there = node_folder(unknown.source, str(tmp_path))
        shutil.copytree(DEMO_MODEL / "transformer", there / "transformer")
        for _ in range(2):
            asyncio.run(edge.ingress.check_health())
    first, second = counted
    assert first != second == reference_work.units(laptop)
