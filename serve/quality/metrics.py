"""Distances between two images of the same prompt and seed.

Protocol: images are 8-bit sRGB of shape (height_px, width_px, 3), compared as they are, without
scaling or another colour space.

- SSIM (Wang et al. 2004) is the mean over the three channels, with the authors' window: a Gaussian
  of σ 1.5, cut off at 11 × 11 pixels, and the constants K1 = 0.01, K2 = 0.03 for the range 255.
- PSNR is in dB, from the mean squared error of all channels together, for the range 255.

Both come from scikit-image. Neither knows what an image shows: a shifted texture looks the same to
people and counts as different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

RANGE = 255
MOST_PSNR_DB = 120.0  # of equal images, so that means stay finite; one pixel of 2048² gives 114
TILE_PX = 32


class Tile(NamedTuple):
    """A square of `TILE_PX` pixels: its left upper corner in px, and its mean SSIM."""

    x: int
    y: int
    ssim: float


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two images are apart; `worst_tiles`: the least alike first."""

    ssim: float
    psnr_db: float
    worst_tiles: tuple[Tile, ...] = ()


def distance(reference: Pixels, tested: Pixels, tiles: int = 0) -> Distance:
    """Compare two images of the same size; find at most `tiles` worst tiles.

    Raises `ValueError` for images of different sizes or with a side under 11 px.
    """
    from skimage.metrics import structural_similarity

    found = structural_similarity(
        reference,
        tested,
        channel_axis=-1,
        data_range=RANGE,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=bool(tiles),
    )
    ssim, worst = (found[0], _worst(found[1], tiles)) if tiles else (found, ())
    return Distance(float(ssim), psnr_db(reference, tested), worst)


def psnr_db(reference: Pixels, tested: Pixels) -> float:
    """The peak signal-to-noise ratio in dB, at most `MOST_PSNR_DB`."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(reference, tested):
        return MOST_PSNR_DB
    return float(peak_signal_noise_ratio(reference, tested, data_range=RANGE))


def _worst(ssim_map: NDArray[np.float64], count: int) -> tuple[Tile, ...]:
    """The tiles with the lowest mean of a map (height_px, width_px, 3)."""
    height, width, _ = ssim_map.shape
    tiles = [
        Tile(x, y, float(ssim_map[y : y + TILE_PX, x : x + TILE_PX].mean()))
        for y in range(0, height, TILE_PX)
        for x in range(0, width, TILE_PX)
    ]
    return tuple(sorted(tiles, key=lambda tile: tile.ssim)[:count])


class Spread(NamedTuple):
    """The distribution of a metric over images; for all metrics here, higher is better."""

    median: float
    p5: float
    least: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The distribution of at least one value; `p5` is interpolated as numpy does."""
        return cls(float(np.median(values)), float(np.quantile(values, 0.05)), min(values))
