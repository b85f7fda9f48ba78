"""Presets, rules, shadows and comparisons on the running demo."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from serve.cli.main import app
from serve.launch import RunningApplication
from serve.settings.models import RoutingRule

from ..wait import wait_for

QUICK = {"size": "64x64", "seed": 3}


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    headers = {"cache-control": "no-cache"}
    with httpx.Client(base_url=url, timeout=120, headers=headers) as client:
        yield client


def generated(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/images/generations", json={"prompt": "the sea", **QUICK, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def pixels(answer: dict[str, Any]) -> NDArray[np.uint8]:
    file = base64.b64decode(answer["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(file)))


def metric(name: str) -> float | None:
    """The sum of a metric's values as Ray exports them; None if there is none."""
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics").text
    values = re.findall(rf"^ray_{name}{{[^}}]*}} (\S+)$", text, re.M)
    return sum(map(float, values)) if values else None


def test_a_preset_generates_what_its_sampler_and_steps_do(client: httpx.Client) -> None:
    same = {"precision": "fp16", "deterministic": True}
    preset = generated(client, quality="low", **same)
    explicit = generated(client, sampler="dpmpp_2m", num_inference_steps=8, **same)
    assert (preset["quality"], explicit["quality"]) == ("low", "auto")
    assert np.array_equal(pixels(preset), pixels(explicit))
    other = generated(client, sampler="euler", num_inference_steps=8, **same)
    assert not np.array_equal(pixels(preset), pixels(other))


def test_the_pools_of_a_server_are_compared(url: str, tmp_path: Path) -> None:
    sides = [f"url={url},precision={precision},steps=2" for precision in ("fp16", "fp8")]
    options = ["--images", "2", "--size", "64x64", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, ["compare", *sides, *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["about"]["suite"] == "landscapes"
    assert found["tested"]["precision"] == "fp8"
    assert all(0.5 < image["ssim"] < 1 for image in found["images"])
    assert found["latents"] == "a server does not tell its latents"
    assert (tmp_path / "out" / "report.html").exists()


def test_a_rule_and_a_shadow_on_the_running_server(
    octet: RunningApplication, client: httpx.Client
) -> None:
    before = octet.settings
    (model,) = before.models
    rule = RoutingRule(name="signs", prompt=r"\bsign\b")
    changes = {"routing": (rule,), "shadow_percent": 100.0}
    octet.apply(before.model_copy(update={"models": (model.model_copy(update=changes),)}))
    try:
        quick = {"num_inference_steps": 2}

        def is_routed() -> bool:
            (image,) = generated(client, prompt="a sign", **quick)["data"]
            return bool(image.get("routed_by") == "signs" and image["precision"] != "fp8")

        wait_for(is_routed)
        wait_for(lambda: bool(metric("octet_routed_images_total")))
        (image,) = generated(client, prompt="a hill", **quick)["data"]
        assert image["precision"] == "fp8"
        wait_for(lambda: metric("octet_shadow_ssim") is not None)
        assert 0.5 < (metric("octet_shadow_ssim") or 0.0) < 1
    finally:
        octet.apply(before)
