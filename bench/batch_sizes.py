"""Compare rules for the size of a batch, by replay on published step times: 10 seconds.

    python -m bench.batch_sizes

A card gains little from batches of large images, and much from batches of small ones. On an H200,
SD3.5 does 1.02 × as many rows per second in batches as alone at 1024², and at 512² 2.8 × in batches
of 4 images and 3.1 × in batches of 8 (github.com/sgl-project/sglang, pull request 22183). The step
times here have these ratios. Only ratios of the latencies mean anything.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from serve.engine.denoising_loop import bucket

from .replay import Costs, RequestedImage, between_steps, percentile, poisson

# Seconds of a step by rows, in units of a step of one image with guidance (two rows).
STEP_S = {
    1024: {1: 0.51, 2: 1.0, 4: 1.98, 8: 3.93, 16: 7.84},
    512: {1: 0.9, 2: 1.0, 4: 1.25, 8: 1.43, 16: 2.58},
}
IMAGES, SEEDS, LOAD = 1500, 3, 0.8
STEPS = 20, 28, 28, 40


def exact(rows: int) -> int:
    """No padding: code for every number of rows."""
    return rows


def every_row(step_s: dict[int, float]) -> Costs:
    """Costs with a time for every number of rows, interpolated."""
    coarse = Costs({0: step_s}, {}, bucket)
    return Costs({0: {rows: coarse.step(0, rows) for rows in range(1, 17)}}, {0: 0.5}, exact)


def mean_and_p99(
    trace: Sequence[Sequence[RequestedImage]], costs: Costs, slots: int, most: int, *, all_: bool
) -> tuple[float, float]:
    """The mean and p99 latency of the images of several traces."""
    latencies = sorted(
        done - image.arrives_s
        for images in trace
        for image, done in zip(
            images, between_steps(images, costs, slots, most, all_that_fit=all_), strict=True
        )
    )
    return statistics.mean(latencies), percentile(latencies, 0.99)


def traces(step_s: dict[int, float], slots: int) -> list[list[RequestedImage]]:
    """Poisson traces at `LOAD` of the rate that the best batches can serve."""
    most_rows_per_s = max(rows / s for rows, s in step_s.items() if rows <= 2 * slots)
    per_s = LOAD * most_rows_per_s / 2 / statistics.mean(STEPS)

    def trace(seed: int) -> list[RequestedImage]:
        rng = random.Random(seed)
        return poisson(rng, IMAGES, per_s, lambda: (0, 2, rng.choice(STEPS)))

    return [trace(seed) for seed in range(SEEDS)]


def main() -> None:
    print(f"Load {LOAD:.0%}; mean and p99 latency ÷ those of batches as large as possible\n")
    print("| size | slots | no padding | at most 4 rows | Octet |\n|---|---|---|---|---|")
    for side, step_s in STEP_S.items():
        padded = Costs({0: step_s}, {0: 0.5}, bucket)
        for slots in (4, 8):
            found = traces(step_s, slots)
            base = mean_and_p99(found, padded, slots, 2 * slots, all_=True)
            others = (
                mean_and_p99(found, every_row(step_s), slots, 2 * slots, all_=True),
                mean_and_p99(found, padded, slots, 4, all_=True),
                mean_and_p99(found, padded, slots, 2 * slots, all_=False),
            )
            cells = [f"{m / base[0]:.2f}, {p / base[1]:.2f}" for m, p in others]
            print(f"| {side}² | {slots} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
