"""The sides of a comparison: from the command line, and on a server that may be busy."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve.cli.compare_sides import Served, Sides, fields_of
from serve.errors import SettingsError
from serve.quality.sides import LocalSide, digest
from serve.request import Sampler

from ..builders import image_request, laptop_settings

SETTINGS = laptop_settings()
(MODEL,) = SETTINGS.models
SERVED = Served(MODEL.id, MODEL.defaults.model_dump(), MODEL.limits, SETTINGS, MODEL)
REQUEST = image_request()


def side(text: str) -> Any:
    return Sides(SERVED, "", 4).side(fields_of(text))


def test_a_quality_is_the_sampler_and_steps_of_its_preset() -> None:
    asked = side("recipe=fp8,quality=medium").asked(REQUEST)
    assert (asked.sampler, asked.num_inference_steps) == (Sampler.DPMPP_2M, 16)
    asked = side("recipe=fp8,sampler=dpmpp_2m,steps=9").asked(REQUEST)
    assert (asked.sampler, asked.num_inference_steps) == (Sampler.DPMPP_2M, 9)
    with pytest.raises(SettingsError, match="a quality, or a sampler and steps"):
        side("recipe=fp8,quality=medium,steps=9")
    asked = side("recipe=fp8").asked(REQUEST)
    assert (asked.sampler, asked.num_inference_steps) == (Sampler.EULER, 28)


def test_names_for_people() -> None:
    assert side("recipe=fp8,quality=low").label == "fp8 low"
    assert side("url=http://h:1,precision=fp16").label == "fp16 of http://h:1"
    assert side("url=http://h:1").label == "http://h:1"


def test_only_what_decides_a_picture_decides_its_digest(tmp_path: Any) -> None:
    base = digest(side("recipe=fp8"), REQUEST)
    assert digest(side("recipe=fp8,quality=auto"), REQUEST) == base
    assert digest(side("recipe=fp8"), image_request(id="9")) == base
    others = [
        digest(side("recipe=bf16"), REQUEST),
        digest(side("recipe=fp8,steps=9"), REQUEST),
        digest(side(f"recipe=fp8,weights={tmp_path}"), REQUEST),
        digest(side("recipe=fp8"), image_request(seed=8)),
        digest(side("url=http://h:1,precision=fp8"), REQUEST),
    ]
    (tmp_path / "transformer").write_bytes(b"other weights in the same folder")
    others.append(digest(side(f"recipe=fp8,weights={tmp_path}"), REQUEST))
    assert len({base, *others}) == 7


def test_16_bit_stands_beside_fp8_with_its_steps() -> None:
    found = Sides(SERVED, "", 4).rounding(fields_of("recipe=fp8,quality=low"))
    assert found
    assert [one.identity["recipe"] for one in found] == ["fp32", "bf16"]
    assert all(isinstance(one, LocalSide) for one in found)
    assert [one.asked(REQUEST).num_inference_steps for one in found] == [8, 8]
    assert Sides(SERVED, "", 4).rounding(fields_of("recipe=bf16")) is None
    assert Sides(SERVED, "", 4).rounding(fields_of("url=http://h:1,precision=fp8")) is None


class Answers(ThreadingHTTPServer):
    """Answers requests for images with `statuses`, one after the other, and keeps the bodies."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.precision = "fp8"
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append(json.loads(body))
        self.server.keys.append(self.headers["authorization"])
        status = self.server.statuses.pop(0)
        self.send_response(status)
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(json.dumps(self._answer(status)).encode())

    def _answer(self, status: int) -> dict[str, Any]:
        if status != 200:
            return {"error": {"message": "no such luck"}}
        file = io.BytesIO()
        Image.new("RGB", (16, 16), "#102030").save(file, "png")
        image = base64.b64encode(file.getvalue()).decode()
        return {"data": [{"b64_json": image, "precision": self.server.precision}]}

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def on(server: Answers, fields: str = "precision=fp8,sampler=euler,steps=3") -> Any:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return Sides(SERVED, "octet_key", 4).side(fields_of(f"url={url},{fields}"))


def test_a_busy_server_is_asked_again(server: Answers) -> None:
    server.statuses = [429, 503, 200]
    ((request, image),) = on(server).images([REQUEST], None)
    assert request is REQUEST
    assert np.array_equal(image[0, 0], [0x10, 0x20, 0x30])
    assert len(server.bodies) == 3
    body = server.bodies[-1]
    assert (body["precision"], body["sampler"], body["num_inference_steps"]) == ("fp8", "euler", 3)
    assert (body["prompt"], body["seed"], body["size"]) == ("dunes", 7, "64x64")
    assert server.keys[-1] == "Bearer octet_key"


def test_a_refusal_is_told(server: Answers) -> None:
    server.statuses = [400]
    with pytest.raises(SettingsError, match="no such luck"):
        list(on(server).images([REQUEST], None))


def test_another_precision_than_asked_for_is_an_error(server: Answers) -> None:
    server.statuses, server.precision = [200], "bf16"
    with pytest.raises(SettingsError, match="generated in bf16"):
        list(on(server).images([REQUEST], None))
    server.statuses = [200, 200]
    assert len(list(on(server, "precision=auto").images([REQUEST], None))) == 1
    assert len(list(on(server, "precision=fp16").images([REQUEST], None))) == 1
