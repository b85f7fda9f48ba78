"""The TextEncoder deployment: prompts in, embeddings out, shared by the models that name it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cluster.capability import capability, probe

from ..settings import Encoder
from .checkpoint import open_checkpoint
from .precision import ENCODER_RECIPES
from .sd3 import ENCODER_COMPONENTS, PromptEmbeds, PromptEncoder


class TextEncoder:
    """One thread owns the encoders; the event loop only waits for it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, encoder: dict[str, Any], models_folder: str | None
    ) -> None:
        self._models_folder = models_folder
        settings = Encoder.model_validate(encoder)
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))
        self._encoder = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._load, settings
        )

    async def encode(self, prompts: list[str], max_sequence_length: int) -> PromptEmbeds:
        """Embeddings on the CPU, by value; see `PromptEmbeds` for shapes."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._encode, prompts, max_sequence_length
        )

    def _load(self, settings: Encoder) -> PromptEncoder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = open_checkpoint(settings.source, self._models_folder, ENCODER_COMPONENTS)
        recipe = ENCODER_RECIPES[settings.precision].on(capability(probe()).sixteen_bit)
        return PromptEncoder(folder, recipe, device)

    def _encode(self, prompts: list[str], max_sequence_length: int) -> PromptEmbeds:
        embeds = self._encoder.encode_prompts(prompts, max_sequence_length)
        return PromptEmbeds(embeds.tokens.cpu(), embeds.pooled.cpu())
