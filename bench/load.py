"""What only the measurements here need of load."""

from __future__ import annotations

from collections.abc import Sequence

STEP_S = 0.05  # of a Generator that only waits


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))
