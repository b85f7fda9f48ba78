"""What batching between steps gains, and what the denoising loop costs.

    python -m bench.engine [--recipe fp8] [--quick]

Real runs on the demo model: throughput of 8 equal images (all there at once) through the loop,
one at a time, in one static batch, and through diffusers' pipeline; memory over 1,000 images; and
a mixed stream of images in real time. Latency tables replay thousands of images in virtual time on
step costs measured in the same run: see `bench.replay`. Writes build/bench/engine.json and
bench/engine.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from serve.cost import Coefficients, ImageShape, Learned
from serve.engine.denoising_loop import BUCKETS, DenoisingLoop, Drawn, bucket
from serve.engine.precision import RECIPES
from serve.engine.sd3 import Denoiser, PromptEmbeds, PromptEncoder, to_pixels
from serve.request import ImageRequest

from .replay import (
    Asked,
    Costs,
    Key,
    between_steps,
    one_at_a_time,
    percentile,
    poisson,
    slowdowns,
    static_batches,
)

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo" / "model"
RESULT = ROOT / "build" / "bench" / "engine.json"
PLOT = ROOT / "bench" / "engine.png"
T = TypeVar("T")
TEXT_LENGTH = 32
EQUAL = 8  # images in the throughput runs, and slots of the replica everywhere
MAX_ROWS = 2 * EQUAL
SIZES = 64, 128, 192
STEPS = 4, 8, 20, 28, 50
LOADS = 0.5, 0.8, 0.95  # of what one at a time can do


class Engine:
    """The demo model in one recipe, with embeddings at hand: text is not what is measured."""

    def __init__(self, recipe: str) -> None:
        encoder = PromptEncoder(MODEL)
        both = encoder.encode_prompts(["", "the sea at dawn"], TEXT_LENGTH)
        self._embeds = {2: both, 1: PromptEmbeds(both.tokens[1:], both.pooled[1:])}
        self.text_tokens = both.tokens.shape[1]
        self.denoiser = Denoiser(MODEL, RECIPES[recipe])
        self.forward_s = 0.0  # within the transformer itself
        original = self.denoiser.transformer.forward

        def forward(**inputs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(**inputs)
            finally:
                self.forward_s += time.perf_counter() - began

        self.denoiser.transformer.forward = forward

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
        """Equal images together from the first step to the last, decoded in one call."""
        batch = [self.begin(key, seed) for seed in range(images)]
        for _ in range(key[2]):
            self.denoiser.denoise_step(batch)
        pictures = self.denoiser.decode(torch.cat([image.latents for image in batch]))
        for picture in pictures:
            to_pixels(picture)

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
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def apart(work: Callable[[], T]) -> T:
    """In a thread that ends afterwards, as the loop's does: OpenMP keeps workers for every thread
    that computes, and with more of them than cores all get slower."""
    with ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,)) as thread:
        return thread.submit(work).result()


def measure_costs(engine: Engine, repeats: int) -> Costs:
    """Medians of steps and decodes, sizes and row counts in turn."""
    steps: dict[int, dict[int, list[float]]] = {
        s: {b: [] for b in BUCKETS if b <= MAX_ROWS} for s in SIZES
    }
    decodes: dict[int, list[float]] = {s: [] for s in SIZES}
    for size in SIZES:
        for rows, found in steps[size].items():
            own = min(rows, 2)
            batch = [engine.begin((size, own, 100), seed) for seed in range(rows // own)]
            engine.denoiser.denoise_step(batch)  # not the first of its kind
            found += [
                timed(lambda b=batch: engine.denoiser.denoise_step(b)) for _ in range(repeats)
            ]  # type: ignore[misc]
        latents = batch[0].latents
        decodes[size] = [
            timed(lambda x=latents: to_pixels(engine.denoiser.decode(x)[0]))  # type: ignore[misc]
            for _ in range(max(3, repeats // 2))
        ]
    return Costs(
        {s: {r: statistics.median(t) for r, t in rows.items()} for s, rows in steps.items()},
        {s: statistics.median(t) for s, t in decodes.items()},
        bucket,
    )


# -- throughput -----------------------------------------------------------------------------------


def throughput(engine: Engine, steps: int, repeats: int) -> dict[str, Any]:
    """Images/s of 8 equal images that are there at once, each way in turn; medians."""
    key = engine.denoiser.native_size_px, 2, steps
    overheads: list[float] = []

    def through_the_loop() -> float:
        loop = DenoisingLoop(engine.denoiser, MAX_ROWS)
        before, began = engine.forward_s, time.perf_counter()
        futures = [loop.draw(engine.request(key, s), engine.embeds(2)) for s in range(EQUAL)]
        drawn = [future.result() for future in futures]
        wall_s = time.perf_counter() - began
        loop.close()
        model_s = engine.forward_s - before + sum(d.decode_s for d in drawn)
        overheads.append(1 - model_s / wall_s)
        return wall_s

    pipeline = bare_pipeline(engine)
    others: dict[str, Callable[[], object]] = {
        "one at a time": lambda: [engine.static_batch(key, 1) for _ in range(EQUAL)],
        "static batch": lambda: engine.static_batch(key, EQUAL),
        "pipeline, one at a time": lambda: [pipeline(key, 1) for _ in range(EQUAL)],
        "pipeline, one batch": lambda: pipeline(key, EQUAL),
    }
    ours: list[float] = []
    seconds: dict[str, list[float]] = {way: [] for way in others}
    decodes: list[tuple[float, float]] = []
    gains = []
    for _ in range(repeats):
        decodes.append(apart(lambda: decode_both_ways(engine, key)))
        gains.append(apart(lambda: model_gain(engine)))
        ours.append(through_the_loop())
        for way, run in others.items():
            seconds[way].append(apart(lambda r=run: timed(r)))  # type: ignore[misc]
    per_s = {
        way: EQUAL / statistics.median(s) for way, s in {"denoising loop": ours, **seconds}.items()
    }

    def over(way: str) -> float:
        return statistics.median(b / a for a, b in zip(ours, seconds[way], strict=True))

    return {
        "steps": steps,
        "images_per_s": per_s,
        "decode_one_by_one_s": statistics.median(one_by_one for one_by_one, _ in decodes),
        "decode_together_s": statistics.median(together for _, together in decodes),
        "throughput_vs_one_at_a_time": over("one at a time"),
        "throughput_vs_static_batching": over("static batch"),
        "throughput_vs_pipeline": over("pipeline, one at a time"),
        "model_batching_gain": statistics.median(gains),
        "loop_overhead_fraction": statistics.median(overheads),
    }


def model_gain(engine: Engine) -> float:
    """Rows/s of the transformer with 8 images ÷ with one, steps in turn."""
    one, all_ = ([engine.begin((128, 2, 100), s) for s in range(n)] for n in (1, EQUAL))
    pairs = [
        (
            timed(lambda: engine.denoiser.denoise_step(one)),
            timed(lambda: engine.denoiser.denoise_step(all_)),
        )
        for _ in range(7)
    ]
    alone_s, together_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return EQUAL * alone_s / together_s


def decode_both_ways(engine: Engine, key: Key) -> tuple[float, float]:
    """Seconds of the VAE for 8 images one by one, as the loop does, and in one call.

    In one call they round differently with their company, so the loop does not.
    """
    latents = [engine.begin(key, seed).latents for seed in range(EQUAL)]
    together = torch.cat(latents)
    engine.denoiser.decode(together)
    return (
        timed(lambda: [engine.denoiser.decode(one) for one in latents]),
        timed(lambda: engine.denoiser.decode(together)),
    )


def bare_pipeline(engine: Engine) -> Callable[[Key, int], object]:
    """diffusers' pipeline on the same weights, given embeddings as we are."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline(
        transformer=engine.denoiser.transformer,
        vae=engine.denoiser.vae,
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL / "scheduler"),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3")),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3")),
    )
    pipeline.set_progress_bar_config(disable=True)
    dtype, embeds = engine.denoiser.recipe.dtype, engine.embeds(2)

    def run(key: Key, images: int) -> object:
        size_px, _, steps = key
        return pipeline(
            prompt_embeds=embeds.tokens[1:].repeat(images, 1, 1).to(dtype),
            negative_prompt_embeds=embeds.tokens[:1].repeat(images, 1, 1).to(dtype),
            pooled_prompt_embeds=embeds.pooled[1:].repeat(images, 1).to(dtype),
            negative_pooled_prompt_embeds=embeds.pooled[:1].repeat(images, 1).to(dtype),
            width=size_px,
            height=size_px,
            num_inference_steps=steps,
            guidance_scale=3.0,
            output_type="np",
        )

    return run


# -- latency --------------------------------------------------------------------------------------


def mix(rng: random.Random) -> Key:
    """Sizes, guidance and steps drawn evenly."""
    return rng.choice(SIZES), rng.choice((1, 2)), rng.choice(STEPS)


def own_time_s(costs: Costs) -> float:
    """The mean of the mix, each image alone: one at a time can do one per so many seconds."""
    return statistics.mean(
        costs.alone(Asked(0, size, rows, steps))
        for size in SIZES
        for rows in (1, 2)
        for steps in STEPS
    )


def replay(costs: Costs, images: int) -> dict[str, Any]:
    """Slowdowns (latency ÷ own time) of the mix at each load."""
    found: dict[str, Any] = {}
    for load in LOADS:
        rng = random.Random(int(100 * load))
        trace = poisson(rng, images, load / own_time_s(costs), lambda r=rng: mix(r))  # type: ignore[misc]
        finished = {
            "between steps": between_steps(trace, costs, EQUAL, MAX_ROWS),
            "one at a time": one_at_a_time(trace, costs),
            "static batches": static_batches(trace, costs, EQUAL),
        }
        found[f"{load:g}"] = {way: summary(trace, f, costs) for way, f in finished.items()}
    return found


def summary(trace: Sequence[Asked], finished: Sequence[float], costs: Costs) -> dict[str, float]:
    ordered = slowdowns(trace, finished, costs)
    latencies = sorted(f - asked.arrives_s for asked, f in zip(trace, finished, strict=True))
    return {
        "slowdown_p50": percentile(ordered, 0.5),
        "slowdown_p99": percentile(ordered, 0.99),
        "latency_mean_s": statistics.mean(latencies),
        "latency_p99_s": percentile(latencies, 0.99),
    }


def real_cell(engine: Engine, costs: Costs, images: int, load: float) -> dict[str, Any]:
    """The same kind of trace in real time, and replayed; and how well its work was foretold."""
    rng = random.Random(7)
    trace = poisson(rng, images, load / own_time_s(costs), lambda: mix(rng))
    loop = DenoisingLoop(engine.denoiser, MAX_ROWS)
    slots = threading.Semaphore(EQUAL)
    learned = Learned(fitted(engine, costs))
    finished, errors = [0.0] * images, []
    began = time.perf_counter()

    def done(i: int, future: Future[Drawn]) -> None:
        finished[i] = time.perf_counter() - began
        slots.release()
        shape, busy_s = engine.shape(trace[i].key), future.result().busy_s
        errors.append(abs(learned.coefficients.work_s(shape) - busy_s) / busy_s)
        learned.observe(shape, busy_s)

    for i, asked in enumerate(trace):
        time.sleep(max(0.0, asked.arrives_s - (time.perf_counter() - began)))
        slots.acquire()
        future = loop.draw(engine.request(asked.key, i), engine.embeds(asked.rows))
        future.add_done_callback(lambda f, i=i: done(i, f))  # type: ignore[misc]
    while not all(finished):
        time.sleep(0.01)
    loop.close()
    replayed = between_steps(trace, costs, EQUAL, MAX_ROWS)
    real, virtual = summary(trace, finished, costs), summary(trace, replayed, costs)
    errors.sort()
    return {
        "load": load,
        "images": images,
        "real": real,
        "replayed": virtual,
        "real_over_replayed": real["latency_mean_s"] / virtual["latency_mean_s"],
        "error_p50": percentile(errors, 0.5),
        "error_p90": percentile(errors, 0.9),
    }


def foretold(engine: Engine, costs: Costs, images: int) -> dict[str, float]:
    """How far the fitted coefficients are off for images alone, of the mix."""
    rng, coefficients = random.Random(11), fitted(engine, costs)
    errors = []
    for _ in range(images):
        key = mix(rng)
        took_s = timed(lambda k=key: engine.static_batch(k, 1))  # type: ignore[misc]
        errors.append(abs(coefficients.work_s(engine.shape(key)) - took_s) / took_s)
    errors.sort()
    return {"error_p50": percentile(errors, 0.5), "error_p90": percentile(errors, 0.9)}


def fitted(engine: Engine, costs: Costs) -> Coefficients:
    """Coefficients of the images alone, least squares of relative errors: see `serve.cost`."""
    rows_of, wanted = [], []
    for size in SIZES:
        for rows in (1, 2):
            n = engine.shape((size, rows, 1)).tokens
            rows_of.append([1, rows * n, rows * n * n])
            wanted.append(costs.step(size, rows))
    step, token, token2 = _least_squares(rows_of, wanted)
    constant, pixel = _least_squares(
        [[1, s * s] for s in SIZES], [costs.decode_s[s] for s in SIZES]
    )
    return Coefficients(constant, step, token, token2, pixel)


def _least_squares(features: list[list[float]], wanted: list[float]) -> list[float]:
    """No coefficient is negative: the worst is left out until none is."""
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


# -- memory ---------------------------------------------------------------------------------------


def memory(engine: Engine, images: int) -> dict[str, float]:
    """MiB resident after the first 100 and after all of a mixed stream of small images."""
    rng, process = random.Random(3), psutil.Process()
    loop, after = DenoisingLoop(engine.denoiser, MAX_ROWS), {}
    for first in range(0, images, 20):
        keys = [
            (rng.choice((64, 80, 96)), rng.choice((1, 2)), rng.choice((1, 2, 3))) for _ in range(20)
        ]
        futures = [
            loop.draw(engine.request(key, first + i), engine.embeds(key[1]))
            for i, key in enumerate(keys)
        ]
        for future in futures:
            future.result()
        after[first + 20] = process.memory_info().rss / 2**20
    loop.close()
    return {
        "images": images,
        "rss_after_100_mib": after[100],
        "rss_after_all_mib": after[images],
        "growth": after[images] / after[100] - 1,
    }


# -- what is written ------------------------------------------------------------------------------


def plot(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    per_s = found["throughput"]["images_per_s"]
    left.barh(list(per_s)[::-1], list(per_s.values())[::-1], color="#4f46e5")
    left.set_title(f"{EQUAL} equal images at once: images/s")
    loads = found["replay"]
    for way in next(iter(loads.values())):
        tails = [cell[way]["slowdown_p99"] for cell in loads.values()]
        right.plot([f"{100 * float(load):.0f} %" for load in loads], tails, "o-", label=way)
    right.set_yscale("log")
    right.set_title("mixed images: p99 of latency ÷ own time")
    right.set_xlabel("load, of what one at a time can do")
    right.legend()
    figure.savefig(PLOT, dpi=110)


def table(found: dict[str, Any]) -> str:
    t, cell, rss = found["throughput"], found["real_cell"], found["memory"]
    alone = found["work_alone"]
    lines = [f"{found['machine']}, demo model in {found['recipe']}", ""]
    lines += [f"| {EQUAL} equal images, {t['steps']} steps | images/s |", "|---|---|"]
    lines += [f"| {way} | {value:.2f} |" for way, value in t["images_per_s"].items()]
    lines += [
        "",
        "| load | | p50 slowdown | p99 slowdown | mean latency s |",
        "|---|---|---|---|---|",
    ]
    for load, ways in found["replay"].items():
        lines += [
            f"| {100 * float(load):.0f} % | {way} | {s['slowdown_p50']:.2f} "
            f"| {s['slowdown_p99']:.1f} | {s['latency_mean_s']:.2f} |"
            for way, s in ways.items()
        ]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| `{key}` | {found[key]:.3f} |" for key in KEYS]
    lines += [
        f"| real ÷ replayed mean latency, {cell['images']} images "
        f"| {cell['real_over_replayed']:.3f} |",
        f"| error of predicted work, images alone, p50 / p90 | {alone['error_p50']:.3f} / "
        f"{alone['error_p90']:.3f} |",
        f"| the same in that stream, refitted online | {cell['error_p50']:.3f} / "
        f"{cell['error_p90']:.3f} |",
        f"| {EQUAL} decodes, one by one / in one call, s | {t['decode_one_by_one_s']:.3f} / "
        f"{t['decode_together_s']:.3f} |",
        f"| MiB resident after 100 and {rss['images']} images | {rss['rss_after_100_mib']:.0f} / "
        f"{rss['rss_after_all_mib']:.0f} |",
    ]
    return "\n".join(lines)


KEYS = (
    "throughput_vs_one_at_a_time",
    "model_batching_gain",
    "throughput_vs_static_batching",
    "p99_slowdown_vs_static_batching_mixed_80",
    "loop_overhead_fraction",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="fp8", choices=["fp8", "bf16", "fp32"])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and steps, < 4 minutes")
    arguments = parser.parse_args()
    quick = arguments.quick
    engine = apart(lambda: Engine(arguments.recipe))
    costs = apart(lambda: measure_costs(engine, repeats=7 if quick else 15))
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "recipe": arguments.recipe,
        "step_s": costs.step_s,
        "decode_s": costs.decode_s,
        "coefficients": fitted(engine, costs)._asdict(),
        "throughput": throughput(engine, steps=10 if quick else 28, repeats=3 if quick else 5),
        "replay": replay(costs, images=4000),
        "work_alone": apart(lambda: foretold(engine, costs, images=15 if quick else 60)),
        "real_cell": real_cell(engine, costs, images=40 if quick else 150, load=0.8),
        "memory": memory(engine, images=1000),
    }
    found |= {key: found["throughput"][key] for key in KEYS if key in found["throughput"]}
    tails = {way: cell["slowdown_p99"] for way, cell in found["replay"]["0.8"].items()}
    found["p99_slowdown_vs_static_batching_mixed_80"] = (
        tails["between steps"] / tails["static batches"]
    )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2))
    plot(found)
    print(table(found))


if __name__ == "__main__":
    main()
