"""The least time that a step can take on a card, from its floating-point operations.

Counts those of SD3.5's transformer exactly, text and image tokens apart; `serve.cost` estimates
with simpler sums. AdaLN's weights are read for few rows of work, so they count by bandwidth.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.structure import TOKEN_PX, Structure


class CardRates(NamedTuple):
    """Floating-point operations a second, and bytes a second."""

    bf16: float
    fp8: float
    bandwidth: float


NOMINAL_H100 = CardRates(800e12, 1600e12, 3.35e12)


def flops(s: Structure, rows: int, side_px: int, text_tokens: int) -> tuple[float, float]:
    """Of the linear layers and of attention, in one step."""
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
    rates: CardRates,
    *,
    fp8: bool,
    adaln_bytes: int = 2,
) -> float:
    """Seconds of a step: linears in FP8 or 16 bit, attention in 16 bit, AdaLN's weights read.

    `adaln_bytes`: of each of those weights.
    """
    linear, attention = flops(s, rows, side_px, text_tokens)
    d = s.width
    adaln_weights = d * d * (12 * s.layers + 3 * s.dual_layers - 4)
    return (
        linear / (rates.fp8 if fp8 else rates.bf16)
        + attention / rates.bf16
        + adaln_bytes * adaln_weights / rates.bandwidth
    )
