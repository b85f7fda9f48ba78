"""Measure what edits cost the generations beside them.

    python -m bench.edits [--recipe fp8] [--quick]      # 3 minutes, with --quick 1

Step and VAE times of the demo model are measured first. Then two streams are replayed in virtual
time (see `bench.replay`), each at 80 % of what one image at a time can serve: generations alone,
and the same with `EDITS` edits in a hundred. Each stream is replayed with several seeds. Finally
the stream with edits runs in real time through the denoising loop, to compare it with its replay.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import numpy as np

from cluster.cost import ENCODE_COST
from serve.edit_pixels import EditPixels
from serve.engine.denoising_loop import DenoisingLoop, GeneratedPixels
from serve.request import Edit

from .demo_engine import MAX_ROWS, Engine, apart, in_stream, measure_costs, timed
from .engine import EQUAL, STEPS
from .replay import Costs, RequestedImage, between_steps, percentile, poisson, slowdowns

LOAD = 0.8
EDITS = 30  # in a hundred images
STRENGTHS = 0.3, 0.6, 1.0

Mix = Callable[[random.Random], tuple[int, int, int, bool]]


def generation(sizes: Sequence[int], rng: random.Random) -> tuple[int, int, int, bool]:
    """Size in px, rows and steps of an image, all equally likely."""
    return rng.choice(sizes), rng.choice((1, 2)), rng.choice(STEPS), False


def mixed(sizes: Sequence[int], rng: random.Random) -> tuple[int, int, int, bool]:
    """A `generation`, or in `EDITS` of 100 cases an edit with one of `STRENGTHS`."""
    size_px, rows, steps, _ = generation(sizes, rng)
    if rng.randrange(100) >= EDITS:
        return size_px, rows, steps, False
    return size_px, rows, max(1, round(steps * rng.choice(STRENGTHS))), True


def trace_of(mix: Mix, costs: Costs, images: int, seed: int) -> list[RequestedImage]:
    """A stream of a mix at `LOAD` of what one image at a time can serve."""
    rng = random.Random(0)
    alone_s = statistics.mean(costs.alone(RequestedImage(0, *mix(rng))) for _ in range(5000))
    rng = random.Random(seed)
    return poisson(rng, images, LOAD / alone_s, partial(mix, rng))


def tails(mix: Mix, costs: Costs, images: int, seed: int) -> dict[str, float]:
    """Percentiles of latency ÷ time alone: of all images, and of the generations among them."""
    trace = trace_of(mix, costs, images, seed)
    finished = between_steps(trace, costs, EQUAL, MAX_ROWS)
    everything = slowdowns(trace, finished, costs)
    kept = [i for i, image in enumerate(trace) if not image.edit]
    generations = slowdowns([trace[i] for i in kept], [finished[i] for i in kept], costs)
    return {
        "p50": percentile(everything, 0.5),
        "p99": percentile(everything, 0.99),
        "generations_p99": percentile(generations, 0.99),
    }


def picture(size_px: int) -> EditPixels:
    """A picture, and a mask that is transparent in its upper half."""
    rng = np.random.default_rng(0)
    kept = np.full((size_px, size_px), 255, np.uint8)
    kept[: size_px // 2] = 0
    return EditPixels(rng.integers(0, 256, (size_px, size_px, 3), np.uint8), kept)


def with_encodes(engine: Engine, costs: Costs, repeats: int) -> Costs:
    """The costs with the median seconds of encoding a picture of each size."""
    encode_s = {}
    for size in engine.sizes:
        encode = partial(engine.denoiser.encode, picture(size), 0)
        encode()
        encode_s[size] = statistics.median(timed(encode) for _ in range(repeats))
    return replace(costs, encode_s=encode_s)


def in_real_time(engine: Engine, costs: Costs, images: int) -> tuple[float, float]:
    """Mean latency of the mixed stream through the loop ÷ in its replay, and the real p99.

    The replay uses the mean step times of the real run, because a shared machine's speed drifts.
    """
    trace = trace_of(partial(mixed, engine.sizes), costs, images, seed=7)
    loop, slots = DenoisingLoop(engine.denoiser, MAX_ROWS), threading.Semaphore(EQUAL)
    finished = [0.0] * images
    engine.steps.clear()
    began = time.perf_counter()

    def done(i: int, _: Future[GeneratedPixels]) -> None:
        finished[i] = time.perf_counter() - began
        slots.release()

    for i, image in enumerate(trace):
        time.sleep(max(0.0, image.arrives_s - (time.perf_counter() - began)))
        slots.acquire()
        request, edited = engine.request(image.key, i), None
        if image.edit:  # strength 0.5 of twice the steps: `image.steps` of them run
            edit = Edit(strength=0.5, image_sha256="", mask_sha256="")
            request = replace(request, num_inference_steps=2 * image.steps, edit=edit)
            edited = picture(image.size_px)
        future = loop.generate(request, engine.embeds(image.rows), edited=edited)
        future.add_done_callback(partial(done, i))
    while not all(finished):
        time.sleep(0.01)
    loop.close()
    costs = in_stream(engine, costs)
    replayed = between_steps(trace, costs, EQUAL, MAX_ROWS)

    def mean_s(ends: Sequence[float]) -> float:
        return statistics.mean(e - image.arrives_s for e, image in zip(ends, trace, strict=True))

    real = slowdowns(trace, finished, costs)
    return mean_s(finished) / mean_s(replayed), percentile(real, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="fp8", choices=["fp8", "bf16", "fp32"])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and images")
    arguments = parser.parse_args()
    quick = arguments.quick
    engine = apart(lambda: Engine.demo(arguments.recipe))
    measured = apart(lambda: measure_costs(engine, repeats=5 if quick else 15))
    costs = apart(lambda: with_encodes(engine, measured, repeats=5 if quick else 15))
    print(f"| size | encode s | decode s | encode ÷ decode (in prices: {ENCODE_COST}) |")
    print("|---|---|---|---|")
    for size in engine.sizes:
        encode_s, decode_s = costs.encode_s[size], costs.decode_s[size]
        print(f"| {size} | {encode_s:.4f} | {decode_s:.4f} | {encode_s / decode_s:.2f} |")
    mixes: dict[str, Mix] = {
        "generations alone": partial(generation, engine.sizes),
        f"{EDITS} % edits": partial(mixed, engine.sizes),
    }
    seeds = range(3 if quick else 15)
    print("\n| at 80 % load | p50 slowdown | p99 slowdown | p99 of the generations |")
    print("|---|---|---|---|")
    p99s = {}
    for name, mix in mixes.items():
        cells = [tails(mix, costs, 4000, seed) for seed in seeds]
        median = {key: statistics.median(cell[key] for cell in cells) for key in cells[0]}
        p99s[name] = median["p99"]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in median.values()) + " |")
    before, after = p99s.values()
    print(f"\np99 slowdown with edits ÷ without: {after / before:.3f}")
    ratio, p99 = in_real_time(engine, costs, images=40 if quick else 200)
    print(f"real ÷ replayed mean latency with edits: {ratio:.3f}; real p99 slowdown {p99:.1f}")


if __name__ == "__main__":
    main()
