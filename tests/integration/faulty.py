"""The application with Generators that fail for requests with one of two guidance scales."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from serve.app import Parts, application
from serve.engine.generator import Generator

DEADLY = 6.125  # the second step of such an image kills its replica
HUNGRY = 7.125  # two such images never fit into memory together


class FaultyGenerator(Generator):
    def _load(self, phases: Any) -> Any:
        denoiser = super()._load(phases)
        original = denoiser.denoise_step

        def denoise_step(batch: Any, rows: int = 0) -> None:
            if any(image.guidance_scale == DEADLY and image.step for image in batch):
                os.kill(os.getpid(), signal.SIGKILL)
            if sum(image.guidance_scale == HUNGRY for image in batch) > 1:
                raise torch.OutOfMemoryError("a test's")
            original(batch, rows)

        denoiser.denoise_step = denoise_step  # type: ignore[method-assign]  # the injected fault
        return denoiser


def build(args: dict[str, Any]) -> Any:
    return application(args, Parts(f"{__name__}.FaultyGenerator"))
