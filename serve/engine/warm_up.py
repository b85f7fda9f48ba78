"""The warm-up of a replica before it takes requests.

The warm-up compiles the transformer's blocks, chooses the attention kernel, and runs every warm
shape once.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..edit_pixels import EditPixels
from ..settings.models import Pool
from .compiled import (
    LONGEST_ROW,
    Mode,
    Shape,
    compile_blocks,
    prefer_attention,
    preferred,
    time_attention,
)
from .compiled_code import CompiledCode, keep_compiled_code
from .decoding import is_out_of_memory
from .denoiser import Denoiser, DenoisingState
from .denoising_loop import DenoisingLoop, bucket, buckets
from .preview import VAE_FACTOR
from .prompt_embeds import PromptEmbeds

log = logging.getLogger("ray.serve")

PATCH = 2  # latents along a side of a token
LAYOUT_TRIALS = 3  # decodes in each memory layout of the VAE
FLEXIBLE_PX = 256  # side of the images for which the flexible code is compiled


class Phases:
    """The seconds that each phase of a replica's start takes, in the order of the phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure how long the block takes, and add that to the phase `name`."""
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"


def chosen_mode(pool: Pool, *, on_cuda: bool) -> Literal["off"] | Mode:
    """The mode in which blocks are compiled; `auto` compiles on a card but not on a CPU."""
    if pool.compile == "auto":
        return "default" if on_cuda else "off"
    return pool.compile


def card_name(*, on_cuda: bool) -> str:
    """The name of what compiled code runs on: the card, or the kind of CPU."""
    return torch.cuda.get_device_name() if on_cuda else platform.machine()


def warm_shapes(pool: Pool, native_px: int, rows: Iterable[int]) -> set[Shape]:
    """The shapes that get code of their own: each warm size with each number of rows."""
    tokens = [w * h // (VAE_FACTOR * PATCH) ** 2 for w, h in warm_sizes(pool, native_px)]
    return {(n, each) for n in rows for each in tokens}


def warm_sizes(pool: Pool, native_px: int) -> list[tuple[int, int]]:
    """The (width, height) in px of the warm images; the model's own size if none is set.

    `native_px`: the side of the model's own size.
    """
    named = [size.split("x") for size in pool.warm_sizes]
    return [(int(width), int(height)) for width, height in named] or [(native_px, native_px)]


def choose_layout(denoiser: Denoiser, latents: torch.Tensor) -> str:
    """Give the VAE the memory layout in which it decodes faster on this card; returns its name.

    Convolutions are faster with channels last, but CUDA's group norms copy such inputs.
    """
    took = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        denoiser.vae.to(memory_format=layout)
        with denoiser.beside_steps():
            denoiser.decode(latents)  # cuDNN chooses its kernels
            denoiser.check_device()
            began = time.perf_counter()
            for _ in range(LAYOUT_TRIALS):
                denoiser.decode(latents)
            denoiser.check_device()
        took[layout] = (time.perf_counter() - began) / LAYOUT_TRIALS
    fastest = min(took, key=lambda layout: took[layout])
    denoiser.vae.to(memory_format=fastest)
    return str(fastest).removeprefix("torch.")


class WarmUp:
    """The warm-up of one replica: call `prepare` after loading the model, then `run`.

    Everything runs in the threads that will serve, because cuDNN keeps its plans by thread. Both
    methods block. `compiled_folder`: where compiled code is kept. `backend`: the backend of
    `torch.compile`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pool: Pool,
        compiled_folder: str | None,
        backend: str = "inductor",
    ) -> None:
        self._denoiser, self._backend = denoiser, backend
        self._pool, self._sizes = pool, warm_sizes(pool, denoiser.native_size_px)
        self._rows = buckets(bucket(2 * pool.slots))
        self._mode = chosen_mode(pool, on_cuda=denoiser.on_cuda)
        self._compiled_folder = compiled_folder
        self._warm: set[Shape] = set()
        self._root: Path | None = None  # of compiled code; None: nothing is compiled

    def prepare(self) -> None:
        """Replace the transformer's blocks by compiled ones, unless the settings say otherwise.

        This must be called before the first step.
        """
        if self._mode != "off":
            self._root = keep_compiled_code(self._compiled_folder)
            self._warm = warm_shapes(self._pool, self._denoiser.native_size_px, self._rows)
            compile_blocks(self._denoiser.transformer, self._warm, self._mode, self._backend)

    def run(self, loop: DenoisingLoop, embeds: PromptEmbeds, phases: Phases) -> str:
        """Run every warm size with every number of rows once, and the flexible code.

        Returns a text for the log that names the chosen attention kernels, and on a card the memory
        layout of the VAE. `loop`: the one that will serve. `embeds`: two rows, as for a request
        with guidance. `phases`: gets the phases `lock`, the wait for another replica that compiles
        the same code, and `warm-up`. If memory does not suffice for a shape, the shape is left out
        and a warning is logged.
        """
        if self._mode == "off" and not self._denoiser.on_cuda:
            return "torch's choice"
        root = self._root
        with ExitStack() as compiling:
            if root:
                with phases.timed("lock"):
                    compiling.enter_context(CompiledCode(root, self._kind(embeds)).compiling())
            with phases.timed("warm-up"):
                return self._run(loop, embeds)

    def _kind(self, embeds: PromptEmbeds) -> dict[str, Any]:
        """Everything on which this replica's compiled code depends."""
        denoiser = self._denoiser
        config = {k: v for k, v in denoiser.transformer.config.items() if not k.startswith("_")}
        return {
            "card": card_name(on_cuda=denoiser.on_cuda),
            "structure": config,
            "recipe": denoiser.recipe.name,
            "mode": self._mode,
            "shapes": sorted(self._warm),
            "text_tokens": embeds.tokens.shape[1],
            "whole_rows": LONGEST_ROW,
        }

    def _run(self, loop: DenoisingLoop, embeds: PromptEmbeds) -> str:
        attention = loop.call(lambda: self._prefer_attention(embeds)).result()
        shapes = [(size, rows) for size in self._sizes for rows in self._rows]
        if self._mode != "off":
            warm = {width * height for width, height in self._sizes}
            other = next(px for px in count(FLEXIBLE_PX, VAE_FACTOR * PATCH) if px * px not in warm)
            # torch compiles separate code for one row.
            shapes += [((other, other), rows) for rows in {1, self._rows[-1]}]
        for (width, height), rows in shapes:
            step = partial(self._step, embeds, width, height, rows)
            try:
                loop.call(step).result()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("warm-up: out of memory with %d rows of %dx%d", rows, width, height)
            self._denoiser.free_memory()
        if self._denoiser.on_cuda:
            latents = self._begin(embeds, *self._sizes[0]).latents
            choose = partial(choose_layout, self._denoiser, latents)
            layout = loop.call(choose, decoding=True).result()
            attention = f"{attention}; VAE: {layout}"
        for width, height in self._sizes:
            loop.call(partial(self._encode_and_decode, width, height), decoding=True).result()
        return attention

    def _prefer_attention(self, embeds: PromptEmbeds) -> str:
        denoiser, (width, height) = self._denoiser, self._sizes[0]
        if not denoiser.on_cuda:
            return "torch's choice"
        config = denoiser.transformer.config
        took = time_attention(
            config.num_attention_heads,
            config.attention_head_dim,
            width * height // (VAE_FACTOR * PATCH) ** 2 + embeds.tokens.shape[1],
            denoiser.device,
            denoiser.recipe.dtype,
        )
        names = preferred(took)
        prefer_attention(names)
        return ", ".join(f"{name} {1e3 * took[name]:.2f} ms" for name in names)

    def _step(self, embeds: PromptEmbeds, width: int, height: int, rows: int) -> None:
        rows_of_one = PromptEmbeds(embeds.tokens[: min(rows, 2)], embeds.pooled[: min(rows, 2)])
        self._denoiser.denoise_step([self._begin(rows_of_one, width, height)], rows)

    def _encode_and_decode(self, width: int, height: int) -> None:
        """Do what the VAE does for an edit of this size."""
        with self._denoiser.beside_steps():
            picture = EditPixels(np.zeros((height, width, 3), np.uint8))
            self._denoiser.decode(self._denoiser.encode(picture, seed=0).image)

    def _begin(self, embeds: PromptEmbeds, width: int, height: int) -> DenoisingState:
        return self._denoiser.begin(
            embeds, width=width, height=height, num_inference_steps=1, guidance_scale=2.0, seed=0
        )
