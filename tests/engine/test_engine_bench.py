"""Tests of the ways to generate images that `bench.engine` compares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.demo_engine import Engine, bare_pipeline
from serve.engine.denoiser import to_pixels


def test_diffusers_pipeline_generates_the_same_pictures_as_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pipeline rounds its noise to bfloat16, so the pictures are close but not equal."""
    engine, key, seed = Engine.demo("bf16"), (64, 2, 8), 5
    image = engine.begin(key, seed)
    noise = image.latents.clone()
    for _ in range(key[2]):
        engine.denoiser.denoise_step([image])
    (pixels,) = map(to_pixels, engine.denoiser.decode(image.latents))

    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise.to(torch.bfloat16))
    (found,) = bare_pipeline(engine)(key, 1)
    assert np.abs(found.astype(float) - pixels).mean() < 5
    assert pixels.std() > 25
