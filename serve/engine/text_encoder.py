"""The TextEncoder deployment: encodes prompts for all models that name it in their settings.

The same prompts come again and again: the empty prompt in most requests with guidance, others in
retries, in calls for several images, and from several clients. So embeddings are cached up to a
number of bytes; the least recently used ones are dropped first. The settings' `warm_prompts` are
encoded at the start and are never dropped. If a prompt is requested while it is being encoded, the
second request waits for the first encoding.

Waiting prompts are encoded together. A batch is always padded to `batch_size` rows with empty
prompts, because in batches of the same size a row is the same bit for bit, whatever the other rows
are. So a seed gives the same image again.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cluster.capability import capability, probe

from ..models.checkpoints import open_checkpoint
from ..settings.serve_config import EncoderArguments, LiveEncoderSettings
from .apart import apart
from .card import device_for, share_card, take_card
from .precision import ENCODER_RECIPES
from .prompt_embeds import PromptEmbeds
from .prompt_encoder import ENCODER_COMPONENTS, PromptEncoder

log = logging.getLogger("ray.serve")

Key = tuple[str, int]  # prompt, max_sequence_length
# Encodes prompts with a `max_sequence_length`; returns one row for each. May block.
Encode = Callable[[list[str], int], list[PromptEmbeds]]


class EmbeddingCache:
    """A cache of the embeddings of single prompts.

    `encode`: encodes prompts; it runs in a thread, for at most `batch_size` prompts at a time.
    `max_bytes`: how much is cached, apart from the embeddings of pinned keys, which are never
    dropped.
    """

    def __init__(self, encode: Encode, max_bytes: int, batch_size: int) -> None:
        self._encode, self._max_bytes, self._batch_size = encode, max_bytes, batch_size
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))
        self._pinned: dict[Key, PromptEmbeds | None] = {}
        self._kept: OrderedDict[Key, PromptEmbeds] = OrderedDict()
        self._kept_bytes = 0
        self._pending: dict[Key, asyncio.Future[PromptEmbeds]] = {}  # waiting or being encoded
        self._waiting: Counter[Key] = Counter()
        self._encoding: asyncio.Task[None] | None = None

    async def pin(self, keys: Collection[Key]) -> None:
        """Never drop the embeddings of `keys` from now on, and encode those that are missing.

        Embeddings that were pinned before, and are not in `keys`, are forgotten.
        """
        self._pinned = {key: self._pinned.get(key) for key in keys}
        await asyncio.gather(*(self.get(*key) for key in keys))

    async def get(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """Return the embedding of a prompt, one row; encode the prompt if it is not cached.

        If all its callers are cancelled before the encoding begins, the prompt is not encoded.
        """
        key = prompt, max_sequence_length
        if pinned := self._pinned.get(key):
            return pinned
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._pending:
            self._pending[key] = asyncio.get_running_loop().create_future()
            if self._encoding is None or self._encoding.done():
                self._encoding = asyncio.create_task(self._encode_all())
        self._waiting[key] += 1
        try:
            return await asyncio.shield(self._pending[key])
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    async def _encode_all(self) -> None:
        """Encode pending prompts, batch after batch, until none is left."""
        while True:
            for key in self._pending.keys() - self._waiting.keys():
                self._pending.pop(key).cancel()
            if not self._pending:
                return
            first, *others = self._pending
            same = [key for key in others if key[1] == first[1]]
            await self._encode_batch([first, *same[: self._batch_size - 1]])

    async def _encode_batch(self, keys: list[Key]) -> None:
        prompts, length = [prompt for prompt, _ in keys], keys[0][1]
        loop = asyncio.get_running_loop()
        try:
            rows = await loop.run_in_executor(self._thread, self._encode, prompts, length)
        except Exception as error:  # one prompt may have failed: try each alone
            if len(keys) == 1:
                self._settle(keys[0], error)
                return
            log.warning("%d prompts could not be encoded together", len(keys), exc_info=True)
            for key in keys:
                await self._encode_batch([key])
        else:
            for key, row in zip(keys, rows, strict=True):
                self._keep(key, row)
                self._settle(key, row)

    def _settle(self, key: Key, outcome: PromptEmbeds | Exception) -> None:
        future = self._pending.pop(key)
        if isinstance(outcome, PromptEmbeds):
            future.set_result(outcome)
        elif key in self._waiting:
            future.set_exception(outcome)

    def _keep(self, key: Key, row: PromptEmbeds) -> None:
        if key in self._pinned:
            self._pinned[key] = row
            return
        self._kept[key] = row
        self._kept_bytes += _nbytes(key, row)
        while self._kept_bytes > self._max_bytes:
            self._kept_bytes -= _nbytes(*self._kept.popitem(last=False))


def _nbytes(key: Key, row: PromptEmbeds) -> int:
    return sys.getsizeof(key[0]) + row.nbytes


class TextEncoder:
    """The deployment that encodes prompts.

    The encoders run in a thread of their own, so that the event loop stays free.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits async constructors
        self, arguments: dict[str, Any]
    ) -> None:
        """`arguments`: the fields of an `EncoderArguments`."""
        given = EncoderArguments.model_validate(arguments)
        settings = given.encoder
        self._batch_size, self._warm_prompts = settings.batch_size, settings.warm_prompts
        await asyncio.to_thread(share_card, settings, given.mps_folder)
        self._card = await asyncio.to_thread(take_card, settings)
        self._encoder = await apart(lambda: self._load(given))
        self._cache = EmbeddingCache(self._encode, settings.cache_mib * 2**20, self._batch_size)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Encode the `warm_prompts` for the models of the present settings.

        Ray Serve calls this before the first request, and whenever a `LiveEncoderSettings` changes.
        """
        lengths = LiveEncoderSettings.model_validate(user_config).max_sequence_lengths
        await self._cache.pin([(p, length) for p in self._warm_prompts for length in lengths])

    async def encode(self, prompts: list[str], max_sequence_length: int) -> PromptEmbeds:
        """Return the embeddings of the prompts, one row each, on the CPU."""
        rows = await asyncio.gather(*(self._cache.get(p, max_sequence_length) for p in prompts))
        return PromptEmbeds(
            torch.cat([row.tokens for row in rows]), torch.cat([row.pooled for row in rows])
        )

    async def check_health(self) -> None:
        """Raise an error if the card is broken or a kernel has failed; called by Ray Serve.

        After such a failure the encoding of every later prompt would fail too.
        """
        if self._card:
            await asyncio.to_thread(self._card.check)
        await asyncio.to_thread(self._encoder.check_device)

    def _load(self, given: EncoderArguments) -> PromptEncoder:
        settings = given.encoder
        device = device_for(settings)
        folder = open_checkpoint(
            settings.source, given.models_folder, ENCODER_COMPONENTS, given.local_models_folder
        )
        recipe = ENCODER_RECIPES[settings.precision].on(capability(probe(device)).sixteen_bit)
        return PromptEncoder(folder, recipe, device)

    def _encode(self, prompts: list[str], max_sequence_length: int) -> list[PromptEmbeds]:
        padded = prompts + [""] * (self._batch_size - len(prompts))
        embeds = self._encoder.encode_prompts(padded, max_sequence_length)
        tokens, pooled = embeds.tokens.cpu(), embeds.pooled.cpu()
        # Clones, because views would keep the memory of the whole batch.
        return [
            PromptEmbeds(tokens[i : i + 1].clone(), pooled[i : i + 1].clone())
            for i in range(len(prompts))
        ]
