"""The demo model, driven by Octet's engine or by diffusers' pipeline, to measure on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.cost import CostCoefficients, ImageShape
from serve.engine.denoiser import Denoiser, load_transformer, to_pixels
from serve.engine.denoising_loop import BUCKETS, bucket
from serve.engine.precision import RECIPES
from serve.engine.prompt_embeds import PromptEmbeds
from serve.engine.prompt_encoder import PromptEncoder
from serve.request import ImageRequest

from .replay import Costs, Key

MODEL = Path(__file__).parents[1] / "demo" / "model"
TEXT_LENGTH = 32
SIZES = 64, 128, 192
MAX_ROWS = 16
T = TypeVar("T")


class Engine:
    """A model in one recipe, with prompt embeddings made beforehand, and timers.

    Text encoding is not measured. `steps`: size in pixels, padded rows and seconds of each step so
    far. `model_s`: seconds spent in the transformer and the VAE themselves.
    """

    def __init__(self, denoiser: Denoiser, both: PromptEmbeds, sizes: Sequence[int]) -> None:
        """`both`: embeddings of an empty prompt and of another. `sizes`: image sizes in pixels."""
        self._embeds = {2: both, 1: PromptEmbeds(both.tokens[1:], both.pooled[1:])}
        self.text_tokens = both.tokens.shape[1]
        self.denoiser, self.sizes = denoiser, sizes
        self.steps: list[tuple[int, int, float]] = []
        self.model_s = 0.0
        for part, method, watched in (
            (denoiser, "denoise_step", self._recorded),
            (denoiser.transformer, "forward", self._timed),
            (denoiser.vae, "decode", self._timed),
        ):
            setattr(part, method, watched(getattr(part, method)))

    @classmethod
    def demo(cls, recipe: str) -> Engine:
        """The demo model in a recipe."""
        both = PromptEncoder(MODEL).encode_prompts(["", "the sea at dawn"], TEXT_LENGTH)
        return cls(Denoiser.load(MODEL, RECIPES[recipe]), both, SIZES)

    def _recorded(self, original: Callable[..., None]) -> Callable[..., None]:
        def step(batch: Any, rows: int = 0) -> None:
            began = time.perf_counter()
            original(batch, rows)
            size_px = 8 * batch[0].latents.shape[-1]
            self.steps.append((size_px, rows, time.perf_counter() - began))

        return step

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **named)
            finally:
                self.model_s += time.perf_counter() - began

        return call

    def request(self, key: Key, seed: int = 0) -> ImageRequest:
        size_px, rows, steps = key
        return ImageRequest(
            id=str(seed),
            model="landscapes",
            prompt="the sea at dawn",
            width=size_px,
            height=size_px,
            num_inference_steps=steps,
            guidance_scale=3.0 if rows == 2 else 1.0,
            seed=seed,
        )

    def embeds(self, rows: int) -> PromptEmbeds:
        return self._embeds[rows]

    def begin(self, key: Key, seed: int) -> Any:
        size_px, rows, steps = key
        return self.denoiser.begin(
            self._embeds[rows],
            width=size_px,
            height=size_px,
            num_inference_steps=steps,
            guidance_scale=3.0 if rows == 2 else 1.0,
            seed=seed,
        )

    def static_batch(self, key: Key, images: int) -> None:
        """Generate equal images together from first step to last, and decode them in one call."""
        batch = [self.begin(key, seed) for seed in range(images)]
        for _ in range(key[2]):
            self.denoiser.denoise_step(batch)
        decoded = self.denoiser.decode(torch.cat([image.latents for image in batch]))
        for image in decoded:
            to_pixels(image)

    def decode(self, latents: torch.Tensor) -> object:
        """The pixels of one image."""
        return to_pixels(self.denoiser.decode(latents)[0])

    def shape(self, key: Key) -> ImageShape:
        size_px, rows, steps = key
        return ImageShape(
            width_px=size_px,
            height_px=size_px,
            text_tokens=self.text_tokens,
            rows=rows,
            steps=steps,
        )


def timed(work: Callable[[], object]) -> float:
    """Seconds that the call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_after_another(work: Callable[[], object], times: int) -> None:
    """Do the same work several times."""
    for _ in range(times):
        work()


def apart(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends afterwards, and return its result.

    The denoising loop also runs in a thread of its own. OpenMP keeps workers for every thread that
    computes, and everything gets slower once there are more workers than cores.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,)) as thread:
        return thread.submit(work).result()


def measure_costs(engine: Engine, repeats: int) -> Costs:
    """Median seconds of steps and decodes, for every size and number of rows."""
    steps: dict[int, dict[int, list[float]]] = {
        s: {b: [] for b in BUCKETS if b <= MAX_ROWS} for s in engine.sizes
    }
    decodes: dict[int, list[float]] = {s: [] for s in engine.sizes}
    for size in engine.sizes:
        for rows, found in steps[size].items():
            own = min(rows, 2)
            batch = [engine.begin((size, own, 100), seed) for seed in range(rows // own)]
            engine.denoiser.denoise_step(batch)  # the first step of its kind takes longer
            found += [timed(partial(engine.denoiser.denoise_step, batch)) for _ in range(repeats)]
        decode = partial(engine.decode, batch[0].latents)
        decodes[size] = [timed(decode) for _ in range(max(3, repeats // 2))]
    return Costs(
        {s: {r: statistics.median(t) for r, t in rows.items()} for s, rows in steps.items()},
        {s: statistics.median(t) for s, t in decodes.items()},
        bucket,
    )


def in_stream(engine: Engine, costs: Costs) -> Costs:
    """Costs with the mean seconds of the steps that the engine has recorded.

    Sizes and rows without recorded steps keep those of `costs`.
    """
    step_s = {
        size: {
            rows: statistics.mean(
                [s for px, r, s in engine.steps if (px, r) == (size, rows)] or [before]
            )
            for rows, before in measured.items()
        }
        for size, measured in costs.step_s.items()
    }
    return replace(costs, step_s=step_s)


def bare_pipeline(engine: Engine) -> Callable[[Key, int], list[NDArray[np.uint8]]]:
    """A function that runs diffusers' pipeline on weights and embeddings like the engine's.

    It takes the key of an image and the number of images to generate in one call. The transformer
    is loaded again, because a `Denoiser` takes the layers out of its own that compute AdaLN. The
    engine decodes the images: on some CPUs its VAE is much faster than one in the recipe's format.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline(
        transformer=load_transformer(MODEL, engine.denoiser.recipe, engine.denoiser.device),
        vae=engine.denoiser.vae,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL / "scheduler"),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3")),
    )
    pipeline.set_progress_bar_config(disable=True)
    dtype, embeds = engine.denoiser.recipe.dtype, engine.embeds(2)

    def run(key: Key, images: int) -> list[NDArray[np.uint8]]:
        size_px, _, steps = key
        latents = pipeline(
            prompt_embeds=embeds.tokens[1:].repeat(images, 1, 1).to(dtype),
            negative_prompt_embeds=embeds.tokens[:1].repeat(images, 1, 1).to(dtype),
            pooled_prompt_embeds=embeds.pooled[1:].repeat(images, 1).to(dtype),
            negative_pooled_prompt_embeds=embeds.pooled[:1].repeat(images, 1).to(dtype),
            width=size_px,
            height=size_px,
            num_inference_steps=steps,
            guidance_scale=3.0,
            output_type="latent",
        ).images
        return [to_pixels(image) for image in engine.denoiser.decode(latents.float())]

    return run


def fitted(engine: Engine, costs: Costs) -> CostCoefficients:
    """Cost coefficients for images that run alone: see `cluster.cost`.

    They minimise the squared relative errors.
    """
    rows_of: list[list[float]] = []
    wanted: list[float] = []
    for size in engine.sizes:
        for rows in (1, 2):
            n = engine.shape((size, rows, 1)).tokens
            rows_of.append([1, rows * n, rows * n * n])
            wanted.append(costs.step(size, rows))
    step, token, token2 = _least_squares(rows_of, wanted)
    constant, pixel = _least_squares(
        [[1, s * s] for s in engine.sizes], [costs.decode_s[s] for s in engine.sizes]
    )
    return CostCoefficients(constant, step, token, token2, pixel)


def _least_squares(features: list[list[float]], wanted: list[float]) -> list[float]:
    """The coefficients that minimise squared relative errors, none of them negative.

    While a coefficient is negative, the most negative one is set to 0 and the others are fitted
    again.
    """
    used = list(range(len(features[0])))
    while True:
        a = torch.tensor(
            [[row[j] / y for j in used] for row, y in zip(features, wanted, strict=True)]
        )
        scale = a.abs().amax(dim=0)
        ones = torch.ones(len(wanted), 1, dtype=torch.float64)
        found = torch.linalg.lstsq((a / scale).double(), ones).solution[:, 0] / scale
        if (found >= 0).all():
            solution = dict(zip(used, found.tolist(), strict=True))
            return [solution.get(j, 0.0) for j in range(len(features[0]))]
        used.pop(int((found * scale).argmin()))
