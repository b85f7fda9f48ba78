"""Distances between images, against values that are known or computed in another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from serve.quality.metrics import MOST_PSNR_DB, Spread, distance, psnr_db

NOISE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
SMOOTH = np.repeat(np.linspace(40, 200, 96, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)


def test_equal_pictures_have_no_distance() -> None:
    found = distance(NOISE, NOISE.copy(), tiles=2)
    assert found.ssim == pytest.approx(1.0)
    assert found.psnr_db == MOST_PSNR_DB


def test_psnr_of_a_known_error() -> None:
    assert psnr_db(SMOOTH, SMOOTH + 16) == pytest.approx(20 * np.log10(255 / 16))


def test_ssim_follows_its_definition() -> None:
    """Computed here from the formula with scipy's Gaussian, cut off at 11 × 11."""
    other = (SMOOTH + np.random.default_rng(1).normal(0, 12, SMOOTH.shape)).clip(0, 255)
    other = other.astype(np.uint8)

    def window(values: Any) -> Any:
        return gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5, mode="reflect")

    a, b = SMOOTH.astype(float), other.astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a**2, window(b * b) - mean_b**2
    both = window(a * b) - mean_a * mean_b
    ssim = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    ssim /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    expected = ssim[5:-5, 5:-5].mean()
    assert 0.2 < expected < 0.9
    assert distance(SMOOTH, other).ssim == pytest.approx(expected, abs=1e-6)


def test_the_worst_tile_is_where_the_pictures_differ() -> None:
    other = SMOOTH.copy()
    other[40:60, 66:90] = 255 - other[40:60, 66:90]
    worst, second = distance(SMOOTH, other, tiles=2).worst_tiles
    assert (worst.x, worst.y) == (64, 32)
    assert worst.ssim < second.ssim


def test_pictures_of_different_sizes_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same dimensions"):
        distance(NOISE, NOISE[:, :64])


def test_a_spread_shows_the_bad_end() -> None:
    found = Spread.of([0.5, *[0.9] * 9, *[0.99] * 10])
    assert found.median == pytest.approx(0.945)
    assert found.least == 0.5
    assert found.least < found.p5 < 0.9
