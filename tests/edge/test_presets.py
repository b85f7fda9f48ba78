"""Presets through HTTP: what they cost is known beforehand, charged, and told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.request import Sampler
from serve.settings.application import Settings
from serve.settings.models import Preset

from ..stored import usage_in
from .edge import WORK, Edge, started

GENERATE = "/v1/images/generations"
PRESETS = {
    "medium": Preset(sampler=Sampler.DPMPP_2M, num_inference_steps=16),
    "low": Preset(sampler=Sampler.DPMPP_2M, num_inference_steps=8),
}


class Server:
    """An edge whose model has presets; `folder`: its data."""

    def __init__(self, edge: Edge, folder: Path) -> None:
        self.edge, self.folder = edge, folder

    def records(self) -> list[dict[str, Any]]:
        return usage_in(self.folder)


@pytest.fixture(scope="module")
def server(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    (model,) = laptop.models
    models = (model.model_copy(update={"presets": PRESETS}),)
    changes = {"data_folder": str(folder), "models": models}
    with started(laptop.model_copy(update=changes), stored=True) as edge:
        yield Server(edge, folder)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.edge.url, timeout=10) as client:
        yield client


def test_the_list_of_models_states_the_cost_that_is_charged(
    server: Server, client: httpx.Client
) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert list(model["qualities"]) == ["auto", "medium", "low"]
    assert model["qualities"]["medium"]["sampler"] == "dpmpp_2m"
    assert model["qualities"]["medium"]["num_inference_steps"] == 16
    before = len(server.records())
    for quality in model["qualities"]:
        answer = client.post(GENERATE, json={"prompt": "x", "quality": quality})
        assert answer.json()["quality"] == quality
    records = server.records()[before:]
    assert [record["preset"] for record in records] == ["", "medium", "low"]
    assert [record["steps"] for record in records] == [28, 16, 8]
    usual = records[0]["work_s"]
    assert usual == pytest.approx(WORK.constant + 28 * WORK.step)
    for record, quality in zip(records, model["qualities"].values(), strict=True):
        assert record["work_s"] / usual == pytest.approx(quality["cost"], abs=1e-3)


def test_the_openai_client_chooses_presets(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.edge.url}/v1", api_key="none") as client:
        answers = [
            client.images.generate(model="landscapes", prompt="x", quality=quality)
            for quality in ("low", "high", "standard")
        ]
    assert [answer.quality for answer in answers] == ["low", "auto", "auto"]
    assert [record["steps"] for record in server.records()[-3:]] == [8, 28, 28]


def test_a_stream_and_an_edit_name_the_preset(client: httpx.Client) -> None:
    body = {"prompt": "x", "quality": "low", "stream": True, "progress": True}
    events = [
        json.loads(line.removeprefix("data: "))
        for line in client.post(GENERATE, json=body).text.splitlines()
        if line.startswith("data: ")
    ]
    assert events[0]["steps"] == 8
    assert events[-1]["quality"] == "low"
    picture = client.post(GENERATE, json={"prompt": "x"}).json()["data"][0]["b64_json"]
    image = {"image_url": f"data:image/png;base64,{picture}"}
    edit = {"prompt": "x", "images": [image], "quality": "medium", "strength": 0.5, "size": "64x64"}
    assert client.post("/v1/images/edits", json=edit).json()["quality"] == "medium"


def test_an_unknown_quality_is_explained(client: httpx.Client) -> None:
    answer = client.post(GENERATE, json={"prompt": "x", "quality": "medum"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("quality", "invalid_value")
    assert error["message"] == "quality 'medum' does not exist: did you mean 'medium'?"
