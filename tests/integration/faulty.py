"""The application with Generators that fail or wait for requests with certain guidance scales."""

from __future__ import annotations

import time
from typing import Any

import torch

from serve.app import Parts, application
from serve.engine.generator import Generator

HUNGRY = 7.125  # two such images never fit into memory together
IDLE = 5.125  # each step of such an image waits `IDLE_STEP_S` and computes nothing
IDLE_STEP_S = 0.3  # 100 steps outlast twice a session's lease


class FaultyGenerator(Generator):
    def _load(self, phases: Any) -> Any:
        denoiser = super()._load(phases)
        original = denoiser.denoise_step

        def denoise_step(batch: Any, rows: int = 0) -> None:
            if sum(image.guidance_scale == HUNGRY for image in batch) > 1:
                raise torch.OutOfMemoryError("a test's")
            waiting = [image for image in batch if image.guidance_scale == IDLE]
            for image in waiting:
                image.velocity, image.step = torch.zeros_like(image.latents), image.step + 1
            if waiting:
                time.sleep(IDLE_STEP_S)
            if computed := [image for image in batch if image.guidance_scale != IDLE]:
                original(computed, rows)

        denoiser.denoise_step = denoise_step  # type: ignore[method-assign]  # the injected fault
        return denoiser


def build(args: dict[str, Any]) -> Any:
    return application(args, Parts(f"{__name__}.FaultyGenerator"))
