"""Measure what some choices in the engine gain, with the demo model on this machine.

    python -m bench.choices [--compiled]

The two variants of a choice take turns, call by call. The command prints the medians of both, and
the median of their ratios. `--compiled` adds compiled blocks, which need a C++ compiler and two
minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from serve.engine.compiled import compile_blocks
from serve.engine.fused_attention import fuse_qkv
from serve.engine.precision import RECIPES, apply_recipe

MODEL = Path(__file__).parents[1] / "demo" / "model"
REPEATS = 25


def transformer(recipe: str, joined: bool = True) -> Any:
    """The demo model's transformer in a recipe; `joined`: with joined q, k and v layers."""
    made = SD3Transformer2DModel.from_pretrained(MODEL / "transformer", torch_dtype=torch.bfloat16)
    return apply_recipe(fuse_qkv(made) if joined else made, RECIPES[recipe]).eval()


def step(model: Any, images: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """A call of the transformer with random inputs for `images` images with guidance."""
    rows = 2 * images
    inputs = {
        "hidden_states": torch.randn(rows, 16, 16, 16, dtype=dtype),
        "timestep": torch.full((rows,), 500.0),
        "encoder_hidden_states": torch.randn(rows, 109, 128, dtype=dtype),
        "pooled_projections": torch.randn(rows, 128, dtype=dtype),
    }
    return lambda: model(**inputs, return_dict=False)


def decode(channels_last: bool, dtype: torch.dtype) -> Callable[[], object]:
    """A call of the VAE's decoder with random latents."""
    vae: Any = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=dtype).eval()
    if channels_last:
        vae.to(memory_format=torch.channels_last)
    latents = torch.randn(1, 16, 16, 16, dtype=dtype)
    return lambda: vae.decode(latents, return_dict=False)


@torch.inference_mode()
def compare(name: str, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Time both variants and print a row of the table."""
    pairs = []
    for _ in range(REPEATS + 3):
        seconds = []
        for work in (before, after):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        pairs.append(seconds)
    pairs = pairs[3:]
    ms = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
    gain = statistics.median(b / a for b, a in pairs)
    print(f"| {name} | {ms[0]:.1f} | {ms[1]:.1f} | {gain:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="measure compiled blocks too")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| demo model at 128² | ms without | ms with | × faster |")
    print("|---|---|---|---|")
    for recipe in ("fp8", "bf16"):
        for images in (1, 4):
            compare(
                f"q, k, v joined: a step of {images} in {recipe}",
                step(transformer(recipe, joined=False), images),
                step(transformer(recipe), images),
            )
    bf16, fp32 = torch.bfloat16, torch.float32
    for images in (1, 4):
        compare(
            f"float32 in place of bfloat16: a step of {images}",
            step(transformer("bf16"), images),
            step(transformer("fp32"), images, fp32),
        )
    compare("float32 in place of bfloat16: a decode", decode(True, bf16), decode(True, fp32))
    for dtype in (bf16, fp32):
        name = str(dtype).removeprefix("torch.")
        compare(f"channels last: a decode in {name}", decode(False, dtype), decode(True, dtype))
    if arguments.compiled:
        for images in (1, 4):
            eager = transformer("fp8")
            compiled = compile_blocks(transformer("fp8"), {(2 * images, 64)})
            compare(
                f"compiled: a step of {images} in fp8", step(eager, images), step(compiled, images)
            )


if __name__ == "__main__":
    main()
