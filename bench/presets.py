"""Measure what the presets of examples/laptop.yaml save, and what they lose.

    python -m bench.presets [--quick] [--images 96]

Quality: images of captions that no preset was chosen by are compared with their *converged*
images, those of 100 steps of DPM-Solver++ 2M in float32; and `demo.check` tells whether they show
what was asked for. Two guidance scales; float32 and FP8. As a check of the reference itself, Euler
with 400 steps is compared with it.

Speed: the real denoising loop with as many default images as presets of each name, against default
images alone: images/s at full load; then arrivals at random times at 80 % of each one's full load,
and the presets at the default's rate.

Prints tables in Markdown; writes build/bench/presets.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from demo.check import shows
from demo.landscapes import Scene, caption, random_scene
from serve.engine.denoiser import Denoiser
from serve.engine.denoising_loop import DenoisingLoop, GeneratedPixels
from serve.engine.precision import RECIPES
from serve.quality.calibration import CONVERGED, Way
from serve.quality.local_model import Embeddings, LocalModel
from serve.quality.metrics import Distance, Pixels, Spread, distance
from serve.request import ImageRequest, Sampler
from serve.settings.file import load_settings

from .demo_engine import MODEL
from .machine import machine
from .replay import percentile

SETTINGS = Path(__file__).parents[1] / "examples" / "laptop.yaml"
RESULT = Path(__file__).parents[1] / "build" / "bench" / "presets.json"
CAPTIONS_SEED = 20_261_201
SCALES = 3.0, 5.0
MANY_EULER_STEPS = 400
SLOTS, MAX_ROWS = 8, 16
LOAD = 0.8
CONSOLE = Console(stderr=True)  # the tables are printed to standard output


def scenes(count: int) -> list[tuple[Scene, str]]:
    """Scenes and captions without repetition, which mention a moon if the scene has one."""
    rng, found = np.random.default_rng(CAPTIONS_SEED), dict[str, Scene]()
    while len(found) < count:
        scene = random_scene(rng)
        text = caption(scene, rng)
        if ("moon" in scene.extras) == ("moon" in text):
            found.setdefault(text, scene)
    return [(scene, text) for text, scene in found.items()]


class Presets:
    """The demo model's default and its presets, and requests for them."""

    def __init__(self) -> None:
        self.settings = load_settings(SETTINGS, {})
        (self.model,) = self.settings.models
        defaults = self.model.defaults
        self.ways = {"auto": Way(defaults.sampler, defaults.num_inference_steps)}
        for name, preset in self.model.presets.items():
            self.ways[name] = Way(preset.sampler, preset.num_inference_steps)

    def request(self, prompt: str, seed: int, way: Way, scale: float) -> ImageRequest:
        values = self.model.defaults.model_dump() | {"guidance_scale": scale}
        request = ImageRequest(
            id=str(seed), model=self.model.id, prompt=prompt, seed=seed, **values
        )
        return way.of(request)


# -- quality --------------------------------------------------------------------------------------


def quality(presets: Presets, images: int) -> Iterator[dict[str, Any]]:
    """The distances of each way's images to the converged ones: one row for each cell."""
    asked = scenes(images)
    embeddings = Embeddings(presets.settings, presets.model)
    models = {
        recipe: LocalModel.load(presets.settings, presets.model.source, recipe, embeddings)
        for recipe in ("fp32", "fp8")
    }

    def generated(recipe: str, way: Way, scale: float, count: int = images) -> list[Pixels]:
        requests = [
            presets.request(text, seed, way, scale) for seed, (_, text) in enumerate(asked[:count])
        ]
        found = models[recipe].images(requests, batch_images=8)
        name = f"{recipe} {way.sampler} {way.steps}, guidance {scale:g}"
        return [pixels for _, pixels in track(found, name, count, console=CONSOLE)]

    for scale in SCALES:
        exact = generated("fp32", CONVERGED, scale)
        many = Way(Sampler.EULER, MANY_EULER_STEPS)
        few = min(8, images)
        yield row(
            "reference", "fp32", many, scale, exact[:few], generated("fp32", many, scale, few)
        )
        for recipe in models:
            for name, way in presets.ways.items():
                found = generated(recipe, way, scale)
                cell = row(name, recipe, way, scale, exact, found)
                cell["shown"] = statistics.mean(
                    shows(Image.fromarray(found_one), scene)
                    for found_one, (scene, _) in zip(found, asked, strict=True)
                )
                yield cell


def row(
    name: str, recipe: str, way: Way, scale: float, exact: list[Pixels], found: list[Pixels]
) -> dict[str, Any]:
    apart: list[Distance] = [distance(*pair) for pair in zip(exact, found, strict=True)]
    return {
        "preset": name,
        "recipe": recipe,
        "sampler": way.sampler.value,
        "steps": way.steps,
        "guidance_scale": scale,
        "ssim": Spread.of([one.ssim for one in apart]),
        "psnr_db": Spread.of([one.psnr_db for one in apart]),
    }


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| guidance | recipe | quality | steps | fewer rows | SSIM | PSNR, dB | shown |",
        "|---" * 8 + "|",
    ]
    usual = {r["recipe"]: r["steps"] for r in rows if r["preset"] == "auto"}
    for r in rows:
        ssim, psnr = r["ssim"], r["psnr_db"]
        rest = [
            f"{usual[r['recipe']] / r['steps']:.2f} ×",
            f"{ssim.median:.4f} / {ssim.p5:.4f}",
            f"{psnr.median:.1f} / {psnr.p5:.1f}",
            f"{r['shown']:.1%}" if "shown" in r else "–",
        ]
        steps = f"{r['sampler']} {r['steps']}"
        cells = [f"{r['guidance_scale']:g}", r["recipe"], r["preset"], steps, *rest]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- speed ----------------------------------------------------------------------------------------


class Stream:
    """The denoising loop of a replica with `SLOTS` slots, and images that arrive at it."""

    def __init__(self, presets: Presets) -> None:
        self._presets = presets
        self._embeddings = Embeddings(presets.settings, presets.model)
        self._denoiser = Denoiser.load(MODEL, RECIPES["fp8"])

    def run(self, names: Sequence[str], arrivals_s: Sequence[float]) -> dict[str, float]:
        """Generate an image of each preset; image i arrives at `arrivals_s[i]`.

        An image that finds all slots taken waits for one, first come, first served.
        """
        loop, slots = DenoisingLoop(self._denoiser, MAX_ROWS), threading.Semaphore(SLOTS)
        finished, all_done = [0.0] * len(names), threading.Semaphore(0)
        began = time.perf_counter()

        def done(i: int, _: Future[GeneratedPixels]) -> None:
            finished[i] = time.perf_counter() - began
            slots.release()
            all_done.release()

        for i, (name, arrives_s) in enumerate(zip(names, arrivals_s, strict=True)):
            request = self._presets.request("the sea at dawn", i, self._presets.ways[name], 3.0)
            time.sleep(max(0.0, arrives_s - (time.perf_counter() - began)))
            slots.acquire()
            loop.generate(request, self._embeddings.of(request)).add_done_callback(partial(done, i))
        for _ in names:
            all_done.acquire()
        loop.close()
        waits = sorted(b - a for a, b in zip(arrivals_s, finished, strict=True))
        return {
            "images_per_s": len(names) / finished_span(arrivals_s, finished),
            "p50_s": percentile(waits, 0.5),
            "p99_s": percentile(waits, 0.99),
        }


def finished_span(arrivals_s: Sequence[float], finished: Sequence[float]) -> float:
    return max(finished) - arrivals_s[0]


def speed(presets: Presets, images: int) -> list[dict[str, Any]]:
    """Default images alone, and a mix with the presets, at full load and at `LOAD` of it."""
    stream, rng = Stream(presets), random.Random(5)
    mixes = {
        "all auto": ["auto"] * images,
        "mixed": [list(presets.ways)[i % len(presets.ways)] for i in range(images)],
    }
    rng.shuffle(mixes["mixed"])
    gaps = [rng.expovariate(1.0) for _ in range(images)]
    stream.run(["auto"] * 2, [0.0, 0.0])  # the first steps of a kind take longer
    rows, full = [], dict[str, float]()
    for name, mix in mixes.items():
        found = stream.run(mix, [0.0] * images)
        full[name] = found["images_per_s"]
        rows.append({"mix": name, "arrivals": "all at once", **found})
    for name, of in (("all auto", "all auto"), ("mixed", "all auto"), ("mixed", "mixed")):
        rate = LOAD * full[of]
        arrivals = [sum(gaps[: i + 1]) / rate for i in range(images)]
        found = stream.run(mixes[name], arrivals)
        rows.append({"mix": name, "arrivals": f"{LOAD:.0%} of {of}'s full load", **found})
    return rows


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| mix | arrivals | images/s | p50, s | p99, s |", "|---" * 5 + "|"]
    lines += [
        f"| {r['mix']} | {r['arrivals']} | {r['images_per_s']:.2f} | {r['p50_s']:.2f} | "
        f"{r['p99_s']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images: less than 7 minutes")
    parser.add_argument("--images", type=int, default=96, help="of each cell of the quality table")
    arguments = parser.parse_args()
    images = 8 if arguments.quick else arguments.images
    presets = Presets()
    if len(presets.ways) == 1:
        raise SystemExit(f"{SETTINGS.name} has no presets")
    print(f"{machine()}, torch {torch.__version__}\n")
    rates = speed(presets, images=24 if arguments.quick else 120)
    print(speed_table(rates), flush=True)
    rows = list(quality(presets, images))
    print(f"\n{images} images of each\n\n{quality_table(rows)}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine(), "quality": rows, "speed": rates}, indent=1))


if __name__ == "__main__":
    main()
