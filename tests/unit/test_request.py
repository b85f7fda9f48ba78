"""Image requests: their fields, and the limits of a model."""

import pickle
from dataclasses import replace
from typing import Any

import pytest

from serve.errors import InvalidRequest
from serve.request import MAX_SEED, Edit, ModelLimits

from ..builders import image_request

GOOD = image_request()


def edit(strength: float = 0.5) -> Edit:
    return Edit(strength=strength, image_sha256="")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "a\x00b"}, "prompt"),
        ({"negative_prompt": "\ud800"}, "negative_prompt"),
        ({"width": 100}, "size"),
        ({"height": 8}, "size"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"edit": edit(0.0)}, "strength"),
        ({"edit": edit(1.01)}, "strength"),
        ({"edit": edit(float("nan"))}, "strength"),
    ],
)
def test_an_impossible_request_cannot_be_made(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replace(GOOD, **change)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"width": 32}, "size"),
        ({"height": 4096}, "size"),
        ({"width": 1536, "height": 1536}, "size"),
        ({"width": 0}, "size"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"guidance_scale": 31.0}, "guidance_scale"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"edit": edit(1e-17)}, "strength"),  # no step would run
        ({"edit": edit(), "height": 63}, "size"),
        ({"edit": edit(), "height": 2049}, "size"),
        ({"edit": edit(), "width": 1023, "height": 1025}, "size"),  # on a canvas of 1024 × 1040
    ],
)
def test_limits_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replace(GOOD, **change).check(ModelLimits(max_pixels=1024 * 1024))
    assert caught.value.param == param


def test_an_edit_runs_the_last_steps_and_any_size_has_a_canvas() -> None:
    """Six of 10,000 pairs of steps and strength run one step more than strength · steps."""
    asked = replace(GOOD, width=100, height=75, edit=edit(0.3), num_inference_steps=28)
    assert (asked.canvas, asked.first_step, asked.steps) == ((112, 80), 19, 9)
    assert (GOOD.canvas, GOOD.first_step, GOOD.steps) == ((64, 64), 0, 4)
    found = {
        (n, percent): replace(asked, num_inference_steps=n, edit=edit(percent / 100)).steps
        for n in range(1, 101)
        for percent in range(1, 101)
    }
    exact = {(n, percent): -(-n * percent // 100) for n, percent in found}
    assert sum(found[pair] != exact[pair] for pair in found) == 6
    assert (found[25, 56], exact[25, 56]) == (15, 14)


def test_limits_include_their_ends() -> None:
    edge = replace(GOOD, width=64, height=2048, num_inference_steps=100, guidance_scale=30.0)
    edge.check(ModelLimits())


@pytest.mark.parametrize("prompt", ["夜晚的城市", "🌕 over the sea", "مدينة في الليل"])
def test_every_script_is_a_prompt(prompt: str) -> None:
    assert replace(GOOD, prompt=prompt).prompt == prompt


def test_guidance_of_one_is_no_guidance() -> None:
    assert not replace(GOOD, guidance_scale=1.0).guided
    assert replace(GOOD, guidance_scale=1.1).guided


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(InvalidRequest("no", param="size")))  # noqa: S301 - bytes made here
    assert (error.message, error.param, error.status) == ("no", "size", 400)


def test_a_limit_of_nothing_cannot_be_set() -> None:
    with pytest.raises(ValueError, match="max_steps 0 must be above 0"):
        ModelLimits(max_steps=0)
