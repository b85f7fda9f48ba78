"""Which presets measurements support, and how they are written into settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import yaml

from serve.errors import SettingsError
from serve.quality.calibration import (
    CONVERGED,
    Measured,
    Way,
    measure,
    proposed,
    settings_fragment,
    ways,
)
from serve.quality.metrics import Pixels, Spread
from serve.request import ImageRequest, Sampler
from serve.settings.models import LiveModelSettings

from ..builders import image_request

EULER, DPMPP_2M = Sampler.EULER, Sampler.DPMPP_2M
DEFAULT = Way(EULER, 28)


def measured(way: Way, scale: float, psnr_db: float, p5: float, ssim: float = 0.99) -> Measured:
    return Measured(way, scale, Spread(ssim, ssim - 0.01, 0.5), Spread(psnr_db, p5, 10.0))


def both(way: Way, psnr_db: float, p5: float, loss_at_5: float = 0.0) -> list[Measured]:
    """The measurements of a way at the guidance scales 3 and 5."""
    return [
        measured(way, 3.0, psnr_db, p5),
        measured(way, 5.0, psnr_db - loss_at_5, p5 - loss_at_5),
    ]


def test_the_fewest_steps_that_are_no_worse_are_medium() -> None:
    found = [
        *both(DEFAULT, 45, 38),
        *both(Way(DPMPP_2M, 16), 46, 39),
        *both(Way(DPMPP_2M, 14), 45.5, 38.5, loss_at_5=2.0),
        *both(Way(EULER, 12), 40, 30),
        *both(Way(DPMPP_2M, 12), 44.5, 37.5, loss_at_5=2.0),
        *both(Way(DPMPP_2M, 10), 43.5, 37.5),
        *both(Way(DPMPP_2M, 8), 39, 30),
        *both(Way(EULER, 8), 33, 25),
    ]
    assert proposed(found, DEFAULT, 3.0) == {
        "medium": Way(DPMPP_2M, 16),
        "economy": Way(DPMPP_2M, 12),
        "low": Way(DPMPP_2M, 8),
    }


def test_a_way_must_hold_in_the_worst_images_and_in_ssim() -> None:
    thin = Way(DPMPP_2M, 20)
    worse = [measured(thin, 3.0, 50, 37.9), measured(DEFAULT, 3.0, 45, 38)]
    assert "medium" not in proposed(worse, DEFAULT, 3.0)
    unlike = [measured(thin, 3.0, 50, 50, ssim=0.98), measured(DEFAULT, 3.0, 45, 38)]
    assert "medium" not in proposed(unlike, DEFAULT, 3.0)


def test_without_a_cheaper_way_nothing_is_proposed() -> None:
    found = [measured(DEFAULT, 3.0, 45, 38), measured(Way(EULER, 24), 3.0, 40, 30)]
    presets = proposed(found, DEFAULT, 3.0)
    assert presets == {}
    assert yaml.safe_load(settings_fragment(found, presets, DEFAULT, "about")) == {"presets": {}}


def test_a_name_that_saves_nothing_more_is_left_out() -> None:
    found = [
        *both(DEFAULT, 45, 38),
        *both(Way(DPMPP_2M, 8), 46, 39),
        *both(Way(DPMPP_2M, 6), 30, 20),
    ]
    # Eight steps are as good as the default already, so a draft of eight steps is no other preset.
    assert proposed(found, DEFAULT, 3.0) == {"medium": Way(DPMPP_2M, 8)}


def test_the_fragment_is_valid_in_settings_and_states_its_numbers() -> None:
    way = Way(DPMPP_2M, 16)
    found = [*both(DEFAULT, 45, 38), *both(way, 46.2, 39.1)]
    text = settings_fragment(found, {"medium": way}, DEFAULT, "landscapes, 24 images")
    defaults = {"width": 64, "height": 64, "num_inference_steps": 28, "guidance_scale": 3.0}
    model = LiveModelSettings.model_validate({"defaults": defaults, **yaml.safe_load(text)})
    assert model.presets["medium"].num_inference_steps == 16
    assert text.startswith("# landscapes, 24 images\n")
    assert "guidance 5: SSIM 0.9900 / 0.9800, PSNR 46.2 / 39.1 dB" in text
    assert "1.75 times fewer steps" in text


def test_the_ways_follow_the_steps_of_the_default() -> None:
    found = ways(DEFAULT)
    assert found[0] == DEFAULT
    assert Way(DPMPP_2M, 16) in found
    assert all(way.steps < 28 for way in found[1:])
    assert Way(DPMPP_2M, 23) in ways(Way(EULER, 40))  # SD3.5 Large: 40 steps


def test_a_distilled_model_is_refused() -> None:
    with pytest.raises(SettingsError, match="distilled"):
        ways(Way(EULER, 4))


def test_pictures_are_compared_with_the_converged_one_of_the_same_guidance() -> None:
    """An image here is grey by its guidance scale, brighter by how many steps are missing."""

    def generate(requests: Sequence[ImageRequest]) -> list[Pixels]:
        return [
            np.full(
                (64, 64, 3),
                int(20 * one.guidance_scale) + 100 - one.num_inference_steps,
                np.uint8,
            )
            for one in requests
        ]

    asked: list[ImageRequest] = []

    def exact(requests: Sequence[ImageRequest]) -> list[Pixels]:
        asked.extend(requests)
        return generate(requests)

    way = Way(DPMPP_2M, 90)
    found = list(measure([image_request()], exact, generate, [way, Way(EULER, 50)], [3.0, 5.0]))
    assert [(one.way.steps, one.guidance_scale) for one in found] == [
        (90, 3.0),
        (50, 3.0),
        (90, 5.0),
        (50, 5.0),
    ]
    assert {CONVERGED.of(one) for one in asked} == set(asked)
    assert found[0].psnr_db.median == pytest.approx(20 * np.log10(255 / 10))
    assert found[1].psnr_db.median == pytest.approx(20 * np.log10(255 / 50))
    assert found[2].psnr_db == found[0].psnr_db
