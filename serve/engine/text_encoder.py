"""The TextEncoder deployment: prompts in, embeddings out, shared by the models that name it.

Prompts repeat: the empty one in every request with guidance, others in retries, in calls for
several images and among clients. What was encoded is kept up to a limit of bytes, least recently
used first to go, and a prompt that is being encoded is waited for, not encoded twice. Every prompt
is encoded by itself: beside others it would round differently, and a seed would not give the same
image again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cluster.capability import capability, probe

from ..settings import Encoder
from .checkpoint import open_checkpoint
from .precision import ENCODER_RECIPES
from .sd3 import ENCODER_COMPONENTS, PromptEmbeds, PromptEncoder

Key = tuple[str, int]  # prompt, max_sequence_length


class EmbeddingCache:
    """Embeddings of single prompts; `encode` may block and runs in a thread, one at a time."""

    def __init__(self, encode: Callable[[str, int], PromptEmbeds], max_bytes: int) -> None:
        self._encode, self._max_bytes = encode, max_bytes
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))
        self._kept: OrderedDict[Key, PromptEmbeds] = OrderedDict()
        self._kept_bytes = 0
        self._under_way: dict[Key, asyncio.Task[PromptEmbeds]] = {}
        self._waiting: Counter[Key] = Counter()

    async def get(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """One row. An encoding that nobody waits for any more is not begun."""
        key = prompt, max_sequence_length
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._under_way:
            self._under_way[key] = asyncio.create_task(self._make(key))
        making = self._under_way[key]
        self._waiting[key] += 1
        try:
            return await asyncio.shield(making)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
                if self._under_way.get(key) is making:
                    del self._under_way[key]
                making.cancel()  # does nothing to one that is done

    async def _make(self, key: Key) -> PromptEmbeds:
        try:
            loop = asyncio.get_running_loop()
            embeds = await loop.run_in_executor(self._thread, self._encode, *key)
        finally:
            if self._under_way.get(key) is asyncio.current_task():
                del self._under_way[key]
        self._kept[key] = embeds
        self._kept_bytes += embeds.nbytes
        while self._kept_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes
        return embeds


class TextEncoder:
    """One thread owns the encoders; the event loop only waits for it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, encoder: dict[str, Any], models_folder: str | None
    ) -> None:
        settings = Encoder.model_validate(encoder)
        self._encoder = await asyncio.to_thread(self._load, settings, models_folder)
        self._cache = EmbeddingCache(self._encode, settings.cache_mib * 2**20)

    async def encode(self, prompts: list[str], max_sequence_length: int) -> PromptEmbeds:
        """Embeddings on the CPU, by value; see `PromptEmbeds` for shapes."""
        rows = await asyncio.gather(*(self._cache.get(p, max_sequence_length) for p in prompts))
        return PromptEmbeds(
            torch.cat([row.tokens for row in rows]), torch.cat([row.pooled for row in rows])
        )

    def _load(self, settings: Encoder, models_folder: str | None) -> PromptEncoder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = open_checkpoint(settings.source, models_folder, ENCODER_COMPONENTS)
        recipe = ENCODER_RECIPES[settings.precision].on(capability(probe()).sixteen_bit)
        return PromptEncoder(folder, recipe, device)

    def _encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        embeds = self._encoder.encode_prompts([prompt], max_sequence_length)
        return PromptEmbeds(embeds.tokens.cpu(), embeds.pooled.cpu())
