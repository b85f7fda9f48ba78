"""Generators that fail or wait for requests with certain guidance scales."""

from __future__ import annotations

import time
from typing import Any

import torch

from serve.engine.generator import Generator

from .faulty import HUNGRY, IDLE, IDLE_STEP_S


class FaultyGenerator(Generator):
    def _load(self, phases: Any) -> Any:
        denoiser = super()._load(phases)
        original = denoiser.denoise_step

        def denoise_step(batch: Any, rows: int = 0) -> None:
            if sum(image.guidance_scale == HUNGRY for image in batch) > 1:
                raise torch.OutOfMemoryError("a test's")
            waiting = [image for image in batch if image.guidance_scale == IDLE]
            for image in waiting:
                image.predicted, image.step = image.latents, image.step + 1
            if waiting:
                time.sleep(IDLE_STEP_S)
            if computed := [image for image in batch if image.guidance_scale != IDLE]:
                original(computed, rows)

        denoiser.denoise_step = denoise_step  # type: ignore[method-assign]  # the injected fault
        return denoiser
