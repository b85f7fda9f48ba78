"""Measure a card and, if there are weights, the real models on it: `make accept-gpu`.

    python -m bench.gpu.accept [--model FOLDER] [--minutes 8] [--out FOLDER]

First the parts of `bench.gpu.quick` run, on random weights. Then real weights are used: those of
FOLDER, or SD3.5 Medium from the hub if HF_TOKEN is set. Each of 24 prompts is generated in FP8 and
in bf16 from the same seed, and both images are compared by SSIM. Without weights this part is left
out, and the report says so. The results are in FOLDER as one JSON file for the card and the day,
beside a page that shows it: send back the JSON file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cluster.telemetry import NoTelemetry, driver_version
from serve.engine.compiled import compile_blocks
from serve.engine.denoiser import Denoiser, to_pixels
from serve.engine.precision import ENCODER_RECIPES, RECIPES
from serve.engine.prompt_embeds import PromptEmbeds
from serve.engine.prompt_encoder import PromptEncoder
from serve.models.checkpoints import pull
from serve.quality.metrics import Pixels, distance
from serve.settings.file import load_settings

from .model import RESULTS, Bench, save
from .page import write_page
from .quick import Parts, measure
from .steps import Clock, fp8_here, guarded

SETTINGS = Path(__file__).parents[2] / "examples" / "sd35.yaml"
MODEL = "sd3.5-medium"  # the smallest, so that it fits every card of 8 GB
PROMPTS = (
    "a lighthouse on a cliff at dusk",
    "a red bicycle against a white wall",
    "a bowl of ripe oranges on a wooden table",
    "a city street in heavy rain, reflections of neon lights",
    "portrait of an old sailor with a grey beard",
    "a snow-covered mountain above a calm lake",
    "a shop sign that says OPEN",
    "a close-up of a honey bee on a purple flower",
    "a glass of water with ice and a slice of lemon",
    "an empty railway station in fog",
    "a black cat asleep on a stack of books",
    "a hot-air balloon over green hills",
    "the inside of a gothic cathedral",
    "a watercolour of a fishing harbour",
    "a chess board in the middle of a game",
    "a loaf of bread, cut open, on linen",
    "a desert road that vanishes at the horizon",
    "a child's drawing of a house and a sun",
    "an astronaut on a beach at noon",
    "a forest of birch trees in autumn",
    "a mechanical watch, seen from above",
    "two people under one umbrella, from behind",
    "a page of handwritten music",
    "a paper boat on a puddle",
)
SEED, GUIDANCE = 1, 4.5


def embeddings(folder: Path, device: str, prompts: tuple[str, ...]) -> list[PromptEmbeds]:
    """The embeddings of each prompt with the empty negative prompt, on the CPU.

    The encoder is freed at the end, so that a small card has room for the model.
    """
    recipe = ENCODER_RECIPES["t5-fp8" if device == "cuda" else "fp32"]
    encoder = PromptEncoder(folder, recipe, device)
    found = []
    for prompt in prompts:
        embeds = encoder.encode_prompts(["", prompt], 256)
        found.append(PromptEmbeds(embeds.tokens.cpu(), embeds.pooled.cpu()))
    return found


def generated(
    bench: Bench, folder: Path, recipe: str, embeds: list[PromptEmbeds], side: int, steps: int
) -> tuple[list[Pixels], dict[str, Any]]:
    """An image of each prompt in a recipe, and what it took."""
    bench.free()
    denoiser = Denoiser.load(folder, RECIPES[recipe], bench.device)
    if denoiser.on_cuda:
        compile_blocks(denoiser.transformer, {(2, (side // 16) ** 2)})
    images, step_s = [], []
    for number, prompt in enumerate(embeds):
        image = denoiser.begin(
            prompt,
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            seed=SEED + number,
        )
        while not image.finished:
            began = time.perf_counter()
            denoiser.denoise_step([image])
            bench.sync()
            step_s.append(time.perf_counter() - began)
        images.append(to_pixels(denoiser.decode(image.latents)[0]))
    took = {"step_ms": 1e3 * statistics.median(step_s), "peak_gib": bench.peak_gib()}
    return images, took


def real_weights(bench: Bench, folder: Path, prompts: int, side: int, steps: int) -> dict[str, Any]:
    """Compare images in FP8 with those in bf16, on a checkpoint's weights."""
    embeds = embeddings(folder, bench.device, PROMPTS[:prompts])
    exact, in_bf16 = generated(bench, folder, "bf16", embeds, side, steps)
    if not fp8_here(bench):
        return {"bf16": in_bf16, "fp8": "left out: the card has no FP8"}
    eight_bit, in_fp8 = generated(bench, folder, "fp8", embeds, side, steps)
    alike = [distance(a, b).ssim for a, b in zip(exact, eight_bit, strict=True)]
    return {
        "folder": folder.name,
        "side": side,
        "steps": steps,
        "prompts": len(alike),
        "bf16": in_bf16,
        "fp8": in_fp8,
        "fp8_faster": in_bf16["step_ms"] / in_fp8["step_ms"],
        "ssim_median": statistics.median(alike),
        "ssim_least": min(alike),
    }


def weights(given: Path | None) -> Path | str:
    """The folder with the weights to use, or the reason why there are none."""
    if given:
        return given
    if "HF_TOKEN" not in os.environ:
        return "left out: set HF_TOKEN, or name a local folder with --model"
    settings = load_settings(SETTINGS)
    (model,) = [model for model in settings.models if model.id == MODEL]
    return pull(model.source, settings.models_folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder with real weights")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the part without weights")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--side", type=int, default=1024, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    arguments = parser.parse_args()
    bench, folder = Bench.here(arguments.tiny), weights(arguments.model)
    quick = measure(
        Parts(bench), Clock(arguments.minutes), lambda found: save(arguments.out, "accept", found)
    )
    found: dict[str, Any] = {"machine": quick.pop("machine"), "quick": quick}
    try:
        found["machine"]["driver"] = driver_version()
    except NoTelemetry:
        found["machine"]["driver"] = "unknown"
    found["machine"]["python"] = sys.version.split()[0]
    if isinstance(folder, str):
        found["real_weights"] = folder
    else:
        run = (folder, arguments.prompts, arguments.side, arguments.steps)
        guarded(found, "real_weights", lambda: real_weights(bench, *run))
    file = save(arguments.out, "accept", found)
    print(f"real weights: {found['real_weights']}")
    print(f"results: {file}\npage: {write_page(file)}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
