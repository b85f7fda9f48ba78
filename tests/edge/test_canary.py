"""Shadows through a real Ingress and Dispatcher: compared, never charged, and out of the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api.canary import WAIT_S
from serve.settings.application import Settings
from serve.settings.models import RoutingRule

from ..stored import usage_in
from ..wait import wait_for
from .edge import Edge, started

GENERATE = "/v1/images/generations"


class Server:
    """An edge that compares all its FP8 images; `folder`: its data.

    `compared`: the SSIM of the images that were compared so far. `outcomes`: how often each came.
    """

    def __init__(self, edge: Edge, folder: Path) -> None:
        self.edge, self.folder = edge, folder
        self.compared: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.canary = edge.ingress._canary
        self.canary._metrics = self  # type: ignore[assignment]  # it notes what is reported

    def shadow(self, model: str, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def shadow_ssim(self, model: str, ssim: float) -> None:
        self.compared.append(ssim)

    def post(self, **body: Any) -> dict[str, Any]:
        answer = httpx.post(self.edge.url + GENERATE, json={"prompt": "x", **body}, timeout=10)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait_until_quiet(self) -> None:
        wait_for(lambda: not self.canary._tasks)


@pytest.fixture(scope="module")
def server(laptop: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    (model,) = laptop.models
    rule = RoutingRule(name="signs", prompt=r"\bsigns?\b")
    model = model.model_copy(update={"shadow_percent": 100.0, "routing": (rule,)})
    changes = {"data_folder": str(folder), "models": (model,)}
    with started(laptop.model_copy(update=changes), stored=True) as edge:
        yield Server(edge, folder)


@pytest.fixture(autouse=True)
def quiet(server: Server) -> Iterator[None]:
    server.wait_until_quiet()
    yield
    server.edge.painter.hold_shadows = False
    server.wait_until_quiet()


def test_an_image_in_fp8_is_compared_and_charged_once(server: Server) -> None:
    before, charged = len(server.compared), len(usage_in(server.folder))
    server.post(seed=77)
    wait_for(lambda: len(server.compared) == before + 1)
    assert server.compared[-1] == pytest.approx(1.0)
    assert len(usage_in(server.folder)) == charged + 1


def test_a_drift_shows_in_the_metric(server: Server) -> None:
    before = len(server.compared)
    server.post(prompt="drifts", seed=0x202020)
    wait_for(lambda: len(server.compared) == before + 1)
    assert server.compared[-1] < 0.9


def test_images_in_16_bit_and_edits_are_not_compared(server: Server) -> None:
    before = server.edge.painter.shadows
    server.post(precision="fp16")
    picture = server.post(precision="fp16", size="64x64")["data"][0]["b64_json"]
    image = {"image_url": f"data:image/png;base64,{picture}"}
    body = {"prompt": "x", "images": [image], "size": "64x64"}
    answer = httpx.post(f"{server.edge.url}/v1/images/edits", json=body, timeout=10)
    assert answer.json()["data"][0]["precision"] == "fp8"
    assert not server.canary._tasks
    assert server.edge.painter.shadows == before


def test_a_shadow_makes_room_for_a_request_and_runs_again(server: Server) -> None:
    painter = server.edge.painter
    painter.hold_shadows = True
    begun, stopped, compared = painter.shadows, painter.stopped_shadows, len(server.compared)
    server.post(seed=1)
    wait_for(lambda: painter.shadows == begun + 1)
    server.post(seed=2, precision="fp16")
    wait_for(lambda: painter.stopped_shadows == stopped + 1)
    wait_for(lambda: painter.shadows == begun + 2)
    painter.hold_shadows = False
    wait_for(lambda: len(server.compared) == compared + 1)


def test_of_many_images_only_a_few_wait_to_be_compared(server: Server) -> None:
    painter = server.edge.painter
    painter.hold_shadows = True
    skipped = server.outcomes["skipped"]
    server.post(n=4, seed=10)
    server.post(n=4, seed=20)
    assert server.outcomes["skipped"] == skipped + 4


def test_without_room_for_long_enough_the_image_is_not_compared(server: Server) -> None:
    painter, canary = server.edge.painter, server.canary
    painter.hold_shadows, canary._wait_s = True, 0.5
    before = server.outcomes["no_room"]
    try:
        server.post(seed=30)
        wait_for(lambda: server.outcomes["no_room"] == before + 1)
    finally:
        canary._wait_s = WAIT_S


def test_a_shadow_that_fails_harms_nobody(server: Server) -> None:
    before, charged = server.outcomes["failed"], len(usage_in(server.folder))
    server.post(prompt="fails again", seed=31)
    wait_for(lambda: server.outcomes["failed"] == before + 1)
    server.post(seed=32)
    assert len(usage_in(server.folder)) == charged + 2


def test_a_rule_sends_a_prompt_to_16_bit_and_the_answer_says_so(server: Server) -> None:
    (image,) = server.post(prompt="A Sign on a door")["data"]
    assert (image["precision"], image["routed_by"]) == ("bf16", "signs")
    (image,) = server.post(prompt="a design")["data"]
    assert image["precision"] == "fp8"
    assert "routed_by" not in image
    (image,) = server.post(prompt="a sign", precision="fp8")["data"]  # the client knows better
    assert image["precision"] == "fp8"
    assert "routed_by" not in image
