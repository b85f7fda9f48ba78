"""AdaLN's modulation of several steps at a time.

Each block of the transformer scales and shifts its inputs by numbers that depend only on the step
and on the pooled text embedding: its *modulation*. These linear layers do little arithmetic on
large weights. Computed in each step, they read 5.4 GB of weights in SD3.5 Large, and if the weights
are stored in 8 bit they write them to memory in 16 bit first. So here an image's modulation is
computed for `STEPS` steps at a time, and the blocks only take their part of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    SD35AdaLayerNormZeroX,
)
from torch import nn

STEPS = 8  # whose modulation is computed at a time; SD3.5 Large then keeps 35 MB for each image
NORMS = AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX


class Modulation(nn.Module):
    """The layers of a transformer that compute its modulation, taken out of it.

    Afterwards the transformer expects rows of this module's output as its `pooled_projections`, and
    no `timestep`.
    """

    def __init__(self, transformer: Any) -> None:
        """Take the layers out of `transformer`, in place."""
        super().__init__()
        self._embed = transformer.time_text_embed
        transformer.time_text_embed = _PassOn()
        linears, offset = [], 0
        for norm in transformer.modules():
            if isinstance(norm, NORMS):
                size = len(norm.linear.weight)
                linears.append(norm.linear)
                norm.silu, norm.linear = nn.Identity(), _Part(offset, size)
                offset += size
        self._linears = nn.ModuleList(linears)

    def forward(self, timesteps: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The modulation of n pairs of a timestep (n,) and a pooled embedding (n, pooled width).

        Returns (n, modulation width) in the dtype of `pooled`.
        """
        embedded = F.silu(self._embed(timesteps, pooled))
        return torch.cat([linear(embedded) for linear in self._linears], dim=-1)


class _PassOn(nn.Module):
    """Stands for the transformer's embedding of time and text: passes the modulation on."""

    def forward(self, _: None, modulation: torch.Tensor) -> torch.Tensor:
        return modulation


class _Part(nn.Module):
    """Stands for the linear layer of one norm: takes its part of the modulation."""

    def __init__(self, offset: int, size: int) -> None:
        super().__init__()
        self._offset, self._size = offset, size

    def forward(self, modulation: torch.Tensor) -> torch.Tensor:
        return modulation.narrow(-1, self._offset, self._size)
