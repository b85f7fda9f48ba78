"""Measure how long image files of 1024² px take to encode, and how large they are.

    python -m bench.image_files

The picture is a photograph-like one: a landscape of the demo model, enlarged, with the grain that
generated images have at full size. Prints a table.
"""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

SAMPLES = Path(__file__).parents[1] / "docs" / "samples.png"
SIDE_PX = 1024
GRAIN = 0.7  # standard deviation of the noise, in steps of 1/255
FORMATS: dict[str, dict[str, Any]] = {
    **{f"PNG, zlib level {n}": {"format": "png", "compress_level": n} for n in (1, 3, 6, 9)},
    "JPEG, quality 95": {"format": "jpeg", "quality": 95},
    "WebP, quality 90": {"format": "webp", "quality": 90},
}


def picture() -> Image.Image:
    """A landscape of SIDE_PX² px with grain."""
    samples = Image.open(SAMPLES).convert("RGB")
    side = min(samples.size) // 2
    enlarged = samples.crop((0, 0, side, side)).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, GRAIN, (SIDE_PX, SIDE_PX, 3))
    return Image.fromarray((np.asarray(enlarged) + noise).round().clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def seconds(image: Image.Image, options: dict[str, Any], threads: int) -> float:
    """Seconds per image if `threads` threads encode two images each."""
    copies = [image.copy() for _ in range(2 * threads)]  # Pillow saves an image in one thread only
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(lambda copy: encoded(copy, options), copies))
        return (time.perf_counter() - began) / (2 * threads)


def main() -> None:
    image = picture()
    print("| 1024² px | ms | ms per image, 2 threads | KiB |\n|---|---|---|---|")
    for name, options in FORMATS.items():
        one, two = (median(seconds(image, options, t) for _ in range(3)) for t in (1, 2))
        size = len(encoded(image, options)) / 1024
        print(f"| {name} | {1000 * one:.0f} | {1000 * two:.0f} | {size:.0f} |")


if __name__ == "__main__":
    main()
