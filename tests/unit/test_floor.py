"""The floor of a step on an H100's nominal rates, against figures worked out elsewhere."""

import pytest

from bench.gpu.floor import NOMINAL_H100, floor_s, flops
from cluster.structure import structure


@pytest.mark.parametrize(
    ("model", "fp8", "ms"),
    [
        ("sd3.5-large", False, 79.4),
        ("sd3.5-large", True, 49.6),
        ("sd3.5-medium", False, 28.6),
        ("sd3.5-medium", True, 19.8),
    ],
)
def test_milliseconds_at_1024_with_guidance(model: str, fp8: bool, ms: float) -> None:
    floor = floor_s(structure(model), 2, 1024, 333, NOMINAL_H100, fp8=fp8)
    assert 1e3 * floor == pytest.approx(ms, rel=0.01)


@pytest.mark.parametrize(("model", "tflop"), [("sd3.5-large", 62.2), ("sd3.5-medium", 22.5)])
def test_operations_of_a_step(model: str, tflop: float) -> None:
    assert sum(flops(structure(model), 2, 1024, 333)) / 1e12 == pytest.approx(tflop, rel=0.005)
