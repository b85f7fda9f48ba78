"""Tests that DPM-Solver++ 2M is diffusers' scheduler on Octet's levels, and Euler plain Euler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from serve.engine.denoiser import Denoiser, DenoisingState, EditLatents
from serve.engine.noise_schedule import TRAIN_STEPS, schedule
from serve.engine.precision import RECIPES
from serve.engine.prompt_encoder import PromptEncoder
from serve.request import Sampler

from ..builders import DEMO_MODEL

pytestmark = [
    pytest.mark.usefixtures("no_denormals"),
    # diffusers converts a tensor in a way that numpy warns of.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


class Model:
    """The demo model in float32, with the embeddings of one prompt."""

    def __init__(self) -> None:
        self.denoiser = Denoiser.load(DEMO_MODEL, RECIPES["fp32"])
        self.embeds = PromptEncoder(DEMO_MODEL).encode_prompts(["", "a city at night"], 32)

    def begin(self, sampler: Sampler, steps: int, guidance: float = 3.0, **more: Any) -> Any:
        return self.denoiser.begin(
            self.embeds,
            width=64,
            height=64,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=7,
            sampler=sampler,
            **more,
        )

    def velocity(self, image: DenoisingState) -> torch.Tensor:
        """Take the image's next step; return the velocity that it used."""
        before, level = image.latents, image.schedule.levels[image.step]
        self.denoiser.denoise_step([image])
        assert image.predicted is not None
        return (before - image.predicted) / level


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def oracle(steps: int, first_step: int = 0) -> DPMSolverMultistepScheduler:
    """diffusers' scheduler on the levels of Octet's table."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    levels = torch.tensor(schedule(Sampler.DPMPP_2M, steps).levels)
    scheduler.sigmas, scheduler.timesteps = levels, levels[:-1] * TRAIN_STEPS
    scheduler.set_begin_index(first_step)
    return scheduler


def differences(
    model: Model, image: DenoisingState, scheduler: DPMSolverMultistepScheduler
) -> list[float]:
    """The largest difference of latents to the scheduler's after each step."""
    expected, found = image.latents, []
    while not image.finished:
        step = image.step
        expected = scheduler.step(
            model.velocity(image), scheduler.timesteps[step], expected
        ).prev_sample
        found.append(float((image.latents - expected).abs().max()))
    return found


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16])
def test_the_steps_are_those_of_diffusers(model: Model, steps: int, guidance: float) -> None:
    image = model.begin(Sampler.DPMPP_2M, steps, guidance)
    found = differences(model, image, oracle(steps))
    assert len(found) == steps
    assert max(found) < 1e-5


def test_an_edit_begins_in_the_middle_of_the_table(model: Model) -> None:
    """Its first step has no step before it; its second has one, unlike a generation's."""
    generator = torch.Generator().manual_seed(3)
    picture, noise = (torch.randn(1, 16, 8, 8, generator=generator) for _ in range(2))
    edit = EditLatents(0.3 * picture, noise, None)
    image = model.begin(Sampler.DPMPP_2M, 16, first_step=6, edit=edit)
    found = differences(model, image, oracle(16, first_step=6))
    assert len(found) == 10
    assert max(found) < 1e-5


def test_eulers_steps_are_the_same_bit_for_bit(model: Model) -> None:
    image, other = (model.begin(Sampler.EULER, 6) for _ in range(2))
    while not image.finished:
        before, step = image.latents, image.step
        model.denoiser.denoise_step([image])
        level, following = image.schedule.levels[step : step + 2]
        with torch.inference_mode():
            v = model.denoiser.transformer(
                hidden_states=before.expand(2, -1, -1, -1),
                encoder_hidden_states=other.embeds.tokens,
                pooled_projections=model.denoiser._modulated(other),
                return_dict=False,
            )[0]
            v = v[:1] + 3.0 * (v[1:] - v[:1])
        other.step += 1
        assert torch.equal(image.latents, before + (following - level) * v)


def test_the_samplers_differ_and_come_close_to_each_other_with_many_steps(model: Model) -> None:
    def finished(sampler: Sampler, steps: int) -> torch.Tensor:
        image = model.begin(sampler, steps)
        while not image.finished:
            model.denoiser.denoise_step([image])
        return model.denoiser.decode(image.latents)

    few = finished(Sampler.EULER, 8) - finished(Sampler.DPMPP_2M, 8)
    many = finished(Sampler.EULER, 60) - finished(Sampler.DPMPP_2M, 30)
    assert 2 * many.std() < few.std()


def test_samplers_share_a_batch(model: Model) -> None:
    """Each image of the batch has its own table, and is as if alone."""
    asked = [(Sampler.DPMPP_2M, 8), (Sampler.EULER, 6), (Sampler.DPMPP_2M, 5)]
    images = [model.begin(*each) for each in asked]
    model.denoiser.denoise_step(images[:1])
    while any(not image.finished for image in images):
        model.denoiser.denoise_step([image for image in images if not image.finished])
    for image, each in zip(images, asked, strict=True):
        alone = model.begin(*each)
        while not alone.finished:
            model.denoiser.denoise_step([alone])
        torch.testing.assert_close(image.latents, alone.latents, atol=1e-4, rtol=0)
