"""Measure what batching between steps gains and what the denoising loop costs.

    python -m bench.engine [--recipe fp8] [--quick]

Real runs on the demo model measure:

- the throughput of 8 equal images that are requested at once: through the loop, one at a time, in
  one static batch, and through diffusers' pipeline;
- the memory over 1,000 images;
- a mixed stream of images in real time.

The latency tables replay thousands of images in virtual time, with step costs measured in the same
run: see `bench.replay`. Writes build/bench/engine.json and bench/engine.png.
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
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from cluster.cost import LearnedCost
from serve.engine.denoising_loop import DenoisingLoop, GeneratedPixels

from .demo_engine import (
    MAX_ROWS,
    Engine,
    apart,
    bare_pipeline,
    fitted,
    in_stream,
    measure_costs,
    one_after_another,
    timed,
)
from .engine_report import KEYS, plot, table
from .replay import (
    Costs,
    Key,
    RequestedImage,
    between_steps,
    one_at_a_time,
    percentile,
    poisson,
    slowdowns,
    static_batches,
)

RESULT = Path(__file__).parents[1] / "build" / "bench" / "engine.json"
EQUAL = MAX_ROWS // 2  # images in the throughput runs, and slots of the replica in all runs
STEPS = 4, 8, 20, 28, 50
LOADS = 0.5, 0.8, 0.95  # fractions of the rate that one image at a time can serve


# -- throughput -----------------------------------------------------------------------------------


def throughput(engine: Engine, steps: int, repeats: int) -> dict[str, Any]:
    """Images/s of 8 equal images that are requested at once, for each way to run them.

    The ways take turns, so that a change of the machine's speed meets all of them. Results are
    medians.
    """
    key = engine.denoiser.native_size_px, 2, steps
    overheads: list[float] = []

    def through_the_loop(beside_steps: bool = False) -> float:
        loop = DenoisingLoop(engine.denoiser, MAX_ROWS, beside_steps=beside_steps)
        before, began = engine.model_s, time.perf_counter()
        futures = [loop.generate(engine.request(key, s), engine.embeds(2)) for s in range(EQUAL)]
        for future in futures:
            future.result()
        wall_s = time.perf_counter() - began
        loop.close()
        if not beside_steps:
            overheads.append(1 - (engine.model_s - before) / wall_s)
        return wall_s

    pipeline = bare_pipeline(engine)
    others: dict[str, Callable[[], object]] = {
        "one at a time": lambda: one_after_another(partial(engine.static_batch, key, 1), EQUAL),
        "static batch": lambda: engine.static_batch(key, EQUAL),
        "pipeline, one at a time": lambda: [pipeline(key, 1) for _ in range(EQUAL)],
        "pipeline, one batch": lambda: pipeline(key, EQUAL),
    }
    loop_s: list[float] = []
    beside_steps_s: list[float] = []
    decodes: list[tuple[float, float]] = []
    seconds: dict[str, list[float]] = {way: [] for way in others}
    gains = []
    for _ in range(repeats):
        gains.append(apart(lambda: model_gain(engine)))
        decodes.append(apart(lambda: decode_both_ways(engine, key)))
        loop_s.append(through_the_loop())
        beside_steps_s.append(through_the_loop(beside_steps=True))
        for way, run in others.items():
            seconds[way].append(apart(partial(timed, run)))
    per_s = {
        way: EQUAL / statistics.median(s)
        for way, s in {
            "denoising loop": loop_s,
            "denoising loop, decoding beside": beside_steps_s,
            **seconds,
        }.items()
    }

    def gain_over(way: str) -> float:
        return statistics.median(b / a for a, b in zip(loop_s, seconds[way], strict=True))

    return {
        "images": EQUAL,
        "steps": steps,
        "images_per_s": per_s,
        "decode_one_by_one_s": statistics.median(one_by_one for one_by_one, _ in decodes),
        "decode_together_s": statistics.median(together for _, together in decodes),
        "throughput_vs_one_at_a_time": gain_over("one at a time"),
        "throughput_vs_static_batching": gain_over("static batch"),
        "throughput_vs_pipeline": gain_over("pipeline, one at a time"),
        "model_batching_gain": statistics.median(gains),
        "loop_overhead_fraction": statistics.median(overheads),
    }


def model_gain(engine: Engine) -> float:
    """The transformer's rows/s with 8 images ÷ its rows/s with one image.

    The steps of both take turns.
    """
    one, all_ = ([engine.begin((128, 2, 100), s) for s in range(n)] for n in (1, EQUAL))
    pairs = [
        (
            timed(lambda: engine.denoiser.denoise_step(one)),
            timed(lambda: engine.denoiser.denoise_step(all_)),
        )
        for _ in range(7)
    ]
    alone_s = statistics.median(alone for alone, _ in pairs)
    together_s = statistics.median(together for _, together in pairs)
    return EQUAL * alone_s / together_s


def decode_both_ways(engine: Engine, key: Key) -> tuple[float, float]:
    """Seconds to decode 8 images one by one, like the loop, and in one call of the VAE."""
    latents = [engine.begin(key, seed).latents for seed in range(EQUAL)]
    together = torch.cat(latents)
    engine.denoiser.decode(together)
    return (
        timed(lambda: [engine.denoiser.decode(one) for one in latents]),
        timed(lambda: engine.denoiser.decode(together)),
    )


# -- latency --------------------------------------------------------------------------------------


def mix(rng: random.Random, sizes: Sequence[int]) -> Key:
    """The key of an image with random size, guidance and steps, all equally likely."""
    return rng.choice(sizes), rng.choice((1, 2)), rng.choice(STEPS)


def own_time_s(costs: Costs) -> float:
    """Mean seconds of an image of the mix alone.

    One image at a time can serve 1 ÷ this many images per second.
    """
    return statistics.mean(
        costs.alone(RequestedImage(0, size, rows, steps))
        for size in costs.step_s
        for rows in (1, 2)
        for steps in STEPS
    )


def replay(costs: Costs, images: int) -> dict[str, Any]:
    """Slowdowns (latency ÷ time alone) of the mix at each load, for each way to serve it."""
    found: dict[str, Any] = {}
    for load in LOADS:
        rng = random.Random(int(100 * load))
        trace = poisson(
            rng, images, load / own_time_s(costs), partial(mix, rng, list(costs.step_s))
        )
        finished = {
            "between steps": between_steps(trace, costs, EQUAL, MAX_ROWS),
            "one at a time": one_at_a_time(trace, costs),
            "static batches": static_batches(trace, costs, EQUAL),
        }
        found[f"{load:g}"] = {way: summary(trace, f, costs) for way, f in finished.items()}
    return found


def summary(
    trace: Sequence[RequestedImage], finished: Sequence[float], costs: Costs
) -> dict[str, float]:
    """Percentiles of slowdowns and latencies."""
    ordered = slowdowns(trace, finished, costs)
    latencies = sorted(done - image.arrives_s for image, done in zip(trace, finished, strict=True))
    return {
        "slowdown_p50": percentile(ordered, 0.5),
        "slowdown_p99": percentile(ordered, 0.99),
        "latency_mean_s": statistics.mean(latencies),
        "latency_p99_s": percentile(latencies, 0.99),
    }


def real_cell(engine: Engine, costs: Costs, images: int, load: float) -> dict[str, Any]:
    """Run a trace of the mix in real time, replay it in virtual time, and compare both.

    The replay uses the mean step times of the real run, because a shared machine's speed drifts
    within minutes. In the result, `steps_over_measured` is these step times ÷ those of `costs`.
    `error_p50` and `error_p90` are relative errors of the work that was predicted for each image.
    """
    rng = random.Random(7)
    engine.steps.clear()
    trace = poisson(rng, images, load / own_time_s(costs), lambda: mix(rng, engine.sizes))
    loop = DenoisingLoop(engine.denoiser, MAX_ROWS)
    slots = threading.Semaphore(EQUAL)
    learned = LearnedCost(fitted(engine, costs))
    finished, errors = [0.0] * images, []
    began = time.perf_counter()

    def done(i: int, future: Future[GeneratedPixels]) -> None:
        finished[i] = time.perf_counter() - began
        slots.release()
        shape, busy_s = engine.shape(trace[i].key), future.result().busy_s
        errors.append(abs(learned.coefficients.work_s(shape) - busy_s) / busy_s)
        learned.observe(shape, busy_s)

    for i, image in enumerate(trace):
        time.sleep(max(0.0, image.arrives_s - (time.perf_counter() - began)))
        slots.acquire()
        future = loop.generate(engine.request(image.key, i), engine.embeds(image.rows))
        future.add_done_callback(partial(done, i))
    while not all(finished):
        time.sleep(0.01)
    loop.close()
    took_s = sum(seconds for _, _, seconds in engine.steps)
    measured_s = sum(costs.step(size, rows) for size, rows, _ in engine.steps)
    costs = in_stream(engine, costs)
    replayed = between_steps(trace, costs, EQUAL, MAX_ROWS)
    real, virtual = summary(trace, finished, costs), summary(trace, replayed, costs)
    errors.sort()
    return {
        "load": load,
        "images": images,
        "real": real,
        "replayed": virtual,
        "real_over_replayed": real["latency_mean_s"] / virtual["latency_mean_s"],
        "steps_over_measured": took_s / measured_s,
        "error_p50": percentile(errors, 0.5),
        "error_p90": percentile(errors, 0.9),
    }


def foretold(engine: Engine, costs: Costs, images: int) -> dict[str, float]:
    """Relative errors of the work that the fitted coefficients predict for images alone."""
    rng, coefficients = random.Random(11), fitted(engine, costs)
    errors = []
    for _ in range(images):
        key = mix(rng, engine.sizes)
        took_s = timed(partial(engine.static_batch, key, 1))
        errors.append(abs(coefficients.work_s(engine.shape(key)) - took_s) / took_s)
    errors.sort()
    return {"error_p50": percentile(errors, 0.5), "error_p90": percentile(errors, 0.9)}


# -- memory ---------------------------------------------------------------------------------------


def memory(engine: Engine, images: int) -> dict[str, float]:
    """Resident MiB after the first 100 and after all images of a mixed stream of small images."""
    rng, process = random.Random(3), psutil.Process()
    loop, after = DenoisingLoop(engine.denoiser, MAX_ROWS), {}
    for first in range(0, images, 20):
        keys = [
            (rng.choice((64, 80, 96)), rng.choice((1, 2)), rng.choice((1, 2, 3))) for _ in range(20)
        ]
        futures = [
            loop.generate(engine.request(key, first + i), engine.embeds(key[1]))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="fp8", choices=["fp8", "bf16", "fp32"])
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats and steps: less than 4 minutes"
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    engine = apart(lambda: Engine.demo(arguments.recipe))
    costs = apart(lambda: measure_costs(engine, repeats=7 if quick else 15))
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "recipe": arguments.recipe,
        "step_s": costs.step_s,
        "decode_s": costs.decode_s,
        "coefficients": fitted(engine, costs)._asdict(),
        "throughput": throughput(engine, steps=10 if quick else 28, repeats=3 if quick else 7),
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
