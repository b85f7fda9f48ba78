"""The floor of a step on an H100, against figures worked out elsewhere."""

import pytest

from bench.gpu.floor import PUBLISHED_H100, floor_s, flops
from cluster.structure import structure


@pytest.mark.parametrize(("fp8", "linear_tflop_s"), [(True, 1100), (False, 800)])
def test_milliseconds_of_large_at_1024_with_guidance(fp8: bool, linear_tflop_s: float) -> None:
    """47.7 TFLOP in linear layers, 14.5 TFLOP in attention, an eighth of AdaLN's 5.4 GB."""
    floor = floor_s(structure("sd3.5-large"), 2, 1024, 333, PUBLISHED_H100, fp8=fp8)
    ms = 47_700 / linear_tflop_s + 14_500 / 408 + 5_400 / 8 / 3_350
    assert 1e3 * floor == pytest.approx(ms, rel=0.005)


@pytest.mark.parametrize(("model", "tflop"), [("sd3.5-large", 62.2), ("sd3.5-medium", 22.5)])
def test_operations_of_a_step(model: str, tflop: float) -> None:
    assert sum(flops(structure(model), 2, 1024, 333)) / 1e12 == pytest.approx(tflop, rel=0.005)
