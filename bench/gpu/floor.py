"""The least time that a denoising step can take on a card, from its floating-point operations.

The operations of SD3.5's transformer are counted exactly, for text and image tokens separately;
`cluster.cost` uses simpler sums. AdaLN's layers do little arithmetic on large weights, so they
count by the time to read the weights, once in `MODULATED_STEPS` steps.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.footprint import MODULATED_STEPS, adaln_outs
from cluster.structure import TOKEN_PX, Structure


class MeasuredRates(NamedTuple):
    """Rates of a card: operations per second in 16 bit and FP8, and bytes read per second.

    `attention`: operations per second of attention with heads of width 64, by the fastest kernel.
    Such narrow heads reach far less than large matrix products.
    """

    bf16: float
    fp8: float
    bandwidth: float
    attention: float


# Published for the H100 SXM: matrix products of random numbers in bf16; cuDNN's attention (Shah et
# al. 2024, FlashAttention-3, for heads of width 64); the memory's datasheet. 1,100 TFLOP/s in FP8
# is an estimate.
PUBLISHED_H100 = MeasuredRates(800e12, 1100e12, 3.35e12, 408e12)


def flops(s: Structure, rows: int, side_px: int, text_tokens: int) -> tuple[float, float]:
    """Floating-point operations of one step: those of the linear layers, and those of attention.

    `s`: the structure of the transformer. `rows`: its samples in the step. `side_px`: the side of
    the square images.
    """
    image, text, d = (side_px // TOKEN_PX) ** 2, text_tokens, s.width
    linear = (
        d
        * d
        * (
            24 * s.layers * image
            + 24 * (s.layers - 1) * text
            + 6 * text
            + 8 * s.dual_layers * image
        )
    )
    attention = 4 * d * (s.layers * (image + text) ** 2 + s.dual_layers * image**2)
    return float(rows * linear), float(rows * attention)


def floor_s(
    s: Structure,
    rows: int,
    side_px: int,
    text_tokens: int,
    rates: MeasuredRates,
    *,
    fp8: bool,
    adaln_bytes: int = 2,
) -> float:
    """The least seconds that a step can take; the arguments are those of `flops`.

    This is the sum of three times: the linear layers (in FP8 or 16 bit), attention, and reading
    AdaLN's weights. `adaln_bytes`: bytes of one of AdaLN's weights.
    """
    linear, attention = flops(s, rows, side_px, text_tokens)
    adaln_weights = s.width * adaln_outs(s) / MODULATED_STEPS
    return (
        linear / (rates.fp8 if fp8 else rates.bf16)
        + attention / rates.attention
        + adaln_bytes * adaln_weights / rates.bandwidth
    )
