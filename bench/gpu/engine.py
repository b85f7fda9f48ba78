"""Measure the denoising loop on a card, and the coefficients that `cluster.cost` needs of it.

    python -m bench.gpu.engine [--model sd3.5-medium] [--out FOLDER]   # --tiny: on a CPU too

The model has its exact structure and random weights, in compiled FP8. First the throughput of 8
equal images is measured: through the loop, decoding at the same time as the steps or between them,
one at a time, and in one static batch. Then a stream of images of mixed sizes, guidance and steps
runs in real time, at 80 % of the rate that one image at a time can serve.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from cluster.structure import TOKEN_PX, TRANSFORMERS
from serve.engine.compiled import prefer_attention, preferred
from serve.engine.denoising_loop import BUCKETS, DenoisingLoop

from ..demo_engine import MAX_ROWS, Engine, fitted, measure_costs, one_after_another, timed
from ..engine import EQUAL, foretold, real_cell
from ..replay import Key
from .model import FP8, FP8_EAGER, RESULTS, Bench, save
from .steps import attention_s

REPEATS = 3


def through_the_loop(engine: Engine, key: Key, beside_steps: bool) -> float:
    """Seconds that the denoising loop takes for `EQUAL` images that are requested at once.

    `beside_steps`: whether images are decoded at the same time as the steps, or between them.
    """
    loop = DenoisingLoop(engine.denoiser, MAX_ROWS, beside_steps=beside_steps)

    def generate() -> None:
        futures = [
            loop.generate(engine.request(key, seed), engine.embeds(2)) for seed in range(EQUAL)
        ]
        for future in futures:
            future.result()

    generate()
    seconds = statistics.median(timed(generate) for _ in range(REPEATS))
    loop.close()
    return seconds


def throughput(engine: Engine, steps: int) -> dict[str, float]:
    """Images/s of equal images for each way to run them, after a round that does not count."""
    key = engine.sizes[-1], 2, steps
    engine.static_batch(key, EQUAL)
    engine.static_batch(key, 1)
    seconds = {
        "loop, decoding beside": through_the_loop(engine, key, beside_steps=True),
        "loop, decoding between": through_the_loop(engine, key, beside_steps=False),
        "static batch": statistics.median(
            timed(lambda: engine.static_batch(key, EQUAL)) for _ in range(REPEATS)
        ),
        "one at a time": timed(
            lambda: one_after_another(partial(engine.static_batch, key, 1), EQUAL)
        ),
    }
    return {way: EQUAL / s for way, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sd3.5-medium", choices=[*TRANSFORMERS])
    parser.add_argument("--images", type=int, default=60, help="images of the stream")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    arguments = parser.parse_args()
    bench = Bench.here(arguments.tiny)
    sizes = (32, 64) if arguments.tiny else (512, 768, 1024)
    attention = attention_s(bench, arguments.model)
    prefer_attention(preferred(attention))
    way = FP8_EAGER if arguments.tiny else FP8  # compiling gains nothing on a CPU
    # Like a replica: code for the exact shape of the model's own size, flexible code for the
    # others.
    warm = {(rows, (sizes[-1] // TOKEN_PX) ** 2) for rows in BUCKETS}
    engine = Engine(bench.denoiser(arguments.model, way, warm), bench.embeds(2), sizes)
    costs = measure_costs(engine, repeats=5)
    found: dict[str, Any] = {
        "machine": bench.machine(),
        "model": arguments.model,
        "runs": way.name,
        "attention_s": attention,
        "step_s": costs.step_s,
        "decode_s": costs.decode_s,
        "coefficients": fitted(engine, costs)._asdict(),
        "images_per_s": throughput(engine, steps=2 if arguments.tiny else 20),
        "work_alone": foretold(engine, costs, images=3 if arguments.tiny else 20),
        "stream": real_cell(engine, costs, images=arguments.images, load=0.8),
    }
    save(arguments.out, f"engine {arguments.model}", found)
    for key, value in found.items():
        if key not in ("step_s", "decode_s"):
            print(f"{key}: {value}")
    for size, by_rows in costs.step_s.items():
        ms = ", ".join(f"{rows} rows {1e3 * s:.1f}" for rows, s in by_rows.items())
        print(f"{size}²: ms per step at {ms}; decode {1e3 * costs.decode_s[size]:.1f} ms")


if __name__ == "__main__":
    main()
