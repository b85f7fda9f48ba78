"""Kernels that read a row of numbers once, instead of once for each thing that they compute of it.

Quantising a row needs its largest number first. torch by itself keeps rows of up to 1,024 numbers
in a kernel's registers. The rows of SD3.5 are longer, so its kernels would read each row twice,
compute GELU twice, and write the normalised row to memory in between. `python -m bench.gpu.kernels`
counts what the generated code reads and writes.
"""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V


class WholeRows(InductorChoices):
    """torch's choices of kernels, except that rows of up to `longest` numbers are read once."""

    def __init__(self, longest: int) -> None:
        self._longest = longest

    def should_use_persistent_reduction(  # type: ignore[override]  # torch's is a static method
        self, features: Any, cooperative_reduction: bool
    ) -> bool:
        """Return whether a reduction keeps its whole row in registers."""
        along_rows = features.get_reduction_hint() is ReductionHint.INNER
        short = V.graph.sizevars.statically_known_leq(features.reduction_numel, self._longest)
        if along_rows and short and not cooperative_reduction:
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def uuid(self) -> str:
        """Return the name of these choices, which becomes part of the key of kept code."""
        return f"whole rows up to {self._longest}"
