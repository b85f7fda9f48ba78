"""AdaLN's modulation, computed for several steps at a time."""

from __future__ import annotations

import pytest
import torch

from cluster.footprint import MODULATED_STEPS, adaln_outs
from cluster.structure import Structure
from serve.engine.denoiser import Denoiser, load_transformer
from serve.engine.modulation import STEPS
from serve.engine.noise_schedule import TRAIN_STEPS
from serve.engine.precision import RECIPES
from serve.engine.prompt_embeds import PromptEmbeds

from ..builders import DEMO_MODEL

EMBEDS = PromptEmbeds(torch.randn(2, 20, 128), torch.randn(2, 128))


@pytest.mark.parametrize("steps", [1, STEPS, STEPS + 3])
def test_the_velocity_is_that_of_the_unchanged_transformer(steps: int) -> None:
    original = load_transformer(DEMO_MODEL, RECIPES["fp32"], "cpu")
    denoiser = Denoiser.load(DEMO_MODEL, RECIPES["fp32"])
    image = denoiser.begin(
        EMBEDS, width=64, height=64, num_inference_steps=steps, guidance_scale=2.0, seed=0
    )
    while not image.finished:
        sigma, before = image.schedule.levels[image.step], image.latents
        denoiser.denoise_step([image])
        with torch.inference_mode():
            velocity = original(
                hidden_states=before.expand(2, -1, -1, -1),
                timestep=torch.full((2,), sigma * TRAIN_STEPS),
                encoder_hidden_states=EMBEDS.tokens,
                pooled_projections=EMBEDS.pooled,
                return_dict=False,
            )[0]
        guided = velocity[:1] + 2.0 * (velocity[1:] - velocity[:1])
        assert torch.allclose(image.estimate, before - sigma * guided, atol=1e-4)


def test_the_layers_run_once_in_several_steps() -> None:
    denoiser = Denoiser.load(DEMO_MODEL, RECIPES["bf16"])
    image = denoiser.begin(
        EMBEDS, width=64, height=64, num_inference_steps=2 * STEPS + 1, guidance_scale=2.0, seed=0
    )
    runs: list[int] = []
    denoiser._modulation.register_forward_hook(lambda *_: runs.append(image.step))
    while not image.finished:
        denoiser.denoise_step([image])
    assert runs == [0, STEPS, 2 * STEPS]


def test_the_footprint_counts_what_an_image_keeps() -> None:
    denoiser = Denoiser.load(DEMO_MODEL, RECIPES["bf16"])
    image = denoiser.begin(
        EMBEDS, width=64, height=64, num_inference_steps=20, guidance_scale=2.0, seed=0
    )
    denoiser.denoise_step([image])
    assert image.modulation is not None
    outs = adaln_outs(Structure.of(denoiser.transformer.config))
    last = 2 * denoiser.transformer.inner_dim  # of the norm of the output, which is not counted
    assert image.modulation.shape == (MODULATED_STEPS, 2, outs + last)
