"""`octet compare` and `octet calibrate` with the demo model, as an operator runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from serve.cli.main import app
from serve.quality.metrics import distance
from serve.settings.models import LiveModelSettings

from ..builders import LAPTOP

pytestmark = pytest.mark.usefixtures("no_denormals")

SUITE = {
    "categories": {
        "night": {"prompts": ["night over a city", "the sea at midnight"], "rule": "night"},
        "</script> & day": ["green hills at noon"],
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    return folder


def octet(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env=environment)


def compare(folder: Path, *more: str, out: str = "out", tested: str = "recipe=fp8") -> Result:
    return octet(
        *("compare", "recipe=fp32,steps=3", f"{tested},steps=3", "--config", str(LAPTOP)),
        *("--suite", str(folder / "suite.yaml"), "--size", "64x64", "--out", str(folder / out)),
        *more,
    )


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """The results of a comparison that passes its gate."""
    result = compare(folder, "--min-ssim", "0.5", "--category-min", "night=0.5", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


def test_the_results_hold_every_image_and_category(found: dict[str, Any]) -> None:
    assert [image["category"] for image in found["images"]] == ["night", "</script> & day", "night"]
    assert [image["seed"] for image in found["images"]] == [0, 1, 2]
    assert found["categories"]["night"]["images"] == 2
    assert found["reference"]["recipe"] == "fp32"
    assert found["tested"]["label"] == "fp8 3"
    assert all(0.5 < image["ssim"] < 1 for image in found["images"])
    assert found["all"]["ssim"]["least"] == min(image["ssim"] for image in found["images"])
    assert found["gate"]["failures"] == []
    assert found["absent"]["clip_score"] == "no CLIP model is given: --clip FOLDER"
    assert all(image["worst_tiles"][0]["ssim"] <= image["ssim"] for image in found["images"])


def test_latents_drift_apart_step_by_step(found: dict[str, Any]) -> None:
    assert found["latents"].keys() == {"night", "</script> & day"}
    for curve in found["latents"].values():
        assert len(curve) == 3
        assert 0 < curve[0] < curve[-1] < 1


def test_16_bit_beside_fp8_shows_what_rounding_changes(found: dict[str, Any]) -> None:
    rounding = found["rounding"]
    assert rounding["categories"].keys() == found["categories"].keys()
    assert rounding["all"]["ssim"]["median"] > found["all"]["ssim"]["median"]


def test_the_numbers_are_those_of_the_pictures(folder: Path, found: dict[str, Any]) -> None:
    """Two of the images in the folder have the distance that the results state."""
    images = [np.asarray(Image.open(f)) for f in (folder / "out" / "images").glob("*.png")]
    assert len(images) == 9  # fp32, fp8 and bf16
    pairs = [distance(a, b).ssim for a in images for b in images if a is not b]
    for image in found["images"]:
        assert min(abs(ssim - image["ssim"]) for ssim in pairs) < 1e-9


def test_the_report_is_one_page_with_all_pictures(folder: Path, found: dict[str, Any]) -> None:
    page = (folder / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(http|/)", page)
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    data = json.loads(text)
    assert data["categories"].keys() == found["categories"].keys()
    for image in data["images"]:
        assert len(image["shown"]) == 3
        assert all(url.startswith("data:image/webp;base64,") for url in image["shown"])
    ordered = [image["ssim"] for image in data["images"]]
    assert ordered == sorted(ordered)


def test_an_interrupted_comparison_goes_on_where_it_was(
    folder: Path, found: dict[str, Any]
) -> None:
    images = sorted((folder / "out" / "images").glob("*.png"))
    written = {file.name: file.stat().st_mtime_ns for file in images}
    images[4].unlink()
    assert compare(folder).exit_code == 0
    again = {file.name: file.stat().st_mtime_ns for file in images}
    changed = [name for name in written if written[name] != again[name]]
    assert changed == [images[4].name]
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["images"] == found["images"]


def test_a_gate_that_fails_sends_its_category_to_16_bit(folder: Path) -> None:
    result = compare(folder, "--category-min", "night=0.9999", "--min-ssim", "0.9999")
    assert result.exit_code == 1
    assert "night: median SSIM 0.9" in result.output
    fragment = yaml.safe_load((folder / "out" / "routing.yaml").read_text())
    defaults = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
    model = LiveModelSettings.model_validate({"defaults": defaults, **fragment})
    assert model.routed_by("a NIGHT sky") == "night"
    assert model.routed_by("green hills at noon") == ""


def test_equal_sides_are_generated_once_and_are_equal(folder: Path) -> None:
    result = compare(folder, "--images", "1", "--no-rounding", out="same", tested="recipe=fp32")
    assert result.exit_code == 0
    found = json.loads((folder / "same" / "results.json").read_text())
    assert found["all"]["ssim"]["median"] == 1.0
    assert len(list((folder / "same" / "images").glob("*.png"))) == 1


def test_two_results_show_what_changed(folder: Path, found: dict[str, Any]) -> None:
    before = folder / "out" / "results.json"
    changed = json.loads(before.read_text())
    changed["all"]["ssim"]["median"] -= 0.01
    (folder / "after.json").write_text(json.dumps(changed))
    result = octet("compare", str(before), str(folder / "after.json"), "--json")
    told = json.loads(result.output)
    assert told["all"]["after"]["median"] == pytest.approx(told["all"]["before"]["median"] - 0.01)
    assert told["night"]["before"] == told["night"]["after"]


def test_calibrate_writes_presets_that_settings_accept(folder: Path) -> None:
    """With one image the numbers say little; the rules have tests of their own."""
    file = folder / "presets.yaml"
    result = octet(
        *("calibrate", "landscapes", "--config", str(LAPTOP), "--images", "1", "--json"),
        *("--settings", str(file)),
        OCTET_MODELS__0__DEFAULTS__NUM_INFERENCE_STEPS="8",
        OCTET_MODELS__0__PRESETS="{}",
        OCTET_MODELS__0__DEFAULTS__WIDTH="64",
        OCTET_MODELS__0__DEFAULTS__HEIGHT="64",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    by_steps = {
        (one["sampler"], one["num_inference_steps"]): one["psnr_db"]["median"]
        for one in found["measured"]
    }
    assert by_steps["euler", 8] > by_steps["euler", 3] + 5
    assert by_steps["dpmpp_2m", 6] > by_steps["dpmpp_2m", 2] + 5
    defaults = {"width": 64, "height": 64, "num_inference_steps": 8, "guidance_scale": 3.0}
    fragment = yaml.safe_load(file.read_text())
    model = LiveModelSettings.model_validate({"defaults": defaults, **fragment})
    assert model.presets["low"].num_inference_steps <= 2
