"""Predicted costs of images: computed from their shape and corrected by measured times."""

import random
import statistics
from dataclasses import replace

import pytest

from cluster.cards import CARDS
from cluster.cost import (
    MAX_FACTOR,
    CostCoefficients,
    ImageShape,
    LearnedCost,
    estimated,
    rates,
    reference,
)
from cluster.structure import structure

LARGE, H100 = structure("sd3.5-large"), CARDS["h100"]
MEGAPIXEL = ImageShape(width_px=1024, height_px=1024, text_tokens=333, rows=2, steps=28)
TRUE = CostCoefficients(constant=0.02, step=0.004, token=3e-5, token2=2e-8, pixel=1e-6)


def some_shape(rng: random.Random) -> ImageShape:
    side = rng.choice([64, 128, 192, 256])
    steps, rows = rng.choice([4, 8, 20, 28, 50]), rng.choice([1, 2])
    return ImageShape(width_px=side, height_px=side, text_tokens=64, rows=rows, steps=steps)


def errors(learned: LearnedCost, rng: random.Random, images: int = 200) -> list[float]:
    """Sorted relative errors of predictions for images that were not observed."""
    shapes = [some_shape(rng) for _ in range(images)]
    return sorted(
        abs(learned.coefficients.work_s(s) - TRUE.work_s(s)) / TRUE.work_s(s) for s in shapes
    )


def test_the_estimate_agrees_with_the_floor_of_a_known_card() -> None:
    """A step of SD3.5 Large with guidance needs 62.2 TFLOP, and an H100 reaches 800 TFLOP/s.

    The estimate counts text tokens as image tokens, reaches half of the peak, and adds the VAE.
    """
    work_s = estimated(LARGE, rates("bf16", H100)).work_s(MEGAPIXEL)
    assert work_s == pytest.approx(2 * 28 * 62.2e12 / 800e12, rel=0.05)


def test_fp8_halves_the_linears_alone() -> None:
    fp8, bf16 = (reference(LARGE, name, H100) for name in ("fp8", "bf16"))
    assert fp8.token == bf16.token / 2
    assert fp8.token2 == bf16.token2


def test_a_card_without_fp8_has_one_rate() -> None:
    assert rates("fp8", CARDS["a100-80"]) == rates("bf16", CARDS["a100-80"])


def test_guidance_steps_and_size_all_count() -> None:
    base = TRUE.work_s(MEGAPIXEL)
    for less in (
        replace(MEGAPIXEL, rows=1),
        replace(MEGAPIXEL, steps=27),
        replace(MEGAPIXEL, width_px=1008),
        replace(MEGAPIXEL, text_tokens=77),
    ):
        assert TRUE.work_s(less) < base


@pytest.mark.parametrize("off", [0.3, 3.0])
def test_a_wrong_reference_is_corrected(off: float) -> None:
    rng = random.Random(1)
    learned = LearnedCost(CostCoefficients(*(off * c * rng.uniform(0.5, 2) for c in TRUE)))
    before = statistics.median(errors(learned, rng))
    for _ in range(300):
        shape = some_shape(rng)
        learned.observe(shape, TRUE.work_s(shape) * rng.gauss(1, 0.05))
    after = errors(learned, rng)
    assert before > 0.3
    assert statistics.median(after) < 0.05
    assert after[180] < 0.2


def test_an_outlier_changes_little_and_is_forgotten() -> None:
    learned, rng = LearnedCost(TRUE), random.Random(2)
    learned.observe(MEGAPIXEL, 1000 * TRUE.work_s(MEGAPIXEL))
    assert learned.coefficients.work_s(MEGAPIXEL) < 1.5 * TRUE.work_s(MEGAPIXEL)
    assert learned.speed == pytest.approx(0.5)
    for _ in range(100):
        shape = some_shape(rng)
        learned.observe(shape, TRUE.work_s(shape))
    assert statistics.median(errors(learned, rng)) < 0.05


def test_factors_are_bounded() -> None:
    learned = LearnedCost(TRUE)
    for _ in range(1000):
        learned.observe(MEGAPIXEL, 1e6)
    assert all(c <= MAX_FACTOR * t * 1.001 for c, t in zip(learned.coefficients, TRUE, strict=True))
    for _ in range(1000):
        learned.observe(MEGAPIXEL, 0.0)
    assert all(c >= t / MAX_FACTOR * 0.999 for c, t in zip(learned.coefficients, TRUE, strict=True))


def test_speed_is_work_over_time() -> None:
    learned = LearnedCost(TRUE)
    assert learned.speed == 1
    for _ in range(40):
        learned.observe(MEGAPIXEL, TRUE.work_s(MEGAPIXEL) / 2)
    assert learned.speed == pytest.approx(2, rel=0.01)


def test_speed_is_reported_in_another_unit_and_predicted_from_a_typical_image() -> None:
    unit = CostCoefficients(*(2 * c for c in TRUE))
    learned = LearnedCost(TRUE, unit, MEGAPIXEL)
    assert learned.speed == pytest.approx(2)
    for _ in range(20):
        learned.observe(MEGAPIXEL, TRUE.work_s(MEGAPIXEL) / 3)
    assert learned.speed == pytest.approx(6, rel=0.1)
    assert LearnedCost(TRUE).speed == 1
