"""Tests of the cache in front of the text encoders, with an encoder that records its batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import pytest
import torch

from serve.engine.prompt_embeds import PromptEmbeds
from serve.engine.text_encoder import EmbeddingCache, TextEncoder, _nbytes

from ..builders import DEMO_MODEL

ROW = PromptEmbeds(torch.zeros(1, 4, 8), torch.zeros(1, 8))
ROW_BYTES = _nbytes(("a", 32), ROW)


class Encoder:
    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def prompts(self) -> list[str]:
        return [prompt for batch in self.batches for prompt in batch]

    def encode(self, prompts: list[str], length: int) -> list[PromptEmbeds]:
        self.gate.wait(5)
        self.batches.append(prompts)
        if "broken" in prompts:
            raise RuntimeError("no")
        return [
            PromptEmbeds(torch.full((1, 4, 8), float(len(p))), torch.full((1, 8), float(length)))
            for p in prompts
        ]


def run(
    test: Callable[[EmbeddingCache, Encoder], Coroutine[Any, Any, None]],
    rows: int,
    pinned: Collection[tuple[str, int]] = (),
) -> None:
    async def main() -> None:
        encoder = Encoder()
        async with asyncio.timeout(5):
            cache = EmbeddingCache(encoder.encode, rows * ROW_BYTES, 4)
            await cache.pin(pinned)
            await test(cache, encoder)

    asyncio.run(main())


def test_a_prompt_is_encoded_once() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        first, again = await cache.get("a", 32), await cache.get("a", 32)
        assert again is first
        assert int((await cache.get("a", 64)).pooled[0, 0]) == 64  # another length is another key
        assert encoder.prompts == ["a", "a"]

    run(test, rows=9)


def test_equal_prompts_wait_for_the_same_encoding() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        encoder.gate.clear()
        waiting = [asyncio.create_task(cache.get("a", 32)) for _ in range(5)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()  # the first caller leaves; the others still get the embedding
        encoder.gate.set()
        rows = await asyncio.gather(*waiting[1:])
        assert all(row is rows[0] for row in rows)
        assert encoder.prompts == ["a"]

    run(test, rows=9)


def test_prompts_that_nobody_waits_for_are_not_encoded() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        encoder.gate.clear()
        running = asyncio.create_task(cache.get("running", 32))
        await asyncio.sleep(0.02)
        gone = [asyncio.create_task(cache.get(f"gone {i}", 32)) for i in range(9)]
        await asyncio.sleep(0.02)
        for task in gone:
            task.cancel()
        await asyncio.sleep(0.02)
        again = asyncio.create_task(cache.get("gone 3", 32))
        encoder.gate.set()
        await asyncio.gather(running, again)
        assert encoder.prompts == ["running", "gone 3"]

    run(test, rows=9)


def test_the_least_recently_used_embedding_is_dropped_first() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        for prompt in ("a", "b", "", "a", "c", "", "a", "b"):
            await cache.get(prompt, 32)
        assert encoder.prompts == ["a", "b", "", "c", "b"]
        assert cache._kept_bytes == sum(_nbytes(k, row) for k, row in cache._kept.items())
        assert cache._kept_bytes <= 3 * ROW_BYTES

    run(test, rows=3)


def test_a_failed_encoding_is_not_cached() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                await cache.get("broken", 32)
        assert encoder.prompts == ["broken"] * 2

    run(test, rows=3)


def test_waiting_prompts_are_encoded_in_batches() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        encoder.gate.clear()
        first = asyncio.create_task(cache.get("first", 32))
        await asyncio.sleep(0.02)
        others = [asyncio.create_task(cache.get(p, 32)) for p in ("a", "bb", "ccc", "dddd", "e")]
        longer = asyncio.create_task(cache.get("longer", 64))
        await asyncio.sleep(0.02)
        encoder.gate.set()
        await asyncio.gather(first, longer)
        rows = await asyncio.gather(*others)
        assert encoder.batches == [["first"], ["a", "bb", "ccc", "dddd"], ["e"], ["longer"]]
        assert [int(row.tokens[0, 0, 0]) for row in rows] == [1, 2, 3, 4, 1]

    run(test, rows=9)


def test_a_prompt_that_fails_fails_alone() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        encoder.gate.clear()
        tasks = [asyncio.create_task(cache.get(p, 32)) for p in ("x", "a", "broken", "b")]
        await asyncio.sleep(0.02)
        encoder.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(o, RuntimeError) for o in outcomes] == [False, False, True, False]

    run(test, rows=9)


def test_pinned_prompts_stay_in_the_cache() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        for prompt in ("", "a", "b", "c", "", "blurry", ""):
            await cache.get(prompt, 32)
        assert encoder.prompts == ["", "a", "b", "c", "blurry"]

    run(test, rows=1, pinned=[("", 32)])


def test_prompts_that_are_pinned_later_are_encoded_then() -> None:
    async def test(cache: EmbeddingCache, encoder: Encoder) -> None:
        await cache.pin([("", 32), ("", 64)])
        await cache.get("a", 32)
        await cache.get("", 64)
        assert encoder.prompts == ["", "", "a"]

    run(test, rows=1, pinned=[("", 32)])


def test_other_prompts_change_no_embedding_and_warm_prompts_are_kept() -> None:
    """The demo model's encoder gets prompts one by one, and then all in one batch.

    The warm prompts are in memory from the start.
    """
    settings = {
        "id": "landscapes",
        "source": {"location": str(DEMO_MODEL)},
        "precision": "fp32",
        "warm_prompts": ["", "blurry"],
    }

    async def embeds(together: bool) -> list[torch.Tensor]:
        encoder = TextEncoder.__new__(TextEncoder)
        arguments = {"encoder": settings, "models_folder": None, "mps_folder": None}
        await encoder.__init__(arguments)  # type: ignore[misc]  # as Ray Serve does
        await encoder.reconfigure({"max_sequence_lengths": [32]})
        assert all(encoder._cache._pinned.values())
        assert encoder._cache._pinned.keys() == {("", 32), ("blurry", 32)}
        prompts = ["the sea", "dunes at noon", "a city"]
        if together:
            await encoder.encode(prompts[::-1], 32)
        return [(await encoder.encode([prompt], 32)).tokens for prompt in prompts]

    alone, together = (asyncio.run(embeds(together)) for together in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1])
