"""The keys of equal requests, the cache in memory, and the circuit breaker."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serve.engine.pixel_digest import pixel_digest
from serve.request import Edit, ImageRequest, Precision, Sampler
from serve.results.cache.circuit_breaker import FAILURES, REST_S, CircuitBreaker
from serve.results.cache.memory import NO_DIFFERENCE, CachedImages, MemoryCache, cache_key

from ..builders import image_request, image_result, laptop_settings

SECRET = bytes(32)
REQUEST = image_request()
EDIT = Edit(strength=0.5, image_sha256="a")


def key(*requests: ImageRequest, tenant: str = "t", version: str = "1") -> str:
    return cache_key(SECRET, tenant, version, requests)


def images(size: int, count: int = 1) -> CachedImages:
    return CachedImages((image_result(bytes(size)),) * count)


def test_every_field_that_changes_the_image_makes_another_key() -> None:
    others: dict[str, Any] = {
        "model": "n",
        "prompt": "dunes ",
        "width": 80,
        "height": 80,
        "num_inference_steps": 5,
        "guidance_scale": 3.5,
        "seed": 8,
        "negative_prompt": "sea",
        "precision": Precision.FP16,
        "output_format": "webp",
        "output_compression": 100,
        "deterministic": True,
        "edit": EDIT,
        "sampler": Sampler.DPMPP_2M,
    }
    edits = [
        replace(EDIT, strength=0.6),
        replace(EDIT, image_sha256="b"),
        replace(EDIT, mask_sha256="a"),
    ]
    assert {*others, *NO_DIFFERENCE} == set(ImageRequest.__dataclass_fields__)
    keys = {key(replace(REQUEST, **{name: value})) for name, value in others.items()}
    keys |= {key(replace(REQUEST, edit=edit)) for edit in edits}
    keys |= {key(REQUEST), key(REQUEST, REQUEST), key(REQUEST, tenant="u")}
    keys |= {key(REQUEST, version="2"), cache_key(b"1" * 32, "t", "1", [REQUEST])}
    assert len(keys) == len(others) + len(edits) + 5
    assert key(replace(REQUEST, id="b/0", preset="medium", routed_by="a")) == key(REQUEST)


@given(st.text(max_size=9), st.text(max_size=9))
def test_texts_do_not_run_into_each_other(prompt: str, negative: str) -> None:
    def key_of(prompt: str, negative: str) -> str:
        request = ImageRequest.__new__(ImageRequest)  # without the check of its texts
        for name in ImageRequest.__dataclass_fields__:
            object.__setattr__(request, name, getattr(REQUEST, name))
        object.__setattr__(request, "prompt", prompt)
        object.__setattr__(request, "negative_prompt", negative)
        return key(request)

    same = key_of(prompt, negative) == key_of(negative, prompt)
    assert same == (prompt == negative)
    assert key_of(prompt + "x", negative) != key_of(prompt, "x" + negative)


def test_other_weights_give_another_pixel_digest(tmp_path: Path) -> None:
    settings = laptop_settings()
    (model,) = settings.models
    before = pixel_digest(settings, model)
    more = [pool.model_copy(update={"replicas": 9, "slots": 1}) for pool in model.pools]
    assert pixel_digest(settings, model.model_copy(update={"pools": tuple(more)})) == before
    longer = model.model_copy(update={"max_sequence_length": 16})
    assert pixel_digest(settings, longer) != before
    (tmp_path / "weights").write_bytes(b"1")
    source = model.source.model_copy(update={"location": str(tmp_path)})
    elsewhere = model.model_copy(update={"source": source})
    first = pixel_digest(settings, elsewhere)
    (tmp_path / "weights").write_bytes(b"22")
    assert len({before, first, pixel_digest(settings, elsewhere)}) == 3


def test_memory_drops_expired_and_least_recently_used_images() -> None:
    async def main() -> None:
        cache = MemoryCache(100)
        await cache.put("a", images(40), 0, 60)
        await cache.put("b", images(20, 2), 0, 60)
        assert await cache.get("a", "t", 59) == images(40)
        await cache.put("c", images(40), 0, 60)  # b is dropped for it
        assert [bool(await cache.get(k, "t", 59)) for k in "abc"] == [True, False, True]
        await cache.put("a", images(60), 0, 60)  # again, and larger
        assert [bool(await cache.get(k, "t", 59)) for k in "ac"] == [True, True]
        assert await cache.get("a", "t", 60) is None
        await cache.put("d", images(60), 0, 60)  # there is room, because a has expired
        assert [bool(await cache.get(k, "t", 59)) for k in "cd"] == [True, True]
        await cache.put("e", images(101), 0, 60)
        assert await cache.get("e", "t", 1) is None

    asyncio.run(main())


def test_a_breaker_opens_rests_and_tries_one_request() -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURES):
        assert breaker.allows(0)
        breaker.failed(0)
    assert breaker.open
    assert not breaker.allows(REST_S - 0.01)
    assert breaker.allows(REST_S)
    assert not breaker.allows(REST_S)  # only one request tries
    breaker.failed(REST_S)
    assert not breaker.allows(2 * REST_S - 0.01)
    assert breaker.allows(2 * REST_S)
    breaker.succeeded()
    assert breaker.allows(2 * REST_S)
    breaker.failed(2 * REST_S)
    assert breaker.allows(2 * REST_S)  # only failures in a row count
