"""Embeddings of prompts, which go from the text encoders to the denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """The embeddings of one or more prompts.

    `tokens`: (prompts, text length, joint width). `pooled`: (prompts, pooled width).
    """

    tokens: torch.Tensor
    pooled: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.pooled.nbytes
