"""Tests of the denoising loop, with the demo model: images that share steps, and faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from serve.edit_pixels import EditPixels
from serve.engine.batching import StepTimes
from serve.engine.denoiser import Denoiser
from serve.engine.denoising_loop import (
    DenoisingLoop,
    GeneratedPixels,
    PreviewPixels,
    StepDone,
    preview_steps,
)
from serve.engine.precision import RECIPES
from serve.engine.prompt_embeds import PromptEmbeds
from serve.engine.prompt_encoder import PromptEncoder
from serve.errors import NonFiniteImage, Unavailable
from serve.request import Edit, ImageRequest

from ..builders import DEMO_MODEL, image_request
from ..wait import wait_for

pytestmark = pytest.mark.usefixtures("no_denormals")
REQUEST = image_request(model="landscapes", prompt="the sea at dawn", num_inference_steps=6, seed=1)
PLUG = replace(REQUEST, num_inference_steps=1, guidance_scale=1.0)
MIXED = [
    REQUEST,
    replace(REQUEST, seed=2, num_inference_steps=3),
    replace(REQUEST, seed=3, guidance_scale=1.0),
    replace(REQUEST, seed=4, width=96, num_inference_steps=4),
    replace(REQUEST, seed=5, guidance_scale=7.5, num_inference_steps=8),
]
# Picture and mask of all edits, 60 × 50 px; the mask keeps the pixels with x < 24.
PICTURE = EditPixels(
    np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8),
    np.repeat(np.where(np.arange(60) < 24, 255, 0).astype(np.uint8)[None], 50, axis=0),
)
EDIT = replace(
    REQUEST,
    width=60,
    height=50,
    num_inference_steps=12,
    edit=Edit(strength=0.5, image_sha256="", mask_sha256=""),
)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(DEMO_MODEL)


class Model:
    """The demo model in one precision and its denoising loop, which tests observe and disturb.

    `entered`: the rows of each call of the transformer. `rows`: the same without calls of one row.
    Calls wait while `gate` is cleared. `fail`: an error that the next call of several rows raises.
    """

    def __init__(self, precision: str, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        self.denoiser = Denoiser.load(DEMO_MODEL, RECIPES[precision])
        self.rows: list[int] = []
        self.entered: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Exception | None = None
        self.broken: float | None = None  # the step of an image with this guidance fails
        self.room = 32  # rows for which there is memory
        original = self.denoiser.transformer.forward

        def forward(**inputs: Any) -> Any:
            rows = len(inputs["hidden_states"])
            self.entered.append(rows)
            self.gate.wait()
            if rows > 1:  # leaves out PLUG, which has one row
                self.rows.append(rows)
            if rows > 1 and self.fail:
                error, self.fail = self.fail, None
                raise error
            if rows > self.room:
                raise torch.OutOfMemoryError(f"no room for {rows} rows")
            return original(**inputs)

        self.denoiser.transformer.forward = forward
        step = self.denoiser.denoise_step

        def denoise_step(batch: Any, rows: int = 0) -> None:
            if any(image.guidance_scale == self.broken for image in batch):
                raise RuntimeError("a test's")
            step(batch, rows)

        self.denoiser.denoise_step = denoise_step  # type: ignore[method-assign]  # the fault
        self.beside_steps = precision == "fp32"  # fp32 decodes as on a card
        self.loop = self.new_loop()

    def new_loop(self, memory_pause_s: float = 0.05) -> DenoisingLoop:
        return DenoisingLoop(
            self.denoiser,
            max_rows=8,
            beside_steps=self.beside_steps,
            memory_pause_s=memory_pause_s,
        )

    def embeds(self, request: ImageRequest) -> PromptEmbeds:
        prompts = [request.negative_prompt] if request.guided else []
        return self.encoder.encode_prompts([*prompts, request.prompt], 32)

    def generate(self, *requests: ImageRequest) -> list[GeneratedPixels]:
        """Generate images together: no image takes a step before all have been submitted."""
        futures = self.submit(*((request, self.embeds(request)) for request in requests))
        return [future.result(30) for future in futures]

    def generate_with_events(
        self, request: ImageRequest, previews: int = 0
    ) -> tuple[GeneratedPixels, list[StepDone | PreviewPixels]]:
        events: list[StepDone | PreviewPixels] = []
        future = self.loop.generate(
            request, self.embeds(request), previews, events.append, picture_of(request)
        )
        return future.result(30), events

    def submit(self, *work: tuple[ImageRequest, PromptEmbeds]) -> list[Future[GeneratedPixels]]:
        """Submit images so that they start together.

        The image PLUG stands still in its only step until all of them have been submitted.
        """
        self.gate.clear()
        entered = len(self.entered)
        first = self.loop.generate(PLUG, self.embeds(PLUG))
        wait_for(lambda: len(self.entered) > entered)
        futures = [
            self.loop.generate(request, embeds, edited=picture_of(request))
            for request, embeds in work
        ]
        self.gate.set()
        first.result(30)
        return futures


def picture_of(request: ImageRequest) -> EditPixels | None:
    return PICTURE if request.edit else None


@pytest.fixture(scope="module", params=["fp32", "fp8"])
def model(request: pytest.FixtureRequest, encoder: PromptEncoder) -> Iterator[Model]:
    model = Model(request.param, encoder)
    yield model
    model.loop.close()


@contextmanager
def a_new_loop(model: Model, memory_pause_s: float = 0.05) -> Iterator[None]:
    """Give the model another loop within the block.

    A loop that ran out of memory keeps its batches small for a while, which would disturb the
    tests that come later.
    """
    usual, model.loop = model.loop, model.new_loop(memory_pause_s)
    try:
        yield
    finally:
        model.loop.close()
        model.loop, model.room = usual, 32


@pytest.fixture
def cramped(model: Model) -> Iterator[Model]:
    with a_new_loop(model):
        yield model


def difference(one: GeneratedPixels, other: GeneratedPixels) -> float:
    """The largest difference between the values of two images, in levels of 0 to 255."""
    return float(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max())


def test_images_generated_together_equal_those_generated_alone(model: Model) -> None:
    alone = [model.generate(request)[0] for request in MIXED]
    model.rows.clear()
    together = model.generate(*MIXED)
    assert max(model.rows) == 8
    exact = model.denoiser.recipe.name == "fp32"
    for one, other in zip(alone, together, strict=True):
        if exact:
            assert difference(one, other) <= 1  # where a sum is rounded differently
        else:
            assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 1


def test_other_images_change_nothing_within_one_padded_size(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image shares batches of four rows with different images.

    The image stands at the first and at the last place of the batch. Batches are as large as
    possible here, however long the steps take on this machine.
    """
    monkeypatch.setattr(StepTimes, "seconds", lambda *_: None)
    others = [replace(REQUEST, seed=s, prompt=p) for s, p in ((8, "dunes"), (9, "a city"))]
    results = [
        model.generate(REQUEST, others[0])[0],
        model.generate(REQUEST, others[1])[0],
        model.generate(others[0], REQUEST)[1],
    ]
    assert set(model.rows[-18:]) == {4}
    assert [difference(results[0], r) for r in results] == [0, 0, 0]


def test_a_deterministic_image_is_the_same_alone_and_in_a_crowd(model: Model) -> None:
    pinned = replace(REQUEST, deterministic=True)
    alone = model.generate(pinned)[0]
    assert set(model.rows[-6:]) == {2}
    crowd = model.generate(*MIXED, pinned, replace(pinned, seed=7))
    assert difference(alone, crowd[-2]) == 0


def test_a_deterministic_edit_is_the_same_alone_and_in_a_crowd(model: Model) -> None:
    pinned = replace(EDIT, deterministic=True)
    alone = model.generate(pinned)[0]
    crowd = model.generate(*MIXED, pinned, replace(pinned, seed=7), EDIT)
    assert difference(alone, crowd[-3]) == 0
    assert difference(alone, crowd[-2]) > 0


def test_an_edit_runs_its_own_steps_and_keeps_what_its_mask_keeps(model: Model) -> None:
    generated, events = model.generate_with_events(EDIT, previews=2)
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]
    previews = [event for event in events if isinstance(event, PreviewPixels)]
    assert [preview.index for preview in previews] == [0, 1]
    for pixels in (generated.pixels, *(preview.pixels for preview in previews)):
        assert pixels.shape == (50, 60, 3)
        assert (pixels[:, :24] == PICTURE.image[:, :24]).all()
        assert (pixels[:, 24:] != PICTURE.image[:, 24:]).mean() > 0.9
    assert generated.latents_s > 0
    assert generated.busy_s == pytest.approx(
        generated.latents_s + generated.denoise_s + generated.decode_s, rel=0.2
    )


def test_a_picture_that_cannot_be_encoded_ends_its_edit_and_not_the_loop(
    cramped: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, original = cramped, cramped.denoiser.encode
    failures: list[Exception] = [torch.OutOfMemoryError("a test's")] * 2

    def encode(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(*arguments)

    monkeypatch.setattr(model.denoiser, "encode", encode)
    assert model.generate(EDIT)  # after two attempts without memory
    failures += [RuntimeError("out of luck")]
    bad, good = model.submit(*((r, model.embeds(r)) for r in (EDIT, REQUEST)))
    with pytest.raises(RuntimeError, match="out of luck"):
        bad.result(30)
    assert good.result(30)


def test_a_picture_with_numbers_that_are_not_finite_fails_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.denoiser.encode

    def broken(*arguments: Any) -> Any:
        found = encode(*arguments)
        return replace(found, image=found.image / 0)

    monkeypatch.setattr(model.denoiser, "encode", broken)
    with pytest.raises(NonFiniteImage):
        model.generate(EDIT)
    assert model.generate(REQUEST)


def test_a_cancelled_edit_is_not_encoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    monkeypatch.setattr(model.denoiser, "encode", lambda *_: encoded.append(1))
    model.gate.clear()
    plug = model.loop.generate(PLUG, model.embeds(PLUG))
    wait_for(lambda: model.loop._inbox.empty())
    edit = model.loop.generate(EDIT, model.embeds(EDIT), edited=PICTURE)
    edit.cancel()
    model.gate.set()
    plug.result(30)
    model.generate(REQUEST)
    assert not encoded


def test_images_join_and_leave_between_steps(model: Model) -> None:
    """The second image comes while the first one runs, and is finished before it."""
    long = replace(REQUEST, num_inference_steps=40)
    first = model.loop.generate(long, model.embeds(long))
    before = len(model.rows)
    while len(model.rows) < before + 4:
        time.sleep(0.005)
    short = replace(REQUEST, num_inference_steps=2)
    second = model.loop.generate(short, model.embeds(short))
    second.result(30)
    assert not first.done()
    first.result(30)


def test_a_cancelled_image_is_dropped_before_its_next_step(model: Model) -> None:
    model.rows.clear()
    long = replace(REQUEST, num_inference_steps=100)
    futures = [model.loop.generate(long, model.embeds(long)) for _ in range(3)]
    while not model.rows:
        time.sleep(0.005)
    assert all(future.cancel() for future in futures)
    steps = len(model.rows)
    model.generate(REQUEST)
    assert len(model.rows) <= steps + 1 + REQUEST.num_inference_steps
    with pytest.raises(CancelledError):
        futures[0].result(0)


def test_a_step_that_fails_ends_its_images_and_not_the_loop(model: Model) -> None:
    model.fail = RuntimeError("out of luck")
    with pytest.raises(RuntimeError, match="out of luck"):
        model.generate(REQUEST)
    assert model.generate(REQUEST)[0].pixels.shape == (64, 64, 3)


def test_a_step_that_fails_for_one_image_is_repeated_for_the_others(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = model.generate(REQUEST)[0]
    monkeypatch.setattr(model, "broken", 7.25)
    first, second, third = model.submit(
        *((r, model.embeds(r)) for r in (REQUEST, replace(REQUEST, guidance_scale=7.25), REQUEST))
    )
    with pytest.raises(RuntimeError, match="a test's"):
        second.result(30)
    for other in (first, third):
        assert np.abs(other.result(30).pixels.astype(int) - good.pixels).mean() < 1


def test_an_image_with_numbers_that_are_not_finite_fails_alone(model: Model) -> None:
    broken = model.embeds(REQUEST)
    broken = PromptEmbeds(torch.full_like(broken.tokens, float("nan")), broken.pooled)
    good = model.generate(REQUEST, replace(REQUEST, seed=9))[0]
    first, second = model.submit(
        (REQUEST, model.embeds(REQUEST)), (replace(REQUEST, seed=9), broken)
    )
    with pytest.raises(NonFiniteImage):
        second.result(30)
    assert difference(first.result(30), good) == 0


@pytest.mark.parametrize("abandoned", [False, True])
def test_an_image_that_cannot_begin_fails_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch, abandoned: bool
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def begin(*_: object, **__: object) -> None:
        reached.set()
        go_on.wait(5)
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(model.denoiser, "begin", begin)
        future = model.loop.generate(REQUEST, model.embeds(REQUEST))
        assert reached.wait(5)
        if abandoned:
            future.cancel()
        go_on.set()
        with pytest.raises(CancelledError if abandoned else RuntimeError):
            future.result(5)
    assert model.generate(REQUEST)
    assert model.loop.alive


def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_batches(cramped: Model) -> None:
    requests = [replace(REQUEST, seed=seed) for seed in range(4)]
    alone = [cramped.generate(request)[0] for request in requests]
    before = cramped.loop.counts.out_of_memory
    cramped.room = 4
    cramped.rows.clear()
    generated = cramped.generate(*requests)
    assert cramped.loop.counts.out_of_memory == before + 1
    assert cramped.rows[0] == 8
    assert max(cramped.rows[1:]) == 4  # batches stay smaller for a while
    assert sum(cramped.rows[1:]) == 4 * 2 * REQUEST.num_inference_steps  # no step is done twice
    exact = cramped.denoiser.recipe.name == "fp32"
    for one, other in zip(alone, generated, strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels).mean() < (0.1 if exact else 1)


def test_an_image_too_large_for_the_memory_fails_and_others_go_on(cramped: Model) -> None:
    cramped.room = 1
    with pytest.raises(Unavailable, match="not enough memory to generate 64x64"):
        cramped.generate(REQUEST)
    assert cramped.generate(PLUG)


def test_images_that_fit_alone_but_not_together_are_generated_alone(cramped: Model) -> None:
    cramped.room = 2
    unguided = replace(REQUEST, guidance_scale=1.0)
    cramped.rows.clear()
    generated = cramped.generate(*(replace(unguided, seed=seed) for seed in range(3)))
    assert len(generated) == 3
    assert max(cramped.rows[1:]) <= 2


def test_an_image_that_waits_for_memory_delays_no_other_image(model: Model) -> None:
    with a_new_loop(model, memory_pause_s=3600):
        model.room = 1
        unguided = replace(REQUEST, guidance_scale=1.0, num_inference_steps=3)
        large, small = model.submit(
            (REQUEST, model.embeds(REQUEST)), (unguided, model.embeds(unguided))
        )
        small.result(30)
        assert not large.done()
        large.cancel()


def test_a_decode_that_runs_out_of_memory_is_repeated(
    cramped: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = cramped.denoiser.decode, [2]

    def decode(latents: torch.Tensor) -> torch.Tensor:
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")
        return original(latents)

    monkeypatch.setattr(cramped.denoiser, "decode", decode)
    assert cramped.generate_with_events(REQUEST)
    failures[0] = 99
    with pytest.raises(Unavailable, match="memory"):
        cramped.generate_with_events(REQUEST)


@pytest.mark.parametrize("model", ["fp32"], indirect=True)  # decodes next to the steps
def test_steps_go_on_while_an_image_is_decoded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, go_on = model.denoiser.decode, threading.Event()

    def decode(latents: torch.Tensor) -> torch.Tensor:
        go_on.wait(10)
        return original(latents)

    monkeypatch.setattr(model.denoiser, "decode", decode)
    short, long = (replace(REQUEST, num_inference_steps=steps) for steps in (2, 20))
    before = model.loop.counts.steps
    first, second = (model.loop.generate(r, model.embeds(r)) for r in (short, long))
    deadline = time.monotonic() + 9
    while model.loop.counts.steps < before + 20:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not first.done()
    go_on.set()
    first.result(30)
    second.result(30)


def test_every_step_is_reported_and_its_time_is_divided_among_its_images(model: Model) -> None:
    generated, events = model.generate_with_events(REQUEST)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].denoise_s == generated.denoise_s
    assert generated.busy_s == pytest.approx(generated.denoise_s + generated.decode_s, rel=0.2)
    together = model.generate(*[replace(REQUEST, seed=seed) for seed in range(4)])
    steps_s = max(d.denoise_s for d in together)
    shared_s = sum(d.busy_s - d.decode_s for d in together)
    assert shared_s == pytest.approx(steps_s, rel=0.2)


def test_previews_come_closer_to_the_picture(model: Model) -> None:
    request = replace(REQUEST, width=128, height=96, num_inference_steps=12, prompt="dunes at noon")
    generated, events = model.generate_with_events(request, previews=3)
    previews = [event for event in events if isinstance(event, PreviewPixels)]
    assert [p.index for p in previews] == [0, 1, 2]
    other = model.generate(replace(request, seed=5, prompt="night, full moon"))[0]
    assert {p.pixels.shape for p in previews} == {(96, 128, 3)}

    def apart(pixels: np.ndarray, picture: np.ndarray) -> float:
        """The mean difference between colours of 8 × 8 patches; previews have no finer detail."""
        means = [
            p.astype(float).reshape(12, 8, 16, 8, 3).mean(axis=(1, 3)) for p in (pixels, picture)
        ]
        return float(np.abs(means[0] - means[1]).mean())

    distances = [apart(p.pixels, generated.pixels) for p in previews]
    assert distances[2] < distances[0]
    assert distances[2] < 20
    assert distances[2] < apart(previews[2].pixels, other.pixels) / 2


def test_previews_are_spread_over_the_steps() -> None:
    assert preview_steps(28, 3) == [7, 14, 21]
    assert preview_steps(4, 3) == [1, 2, 3]
    assert preview_steps(2, 3) == [1]
    assert preview_steps(1, 3) == preview_steps(28, 0) == []


def test_a_preview_that_fails_does_not_end_its_image(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preview(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(model.denoiser, "preview", preview)
    generated, events = model.generate_with_events(REQUEST, previews=2)
    assert generated.pixels.shape == (64, 64, 3)
    assert not any(isinstance(event, PreviewPixels) for event in events)


@pytest.mark.parametrize("where", ["encode", "begin", "denoise_step", "decode"])
@pytest.mark.parametrize("beside_steps", [False, True])
def test_a_broken_device_is_reported_at_once(model: Model, where: str, beside_steps: bool) -> None:
    told = threading.Event()
    denoiser = copy(model.denoiser)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    setattr(denoiser, where, broken)
    denoiser.check_device = broken  # type: ignore[method-assign]  # the fault
    loop = DenoisingLoop(denoiser, max_rows=8, on_broken=told.set, beside_steps=beside_steps)
    edit = replace(EDIT, guidance_scale=1.0)
    loop.generate(edit, model.embeds(edit), edited=PICTURE)
    assert told.wait(10)
    loop.close()


def test_an_image_whose_beginning_runs_out_of_memory_is_tried_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = model.denoiser.begin, [2]

    def begin(*args: Any, **named: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("a test's")
        return original(*args, **named)

    monkeypatch.setattr(model.denoiser, "begin", begin)
    assert model.generate_with_events(REQUEST)
    failures[0] = 99
    with pytest.raises(Unavailable, match="not enough memory"):
        model.generate_with_events(REQUEST)


def test_other_padded_sizes_change_only_rounding(model: Model) -> None:
    """Images stay within the tolerances of docs/pools.md: float32 latents, and FP8 pictures."""

    def latents_with(rows: int) -> torch.Tensor:
        image = model.denoiser.begin(
            model.embeds(REQUEST),
            width=128,
            height=128,
            num_inference_steps=14,
            guidance_scale=3.0,
            seed=1,
        )
        while not image.finished:
            model.denoiser.denoise_step([image], rows)
        return image.latents

    latents = [latents_with(rows) for rows in (2, 4, 16)]
    if model.denoiser.recipe.name == "fp32":
        apart = max(float((x - latents[0]).abs().max()) for x in latents)
        assert apart <= 5e-5, apart  # latents have values around 1
    else:
        pictures = [model.denoiser.decode(x).clamp(0, 1) for x in latents]
        likeness = min(ssim(x, pictures[0]) for x in pictures)
        assert likeness >= 0.99, likeness


def ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    """Structural similarity (Wang et al. 2004) in windows of 8 × 8, of pictures within 0..1."""
    pool = torch.nn.functional.avg_pool2d
    mean, mean_2 = pool(one, 8, 1), pool(other, 8, 1)
    var, var_2 = pool(one**2, 8, 1) - mean**2, pool(other**2, 8, 1) - mean_2**2
    both = pool(one * other, 8, 1) - mean * mean_2
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean * mean_2 + c1) * (2 * both + c2)
    return float((top / ((mean**2 + mean_2**2 + c1) * (var + var_2 + c2))).mean())
